"""Certificate: an evaluation report of a generator, stored inside its artifact.

GAN-test is the accuracy on generated images of a classifier that was trained on real images only,
GAN-train the accuracy of classifiers trained on generated images only (both Shmelkov et al., arXiv
1807.09499). The metrics of `training.quality.metrics` use the features of the former instead of
Inception's, so they are comparable only between certificates of the same classifier.
"""

import dataclasses
import logging
import math
import statistics
import time
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from training.artifact import ArtifactInfo
from training.data.named import Dataset
from training.networks import Generator
from training.quality.classifier import FeatureClassifier
from training.quality.gan_train import EPOCHS as GAN_TRAIN_EPOCHS
from training.quality.gan_train import IMAGES as GAN_TRAIN_IMAGES
from training.quality.gan_train import SEEDS, GANTrain, gan_train
from training.quality.memorisation import IMAGES as MEMORISATION_IMAGES
from training.quality.memorisation import Memorisation, memorisation
from training.quality.metrics import (
    KID_SUBSET_SIZE,
    NEIGHBOURS,
    find_neighbours,
    frechet_distance,
    kid,
)
from training.quality.parzen import VALIDATION_IMAGES, Parzen, parzen
from training.quality.spread import binomial, bootstrap
from training.sampling import Sampler, generate

IMAGES = 10_000
INT8_SEEDS = 5
# Metrics that int8 must not make worse: 1 if more is better, else -1.
_BETTER = {
    **dict.fromkeys(("gan_test", "precision", "recall", "density", "coverage"), 1.0),
    "frechet_distance": -1.0,
}
# The only data set with published log-likelihoods.
PARZEN_DATASET = "mnist"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class CertificateSize:
    """The numbers of images and classifiers that a certificate measures."""

    images: int = IMAGES  # generated, and real training images as the reference
    gan_train_images: int = GAN_TRAIN_IMAGES  # generated to train classifiers on
    gan_train_seeds: int = SEEDS
    memorisation_images: int = MEMORISATION_IMAGES  # generated, and real test images

    def test_images(self, available: int) -> int:
        """Return the number of real test images to compare with.

        Coverage with k neighbours is about the chance that one of N generated images falls into a
        ball that holds k of M real ones, so it depends on N / M. A brief certificate has the ratio
        of a full one: 1 for the 10,000 test images of a named data set. Of fewer test images there
        are none to leave out: fewer of them would make the balls larger.
        """
        ratio = max(1.0, available / FULL.images)
        return min(available, round(self.images * ratio))

    def __str__(self) -> str:
        """Return the numbers as text."""
        seeds = "1 seed" if self.gan_train_seeds == 1 else f"{self.gan_train_seeds} seeds"
        return (
            f"{self.images:,} images; GAN-train with {seeds} of {self.gan_train_images:,} images; "
            f"{self.memorisation_images:,} images compared with the training images"
        )


FULL = CertificateSize()


@dataclass(frozen=True, kw_only=True)
class QualitySpread:
    """Standard errors of the metrics of the same names, over the images of one set."""

    gan_test: float
    gan_test_per_class: tuple[float | None, ...]
    precision: float
    recall: float
    density: float
    coverage: float
    frechet_distance: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Metrics of one set of images against the real test images."""

    gan_test: float  # share of images that are classified as their own label, in [0, 1]
    gan_test_per_class: tuple[float | None, ...]  # None for a class without images
    precision: float  # share of images that lie among the real ones
    recall: float  # share of real images that lie among these
    density: float  # of real images around these; about 1 for real images, can exceed 1
    coverage: float  # share of real images that have one of these as a near neighbour
    frechet_distance: float  # of normal distributions fitted to the features; 0 for equal ones
    kid: float  # kernel distance of the features, unbiased; about 0 for equal distributions
    kid_std: Annotated[float, Field(alias="kid_spread")]  # standard deviation over subsets
    spread: QualitySpread | None = None  # in a brief certificate


@dataclass(frozen=True, kw_only=True)
class Int8Quality:
    """The quality of a generator in int8, compared with its own in float32.

    Nothing is lost if the mean of no metric over the seeds is worse than in float32, with the same
    latents, by more than twice the standard deviation of float32 over the seeds.
    """

    generated: Quality  # of images of the certificate's latents
    change: dict[str, float]  # of the mean over the seeds from float32 to int8, by metric
    std: dict[str, float]  # standard deviation of float32 over the seeds, by metric
    seeds: int
    lossless: bool


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The measured quality of a generator; an alias is the field's name inside artifacts."""

    dataset: str
    dataset_sha256: str  # of its training images
    classifier_sha256: Annotated[str, Field(alias="judge_sha256")]
    classifier_accuracy: Annotated[float, Field(alias="judge_accuracy")]  # on real test images
    images: int  # generated, equally many of each class
    neighbours: int  # k of precision, recall, density and coverage
    seed: int  # of the latents
    generated: Quality
    reference: Annotated[Quality, Field(alias="real")]  # of as many real training images
    gan_train: GANTrain
    memorisation: Memorisation
    parzen: Parzen | None  # for MNIST only, in a full certificate
    parzen_reference: Annotated[Parzen | None, Field(alias="parzen_real")]  # of training images
    brief: str | None = None  # the smaller numbers of images in it; None in a full certificate
    test_images: int | None = None  # real ones to compare with; None for all of the data set
    int8: Int8Quality | None = None  # None in a brief certificate


