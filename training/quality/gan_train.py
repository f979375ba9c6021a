"""GAN-train: accuracy of classifiers trained on generated images alone (arXiv 1807.09499).

It is high only where images match their labels, look real, and are as varied as real ones.
"""

import logging
import math
import statistics
import time
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from training.data.named import Dataset
from training.devices import has_native_bfloat16
from training.quality.classifier import build, fit, to_images
from training.quality.spread import binomial

IMAGES = 60_000
EPOCHS = 4  # passes over the generated images
SEEDS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GANTrainSpread:
    """Standard errors of the accuracies in a brief certificate, and how it was shortened."""

    shown: int  # images shown to the classifier that saw the fewest, repetitions counted
    generated: float  # of the mean
    real: float


@dataclass(frozen=True, kw_only=True)
class GANTrain:
    """Accuracies on the real test images, in [0, 1]."""

    images: int  # number of generated training images
    accuracies: tuple[float, ...]  # of classifiers trained on generated images, one per seed
    real: float  # of one trained as long on the real training images
    spread: GANTrainSpread | None = None  # in a brief certificate

    @property
    def mean(self) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Return the standard deviation over the seeds, in a brief certificate the spread."""
        return self.spread.generated if self.spread else statistics.stdev(self.accuracies)


class GanTrainClassifier(nn.Module):
    """A small classifier that trains fast on a CPU: images to class logits.

    The first convolution halves the size, so that no layer computes at full size.
    """

    def __init__(self, *, num_classes: int, channels: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        fan_in = channels
        for fan_out, stride in ((width, 2), (width, 1), (2 * width, 2), (2 * width, 1)):
            layers += [
                nn.Conv2d(fan_in, fan_out, 3, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(fan_out),
                nn.ReLU(),
            ]
            fan_in = fan_out
        self.main = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.out = nn.Linear(4 * fan_in, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) float32 in [-1, 1] to logits (N, num_classes)."""
        logits: Tensor = self.out(self.main(images))
        return logits


def gan_train(
    generated: Dataset,
    train: Dataset,
    test: Dataset,
    seeds: int = SEEDS,
    *,
    seconds: float = math.inf,
    spread: bool = False,
) -> GANTrain:
    """Train classifiers on generated images and one on real images; test all on real images.

    Each is shown `EPOCHS` times as many images as were generated, or fewer if there are not enough
    seconds left; all of them have the same time.
    """
    ends_at, accuracies, shown = time.perf_counter() + seconds, [], []
    count = EPOCHS * len(generated.labels)
    for seed in range(seeds):
        limit = (ends_at - time.perf_counter()) / (seeds + 1 - seed)
        classifier, seen = _train(generated, seed, count, limit)
        accuracies.append(_accuracy(classifier, test))
        shown.append(seen)
        logger.info("GAN-train, seed %d: %s", seed, f"{accuracies[-1]:.2%}")
    classifier, seen = _train(train, 0, min(shown), ends_at - time.perf_counter())
    real = _accuracy(classifier, test)
    logger.info("The same on real training images: %s", f"{real:.2%}")
    found = GANTrain(images=len(generated.labels), accuracies=tuple(accuracies), real=real)
    if not spread:
        return found
    return replace(found, spread=_spread(found, min(*shown, seen), len(test.labels)))


def _spread(found: GANTrain, shown: int, test_images: int) -> GANTrainSpread:
    """Return the errors of few test images, or of few seeds where that is larger."""
    several = len(found.accuracies) > 1
    return GANTrainSpread(
        shown=shown,
        generated=max(binomial(found.mean, test_images), found.std if several else 0.0),
        real=binomial(found.real, test_images),
    )


def _train(
    dataset: Dataset, seed: int, images: int, seconds: float
) -> tuple[GanTrainClassifier, int]:
    """Train a classifier on a number of images, repetitions counted; return it and that number."""
    classifier = build_classifier(dataset, seed)
    count = len(dataset.labels)
    half = has_native_bfloat16(dataset.labels.device)
    epochs = fit(classifier, dataset, epochs=images / count, seed=seed, half=half, seconds=seconds)
    return classifier, round(epochs * count)


def build_classifier(dataset: Dataset, seed: int) -> GanTrainClassifier:
    """Return an untrained classifier for a data set."""
    classifier = build(GanTrainClassifier, dataset, seed)
    return classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@torch.inference_mode()
def _accuracy(classifier: GanTrainClassifier, test: Dataset) -> float:
    correct = [
        (classifier(to_images(pixels)).argmax(1) == labels).float()
        for pixels, labels in zip(test.images.split(500), test.labels.split(500), strict=True)
    ]
    return torch.cat(correct).mean().item()
