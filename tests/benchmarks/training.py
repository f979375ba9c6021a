"""Training steps beside the loop as it is commonly published, at the same batch and networks.

    python -m tests.benchmarks.training [--device cuda] [--data-dir DIR] [--batches 64 256 1024]

The published loop (CGAN-PyTorch, PyTorch-GAN): a DataLoader over torchvision's MNIST with ToTensor
and Normalize, in the training process as the one has it, or in four workers as the other; real and
fake images judged apart, Adam as it comes, losses read back with `.item()` at every step. Its
networks here are this project's own, and its defects are left out: labels are drawn from all
classes, weights start as PyTorch starts them. The same loop with images that are float tensors
beforehand shows how much of the difference is the loading.

All are compared at several batch sizes. Rounds are interleaved; printed are medians, in images per
second and in microseconds a step. The ratios are to the faster of the published loops, and to the
one with nothing to load. The floor is what the matrix products of a step take, one after the other
and nothing else. On a GPU steps are also launched one by one, and those of preset `conv` timed.

    python -m tests.benchmarks.training --against CHECKOUT [--batches 32 128]

compares the steps of preset `conv`, by this working tree and by another one, instead.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.utils.data
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tests.benchmarks import step_rate
from tests.support.processes import REPOSITORY
from training.config import PRESETS, TrainingConfig
from training.cuda_graph import make_step
from training.data.named import Dataset, default_data_dir, load_dataset
from training.devices import describe, has_native_bfloat16, resolve_device
from training.loop import make_eager_step
from training.state import create_state, generator_config


class PerImage(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """MNIST image by image, as torchvision's MNIST, ToTensor and Normalize go about it.

    The same operations in the same order, written out here because torchvision is not a dependency:
    the row as a PIL image, its bytes copied into an array, the channel put first, scaled to [0, 1];
    then a copy with mean and deviation made into tensors, checked, and applied. The Resize to 28
    pixels between them returns an image that has 28 pixels as it is, and is left out.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._images, self._labels = dataset.images.cpu().squeeze(1), dataset.labels.cpu()

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(1, 28, 28) float32 in [-1, 1], and the label."""
        image = Image.fromarray(self._images[index].numpy())
        return normalise(to_tensor(image), [0.5], [0.5]), int(self._labels[index])


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.from_numpy(np.array(image, np.uint8, copy=True))
    pixels = pixels.view(image.size[1], image.size[0], len(image.getbands()))
    return pixels.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def normalise(image: Tensor, mean: list[float], deviation: list[float]) -> Tensor:
    image = image.clone()
    means = torch.as_tensor(mean, dtype=image.dtype, device=image.device)
    deviations = torch.as_tensor(deviation, dtype=image.dtype, device=image.device)
    if (deviations == 0).any():
        raise ValueError("a deviation of zero")
    return image.sub_(means.view(-1, 1, 1)).div_(deviations.view(-1, 1, 1))


def ready_made(dataset: Dataset) -> TensorDataset:
    """The same as float tensors beforehand."""
    return TensorDataset(dataset.images.cpu().float().div(127.5).sub(1.0), dataset.labels.cpu())


def endless(loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        yield from loader


def plain_loop(
    dataset: Dataset,
    device: torch.device,
    source: torch.utils.data.Dataset[Any],
    *,
    batch: int,
    workers: int,
) -> Callable[[float], float]:
    """The published loop as a function: seconds to spend -> images per second."""
    state = create_state(
        PRESETS["paper"], generator_config(PRESETS["paper"], dataset), device, seed=0
    )
    generator, discriminator = state.generator, state.discriminator
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for network in (discriminator, generator)
    ]
    loader = DataLoader(source, batch, shuffle=True, drop_last=True, num_workers=workers)
    batches = endless(loader)
    loss = nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones(batch, device=device), torch.zeros(batch, device=device)

    def step(real: Tensor, labels: Tensor) -> tuple[float, float]:
        real, labels = real.to(device), labels.to(device)
        wanted = torch.randint(dataset.num_classes, (batch,), device=device)
        fake = generator(torch.randn(batch, 100, device=device), wanted)
        discriminator.zero_grad()
        real_loss = loss(discriminator(real, labels), ones)
        fake_loss = loss(discriminator(fake.detach(), wanted), zeros)
        (real_loss + fake_loss).backward()
        optimizers[0].step()
        generator.zero_grad()
        generator_loss = loss(discriminator(fake, wanted), ones)
        generator_loss.backward()
        optimizers[1].step()
        return (real_loss + fake_loss).item(), generator_loss.item()

    def run(seconds: float) -> float:
        began, steps = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds:
            step(*next(batches))
            steps += 1
        return steps * batch / spent

    return run


def our_loop(
    dataset: Dataset, device: torch.device, config: TrainingConfig, *, eager: bool = False
) -> Callable[[float], float]:
    """This project's steps as a function: seconds to spend -> images per second."""
    state = create_state(config, generator_config(config, dataset), device, seed=0)
    step = (make_eager_step if eager else make_step)(state, dataset)

    def run(seconds: float) -> float:
        began, first = time.perf_counter(), state.images_seen
        while time.perf_counter() - began < seconds:
            report = step(0.0)
        report.sum().item()  # waits for the device
        return (state.images_seen - first) / (time.perf_counter() - began)

    return run


