"""GAN-train: what a classifier learns from generated images alone (arXiv 1807.09499).

It is the figure that a person who wants images to train on cares about: high only where the images
look like their labels, look real, and are as different from one another as real ones.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.data.named import Dataset
from training.devices import has_native_bfloat16
from training.quality.classifier import estimate_pass_s, fit, to_images

IMAGES = 60_000
EPOCHS = 4  # passes over so many images
SEEDS = 3
_BATCH = 128


@dataclass(frozen=True, kw_only=True)
class GANTrain:
    """Accuracies on the real test images, in [0, 1].

    Attributes:
        images: how many generated images a classifier learns from.
        accuracies: of classifiers trained on generated images, one a seed.
        real: of one trained on as many real training images, or on all there are.
    """

    images: int
    accuracies: tuple[float, ...]
    real: float

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.accuracies)


class GanTrainClassifier(nn.Module):
    """A small classifier that learns fast on a CPU: images to class logits.

    The first convolution halves the size, so that none runs at full size.
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
        """(N, C, H, W) float32 in [-1, 1] to logits (N, num_classes)."""
        logits: Tensor = self.out(self.main(images))
        return logits


def gan_train(
    generated: Dataset, train: Dataset, test: Dataset, report: Callable[[str], None]
) -> GANTrain:
    """Train classifiers on generated images, and one on real ones, and test all on real ones.

    Args:
        generated: made by a generator.
        train: the real training images.
        test: the real test images.
        report: told each accuracy.
    """
    accuracies = []
    for seed in range(SEEDS):
        accuracies.append(_accuracy(_educate(generated, seed), test))
        report(f"GAN-train, seed {seed}: {accuracies[-1]:.2%}")
    real = _accuracy(_educate(train, 0), test)
    report(f"The same on real training images: {real:.2%}")
    return GANTrain(images=len(generated.labels), accuracies=tuple(accuracies), real=real)


def estimate_gan_train_s(train: Dataset) -> float:
    """About how long `gan_train` takes here, in seconds: some steps on real images are timed."""
    passes = (SEEDS + 1) * EPOCHS * IMAGES / len(train.labels)
    pass_s = estimate_pass_s(_pupil(train, 0), train, batch_size=_BATCH, half=_half(train))
    return passes * pass_s


def _educate(dataset: Dataset, seed: int) -> GanTrainClassifier:
    """A pupil that has seen `EPOCHS * IMAGES` images, or as many passes as that takes."""
    pupil = _pupil(dataset, seed)
    epochs = max(1, round(EPOCHS * IMAGES / len(dataset.labels)))
    fit(pupil, dataset, epochs=epochs, seed=seed, batch_size=_BATCH, half=_half(dataset))
    return pupil


def _pupil(dataset: Dataset, seed: int) -> GanTrainClassifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pupil = GanTrainClassifier(num_classes=dataset.num_classes, channels=dataset.channels)
    pupil.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return pupil


def _half(dataset: Dataset) -> bool:
    return has_native_bfloat16(dataset.labels.device)


@torch.inference_mode()
def _accuracy(pupil: GanTrainClassifier, test: Dataset) -> float:
    right = [
        (pupil(to_images(pixels)).argmax(1) == labels).float()
        for pixels, labels in zip(test.images.split(500), test.labels.split(500), strict=True)
    ]
    return torch.cat(right).mean().item()
