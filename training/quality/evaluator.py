"""Evaluation during and after a training run: quick metrics in between, the certificate at the end.

Quick metrics compare with training images only. They decide which generator is kept, so the test
images must stay unseen until the certificate.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from training.artifact import list_names
from training.data.named import Dataset, default_cache
from training.networks import Generator
from training.quality.certificate import Certificate, certify, estimate_certification_s
from training.quality.classifier import (
    ClassifierNetwork,
    FeatureClassifier,
    build,
    estimate_classifier_s,
    get_classifier,
)
from training.quality.metrics import frechet_distance, prdc
from training.sampling import generate

QUICK_IMAGES = 3000  # generated for quick metrics
REFERENCE_IMAGES = 5000  # real training images that they compare with
_SEED = 1  # the certificate has other latents

# Share of a budget of minutes for the export and a grid of samples.
RESERVED_SHARE = 0.02
# Factor for errors of the estimated duration of certification.
CERTIFICATION_MARGIN = 1.25
# Maximum share of a budget of minutes for training a classifier.
CLASSIFIER_SHARE = 0.2
# Minimum share of a budget of minutes for training the generator.
MIN_TRAINING_SHARE = 0.1


@dataclass(frozen=True)
class QuickMetrics:
    """Metrics of fewer images than a certificate's, so less exact."""

    gan_test: float  # share of generated images that are classified as their own label
    coverage: float  # share of training images that have a generated one as a near neighbour
    frechet_distance: float  # of the features of both
    score: float  # gan_test * coverage, which rises with label fidelity and with diversity


@dataclass(frozen=True)
class Evaluator:
    """A feature classifier and the images to compare with, all on one device."""

    classifier: FeatureClassifier
    train: Dataset
    test: Dataset  # a run never sees them
    reference_features: Tensor  # (M, D), of the training images that quick metrics compare with

    @classmethod
    def create(cls, train: Dataset, test: Dataset, *, minutes: float | None = None) -> "Evaluator":
        """Load or train the classifier of a data set, and compute the reference features.

        The budget of a run in minutes limits the training of a classifier.
        """
        seconds = None if minutes is None else 60.0 * minutes * CLASSIFIER_SHARE
        classifier = get_classifier(train, cache=default_cache(), seconds=seconds)
        return cls.of(classifier, train, test)

    @classmethod
    def of(cls, classifier: FeatureClassifier, train: Dataset, test: Dataset) -> "Evaluator":
        """Compute the reference features of a classifier."""
        rng = torch.Generator().manual_seed(_SEED)
        chosen = torch.randperm(len(train.labels), generator=rng)[:REFERENCE_IMAGES]
        _, features = classifier.classify(train.images[chosen.to(train.labels.device)])
        return cls(classifier, train, test, features)

    def evaluate_quick(self, generator: Generator) -> QuickMetrics:
        """Measure `QUICK_IMAGES` images of a generator; takes 1 to 2 s on a CPU.

        The generator is in evaluation mode, on the images' device. No random state is changed.
        """
        labels = torch.arange(QUICK_IMAGES, device=self.train.labels.device)
        labels %= generator.config.num_classes
        pixels = generate(generator, labels, seed=_SEED)
        predictions, features = self.classifier.classify(pixels)
        gan_test = (predictions == labels).float().mean().item()
        *_, coverage = prdc(self.reference_features, features)
        return QuickMetrics(
            gan_test=gan_test,
            coverage=coverage,
            frechet_distance=frechet_distance(self.reference_features, features),
            score=gan_test * coverage,
        )

    def certify(self, generator: Generator) -> Certificate:
        """Measure a generator in full."""
        return certify(generator, self.classifier, train=self.train, test=self.test)


@dataclass(frozen=True, kw_only=True)
class Overhead:
    """Estimated durations of all parts of a run but the training of its generator."""

    classifier_s: float = 0.0  # of training the classifier in full; 0 if there is one already
    quick_s: float = 0.0  # of one quick evaluation
    certification_s: float = 0.0  # with a margin; 0 if there will be none

    def seconds_for_training(self, minutes: float) -> float:
        """Return the part of a budget of minutes before the last evaluation.

        It contains the training of the classifier, whose share is limited.

        Raises:
            ValueError: too little is left for training the generator.
        """
        enough = self._least_minutes(self.certification_s)
        if minutes < enough:
            known = render_durations(self.durations_s(minutes))
            text = f"{minutes:g} is too short for {known}; give {_rounded_up(enough)} or more"
            without = _rounded_up(self._least_minutes(certification_s=0.0))
            raise ValueError(
                f"{text}, or {without} without --certify" if self.certification_s else text
            )
        return 60.0 * minutes * (1.0 - RESERVED_SHARE) - self.quick_s - self.certification_s

    def durations_s(self, minutes: float | None, evaluations: int = 1) -> dict[str, float]:
        """Return part -> seconds, for a budget of minutes if there is one."""
        limit = math.inf if minutes is None else 60.0 * minutes * CLASSIFIER_SHARE
        return {
            "the training of a classifier": min(self.classifier_s, limit),
            "evaluation during the run": evaluations * self.quick_s,
            "certification": self.certification_s,
        }

    def _least_minutes(self, certification_s: float) -> float:
        """Return the least budget that leaves `MIN_TRAINING_SHARE` to training the generator."""
        fixed_s = self.quick_s + certification_s
        usable = (1.0 - RESERVED_SHARE) * (1.0 - MIN_TRAINING_SHARE)
        in_full = (fixed_s + self.classifier_s) / usable
        shortened = fixed_s / (usable - CLASSIFIER_SHARE)
        return min(in_full, shortened) / 60


def render_durations(durations_s: Mapping[str, float]) -> str:
    """Return durations as text, in minutes, without those of 0."""
    shown = [f"{part} ({s / 60:.1f} minutes)" for part, s in durations_s.items() if s]
    return list_names(shown)


def _rounded_up(minutes: float) -> str:
    return f"{math.ceil(10 * minutes) / 10:.1f}"


def estimate_overhead(
    train: Dataset, test: Dataset, generator: Generator, *, certified: bool
) -> Overhead:
    """Time small shares of the parts of a run with an untrained classifier; takes seconds.

    The generator is in evaluation mode, on the images' device.
    """
    device = train.labels.device
    network = build(ClassifierNetwork, train, seed=0).eval().requires_grad_(False)
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    evaluator = Evaluator.of(FeatureClassifier(network, digest=""), train, test)
    started = time.perf_counter()
    evaluator.evaluate_quick(generator)
    quick_s = time.perf_counter() - started
    certification_s = 0.0
    if certified:
        certification_s = CERTIFICATION_MARGIN * estimate_certification_s(
            generator, evaluator.classifier, train=train, test=test
        )
    return Overhead(
        classifier_s=estimate_classifier_s(train, cache=default_cache()),
        quick_s=quick_s,
        certification_s=certification_s,
    )
