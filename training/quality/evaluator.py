"""Evaluation during and after a training run: quick metrics in between, the certificate at the end.

Quick metrics compare with training images only. They decide which generator is kept, so the test
images must stay unseen until the certificate.
"""

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from training.data.named import Dataset, default_cache
from training.networks import Generator
from training.quality.certificate import Certificate, certify, estimate_certification_s
from training.quality.classifier import FeatureClassifier, get_classifier
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

    def seconds_for_training(
        self, minutes: float, generator: Generator, *, certified: bool
    ) -> float:
        """Return the part of a budget of minutes that is left for training.

        Raises:
            ValueError: certification takes nearly all of the budget, or more.
        """
        started = time.perf_counter()
        self.evaluate_quick(generator)  # a run does it once more after its last step
        quick_s = time.perf_counter() - started
        seconds = 60.0 * minutes * (1.0 - RESERVED_SHARE) - quick_s
        if not certified:
            return seconds
        reserved = CERTIFICATION_MARGIN * estimate_certification_s(
            generator, self.classifier, train=self.train, test=self.test
        )
        if seconds - reserved < MIN_TRAINING_SHARE * seconds:
            enough = (reserved / (1.0 - MIN_TRAINING_SHARE) + quick_s) / (1.0 - RESERVED_SHARE) / 60
            raise ValueError(
                f"{minutes:g} is too short, since the evaluation takes about "
                f"{reserved / 60:.1f} minutes here; with --certify, give "
                f"{math.ceil(10 * enough) / 10:.1f} or more"
            )
        return seconds - reserved
