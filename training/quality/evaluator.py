"""Evaluation during and after a training run: quick metrics in between, the certificate at the end.

Quick metrics compare with training images only. They decide which generator is kept, so the test
images must stay unseen until the certificate.
"""

import math
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from training.data.named import Dataset, default_cache
from training.networks import Generator
from training.onnx_graph import quantised
from training.quality.certificate import FULL, Certificate, CertificateSize, certify, measure_int8
from training.quality.classifier import FeatureClassifier, get_classifier
from training.quality.metrics import frechet_distance, prdc
from training.sampling import generate

QUICK_IMAGES = 3000  # generated for quick metrics
REFERENCE_IMAGES = 5000  # real training images that they compare with
_MIN_IMAGES = 20
_SEED = 1  # the certificate has other latents


@dataclass(frozen=True)
class QuickMetrics:
    """Metrics of fewer images than a certificate's, so less exact."""

    gan_test: float  # share of generated images that are classified as their own label
    coverage: float  # share of training images that have a generated one as a near neighbour
    frechet_distance: float  # of the features of both
    score: float  # gan_test * coverage, which rises with label fidelity and with diversity
    images: float = QUICK_IMAGES  # generated; a whole number


def quick_sizes(share: float) -> tuple[int, int]:
    """Return the numbers of generated and of real images for a share of a quick evaluation.

    Coverage depends on the ratio of the two, which is always the same.
    """
    fake, real = (max(_MIN_IMAGES, round(share * n)) for n in (QUICK_IMAGES, REFERENCE_IMAGES))
    return fake, real


@dataclass(frozen=True)
class Evaluator:
    """A feature classifier and the images to compare with, all on one device."""

    classifier: FeatureClassifier
    train: Dataset
    test: Dataset  # a run never sees them
    reference_features: Tensor  # (M, D), of the training images that quick metrics compare with
    quick_share: float = 1.0  # of the images of a quick evaluation

    @classmethod
    def create(
        cls,
        train: Dataset,
        test: Dataset,
        *,
        epochs: float | None = None,
        seconds: float = math.inf,
        quick_share: float = 1.0,
    ) -> "Evaluator":
        """Load or train the classifier of a data set, and compute the reference features.

        Passes and seconds limit the training of a classifier.
        """
        classifier = get_classifier(train, cache=default_cache(), epochs=epochs, seconds=seconds)
        rng = torch.Generator().manual_seed(_SEED)
        _, count = quick_sizes(quick_share)
        chosen = torch.randperm(len(train.labels), generator=rng)[:count]
        _, features = classifier.classify(train.images[chosen.to(train.labels.device)])
        return cls(classifier, train, test, features, quick_share)

    def evaluate_quick(self, generator: Generator) -> QuickMetrics:
        """Measure `QUICK_IMAGES` images of a generator, or a share; takes 1 to 2 s on a CPU.

        The generator is in evaluation mode, on the images' device. No random state is changed.
        """
        count, _ = quick_sizes(self.quick_share)
        labels = torch.arange(count, device=self.train.labels.device)
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
            images=count,
        )

    def certify(
        self,
        generator: Generator,
        *,
        size: CertificateSize | None = None,
        seconds: float = math.inf,
    ) -> Certificate:
        """Measure a generator: in full, or at a smaller size within a time limit.

        A full certificate also measures it in int8, if the time suffices.
        """
        ends_at = time.perf_counter() + seconds
        certificate = certify(
            *(generator, self.classifier),
            train=self.train,
            test=self.test,
            size=size or FULL,
            seconds=seconds,
        )
        if certificate.brief is not None:
            return certificate
        left_s = ends_at - time.perf_counter()
        measured = quantised(generator), generator, certificate, self.classifier, self.test
        found = measure_int8(*measured, seconds=left_s)
        return replace(certificate, int8=found)
