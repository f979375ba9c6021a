"""Feature classifiers: trained on real images only, they are the feature space of all metrics.

The classifiers of the named data sets are part of this package, so that everybody measures with the
same weights. The SHA-256 of a classifier's file stands in every certificate.
"""

import hashlib
import json
import logging
import math
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.named import Dataset
from training.devices import has_native_bfloat16
from training.files import FileError, write_atomically

EPOCHS = 12
MIN_IMAGES = 200_000  # a small data set is passed more often, until this many images were shown
BATCH = 128  # images per step, or all images if they are fewer

# `estimate_pass_s` times rounds of this many steps. The first rounds are slower and not counted;
# the median of the others is robust to processes that take the core for a moment.
_STEPS, _WARMUP_ROUNDS, _MIN_ROUNDS, _MIN_TIMED_S = 4, 2, 5, 2.0

FOLDER = Path(__file__).parent / "classifiers"

# The classifiers of this package: data set name -> SHA-256 of the file.
DIGESTS = {
    "mnist": "112d65ddbd5da0a41e500ff6f27f6bc2b12cbdb225ef81b5428646f2b774fb9a",
    "fashion-mnist": "366f460b3a026240a4590a4548bb90d6744629774942256d6c71b980216582c9",
}
# Data set name -> `Dataset.digest` of the images that they were trained on.
_TRAINED_ON = {
    "mnist": "c5097fdd51cfdbe7695fd9df3612695696864b5c424f58d843ffdc5d335e9914",
    "fashion-mnist": "d9ef4273af5c2e360155dad0c06bd939447bf37a6620db007d69fc79e4732045",
}

logger = logging.getLogger(__name__)

Network = TypeVar("Network", bound=nn.Module)


class ClassifierError(FileError):
    """A bundled classifier that is missing or differs from the committed one."""


class ClassifierNetwork(nn.Module):
    """Images to class logits: three stages of two convolutions, then a mean over positions."""

    def __init__(self, *, num_classes: int, channels: int, width: int = 24) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        fan_in = channels
        for fan_out in (width, 2 * width, 4 * width):
            for conv_in in (fan_in, fan_out):
                layers += [
                    nn.Conv2d(conv_in, fan_out, 3, padding=1, bias=False),
                    nn.BatchNorm2d(fan_out),
                    nn.ReLU(),
                ]
            layers.append(nn.MaxPool2d(2))
            fan_in = fan_out
        self.main = nn.Sequential(*layers[:-1])  # the mean replaces the last pooling
        self.out = nn.Linear(fan_in, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) in [-1, 1] to features (N, 4 * width)."""
        maps: Tensor = self.main(images)
        return maps.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, C, H, W) float32 in [-1, 1] to logits (N, num_classes)."""
        logits: Tensor = self.out(self.features(images))
        return logits


@dataclass(frozen=True)
class FeatureClassifier:
    """A trained network in evaluation mode, and the SHA-256 of its file."""

    network: ClassifierNetwork
    digest: str

    @torch.inference_mode()
    def classify(self, pixels: Tensor, *, batch_size: int = 100) -> tuple[Tensor, Tensor]:
        """Map pixels (N, C, H, W) uint8 to predictions (N,) int64 and features (N, D) float32."""
        predictions, features = [], []
        for batch in pixels.split(batch_size):
            features.append(self.network.features(to_images(batch)))
            predictions.append(self.network.out(features[-1]).argmax(1))
        return torch.cat(predictions), torch.cat(features)

    def accuracy(self, dataset: Dataset) -> float:
        """Return the share of a data set's images that are classified correctly."""
        predictions, _ = self.classify(dataset.images)
        return (predictions == dataset.labels).float().mean().item()


