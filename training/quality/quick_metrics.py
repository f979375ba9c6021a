"""A light look at a generator, for use while it is being trained.

It compares with training images alone: the test images stay unseen until the certificate, though
looks choose which generator is kept.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.named import Dataset
from training.networks import Generator
from training.quality.certificate import generate
from training.quality.classifier import FeatureClassifier
from training.quality.metrics import frechet_distance, prdc

IMAGES = 3000
REAL_IMAGES = 5000
_SEED = 1  # the certificate draws other latents


@dataclass(frozen=True, kw_only=True)
class QuickMetrics:
    """What a look sees; fewer images than a certificate's, so the figures are rougher.

    Attributes:
        gan_test: share of generated images that the judge gives their own label.
        coverage: share of real training images that have a generated one as a near neighbour.
        frechet_distance: of the features of both.
        score: gan_test * coverage, which rises with label fidelity and with diversity.
    """

    gan_test: float
    coverage: float
    frechet_distance: float
    score: float


@dataclass(frozen=True)
class Reference:
    """What looks compare with: features (M, D) of real training images, prepared once."""

    features: Tensor


def make_reference(judge: FeatureClassifier, train: Dataset) -> Reference:
    """The features of some training images, the same ones every time."""
    rng = torch.Generator().manual_seed(_SEED)
    chosen = torch.randperm(len(train.labels), generator=rng)[:REAL_IMAGES]
    _, features = judge.look(train.images[chosen.to(train.labels.device)])
    return Reference(features)


def glance(generator: Generator, judge: FeatureClassifier, reference: Reference) -> QuickMetrics:
    """Measure a generator lightly: `IMAGES` of its images, a second or two on a CPU.

    Args:
        generator: in evaluation mode, on the reference's device. No random state is touched.
        judge: of the data set.
        reference: see `make_reference`.
    """
    labels = torch.arange(IMAGES, device=reference.features.device) % generator.config.num_classes
    predictions, features = judge.look(generate(generator, labels, seed=_SEED))
    gan_test = (predictions == labels).float().mean().item()
    *_, coverage = prdc(reference.features, features)
    return QuickMetrics(
        gan_test=gan_test,
        coverage=coverage,
        frechet_distance=frechet_distance(reference.features, features),
        score=gan_test * coverage,
    )