_CERTIFICATE = TypeAdapter(Certificate)


def certify(
    generator: Generator,
    classifier: FeatureClassifier,
    *,
    train: Dataset,
    test: Dataset,
    size: CertificateSize = FULL,
    seconds: float = math.inf,
    seed: int = 0,
) -> Certificate:
    """Measure a generator, and log the progress.

    Args:
        generator: in evaluation mode, on the data sets' device.
        classifier: trained on the training images.
        train: the real training images.
        test: the real images to compare with, unseen by generator and classifier.
        size: the numbers of images; fewer than `FULL` make a brief certificate.
        seconds: limit of the duration; classifiers of GAN-train that would exceed it learn less.
        seed: decides the latents and the choice of real images.
    """
    ends_at, brief = time.perf_counter() + seconds, size != FULL
    counts = f"{size.images:,}", f"{size.gan_train_images:,}"
    logger.info("Generating %s images and %s for GAN-train …", *counts)
    fake = generate_dataset(generator, test, images=size.images, seed=seed)
    gan_train_set = generate_dataset(generator, test, images=size.gan_train_images, seed=seed + 1)
    real, some, tested = _choose(train, size.images, seed), test, test
    if brief:
        some = _choose(test, size.test_images(len(test.labels)), seed)
        tested = _choose(test, GAN_TRAIN_EPOCHS * size.gan_train_images, seed)
    predictions, features = classifier.classify(some.images)
    logger.info("Comparing them with the test images …")
    generated, reference = (
        measure(classifier, each, features, spread=brief) for each in (fake, real)
    )
    logger.info("Comparing them with the training images …")
    compared = fake.images, train.images, some.images
    distances = memorisation(*compared, images=size.memorisation_images, spread=brief)
    # The likelihood grows with the number of images, so a brief certificate has none.
    likelihoods = [None if brief else _parzen(each, train, test) for each in (fake, real)]
    left_s = ends_at - time.perf_counter()
    return Certificate(
        dataset=test.name,
        dataset_sha256=train.digest,
        classifier_sha256=classifier.digest,
        classifier_accuracy=(predictions == some.labels).float().mean().item(),
        images=size.images,
        neighbours=_neighbours(len(features)),
        seed=seed,
        generated=generated,
        reference=reference,
        gan_train=gan_train(
            *(gan_train_set, train, tested, size.gan_train_seeds), seconds=left_s, spread=brief
        ),
        memorisation=distances,
        parzen=likelihoods[0],
        parzen_reference=likelihoods[1],
        brief=f"{size}; `training evaluate FILE` completes it" if brief else None,
        test_images=len(some.labels) if brief else None,
    )


def measure_int8(
    int8: Sampler,
    generator: Sampler,
    certificate: Certificate,
    classifier: FeatureClassifier,
    test: Dataset,
    *,
    seconds: float = math.inf,
) -> Int8Quality | None:
    """Measure a generator in int8 and in float32, with several seeds.

    Returns None if the first measurement shows that all would exceed the time.

    Args:
        int8: the generator in int8.
        generator: in evaluation mode, on the data set's device.
        certificate: its full certificate.
        classifier: of the certificate.
        test: the real images of the certificate.
        seconds: limit of the duration.
    """
    began = time.perf_counter()
    logger.info("Measuring %d seeds in int8 and in float32 …", INT8_SEEDS)
    _, features = classifier.classify(test.images)

    def quality(sampler: Sampler, seed: int) -> Quality:
        made = generate_dataset(sampler, test, images=certificate.images, seed=seed)
        return measure(classifier, made, features)

    found = [quality(int8, certificate.seed)]
    if (2 * INT8_SEEDS - 1) * (time.perf_counter() - began) > seconds:
        logger.info("There is too little time for int8; `training evaluate FILE` measures it.")
        return None
    # The next seed is that of GAN-train.
    seeds = range(certificate.seed + 2, certificate.seed + 1 + INT8_SEEDS)
    exact = [certificate.generated, *(quality(generator, seed) for seed in seeds)]
    found += [quality(int8, seed) for seed in seeds]
    change, std = {}, {}
    for name in _BETTER:
        values, others = (
            [getattr(each, name) for each in qualities] for qualities in (exact, found)
        )
        change[name] = statistics.mean(others) - statistics.mean(values)
        std[name] = statistics.stdev(values)
    return Int8Quality(
        generated=found[0],
        change=change,
        std=std,
        seeds=INT8_SEEDS,
        lossless=all(sign * change[name] >= -2.0 * std[name] for name, sign in _BETTER.items()),
    )