def products(device: torch.device, batch: int, dtype: torch.dtype) -> Callable[[float], float]:
    """The products of a step of the document's pair, as a function like a loop.

    A generator's forward, and the discriminator's on real and fake images; back through it to its
    weights; its forward on the fakes again, back to them, and through the generator.
    """
    generator = list(pairwise((110, 128, 256, 512, 1024, 784)))
    discriminator = list(pairwise((794, 512, 256, 1)))
    passes = [
        (batch, generator, "forward"),
        (2 * batch, discriminator, "forward"),
        (2 * batch, discriminator, "to the weights"),
        (batch, discriminator, "forward"),
        (batch, discriminator, "to the input"),
        (batch, generator, "to the weights"),
    ]

    def filled(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    work: list[tuple[Tensor, Tensor]] = []
    for rows, layers, kind in passes:
        for place, (fan_in, fan_out) in enumerate(layers):
            x, weight, slope = filled(rows, fan_in), filled(fan_out, fan_in), filled(rows, fan_out)
            if kind == "forward":
                work.append((x, weight.T))
            elif kind == "to the input" or place:  # nobody needs the slope at a network's input
                work.append((slope, weight))
            if kind == "to the weights":
                work.append((slope.T, x))

    def once() -> None:
        for one, other in work:
            torch.mm(one, other)

    once()
    if device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
    step = graph.replay if device.type == "cuda" else once

    def run(seconds: float) -> float:
        began, steps = time.perf_counter(), 0
        while time.perf_counter() - began < seconds:
            step()
            steps += 1
            if device.type == "cuda" and steps % 64 == 0:
                torch.cuda.synchronize(device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return steps * batch / (time.perf_counter() - began)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each loop in each round")
    parser.add_argument("--batches", type=int, nargs="+", help="[default: 64 256, or 32 128]")
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another working tree")
    options = parser.parse_args()
    if options.against is not None:
        compare_checkouts(options)
        return
    device = resolve_device(options.device)
    dataset = load_dataset("mnist", "train", options.data_dir).to(device)
    print(f"{describe(device)}, torch {torch.__version__}")
    for batch in options.batches or [64, 256]:
        compare(dataset, device, batch, options.rounds, options.seconds)


def compare_checkouts(options: argparse.Namespace) -> None:
    """Print the speed of the default networks' steps here and in another working tree."""
    print(f"{describe(resolve_device(options.device))}, torch {torch.__version__}")
    step_rate.compare(
        {str(options.against): options.against.resolve(), "this working tree": REPOSITORY},
        batches=options.batches or [32, 128],
        rounds=options.rounds,
        seconds=options.seconds,
        data_dir=options.data_dir.resolve(),
        device=options.device,
    )


def compare(
    dataset: Dataset, device: torch.device, batch: int, rounds: int, seconds: float
) -> None:
    """Print how fast all loops are at one batch size."""
    paper = dataclasses.replace(PRESETS["paper"], batch_size=batch)
    images, ready = PerImage(dataset), ready_made(dataset)
    published = {
        "published loop": plain_loop(dataset, device, images, batch=batch, workers=0),
        "published loop, 4 workers": plain_loop(dataset, device, images, batch=batch, workers=4),
    }
    loops = {
        **published,
        "the same, ready-made floats": plain_loop(dataset, device, ready, batch=batch, workers=0),
    }
    conv = dataclasses.replace(PRESETS["conv"], batch_size=batch)
    precisions: list[Literal["float32", "bfloat16"]] = ["float32"]
    if has_native_bfloat16(device):
        precisions.append("bfloat16")
    for precision in precisions:
        config = dataclasses.replace(paper, precision=precision)
        loops[f"preset paper, {precision}"] = our_loop(dataset, device, config)
        loops[f"floor, {precision}"] = products(device, batch, getattr(torch, precision))
        if device.type == "cuda":
            name = f"preset paper, {precision}, eager"
            loops[name] = our_loop(dataset, device, config, eager=True)
    if device.type == "cuda":
        loops["preset conv"] = our_loop(dataset, device, conv)
        loops["preset conv, eager"] = our_loop(dataset, device, conv, eager=True)
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(2.0)
    for _ in range(rounds):
        for name, loop in loops.items():
            speeds[name].append(loop(seconds))
    medians = {name: statistics.median(found) for name, found in speeds.items()}
    floors = max(medians[name] for name in published), medians["the same, ready-made floats"]
    head = f"{'images/s':>12}{'us a step':>12}{'to published':>16}{'to ready-made':>16}"
    print(f"{f'batch {batch}':<32}{head}")
    for name, median in medians.items():
        ratios = "".join(f"{median / floor:>15.2f}x" for floor in floors)
        print(f"{name:<32}{median:>12,.0f}{1e6 * batch / median:>12,.0f}{ratios}")


if __name__ == "__main__":
    main()
