"""Training steps of the default networks, by the `training` package of any working tree.

    PYTHONPATH=CHECKOUT python -P tests/benchmarks/step_rate.py --batch 128 --data-dir DIR

prints images/s. `compare` does so for two working trees in turn; its command is `python -m
tests.benchmarks.training --against CHECKOUT`. This file imports nothing else of this project, and
knows the names of 2de422f, the oldest build to compare with.
"""

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

WARM_UP_S = 2.0
START_S = 120.0


def make_step(batch: int, data_dir: Path, device_name: str) -> tuple[Any, Callable[[float], Any]]:
    """Return the state of a run of preset `conv` on MNIST, and its step function."""

    def module(name: str) -> Any:
        return import_module(f"training.{name}")

    # Not `find_spec`: an editable installation of another tree would add its modules.
    is_old = not (Path(import_module("training").__path__[0]) / "state.py").exists()
    device = module("devices").resolve_device(device_name)
    conv = module("config").PRESETS["conv"]
    gamma = {"penalty" if is_old else "r1_gamma": 1.0}
    config = dataclasses.replace(conv, batch_size=batch, **gamma)
    load_dataset = module("data" if is_old else "data.named").load_dataset
    dataset = load_dataset("mnist", "train", data_dir).to(device)
    states = module("loop" if is_old else "state")
    network = states.generator_config(config, dataset)
    state = states.create_state(config, network, device, seed=0)
    if is_old:
        return state, module("capture").make_stepper(state, dataset, config, print)
    return state, module("cuda_graph").make_step(state, dataset)


def measure(state: Any, step: Callable[[float], Any], seconds: float) -> float:
    """Return the images per second of steps for some seconds."""
    started_at, first = time.perf_counter(), state.images_seen
    while time.perf_counter() - started_at < seconds:
        report = step(0.0)
    report.sum().item()  # waits for the device
    return float(state.images_seen - first) / (time.perf_counter() - started_at)


def measure_checkout(checkout: Path, *arguments: str, seconds: float) -> float:
    """Return the images per second of a working tree, in a process of its own."""
    ended = subprocess.run(
        [sys.executable, "-P", __file__, *arguments, "--seconds", str(seconds)],
        env={**os.environ, "PYTHONPATH": str(checkout)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=START_S + 10.0 * seconds,
        check=False,
    )
    if ended.returncode:
        raise SystemExit(f"the training steps of {checkout} failed; see above")
    return float(ended.stdout)


def compare(
    checkouts: Mapping[str, Path],
    *,
    batches: Sequence[int],
    rounds: int,
    seconds: float,
    data_dir: Path,
    device: str,
) -> None:
    """Print the medians of interleaved rounds, with the ratio to the first working tree.

    Every round starts new processes, because two processes of one build may differ.

    Args:
        checkouts: working trees by their names.
        batches: images per step.
        rounds: number of rounds; the trees take turns in being first.
        seconds: duration of the steps of each tree in each round.
        data_dir: folder of the named data sets.
        device: name of the device.
    """
    for batch in batches:
        options = "--batch", str(batch), "--data-dir", str(data_dir), "--device", device
        found: dict[str, list[float]] = {name: [] for name in checkouts}
        for number in range(rounds):
            names = [*checkouts] if number % 2 == 0 else [*checkouts][::-1]
            for name in names:
                found[name].append(measure_checkout(checkouts[name], *options, seconds=seconds))
        print(render_rates(batch, found), flush=True)


def render_rates(batch: int, found: Mapping[str, Sequence[float]]) -> str:
    """Return a table of medians, ranges and ratios to the first name."""
    reference = statistics.median(next(iter(found.values())))
    lines = [f"{f'batch {batch}':<24}{'images/s':>10}{'lowest':>10}{'highest':>10}{'ratio':>8}"]
    for name, rates in found.items():
        middle = statistics.median(rates)
        figures = "".join(f"{each:>10,.0f}" for each in (middle, min(rates), max(rates)))
        lines.append(f"{name:<24}{figures}{middle / reference:>8.2f}")
    return "\n".join(lines)


def main() -> None:
    """Measure the `training` package that is found, and print images/s."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seconds", type=float, default=4.0)
    options = parser.parse_args()
    state, step = make_step(options.batch, options.data_dir, options.device)
    measure(state, step, WARM_UP_S)
    print(measure(state, step, options.seconds))


if __name__ == "__main__":
    main()
