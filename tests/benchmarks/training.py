"""Training steps beside the loop as it is commonly published, at the same batch and networks.

    python -m tests.benchmarks.training [--device cuda] [--data-dir DIR]

The published loop (CGAN-PyTorch, PyTorch-GAN): a DataLoader of float images, real and fake judged
apart, Adam as it comes, losses read back with `.item()` at every step. Its networks here are this
project's own, and its defects are left out: labels are drawn from all classes, weights start as
PyTorch starts them. Rounds of both are interleaved; printed are medians, in images per second.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from training.capture import make_stepper
from training.config import PRESETS, TrainingConfig
from training.data import Dataset, default_data_dir, load_dataset
from training.devices import describe, has_native_bfloat16, resolve_device
from training.loop import create_state, generator_config

BATCH = 64


def plain_loop(dataset: Dataset, device: torch.device) -> Callable[[float], float]:
    """The published loop as a function: seconds to spend -> images per second."""
    state = create_state(
        PRESETS["paper"], generator_config(PRESETS["paper"], dataset), device, seed=0
    )
    generator, discriminator = state.generator, state.discriminator
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=2e-4, betas=(0.5, 0.999))
        for network in (discriminator, generator)
    ]
    images = dataset.images.cpu().float().div(127.5).sub(1.0)
    loader = DataLoader(
        TensorDataset(images, dataset.labels.cpu()), BATCH, shuffle=True, drop_last=True
    )
    loss = nn.BCEWithLogitsLoss()
    ones, zeros = torch.ones(BATCH, device=device), torch.zeros(BATCH, device=device)

    def step(real: Tensor, labels: Tensor) -> tuple[float, float]:
        real, labels = real.to(device), labels.to(device)
        wanted = torch.randint(dataset.num_classes, (BATCH,), device=device)
        fake = generator(torch.randn(BATCH, 100, device=device), wanted)
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
        while True:
            for real, labels in loader:
                step(real, labels)
                steps += 1
                if (spent := time.perf_counter() - began) > seconds:
                    return steps * BATCH / spent

    return run


def our_loop(
    dataset: Dataset, device: torch.device, config: TrainingConfig
) -> Callable[[float], float]:
    """This project's steps as a function: seconds to spend -> images per second."""
    state = create_state(config, generator_config(config, dataset), device, seed=0)
    stepper = make_stepper(state, dataset, config, print)

    def run(seconds: float) -> float:
        began, first = time.perf_counter(), state.images_seen
        while time.perf_counter() - began < seconds:
            report = stepper(0.0)
        report.sum().item()  # waits for the device
        return (state.images_seen - first) / (time.perf_counter() - began)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each loop in each round")
    options = parser.parse_args()
    device = resolve_device(options.device)
    dataset = load_dataset("mnist", "train", options.data_dir).to(device)
    paper = dataclasses.replace(PRESETS["paper"], batch_size=BATCH)
    loops = {"the published loop": plain_loop(dataset, device)}
    loops["preset paper, float32"] = our_loop(dataset, device, paper)
    if has_native_bfloat16(device):
        half = dataclasses.replace(paper, precision="bfloat16")
        loops["preset paper, bfloat16"] = our_loop(dataset, device, half)
    print(f"{describe(device)}, torch {torch.__version__}, batch {BATCH}")
    speeds: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(2.0)
    for _ in range(options.rounds):
        for name, loop in loops.items():
            speeds[name].append(loop(options.seconds))
    floor = statistics.median(speeds["the published loop"])
    for name, found in speeds.items():
        median = statistics.median(found)
        print(f"{name:<24}{median:>12,.0f} images/s{median / floor:>8.2f}x")


if __name__ == "__main__":
    main()
