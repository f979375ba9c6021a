"""The judge: a classifier trained on real images, whose eyes the certificate measures with.

A judge never sees a generated image while it learns. It is small enough to travel with the code, so
that everybody measures with the same one; its file's SHA-256 stands in every certificate.
"""

import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from training.data.named import Dataset
from training.devices import has_native_bfloat16
from training.files import write_atomically

EPOCHS = 12
MIN_IMAGES = 200_000  # that a judge sees, however few different ones there are

# How the speed of training is estimated: so many steps at a time, so often and so long, after some
# that are slower. Another process may have the core now and then.
_STEPS, _TIMED, _TIMED_S, _UNTIMED = 4, 3, 2.0, 2

FOLDER = Path(__file__).parent / "classifiers"

# The judges that travel with the code: data set name -> SHA-256 of the file.
DIGESTS = {
    "mnist": "112d65ddbd5da0a41e500ff6f27f6bc2b12cbdb225ef81b5428646f2b774fb9a",
    "fashion-mnist": "366f460b3a026240a4590a4548bb90d6744629774942256d6c71b980216582c9",
}
# The digests of the training images that they learnt.
_TRAINED_ON = {
    "mnist": "c5097fdd51cfdbe7695fd9df3612695696864b5c424f58d843ffdc5d335e9914",
    "fashion-mnist": "d9ef4273af5c2e360155dad0c06bd939447bf37a6620db007d69fc79e4732045",
}


class JudgeError(Exception):
    """A judge that is missing or is not the one that was committed; names the path."""


class Classifier(nn.Module):
    """Images to class logits by three stages of two convolutions and a mean over positions."""

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
        """(N, C, H, W) in [-1, 1] to (N, 4 * width), the space in which distances are measured."""
        maps: Tensor = self.main(images)
        return maps.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """(N, C, H, W) float32 in [-1, 1] to logits (N, num_classes)."""
        logits: Tensor = self.out(self.features(images))
        return logits


@dataclass(frozen=True)
class FeatureClassifier:
    """A trained classifier in evaluation mode, and the SHA-256 of the file it came from."""

    classifier: Classifier
    digest: str

    @torch.inference_mode()
    def look(self, pixels: Tensor, *, batch_size: int = 100) -> tuple[Tensor, Tensor]:
        """Classify images and measure them.

        Args:
            pixels: (N, C, H, W) uint8.
            batch_size: images at a time.

        Returns:
            predictions (N,) int64, and features (N, D) float32.
        """
        predictions, features = [], []
        for batch in pixels.split(batch_size):
            seen = self.classifier.features(to_images(batch))
            features.append(seen)
            predictions.append(self.classifier.out(seen).argmax(1))
        return torch.cat(predictions), torch.cat(features)

    def accuracy(self, dataset: Dataset) -> float:
        """The share of a data set's images that are given their own label."""
        predictions, _ = self.look(dataset.images)
        return share_right(predictions, dataset)


def share_right(predictions: Tensor, dataset: Dataset) -> float:
    """The share, in [0, 1], of predictions (N,) that are the label of their image."""
    return (predictions == dataset.labels).float().mean().item()


def to_images(pixels: Tensor) -> Tensor:
    """Uint8 pixels to float32 images in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)


def augment(images: Tensor, rng: torch.Generator) -> Tensor:
    """Turn, scale and move each image a little: up to 10 degrees, 10 % and 2 pixels in 28."""
    n, device = len(images), images.device
    u = torch.rand((4, n), generator=rng, device=device) * 2.0 - 1.0
    angle, scale = u[0] * math.radians(10), 1.0 + 0.1 * u[1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    theta = torch.stack([cos, -sin, u[2] / 7, sin, cos, u[3] / 7], dim=1).view(n, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_classifier(
    dataset: Dataset,
    *,
    epochs: float,
    seed: int,
    batch_size: int = 128,
    lr: float = 3e-3,
    half: bool = False,
    report: Callable[[int, float], None] = lambda _epoch, _loss: None,
) -> Classifier:
    """Train a judge's classifier from scratch; see `fit`."""
    classifier = _classifier(dataset, seed)
    fit(
        classifier,
        dataset,
        epochs=epochs,
        seed=seed,
        batch_size=batch_size,
        lr=lr,
        half=half,
        report=report,
    )
    return classifier


def _classifier(dataset: Dataset, seed: int) -> Classifier:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Classifier(num_classes=dataset.num_classes, channels=dataset.channels)