def _choose(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Return a random choice of images."""
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(dataset.labels), generator=rng)[:count].to(dataset.labels.device)
    return dataclasses.replace(
        dataset, images=dataset.images[chosen], labels=dataset.labels[chosen]
    )


def generate_dataset(generator: Sampler, like: Dataset, *, images: int, seed: int) -> Dataset:
    """Generate a data set with the classes of a real one, the labels 0, 1, 2, … in turn.

    The generator is in evaluation mode, on the device of the real data set.
    """
    labels = torch.arange(images, device=like.labels.device) % like.num_classes
    return dataclasses.replace(
        like, name="generated", images=generate(generator, labels, seed=seed), labels=labels
    )


def measure(
    classifier: FeatureClassifier, dataset: Dataset, real_features: Tensor, *, spread: bool = False
) -> Quality:
    """Measure one set of images against the features (M, D) of the real test images."""
    predictions, features = classifier.classify(dataset.images)
    correct = (predictions == dataset.labels).double()
    counts, hits = (
        torch.bincount(dataset.labels, weights=weights, minlength=dataset.num_classes).tolist()
        for weights in (None, correct)
    )
    neighbours = find_neighbours(real_features, features, _neighbours(len(real_features)))
    precision, recall, density, coverage = neighbours.prdc()
    # Subsets of nearly all images would hide how much the estimate varies.
    halved = max(2, min(len(real_features), len(features)) // 2)
    subset = min(KID_SUBSET_SIZE, halved) if spread else KID_SUBSET_SIZE
    kid_mean, kid_std = kid(real_features, features, size=subset)
    found = Quality(
        gan_test=correct.mean().item(),
        gan_test_per_class=tuple(h / n if n else None for h, n in zip(hits, counts, strict=True)),
        precision=precision,
        recall=recall,
        density=density,
        coverage=coverage,
        frechet_distance=frechet_distance(real_features, features),
        kid=kid_mean,
        kid_std=kid_std,
    )
    if not spread:
        return found
    real, fake = len(real_features), len(features)
    classes = zip(found.gan_test_per_class, counts, strict=True)
    errors = QualitySpread(
        gan_test=binomial(found.gan_test, fake),
        gan_test_per_class=tuple(None if h is None else binomial(h, n) for h, n in classes),
        precision=binomial(precision, fake),
        recall=binomial(recall, real),
        density=(neighbours.real_balls.double().std() / neighbours.k / fake**0.5).item(),
        coverage=binomial(coverage, real),
        frechet_distance=bootstrap(frechet_distance, real_features, features),
    )
    return dataclasses.replace(found, spread=errors)


def _neighbours(images: int) -> int:
    """Return k for a number of test images: smaller than `NEIGHBOURS` for very few of them."""
    return min(NEIGHBOURS, images - 1)


def _parzen(samples: Dataset, train: Dataset, test: Dataset) -> Parzen | None:
    if train.name != PARZEN_DATASET:
        return None
    vectors = (
        pixels.flatten(1).float() / 255.0
        for pixels in (samples.images, train.images[-VALIDATION_IMAGES:], test.images)
    )
    return parzen(*vectors)


def read_certificate(info: ArtifactInfo) -> Certificate | None:
    """Return the certificate inside an artifact, or None if it has none.

    Raises:
        pydantic.ValidationError: it was written by another version of this code.
    """
    return None if info.certificate is None else _CERTIFICATE.validate_python(info.certificate)


def with_certificate(info: ArtifactInfo, certificate: Certificate) -> ArtifactInfo:
    """Return the same description with this certificate in it."""
    # A full certificate has no fields of brief ones.
    stored = _CERTIFICATE.dump_python(certificate, by_alias=True, exclude_defaults=True)
    return dataclasses.replace(info, certificate=stored)
