"""One training run in one folder: progress bar, log, sample grids, checkpoints, and the export."""

import dataclasses
import json
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Never, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.artifact import ArtifactInfo, save_artifact
from training.checkpoint import Identity, save_checkpoint
from training.data import Dataset
from training.loop import LogPoint, TrainState, recompute_batch_norm, train, used_fraction
from training.pictures import class_grid, save_png

LOG_EVERY_IMAGES = 12_800
SAMPLE_GRIDS = 40  # over the whole run
CHECKPOINT_EVERY_S = 120.0


@dataclass(frozen=True)
class RunFolder:
    """Where a run keeps its files."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """What `--resume` goes on from."""
        return self.path / "checkpoint.pt"

    @property
    def artifact(self) -> Path:
        """The finished generator."""
        return self.path / "generator.safetensors"

    @property
    def log(self) -> Path:
        """One JSON object a line, one line a log point."""
        return self.path / "log.jsonl"

    @property
    def tensorboard(self) -> Path:
        """TensorBoard's event files."""
        return self.path / "tensorboard"

    def sample(self, images_seen: int) -> Path:
        """A grid of samples, named by progress so that they sort."""
        return self.path / "samples" / f"{images_seen:010d}.png"


class StopFlag:
    """Set by Ctrl-C or SIGTERM; the run then ends at the next step with a checkpoint."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Whether it is set."""
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopFlag]:
    """Turn the first SIGINT or SIGTERM into a flag; a second one acts as it always does."""
    flag = StopFlag()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: FrameType | None) -> None:
        flag.signal = number
        for each, handler in previous.items():
            signal.signal(each, handler)

    for number in previous:
        signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run(
    folder: RunFolder, state: TrainState, dataset: Dataset, identity: Identity, stop: StopFlag
) -> bool:
    """Train to the end of the budget, or until stopped; then export, or leave a checkpoint.

    Returns:
        whether the run is complete and its artifact written.

    Raises:
        CheckpointError: a checkpoint cannot be written (a full disk, say); the last one survives.
        OSError: another file of the run cannot be written.
    """
    (folder.path / "samples").mkdir(parents=True, exist_ok=True)
    _truncate_log(folder.log, state.images_seen)
    last_checkpoint, last_grid = time.monotonic(), _grid_number(state, identity)
    # Purging begins at its step, and the last point before the checkpoint is to stay.
    writer = SummaryWriter(str(folder.tensorboard), purge_step=state.images_seen + 1)
    bar = tqdm(
        total=identity.config.images,
        initial=state.images_seen,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.1,
    )
    with folder.log.open("a", encoding="utf-8") as log, writer, bar:
        for point in train(
            state,
            dataset,
            identity.config,
            minutes=identity.minutes,
            log_every=LOG_EVERY_IMAGES,
            stop=stop,
        ):
            _report(point, state, bar, log, writer)
            if (number := _grid_number(state, identity)) != last_grid or point.finished:
                last_grid = number
                _sample(folder, state, writer)
            due = time.monotonic() - last_checkpoint >= CHECKPOINT_EVERY_S
            if due or point.finished or stop():
                save_checkpoint(folder.checkpoint, state, identity)
                last_checkpoint = time.monotonic()
    if not point.finished:
        return False
    export(folder.artifact, state, dataset, identity)
    return True


def export(path: Path, state: TrainState, dataset: Dataset, identity: Identity) -> None:
    """Write the averaged generator, with batch-norm statistics of its own, as an artifact."""
    recompute_batch_norm(state.ema, batches=200)
    config = dataclasses.asdict(identity.config)
    circumstances = {
        "dataset": identity.dataset,
        "dataset_sha256": identity.dataset_digest,
        "preset": identity.preset,
        "seed": identity.seed,
        "minutes": identity.minutes,
        "elapsed_s": round(state.elapsed_s, 1),
        "device": state.rng.device.type,
        "torch": torch.__version__,
    }
    info = ArtifactInfo(
        network=state.ema.config,
        class_names=dataset.class_names,
        training={**circumstances, "config": config},
        images_seen=state.images_seen,
        source_commit=source_commit(),
    )
    save_artifact(path, state.ema, info)


def source_commit() -> str | None:
    """The commit of this code, with `-dirty` where files differ from it; None outside a clone."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _grid_number(state: TrainState, identity: Identity) -> int:
    return int(used_fraction(state, identity.config, identity.minutes) * SAMPLE_GRIDS)


def _sample(folder: RunFolder, state: TrainState, writer: SummaryWriter) -> None:
    recompute_batch_norm(state.ema, batches=20)
    picture = class_grid(state.ema, columns=10)
    save_png(folder.sample(state.images_seen), picture, scale=2)
    writer.add_image("samples", picture, state.images_seen, dataformats="HWC")


def _report(
    point: LogPoint,
    state: TrainState,
    bar: "tqdm[Never]",
    log: TextIO,
    writer: SummaryWriter,
) -> None:
    if point.losses is None:
        return
    losses = dataclasses.asdict(point.losses)
    line = {
        "images_seen": state.images_seen,
        "elapsed_s": round(state.elapsed_s, 3),
        "images_per_s": round(point.images_per_s, 1),
        **losses,
    }
    log.write(json.dumps(line) + "\n")
    log.flush()
    for name, value in losses.items():
        writer.add_scalar(f"losses/{name}", value, state.images_seen)
    writer.add_scalar("images_per_s", point.images_per_s, state.images_seen)
    if point.used > 0:  # a budget in minutes shows as the images it will come to
        bar.total = round(state.images_seen / point.used)
    bar.set_postfix(
        D=f"{losses['discriminator']:.3f}", G=f"{losses['generator']:.3f}", refresh=False
    )
    bar.update(state.images_seen - bar.n)


def _truncate_log(path: Path, images_seen: int) -> None:
    """Drop what a run logged after the checkpoint that it goes on from."""
    if not path.exists():
        return
    with path.open("r+", encoding="utf-8") as log:
        kept = []
        for line in log:
            try:
                if json.loads(line)["images_seen"] > images_seen:
                    break
            except (ValueError, KeyError, TypeError):
                break  # a line cut short by a crash
            kept.append(line.rstrip("\n") + "\n")
        log.seek(0)
        log.writelines(kept)
        log.truncate()