def fit(
    classifier: nn.Module,
    dataset: Dataset,
    *,
    epochs: float,
    seed: int,
    batch_size: int = 128,
    lr: float = 3e-3,
    half: bool = False,
    report: Callable[[int, float], None] = lambda _epoch, _loss: None,
) -> None:
    """Train a classifier in place, on the data set's device, and leave it in evaluation mode.

    Adam with decoupled weight decay, one cycle of the learning rate, augmented images.

    Args:
        classifier: (N, C, H, W) to logits (N, num_classes).
        dataset: resident on the device.
        epochs: passes over it; the last one may be a part of one.
        seed: decides order and augmentation.
        batch_size: images a step, or all images where they are fewer.
        lr: the highest learning rate.
        half: whether to multiply in bfloat16.
        report: told (epoch, mean loss) after every epoch.
    """
    device = dataset.labels.device
    batch_size = min(batch_size, len(dataset.labels))
    classifier.to(device)
    rng = torch.Generator(device).manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=1e-2, fused=True)
    steps = len(dataset.labels) // batch_size  # of a pass
    left = max(1, round(epochs * steps))
    # Of very few steps, PyTorch cannot make a cycle.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=max(10, left), pct_start=0.2
    )
    for epoch in range(math.ceil(left / steps)):
        order = torch.randperm(len(dataset.labels), generator=rng, device=device)
        total = torch.zeros((), device=device)
        batches = order[: min(steps, left) * batch_size].view(-1, batch_size)
        for indices in batches:
            images = augment(to_images(dataset.images[indices]), rng)
            images = images.contiguous(memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = classifier(images)
            loss = F.cross_entropy(logits.float(), dataset.labels[indices])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.detach()
        left -= len(batches)
        report(epoch, total.item() / len(batches))
    classifier.eval().requires_grad_(False)


def estimate_pass_s(
    classifier: nn.Module, dataset: Dataset, *, batch_size: int = 128, half: bool = False
) -> float:
    """About how long `fit` takes here for one pass, in seconds: some of its steps are timed.

    The classifier is worth nothing afterwards.
    """
    batch_size = min(batch_size, len(dataset.labels))
    few = replace(dataset, images=dataset.images[:batch_size], labels=dataset.labels[:batch_size])
    spent_s: list[float] = []
    while len(spent_s) < _UNTIMED + _TIMED or sum(spent_s) < _TIMED_S:
        classifier.train().requires_grad_(True)
        began = time.perf_counter()
        fit(classifier, few, epochs=_STEPS, seed=0, batch_size=batch_size, half=half)
        spent_s.append(time.perf_counter() - began)
    return statistics.median(spent_s[_UNTIMED:]) / _STEPS * (len(dataset.labels) // batch_size)


def save_judge(
    path: Path, classifier: Classifier, *, dataset: str, epochs: float, seed: int
) -> str:
    """Write a judge with half-precision weights, to keep it small; returns its SHA-256."""
    tensors = {
        name: (t.half() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in classifier.state_dict().items()
    }
    recipe = json.dumps({"dataset": dataset, "epochs": epochs, "seed": seed}, sort_keys=True)
    data = safetensors.torch.save(tensors, {"judge": recipe})
    write_atomically(path, data)
    return hashlib.sha256(data).hexdigest()


def judge_for(
    train: Dataset,
    test: Dataset,
    *,
    cache: Path,
    report: Callable[[str], None],
    seconds: float | None = None,
) -> FeatureClassifier:
    """The judge for a data set, on that data set's device.

    It is the one that travels with the code, where there is one for these very images; else one
    that was trained on them before; else one that is trained now and kept.

    Args:
        train: the training images.
        test: real images that the judge does not learn.
        cache: the folder to keep judges in; a damaged one there is replaced.
        report: told what takes time.
        seconds: the most that training one may take. A judge that learnt less for want of time is
            replaced as soon as there is more.

    Raises:
        JudgeError: the file that travels with the code is not the committed one.
        OSError: the cache cannot be written.
    """
    if _TRAINED_ON.get(train.name) == train.digest:
        return load_judge(test)
    path = cache / "judges" / f"{train.digest}.safetensors"
    kept, learnt = _kept(path, test, report)
    full = float(max(EPOCHS, -(-MIN_IMAGES // len(train.labels))))
    if kept is not None and learnt >= full:
        return kept
    half = has_native_bfloat16(train.labels.device)
    pass_s = estimate_pass_s(_classifier(train, seed=0), train, half=half)
    epochs = full if seconds is None else min(full, seconds / pass_s)
    # Half is near enough: no two estimates are the same.
    if kept is not None and seconds is not None and learnt >= epochs / 2:
        return kept
    passes = f"{full:g}" if epochs == full else f"for want of time {epochs:.2g} instead of {full:g}"
    report(
        f"Training a judge of {train.name}: {passes} passes over its training images, about "
        f"{epochs * pass_s / 60:.1f} minutes"
    )
    classifier = train_classifier(train, epochs=epochs, seed=0, half=half)
    save_judge(path, classifier, dataset=train.name, epochs=epochs, seed=0)
    return _parse_judge(path.read_bytes(), test)


def _kept(
    path: Path, test: Dataset, report: Callable[[str], None]
) -> tuple[FeatureClassifier | None, float]:
    """The judge that was trained before, and how many passes; one that is damaged is no judge."""
    if not path.exists():
        return None, 0.0
    try:
        with safe_open(path, "pt") as file:
            recipe = json.loads(file.metadata()["judge"])
        return _parse_judge(path.read_bytes(), test), float(recipe["epochs"])
    except (SafetensorError, RuntimeError, KeyError, TypeError, ValueError) as error:
        report(f"{path}: is damaged ({error}), and is trained again.")
        return None, 0.0


def load_judge(dataset: Dataset, folder: Path = FOLDER) -> FeatureClassifier:
    """The judge that travels with the code for a named data set, on that data set's device.

    Raises:
        JudgeError: there is none, or its file is not the committed one.
    """
    path = folder / f"{dataset.name}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise JudgeError(f"{path}: no judge for the data set {dataset.name!r}: {error}") from error
    digest = hashlib.sha256(data).hexdigest()
    expected = DIGESTS.get(dataset.name)
    if digest != expected:
        raise JudgeError(f"{path}: SHA-256 is {digest}, the committed judge has {expected}")
    return _parse_judge(data, dataset)


def _parse_judge(data: bytes, dataset: Dataset) -> FeatureClassifier:
    classifier = Classifier(num_classes=dataset.num_classes, channels=dataset.channels)
    classifier.load_state_dict(safetensors.torch.load(data))  # copies into float32
    classifier.eval().requires_grad_(False)
    # Channels last, and few images at a time: what a CPU does fastest.
    classifier.to(dataset.labels.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return FeatureClassifier(classifier, hashlib.sha256(data).hexdigest())
