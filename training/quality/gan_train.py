"""GAN-train: accuracy of classifiers trained on generated images alone (arXiv 1807.09499).

It is high only where images match their labels, look real, and are as varied as real ones.
"""

import logging
import statistics
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.data.named import Dataset
from training.devices import has_native_bfloat16
from training.quality.classifier import build, estimate_pass_s, fit, to_images

IMAGES = 60_000
EPOCHS = 4  # passes over `IMAGES` images
SEEDS = 3

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class GANTrain:
    """Accuracies on the real test images, in [0, 1]."""

    images: int  # number of generated training images
    accuracies: tuple[float, ...]  # of classifiers trained on generated images, one per seed
    real: float  # of one trained as long on the real training images

    @property
    def mean(self) -> float:
        """Return the mean over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def std(self) -> float:
        """Return the standard deviation over the seeds."""
        return statistics.stdev(self.accuracies)


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


def gan_train(generated: Dataset, train: Dataset, test: Dataset) -> GANTrain:
    """Train classifiers on generated images and one on real images; test all on real images."""
    accuracies = []
    for seed in range(SEEDS):
        accuracies.append(_accuracy(_train(generated, seed), test))
        logger.info("GAN-train, seed %d: %s", seed, f"{accuracies[-1]:.2%}")
    real = _accuracy(_train(train, 0), test)
    logger.info("The same on real training images: %s", f"{real:.2%}")
    return GANTrain(images=len(generated.labels), accuracies=tuple(accuracies), real=real)


def estimate_gan_train_s(train: Dataset) -> float:
    """Estimate the duration of `gan_train` in seconds from a few timed steps on real images."""
    passes = (SEEDS + 1) * EPOCHS * IMAGES / len(train.labels)
    return passes * estimate_pass_s(_build(train, 0), train)


def _train(dataset: Dataset, seed: int) -> GanTrainClassifier:
    """Train a classifier for about `EPOCHS * IMAGES` images, in whole passes."""
    classifier = _build(dataset, seed)
    epochs = max(1, round(EPOCHS * IMAGES / len(dataset.labels)))
    half = has_native_bfloat16(dataset.labels.device)
    fit(classifier, dataset, epochs=epochs, seed=seed, half=half)
    return classifier


def _build(dataset: Dataset, seed: int) -> GanTrainClassifier:
    classifier = build(GanTrainClassifier, dataset, seed)
    return classifier.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


@torch.inference_mode()
def _accuracy(classifier: GanTrainClassifier, test: Dataset) -> float:
    correct = [
        (classifier(to_images(pixels)).argmax(1) == labels).float()
        for pixels, labels in zip(test.images.split(500), test.labels.split(500), strict=True)
    ]
    return torch.cat(correct).mean().item()