def to_images(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels to float32 images in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def random_affine(images: Tensor, rng: torch.Generator) -> Tensor:
    """Rotate, scale and shift each image by up to 10 degrees, 10 % and a fourteenth of its size."""
    n, device = len(images), images.device
    u = torch.rand((4, n), generator=rng, device=device) * 2.0 - 1.0
    angle, scale = u[0] * math.radians(10), 1.0 + 0.1 * u[1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, u[2] / 7, sin, cos, u[3] / 7], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_classifier(
    dataset: Dataset, *, epochs: float, seed: int, half: bool = False
) -> ClassifierNetwork:
    """Train a new network, and log the loss of every epoch; see `fit`."""
    network = build(ClassifierNetwork, dataset, seed)
    fit(network, dataset, epochs=epochs, seed=seed, half=half, log_epochs=True)
    return network


def build(kind: type[Network], dataset: Dataset, seed: int) -> Network:
    """Return an untrained network for a data set; leave the global random state as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(num_classes=dataset.num_classes, channels=dataset.channels)


def fit(
    network: nn.Module,
    dataset: Dataset,
    *,
    epochs: float,
    seed: int,
    half: bool = False,
    log_epochs: bool = False,
) -> None:
    """Train a network in place, on the data set's device, and leave it in evaluation mode.

    Adam with decoupled weight decay, one cycle of the learning rate, images augmented by
    `random_affine`.

    Args:
        network: (N, C, H, W) to logits (N, num_classes).
        dataset: resident on the device.
        epochs: passes over it; the last one may be partial.
        seed: decides order and augmentation.
        half: compute in bfloat16.
        log_epochs: log the mean loss of every epoch.
    """
    device = dataset.labels.device
    batch_size = min(BATCH, len(dataset.labels))
    network.to(device)
    rng = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2, fused=True)
    steps = len(dataset.labels) // batch_size  # per pass
    left = max(1, round(epochs * steps))
    # OneCycleLR fails with very few steps.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=max(10, left), pct_start=0.2
    )
    passes = math.ceil(left / steps)
    for epoch in range(passes):
        order = torch.randperm(len(dataset.labels), generator=rng, device=device)
        total = torch.zeros((), device=device)
        batches = order[: min(steps, left) * batch_size].view(-1, batch_size)
        for indices in batches:
            images = random_affine(to_images(dataset.images[indices]), rng)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = network(images)
            loss = F.cross_entropy(logits.float(), dataset.labels[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        left -= len(batches)
        if log_epochs:
            mean = total.item() / len(batches)
            logger.info("epoch %d of %d: loss %.4f", epoch + 1, passes, mean)
    network.eval().requires_grad_(False)


def estimate_pass_s(network: nn.Module, dataset: Dataset) -> float:
    """Estimate the duration of one pass of `fit` in seconds by timing some steps.

    The network's weights are useless afterwards.
    """
    half = has_native_bfloat16(dataset.labels.device)
    few = replace(dataset, images=dataset.images[:BATCH], labels=dataset.labels[:BATCH])
    spent_s: list[float] = []
    while len(spent_s) < _MIN_ROUNDS or sum(spent_s) < _MIN_TIMED_S:
        network.train().requires_grad_(True)
        started = time.perf_counter()
        fit(network, few, epochs=_STEPS, seed=0, half=half)
        spent_s.append(time.perf_counter() - started)
    step_s = statistics.median(spent_s[_WARMUP_ROUNDS:]) / _STEPS
    return step_s * (len(dataset.labels) // len(few.labels))


def save_classifier(
    path: Path, network: ClassifierNetwork, *, dataset: str, epochs: float, seed: int
) -> str:
    """Write a classifier with half-precision weights, to keep it small; return its SHA-256."""
    tensors = {
        name: (t.half() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in network.state_dict().items()
    }
    recipe = json.dumps({"dataset": dataset, "epochs": epochs, "seed": seed}, sort_keys=True)
    data = safetensors.torch.save(tensors, {"classifier": recipe})
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def get_classifier(
    train: Dataset, *, cache: Path, seconds: float | None = None
) -> FeatureClassifier:
    """Return the classifier of a data set, on that data set's device.

    It is the bundled one if there is one for exactly these training images, else a cached one, else
    one that is trained now, within the given time, and cached. A cached one is trained again if it
    is damaged, or if a time limit shortened its training and there is more time now.

    Raises:
        ClassifierError: the bundled file is not the committed one.
        OSError: the cache cannot be written.
    """
    if _TRAINED_ON.get(train.name) == train.digest:
        return load_bundled_classifier(train)
    path, full = _cached_path(cache, train), _full_epochs(train)
    cached, cached_epochs = _load_cached(path, train)
    if cached is not None and cached_epochs >= full:
        return cached
    pass_s = estimate_pass_s(build(ClassifierNetwork, train, seed=0), train)
    epochs = full if seconds is None else min(full, seconds / pass_s)
    # Two estimates of the same machine differ, so half of the epochs counts as enough.
    if cached is not None and seconds is not None and cached_epochs >= epochs / 2:
        return cached
    passes = f"{full:g}" if epochs == full else f"{epochs:.2g} instead of {full:g} (time limit)"
    logger.info(
        "Training a classifier of %s to measure with: %s passes over its training images, "
        "about %.1f minutes",
        train.name,
        passes,
        epochs * pass_s / 60,
    )
    half = has_native_bfloat16(train.labels.device)
    network = train_classifier(train, epochs=epochs, seed=0, half=half)
    save_classifier(path, network, dataset=train.name, epochs=epochs, seed=0)
    return _parse(path.read_bytes(), train)


def estimate_classifier_s(train: Dataset, *, cache: Path) -> float:
    """Estimate how long `get_classifier` trains without a time limit; 0 if it need not."""
    if _TRAINED_ON.get(train.name) == train.digest:
        return 0.0
    full = _full_epochs(train)
    _, cached_epochs = _load_cached(_cached_path(cache, train), train)
    if cached_epochs >= full:
        return 0.0
    return full * estimate_pass_s(build(ClassifierNetwork, train, seed=0), train)


def _cached_path(cache: Path, train: Dataset) -> Path:
    return cache / "classifiers" / f"{train.digest}.safetensors"


def _full_epochs(train: Dataset) -> float:
    return float(max(EPOCHS, -(-MIN_IMAGES // len(train.labels))))


def _load_cached(path: Path, dataset: Dataset) -> tuple[FeatureClassifier | None, float]:
    """Return a cached classifier and its epochs; None and 0 if it is missing or damaged."""
    if not path.exists():
        return None, 0.0
    try:
        with safe_open(path, "pt") as file:
            recipe = json.loads(file.metadata()["classifier"])
        return _parse(path.read_bytes(), dataset), float(recipe["epochs"])
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        logger.warning("%s: is damaged (%s); training it again.", path, error)
        return None, 0.0


def load_bundled_classifier(dataset: Dataset, folder: Path = FOLDER) -> FeatureClassifier:
    """Return the bundled classifier of a named data set, on that data set's device.

    Raises:
        ClassifierError: its file is missing or is not the committed one.
    """
    path = folder / f"{dataset.name}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        cause = f"no classifier of the data set {dataset.name!r}: {error.strerror}"
        raise ClassifierError(path, cause) from error
    digest = hashlib.sha256(data).hexdigest()
    expected = DIGESTS.get(dataset.name)
    if digest != expected:
        cause = f"SHA-256 is {digest}, but that of the committed classifier is {expected}"
        raise ClassifierError(path, cause)
    return _parse(data, dataset)


def _parse(data: bytes, dataset: Dataset) -> FeatureClassifier:
    network = ClassifierNetwork(num_classes=dataset.num_classes, channels=dataset.channels)
    network.load_state_dict(safetensors.torch.load(data))  # copies into float32
    network.eval().requires_grad_(False)
    # Channels last and small batches are fastest on a CPU.
    network.to(dataset.labels.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FeatureClassifier(network, hashlib.sha256(data).hexdigest())
