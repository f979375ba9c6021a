"""The quality certificate: what a judge that knows only real images sees in generated ones.

Precision and recall are those of Kynkäänniemi et al. (arXiv 1904.06991), density and coverage those
of Naeem et al. (arXiv 2002.09797), the Fréchet distance that of Heusel et al. (arXiv 1706.08500);
all of them in the judge's features instead of Inception's, so they compare only with figures of the
same judge. GAN-test is the judge's accuracy on generated images (Shmelkov et al., arXiv
1807.09499).
"""

import dataclasses
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter
from torch import Tensor

from training.artifact import ArtifactInfo
from training.data import Dataset
from training.judge import Judge
from training.networks import Generator

IMAGES = 10_000
NEIGHBOURS = 5


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of one set of images against the real test images.

    Attributes:
        gan_test: share of images that the judge gives their own label, in [0, 1].
        gan_test_per_class: the same for each class.
        precision: share of images that lie among the real ones.
        recall: share of real images that lie among these.
        density: how densely the real images surround these; 1 is like real, it can exceed 1.
        coverage: share of real images that have one of these as a near neighbour.
        frechet_distance: between two normal distributions fitted to the features; 0 is equal.
    """

    gan_test: float
    gan_test_per_class: tuple[float, ...]
    precision: float
    recall: float
    density: float
    coverage: float
    frechet_distance: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The measured quality of a generator.

    Attributes:
        dataset: whose test images were compared with.
        judge_sha256: of the judge's file.
        judge_accuracy: of the judge on the real test images.
        images: how many images were generated, the same number of each class.
        neighbours: k of precision, recall, density and coverage.
        seed: of the latents.
        generated: figures of the generated images.
        real: the same figures for as many real training images, as the yardstick.
    """

    dataset: str
    judge_sha256: str
    judge_accuracy: float
    images: int
    neighbours: int
    seed: int
    generated: Quality
    real: Quality


_CERTIFICATE = TypeAdapter(Certificate)


def certify(
    generator: Generator,
    judge: Judge,
    *,
    train: Dataset,
    test: Dataset,
    images: int = IMAGES,
    seed: int = 0,
) -> Certificate:
    """Measure a generator.

    Args:
        generator: in evaluation mode, on the data sets' device.
        judge: trained on real images of the same data set.
        train: the real training images, the yardstick.
        test: the real images to compare with.
        images: how many to generate, and how many real training images to take.
        seed: decides the latents and which training images are taken.
    """
    labels = torch.arange(images, device=test.labels.device) % test.num_classes
    fake = generate(generator, labels, seed=seed)
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train.labels), generator=rng)[:images].to(test.labels.device)
    _, features = judge.look(test.images)
    return Certificate(
        dataset=test.name,
        judge_sha256=judge.digest,
        judge_accuracy=judge.accuracy(test),
        images=images,
        neighbours=NEIGHBOURS,
        seed=seed,
        generated=measure(judge, fake, labels, features),
        real=measure(judge, train.images[chosen], train.labels[chosen], features),
    )


@torch.inference_mode()
def generate(generator: Generator, labels: Tensor, *, seed: int, batch_size: int = 1000) -> Tensor:
    """Generate one image a label.

    Args:
        generator: in evaluation mode.
        labels: (N,) int64, on the generator's device.
        seed: of the latents, which are drawn on the CPU so that every device gets the same.
        batch_size: images at a time.

    Returns:
        (N, C, H, W) uint8.
    """
    rng = torch.Generator().manual_seed(seed)
    # All at once: what several calls of randn give depends on how many there are.
    latents = torch.randn((len(labels), generator.config.latent_dim), generator=rng)
    batches = zip(latents.split(batch_size), labels.split(batch_size), strict=True)
    return torch.cat([to_pixels(generator(z.to(labels.device), y)) for z, y in batches])


def to_pixels(images: Tensor) -> Tensor:
    """Images in [-1, 1] to uint8 pixels, rounded to the nearest level."""
    return images.float().mul(127.5).add_(127.5).round_().clamp_(0, 255).to(torch.uint8)


