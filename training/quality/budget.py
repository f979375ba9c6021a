"""The budget of measuring: a classifier, quick evaluations and a certificate in a fifth of a run.

A run of minutes measures less instead of taking longer. The plan of a run follows from the timed
costs of small shares of the work.
"""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from training.data.named import Dataset, default_cache
from training.devices import has_native_bfloat16
from training.networks import Generator
from training.quality.certificate import FULL, CertificateSize, generate_dataset
from training.quality.classifier import (
    BATCH,
    ClassifierNetwork,
    FeatureClassifier,
    build,
    fit,
    plan_epochs,
)
from training.quality.evaluator import quick_sizes
from training.quality.gan_train import EPOCHS, build_classifier
from training.quality.memorisation import nearest_distances
from training.quality.metrics import KID_SUBSET_SIZE, KID_SUBSETS, NEIGHBOURS

# Shares of a budget of minutes. The rest of the fifth is the certificate's.
MEASURING_SHARE = 0.2
CLASSIFIER_SHARE = 0.08  # at most
EVALUATIONS_SHARE = 0.06  # of all quick evaluations; the run spaces them to keep it
EVALUATION_SHARE = 0.01  # of one of them
ESTIMATE_SHARE = 0.01  # of timing the costs
# Share of a certificate's time for all metrics but GAN-train, which needs more for the same spread.
METRICS_SHARE = 1 / 3
# A certificate measures this much at least.
SMALLEST = CertificateSize(
    images=200, gan_train_images=250, gan_train_seeds=1, memorisation_images=50
)
MARGIN = 1.25  # factor of estimated durations: machines vary

_MIN_TIMED_S = 0.2  # of each cost
_FEW, _STEPS = 200, 2  # images and steps that are timed at once


@dataclass(frozen=True, kw_only=True)
class Costs:
    """Durations in seconds, with a margin; 0 for work that the run does not do."""

    generate_s: float  # of generating an image
    classify_s: float  # of classifying an image
    pair_s: float  # of comparing the features of two images
    nearest_s: float = 0.0  # of comparing an image with all training images
    # Of showing an image to the classifier that learns; without a margin, because its time is
    # limited and its schedule follows the time.
    classifier_s: float = 0.0
    gan_train_s: float = 0.0  # of showing an image to a classifier of GAN-train


@dataclass(frozen=True, kw_only=True)
class MeasuringPlan:
    """The measurements of a run and the time that each may take; without limits by default."""

    epochs: float | None = None  # passes that train the classifier, 0 for none; None for enough
    classifier_s: float = math.inf
    quick_share: float = 1.0  # of the images of a quick evaluation
    quick_s: float = 0.0  # of one quick evaluation
    size: CertificateSize | None = None  # None without a certificate
    certificate_s: float = math.inf  # 0 without a certificate


def plan_measuring(
    costs: Costs, train: Dataset, test: Dataset, *, minutes: float | None, certified: bool
) -> MeasuringPlan:
    """Choose the numbers of passes and images that fit into a budget; the full ones without one."""
    total_s = math.inf if minutes is None else 60.0 * minutes
    quick_share = _largest_share(
        lambda share: quick_evaluation_s(costs, train, share), EVALUATION_SHARE * total_s
    )
    pass_s = costs.classifier_s * len(train.labels)
    affordable = CLASSIFIER_SHARE * total_s / pass_s if pass_s else math.inf
    epochs = plan_epochs(train, cache=default_cache(), affordable=affordable)
    size, left_s = None, MEASURING_SHARE - EVALUATIONS_SHARE - ESTIMATE_SHARE
    if certified:
        size = choose_size(costs, test, left_s * total_s - epochs * pass_s)
    return MeasuringPlan(
        epochs=epochs,
        classifier_s=epochs * pass_s,
        quick_share=quick_share,
        quick_s=quick_evaluation_s(costs, train, quick_share),
        size=size,
        certificate_s=certificate_s(costs, test, size) if size else 0.0,
    )


def choose_size(costs: Costs, test: Dataset, seconds: float) -> CertificateSize:
    """Return the largest certificate that is within a time, or the smallest of all."""
    if certificate_s(costs, test, FULL) <= seconds:
        return FULL

    def scaled(share: float) -> CertificateSize:
        images, compared = (
            _rounded(share * most, least, most)
            for most, least in (
                (FULL.images, SMALLEST.images),
                (FULL.memorisation_images, SMALLEST.memorisation_images),
            )
        )
        return replace(FULL, images=images, memorisation_images=compared)

    share = _largest_share(
        lambda share: _metrics_s(costs, test, scaled(share)), METRICS_SHARE * seconds
    )
    size = scaled(share)
    # Longer training comes before more seeds: it changes the accuracy, seeds only narrow it.
    full_s = _gan_train_s(costs, FULL.gan_train_images, tested=math.inf)
    classifiers = (seconds - _metrics_s(costs, test, size)) / full_s if full_s else math.inf
    seeds = int(min(FULL.gan_train_seeds, max(SMALLEST.gan_train_seeds, classifiers - 1)))
    most = FULL.gan_train_images
    images = _rounded(classifiers / (seeds + 1) * most, SMALLEST.gan_train_images, most)
    return replace(size, gan_train_seeds=seeds, gan_train_images=images)


