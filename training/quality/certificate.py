"""The quality certificate: what a judge that knows only real images sees in generated ones.

GAN-test is the judge's accuracy on generated images, GAN-train that of classifiers which learnt
from generated images alone (both Shmelkov et al., arXiv 1807.09499). The figures of
`training.quality.metrics` are taken in the judge's features instead of Inception's, so they compare
only with figures of the same judge.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import TypeAdapter
from torch import Tensor

from training.artifact import ArtifactInfo
from training.data.named import Dataset
from training.networks import Generator
from training.quality.classifier import FeatureClassifier, share_right
from training.quality.gan_train import IMAGES as GAN_TRAIN_IMAGES
from training.quality.gan_train import GANTrain, estimate_gan_train_s, gan_train
from training.quality.memorisation import AT_A_TIME as NEAREST_AT_A_TIME
from training.quality.memorisation import IMAGES as MEMORISATION_IMAGES
from training.quality.memorisation import Memorisation, memorisation, nearest
from training.quality.metrics import NEIGHBOURS, frechet_distance, kernel_distance, prdc
from training.quality.parzen import VALIDATION_IMAGES, Parzen, parzen

IMAGES = 10_000
# The one data set for which log-likelihoods were published.
PARZEN_DATASET = "mnist"


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Figures of one set of images against the real test images.

    Attributes:
        gan_test: share of images that the judge gives their own label, in [0, 1].
        gan_test_per_class: the same for each class; None where the set has no image of it.
        precision: share of images that lie among the real ones.
        recall: share of real images that lie among these.
        density: how densely the real images surround these; 1 is like real, it can exceed 1.
        coverage: share of real images that have one of these as a near neighbour.
        frechet_distance: between two normal distributions fitted to the features; 0 is equal.
        kid: the kernel distance of the features, unbiased; about 0 is equal.
        kid_spread: its standard deviation over subsets.
    """

    gan_test: float
    gan_test_per_class: tuple[float | None, ...]
    precision: float
    recall: float
    density: float
    coverage: float
    frechet_distance: float
    kid: float
    kid_spread: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The measured quality of a generator.

    Attributes:
        dataset: whose test images were compared with.
        dataset_sha256: of its training images.
        judge_sha256: of the judge's file.
        judge_accuracy: of the judge on the real test images.
        images: how many images were generated, the same number of each class.
        neighbours: k of precision, recall, density and coverage.
        seed: of the latents.
        generated: figures of the generated images.
        real: the same figures for as many real training images, as the yardstick.
        gan_train: what classifiers learn from generated images.
        memorisation: how near generated images are to training images.
        parzen: the legacy log-likelihood, for MNIST.
        parzen_real: the same with real training images in place of generated ones.
    """

    dataset: str
    dataset_sha256: str
    judge_sha256: str
    judge_accuracy: float
    images: int
    neighbours: int
    seed: int
    generated: Quality
    real: Quality
    gan_train: GANTrain
    memorisation: Memorisation
    parzen: Parzen | None
    parzen_real: Parzen | None


_CERTIFICATE = TypeAdapter(Certificate)


def certify(
    generator: Generator,
    judge: FeatureClassifier,
    *,
    train: Dataset,
    test: Dataset,
    images: int = IMAGES,
    seed: int = 0,
    report: Callable[[str], None],
) -> Certificate:
    """Measure a generator in full.

    Args:
        generator: in evaluation mode, on the data sets' device.
        judge: trained on real images of the same data set.
        train: the real training images, the yardstick.
        test: the real images to compare with, none of which was trained on.
        images: how many to generate, and how many real training images to take.
        seed: decides the latents and which training images are taken.
        report: told, in a line, what takes time.
    """
    report(f"Generating {images:,} images and {GAN_TRAIN_IMAGES:,} to learn from …")
    fake = made_by(generator, test, images=images, seed=seed)
    lesson = made_by(generator, test, images=GAN_TRAIN_IMAGES, seed=seed + 1)
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train.labels), generator=rng)[:images].to(train.labels.device)
    real = dataclasses.replace(train, images=train.images[chosen], labels=train.labels[chosen])
    predictions, features = judge.look(test.images)
    report("Comparing them with the test images …")
    generated, yardstick = (measure(judge, each, features) for each in (fake, real))
    report("Looking for copies of training images …")
    copies = memorisation(fake.images, train.images, test.images)
    windows = [_parzen(each, train, test) for each in (fake, real)]
    return Certificate(
        dataset=test.name,
        dataset_sha256=train.digest,
        judge_sha256=judge.digest,
        judge_accuracy=share_right(predictions, test),
        images=images,
        neighbours=_neighbours(len(features)),
        seed=seed,
        generated=generated,
        real=yardstick,
        gan_train=gan_train(lesson, train, test, report),
        memorisation=copies,
        parzen=windows[0],
        parzen_real=windows[1],
    )


def estimate_certification_s(
    generator: Generator, judge: FeatureClassifier, *, train: Dataset, test: Dataset
) -> float:
    """About how long `certify` takes here, in seconds: a small share of each part is timed."""
    few = 200
    sample = made_by(generator, test, images=few, seed=0)
    _, features = judge.look(test.images[:few])
    wide = features[:1].expand(len(test.labels), -1).contiguous()
    shares: list[tuple[Callable[[], object], float]] = [
        (lambda: made_by(generator, test, images=few, seed=0), (IMAGES + GAN_TRAIN_IMAGES) / few),
        (lambda: judge.look(sample.images), (2 * IMAGES + 2 * len(test.labels)) / few),
        # Every set of images is compared with itself and with the test images.
        (lambda: torch.cdist(features, wide).topk(NEIGHBOURS + 1, largest=False), 6 * IMAGES / few),
        (
            lambda: nearest(sample.images, train.images[:NEAREST_AT_A_TIME]),
            2 * MEMORISATION_IMAGES / few * math.ceil(len(train.labels) / NEAREST_AT_A_TIME),
        ),
    ]
    total = estimate_gan_train_s(train)
    for work, times in shares:
        work()  # the first time takes longer
        began = time.perf_counter()
        work()
        if features.is_cuda:
            torch.cuda.synchronize(features.device)
        total += times * (time.perf_counter() - began)
    return total


def made_by(generator: Generator, like: Dataset, *, images: int, seed: int) -> Dataset:
    """A data set of generated images, the classes in turn, with the classes of a real one.

    Args:
        generator: in evaluation mode, on the device of `like`.
        like: gives classes and device.
        images: how many.
        seed: see `generate`.
    """
    labels = torch.arange(images, device=like.labels.device) % like.num_classes
    return dataclasses.replace(
        like, name="generated", images=generate(generator, labels, seed=seed), labels=labels
    )


@torch.inference_mode()
def generate(generator: Generator, labels: Tensor, *, seed: int, batch_size: int = 500) -> Tensor:
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


def measure(judge: FeatureClassifier, dataset: Dataset, real_features: Tensor) -> Quality:
    """All figures of one set of images against the features (M, D) of the real test images."""
    predictions, features = judge.look(dataset.images)
    right = (predictions == dataset.labels).double()
    counts, hits = (
        torch.bincount(dataset.labels, weights=weights, minlength=dataset.num_classes).tolist()
        for weights in (None, right)
    )
    precision, recall, density, coverage = prdc(
        real_features, features, _neighbours(len(real_features))
    )
    kid, kid_spread = kernel_distance(real_features, features)
    return Quality(
        gan_test=right.mean().item(),
        gan_test_per_class=tuple(h / n if n else None for h, n in zip(hits, counts, strict=True)),
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        frechet_distance=frechet_distance(real_features, features),
        kid=kid,
        kid_spread=kid_spread,
    )


def _neighbours(images: int) -> int:
    """K for so many test images: fewer than usual where there are hardly any."""
    return min(NEIGHBOURS, images - 1)


def _parzen(samples: Dataset, train: Dataset, test: Dataset) -> Parzen | None:
    if train.name != PARZEN_DATASET:
        return None
    vectors = (
        pixels.flatten(1).float() / 255.0
        for pixels in (samples.images, train.images[-VALIDATION_IMAGES:], test.images)
    )
    return parzen(*vectors)


def certificate_of(info: ArtifactInfo) -> Certificate | None:
    """The certificate inside an artifact, or None where it was never measured.

    Raises:
        pydantic.ValidationError: it is of another version of this code.
    """
    return None if info.certificate is None else _CERTIFICATE.validate_python(info.certificate)


def with_certificate(info: ArtifactInfo, certificate: Certificate) -> ArtifactInfo:
    """The same description with this certificate in it."""
    return dataclasses.replace(info, certificate=dataclasses.asdict(certificate))
