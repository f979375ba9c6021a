"""Feature classifiers: trained on real images only, they are the feature space of all metrics.

The classifiers of the named data sets are part of this package, so that everybody measures with the
same weights. The SHA-256 of a classifier's file stands in every certificate.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
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
# Little training has smaller batches, to make this many steps. With 3,700 images of 540 digits, 16
# images a step reach an accuracy of 97 %, 128 images a step 31 %.
MIN_STEPS, MIN_BATCH = 200, 16

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
    seconds: float = math.inf,
    batch_size: int | None = None,
) -> float:
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
        seconds: limit of the duration. Where it is too short, the cycle of the learning rate
            follows the time instead of the steps, so that it still ends at its lowest value.
        batch_size: images per step; by default `BATCH`, or fewer for `MIN_STEPS` steps.

    Returns:
        the passes made.
    """
    device = dataset.labels.device
    batch_size = batch_size or _choose_batch_size(dataset, epochs)
    steps = len(dataset.labels) // batch_size  # per pass
    total = max(1, round(epochs * steps))
    rng = torch.Generator(device).manual_seed(seed)
    optimizer, schedule = _make_optimizer(network.to(device), total)
    losses, started = torch.zeros((), device=device), time.perf_counter()
    for made, indices in enumerate(_draw_batches(dataset, batch_size, rng), 1):
        images = random_affine(to_images(dataset.images[indices]), rng)
        images = images.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = network(images)
        loss = F.cross_entropy(logits.float(), dataset.labels[indices])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses += loss.detach()
        spent = (time.perf_counter() - started) / max(seconds, 1e-3)
        position = min(total, max(made, math.ceil(spent * total)))
        while schedule.last_epoch < position:
            schedule.step()
        finished = position == total
        if log_epochs and (finished or made % steps == 0):
            epoch, mean = math.ceil(made / steps), losses.item() / ((made - 1) % steps + 1)
            logger.info("epoch %d of %d: loss %.4f", epoch, math.ceil(total / steps), mean)
            losses.zero_()
        if finished:
            break
    network.eval().requires_grad_(False)
    return made / steps


def _choose_batch_size(dataset: Dataset, epochs: float) -> int:
    count = len(dataset.labels)
    return min(BATCH, count, max(MIN_BATCH, round(epochs * count) // MIN_STEPS))


def _make_optimizer(
    network: nn.Module, steps: int
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2, fused=True)
    # OneCycleLR fails with very few steps.
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=max(10, steps), pct_start=0.2
    )


def _draw_batches(dataset: Dataset, size: int, rng: torch.Generator) -> Iterator[Tensor]:
    """Yield indices (size,) without end, in another order in every pass."""
    count = len(dataset.labels)
    while True:
        order = torch.randperm(count, generator=rng, device=dataset.labels.device)
        yield from order[: count // size * size].view(-1, size)


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
    train: Dataset, *, cache: Path, epochs: float | None = None, seconds: float = math.inf
) -> FeatureClassifier:
    """Return the classifier of a data set, on that data set's device.

    It is the bundled one if there is one for exactly these training images, else a cached one, else
    one that is trained now and cached. A cached one is trained again if it is damaged, or if a
    limit shortened its training and there is more time now.

    Args:
        train: the training images.
        cache: the folder of cached classifiers.
        epochs: passes over the training images that there is time for; None for enough.
        seconds: limit of the training, which shortens it if the passes take longer than expected.

    Raises:
        ClassifierError: the bundled file is not the committed one.
        OSError: the cache cannot be written.
    """
    if _is_bundled(train):
        return load_bundled_classifier(train)
    path, full = _cached_path(cache, train), _full_epochs(train)
    epochs = full if epochs is None else min(full, epochs)
    cached, cached_epochs = _load_cached(path, train)
    if cached is not None and _is_enough(cached_epochs, epochs, full):
        return cached
    passes = f"{full:g}" if epochs == full else f"{epochs:.2g} instead of {full:g} (time limit)"
    limit = "" if seconds == math.inf else f", at most {seconds / 60:.1f} minutes"
    logger.info(
        "Training a classifier of %s to measure with: %s passes over its training images%s",
        *(train.name, passes, limit),
    )
    half, network = has_native_bfloat16(train.labels.device), build(ClassifierNetwork, train, 0)
    made = fit(network, train, epochs=epochs, seed=0, half=half, log_epochs=True, seconds=seconds)
    save_classifier(path, network, dataset=train.name, epochs=made, seed=0)
    return _parse(path.read_bytes(), train)


def plan_epochs(train: Dataset, *, cache: Path, affordable: float = math.inf) -> float:
    """Return the passes that `get_classifier` trains if there is time for `affordable` ones.

    It is 0 if there is a classifier that is good enough.
    """
    if _is_bundled(train):
        return 0.0
    full = _full_epochs(train)
    epochs = min(full, affordable)
    _, cached_epochs = _load_cached(_cached_path(cache, train), train)
    return 0.0 if _is_enough(cached_epochs, epochs, full) else epochs


def _is_bundled(train: Dataset) -> bool:
    return _TRAINED_ON.get(train.name) == train.digest


def _is_enough(cached: float, wanted: float, full: float) -> bool:
    # Two estimates of the same machine differ, so half of the epochs counts as enough.
    return cached >= (full if wanted >= full else wanted / 2)


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
