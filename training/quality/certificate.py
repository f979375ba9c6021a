"""Certificate: an evaluation report of a generator, stored inside its artifact.

GAN-test is the accuracy on generated images of a classifier that was trained on real images only,
GAN-train the accuracy of classifiers trained on generated images only (both Shmelkov et al., arXiv
1807.09499). The metrics of `training.quality.metrics` use the features of the former instead of
Inception's, so they are comparable only between certificates of the same classifier.
"""

import dataclasses
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field, TypeAdapter
from torch import Tensor

from training.artifact import ArtifactInfo
from training.data.named import Dataset
from training.networks import Generator
from training.quality.classifier import FeatureClassifier
from training.quality.gan_train import IMAGES as GAN_TRAIN_IMAGES
from training.quality.gan_train import GANTrain, estimate_gan_train_s, gan_train
from training.quality.memorisation import (
    CHUNK_IMAGES,
    Memorisation,
    memorisation,
    nearest_distances,
)
from training.quality.memorisation import IMAGES as MEMORISATION_IMAGES
from training.quality.metrics import NEIGHBOURS, frechet_distance, kid, prdc
from training.quality.parzen import VALIDATION_IMAGES, Parzen, parzen
from training.sampling import generate

IMAGES = 10_000
# The only data set with published log-likelihoods.
PARZEN_DATASET = "mnist"

logger = logging.getLogger(__name__)


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
    parzen: Parzen | None  # for MNIST only
    parzen_reference: Annotated[Parzen | None, Field(alias="parzen_real")]  # of training images


_CERTIFICATE = TypeAdapter(Certificate)


def certify(
    generator: Generator,
    classifier: FeatureClassifier,
    *,
    train: Dataset,
    test: Dataset,
    images: int = IMAGES,
    seed: int = 0,
) -> Certificate:
    """Measure a generator in full, and log the progress.

    Args:
        generator: in evaluation mode, on the data sets' device.
        classifier: trained on the training images.
        train: the real training images.
        test: the real images to compare with, unseen by generator and classifier.
        images: number of images to generate, and of real training images to measure as a reference.
        seed: decides the latents and the choice of training images.
    """
    logger.info(
        "Generating %s images and %s for GAN-train …", f"{images:,}", f"{GAN_TRAIN_IMAGES:,}"
    )
    fake = generate_dataset(generator, test, images=images, seed=seed)
    gan_train_set = generate_dataset(generator, test, images=GAN_TRAIN_IMAGES, seed=seed + 1)
    rng = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(train.labels), generator=rng)[:images].to(train.labels.device)
    real = dataclasses.replace(train, images=train.images[chosen], labels=train.labels[chosen])
    predictions, features = classifier.classify(test.images)
    logger.info("Comparing them with the test images …")
    generated, reference = (measure(classifier, each, features) for each in (fake, real))
    logger.info("Comparing them with the training images …")
    distances = memorisation(fake.images, train.images, test.images)
    likelihoods = [_parzen(each, train, test) for each in (fake, real)]
    return Certificate(
        dataset=test.name,
        dataset_sha256=train.digest,
        classifier_sha256=classifier.digest,
        classifier_accuracy=(predictions == test.labels).float().mean().item(),
        images=images,
        neighbours=_neighbours(len(features)),
        seed=seed,
        generated=generated,
        reference=reference,
        gan_train=gan_train(gan_train_set, train, test),
        memorisation=distances,
        parzen=likelihoods[0],
        parzen_reference=likelihoods[1],
    )


def estimate_certification_s(
    generator: Generator, classifier: FeatureClassifier, *, train: Dataset, test: Dataset
) -> float:
    """Estimate the duration of `certify` in seconds by timing a small share of each part."""
    few = 200
    sample = generate_dataset(generator, test, images=few, seed=0)
    _, features = classifier.classify(test.images[:few])
    wide = features[:1].expand(len(test.labels), -1).contiguous()
    parts: list[tuple[Callable[[], object], float]] = [
        (
            lambda: generate_dataset(generator, test, images=few, seed=0),
            (IMAGES + GAN_TRAIN_IMAGES) / few,
        ),
        (lambda: classifier.classify(sample.images), (2 * IMAGES + 2 * len(test.labels)) / few),
        # Every set of images is compared with itself and with the test images.
        (lambda: torch.cdist(features, wide).topk(NEIGHBOURS + 1, largest=False), 6 * IMAGES / few),
        (
            lambda: nearest_distances(sample.images, train.images[:CHUNK_IMAGES]),
            2 * MEMORISATION_IMAGES / few * math.ceil(len(train.labels) / CHUNK_IMAGES),
        ),
    ]
    total = estimate_gan_train_s(train)
    for work, times in parts:
        work()  # the first call is slower
        started = time.perf_counter()
        work()
        if features.is_cuda:
            torch.cuda.synchronize(features.device)
        total += times * (time.perf_counter() - started)
    return total


def generate_dataset(generator: Generator, like: Dataset, *, images: int, seed: int) -> Dataset:
    """Generate a data set with the classes of a real one, the labels 0, 1, 2, … in turn.

    The generator is in evaluation mode, on the device of the real data set.
    """
    labels = torch.arange(images, device=like.labels.device) % like.num_classes
    return dataclasses.replace(
        like, name="generated", images=generate(generator, labels, seed=seed), labels=labels
    )


def measure(classifier: FeatureClassifier, dataset: Dataset, real_features: Tensor) -> Quality:
    """Measure one set of images against the features (M, D) of the real test images."""
    predictions, features = classifier.classify(dataset.images)
    correct = (predictions == dataset.labels).double()
    counts, hits = (
        torch.bincount(dataset.labels, weights=weights, minlength=dataset.num_classes).tolist()
        for weights in (None, correct)
    )
    precision, recall, density, coverage = prdc(
        real_features, features, _neighbours(len(real_features))
    )
    kid_mean, kid_std = kid(real_features, features)
    return Quality(
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
    stored = _CERTIFICATE.dump_python(certificate, by_alias=True)
    return dataclasses.replace(info, certificate=stored)
