"""Adversarial losses and the gradient penalty: unreduced tensors of shape (N,)."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

Objective = Literal["cross-entropy", "relativistic"]


def discriminator_loss(objective: Objective, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the adversarial loss of the discriminator.

    Args:
        objective: `cross-entropy` (Goodfellow et al., arXiv 1406.2661, eq. 1) has target 1 for real
            and 0 for fake images; `relativistic` (Jolicoeur-Martineau, arXiv 1807.00734; R3GAN,
            arXiv 2501.05441, eq. 2) raises each real image above the fake one it is paired with.
        real_logits: (N,).
        fake_logits: (N,).

    Returns:
        (N,), non-negative.
    """
    if objective == "relativistic":
        return softplus(fake_logits - real_logits)
    return softplus(-real_logits) + softplus(fake_logits)  # -log D(x) - log(1 - D(G(z)))


def generator_loss(objective: Objective, real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the non-saturating loss of the generator; arguments as in `discriminator_loss`.

    Returns:
        (N,), non-negative.
    """
    if objective == "relativistic":
        return softplus(real_logits - fake_logits)
    return softplus(-fake_logits)  # -log D(G(z))


def mismatch_loss(logits: Tensor, mismatched_logits: Tensor) -> Tensor:
    """Return the matching-aware term: it penalises real images paired with a wrong label.

    The third kind of pair of Reed et al. (arXiv 1605.05396, algorithm 1), as a relativistic pair.

    Args:
        logits: (N,), of real images with their own labels.
        mismatched_logits: (N,), of the same images with other labels.

    Returns:
        (N,), non-negative.
    """
    return softplus(mismatched_logits - logits)


def image_gradients(images: Tensor, logits: Tensor) -> Tensor:
    """Return the gradient of each logit by its image; differentiable.

    Args:
        images: (N, C, H, W), requiring gradients.
        logits: (N,), computed from `images` without mixing samples.

    Returns:
        (N, C, H, W).
    """
    (gradients,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradients


def gradient_penalty(gradients: Tensor) -> Tensor:
    """Return the squared norm of each gradient of `image_gradients`: (N,).

    On real images this is R1, on fake ones R2 (Mescheder et al., arXiv 1801.04406, eq. 9).
    """
    return gradients.square().sum(dim=(1, 2, 3))