def certificate_s(costs: Costs, test: Dataset, size: CertificateSize) -> float:
    """Estimate the duration of a certificate."""
    classifier_s = _gan_train_s(costs, size.gan_train_images, tested=len(test.labels))
    return _metrics_s(costs, test, size) + (size.gan_train_seeds + 1) * classifier_s


def quick_evaluation_s(costs: Costs, train: Dataset, share: float) -> float:
    """Estimate the duration of a quick evaluation of a share of its images."""
    fake, real = quick_sizes(share)
    real = min(real, len(train.labels))
    pairs = fake**2 + real**2 + fake * real
    return fake * (costs.generate_s + costs.classify_s) + pairs * costs.pair_s


def _metrics_s(costs: Costs, test: Dataset, size: CertificateSize) -> float:
    """Estimate the duration of all but GAN-train."""
    real = size.test_images(len(test.labels))
    # Generated and training images are compared with themselves and with the test images.
    pairs = 2 * (size.images**2 + real**2 + size.images * real)
    pairs += 2 * KID_SUBSETS * 3 * min(KID_SUBSET_SIZE, size.images // 2, real // 2) ** 2
    return (
        size.images * costs.generate_s
        + (2 * size.images + real) * costs.classify_s
        + pairs * costs.pair_s
        + 2 * size.memorisation_images * costs.nearest_s
    )


def _gan_train_s(costs: Costs, images: int, tested: float) -> float:
    """Estimate the duration of generating images, and of training and testing on them once."""
    shown = EPOCHS * images
    # A test is at most a third of a training step, and of no more images than are shown.
    passes = shown + min(shown, tested) / 3
    return images * costs.generate_s + passes * costs.gan_train_s


def _largest_share(cost: Callable[[float], float], limit: float) -> float:
    """Return the largest share in (0, 1] whose cost, which grows with it, is within the limit."""
    low, high = 0.0, 1.0
    if cost(high) <= limit:
        return high
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(middle) <= limit else (low, middle)
    return max(low, 1e-3)


def _rounded(count: float, least: int, most: int) -> int:
    """Return a number with two significant digits, rounded down, between two limits."""
    if count < least or most <= least:
        return min(least, most)
    if count >= most:
        return most
    unit = 10 ** max(0, int(math.log10(count)) - 1)
    return int(count // unit * unit)


def measure_costs(train: Dataset, test: Dataset, generator: Generator, *, certified: bool) -> Costs:
    """Time small shares of the work with untrained classifiers; takes a few seconds.

    The generator is in evaluation mode, on the images' device.
    """
    network = build(ClassifierNetwork, train, seed=0).eval().requires_grad_(False)
    network.to(train.labels.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    classifier = FeatureClassifier(network, digest="")
    _, features = classifier.classify(train.images[:_FEW])
    many = features[:1].expand(10 * _FEW, -1).contiguous()
    learns = plan_epochs(train, cache=default_cache()) > 0

    def timed(work: Callable[[], object], count: float) -> float:
        return MARGIN * _time(work, train.labels.device) / count

    costs = Costs(
        generate_s=timed(lambda: generate_dataset(generator, test, images=_FEW, seed=0), _FEW),
        classify_s=timed(lambda: classifier.classify(train.images[:_FEW]), len(features)),
        pair_s=timed(
            lambda: torch.cdist(features, many).topk(NEIGHBOURS + 1, largest=False),
            len(features) * len(many),
        ),
        classifier_s=_training_s(build(ClassifierNetwork, train, seed=0), train) if learns else 0.0,
    )
    if not certified:
        return costs
    queries, chunk = train.images[:_FEW], train.images[: 10 * _FEW]
    nearest_s = timed(lambda: nearest_distances(queries, chunk), len(queries) * len(chunk))
    return replace(
        costs,
        nearest_s=nearest_s * len(train.labels),
        gan_train_s=MARGIN * _training_s(build_classifier(train, 0), train),
    )


def _training_s(network: torch.nn.Module, dataset: Dataset) -> float:
    """Return the duration of showing a network an image; its weights are useless afterwards."""
    half = has_native_bfloat16(dataset.labels.device)
    few = replace(dataset, images=dataset.images[:BATCH], labels=dataset.labels[:BATCH])

    def steps() -> None:
        network.train().requires_grad_(True)
        fit(network, few, epochs=_STEPS, seed=0, half=half, batch_size=len(few.labels))

    return _time(steps, dataset.labels.device) / (_STEPS * len(few.labels))


def _time(work: Callable[[], object], device: torch.device) -> float:
    """Return the median duration of a call but the first, which may import and compile.

    The median is robust to processes that take the core for a moment.
    """
    work()
    spent_s: list[float] = []
    while sum(spent_s) < _MIN_TIMED_S:
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent_s.append(time.perf_counter() - started)
    return statistics.median(spent_s)