def measure(judge: Judge, pixels: Tensor, labels: Tensor, real_features: Tensor) -> Quality:
    """All figures of one set of images against the features (M, D) of the real test images."""
    predictions, features = judge.look(pixels)
    right = (predictions == labels).double()
    classes = int(labels.max()) + 1
    counts = torch.bincount(labels, minlength=classes)
    per_class = torch.bincount(labels, weights=right, minlength=classes) / counts
    precision, recall, density, coverage = manifold_figures(real_features, features)
    return Quality(
        gan_test=right.mean().item(),
        gan_test_per_class=tuple(per_class.tolist()),
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        frechet_distance=frechet_distance(real_features, features),
    )


def manifold_figures(
    real: Tensor, fake: Tensor, k: int = NEIGHBOURS
) -> tuple[float, float, float, float]:
    """Precision, recall, density and coverage of fake (N, D) against real (M, D) features.

    A point's ball reaches to its k-th nearest neighbour within its own set.
    """
    real_radii, fake_radii = _radii(real, k), _radii(fake, k)
    inside_any_real = torch.zeros(len(fake), dtype=torch.bool, device=fake.device)
    inside_any_fake, covered = [], []
    balls = 0
    for rows, radii in zip(real.split(1000), real_radii.split(1000), strict=True):
        distances = torch.cdist(rows, fake)  # (1000, N)
        inside = distances <= radii[:, None]
        balls += int(inside.sum())
        inside_any_real |= inside.any(0)
        covered.append(distances.min(1).values <= radii)
        inside_any_fake.append((distances <= fake_radii[None]).any(1))
    return (
        inside_any_real.float().mean().item(),
        torch.cat(inside_any_fake).float().mean().item(),
        balls / (k * len(fake)),
        torch.cat(covered).float().mean().item(),
    )


def _radii(features: Tensor, k: int) -> Tensor:
    """Distance to the k-th nearest other point of the same set: (N,)."""
    if len(features) <= k:
        raise ValueError(f"{len(features)} images are too few for {k} neighbours")
    return torch.cat(
        [torch.cdist(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(1000)]
    )


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """The squared Fréchet distance of two normal distributions fitted to features (N, D), (M, D).

    The trace of the root of a product of covariances is that of the symmetric form, whose
    eigenvalues are real, so no imaginary part has to be thrown away.
    """
    a, b = first.double(), second.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    means = (a.mean(0) - b.mean(0)).square().sum()
    distance: float = (means + cov_a.trace() + cov_b.trace() - 2 * product).item()
    return max(0.0, distance)


def table(certificate: Certificate, class_names: tuple[str, ...]) -> str:
    """A certificate in words and columns; valid Markdown."""
    made, real = certificate.generated, certificate.real
    rows = [("", "generated", "real training images")]
    rows += [
        ("GAN-test", f"{made.gan_test:.2%}", f"{real.gan_test:.2%}"),
        *(
            (f"GAN-test, {name}", f"{a:.2%}", f"{b:.2%}")
            for name, a, b in zip(
                class_names, made.gan_test_per_class, real.gan_test_per_class, strict=True
            )
        ),
    ]
    for name in ("precision", "recall", "density", "coverage"):
        rows.append((name, f"{getattr(made, name):.3f}", f"{getattr(real, name):.3f}"))
    rows.append(
        ("Fréchet distance", f"{made.frechet_distance:.3f}", f"{real.frechet_distance:.3f}")
    )
    rows = [(name.replace("|", "\\|").replace("\n", " "), a, b) for name, a, b in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "| " + f"{a:<{widths[0]}} | {b:>{widths[1]}} | {c:>{widths[2]}}" + " |" for a, b, c in rows
    ]
    rule = f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|{'-' * (widths[2] + 1)}:|"
    return "\n".join([lines[0], rule, *lines[1:]])


def certificate_of(info: ArtifactInfo) -> Certificate | None:
    """The certificate inside an artifact, or None where it was never measured.

    Raises:
        pydantic.ValidationError: it is of another version of this code.
    """
    return None if info.certificate is None else _CERTIFICATE.validate_python(info.certificate)


def with_certificate(info: ArtifactInfo, certificate: Certificate) -> ArtifactInfo:
    """The same description with this certificate in it."""
    return dataclasses.replace(info, certificate=dataclasses.asdict(certificate))
