"""The records of a run: progress bar, JSON lines, TensorBoard events and sample grids."""

import dataclasses
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Never, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.images import class_grid, save_png
from training.loop import LogPoint, recompute_batch_norm
from training.quality.evaluator import QuickMetrics
from training.state import TrainState

logger = logging.getLogger(__name__)


class RunFolder:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"  # the state that `--resume` continues from
        self.artifact = path / "generator.safetensors"  # the best generator so far
        self.log = path / "log.jsonl"  # one JSON object per line, one line per log point
        self.tensorboard = path / "tensorboard"  # its event files
        self.samples = path / "samples"  # grids of samples, named by images seen


class RunLogger:
    """Writes the records of a run; only the main process has one."""

    def __init__(
        self, folder: RunFolder, bar: "tqdm[Never]", log: TextIO, writer: SummaryWriter
    ) -> None:
        self._folder, self._bar, self._log, self._writer = folder, bar, log, writer

    def losses(self, state: TrainState, point: LogPoint) -> None:
        """Record the losses of a log point."""
        assert point.losses is not None
        losses = dataclasses.asdict(point.losses)
        self._write_line(state, images_per_s=round(point.images_per_s, 1), **losses)
        for name, value in losses.items():
            self._writer.add_scalar(f"losses/{name}", value, state.images_seen)
        self._writer.add_scalar("images_per_s", point.images_per_s, state.images_seen)
        if point.progress > 0:  # a run with a time budget shows its expected number of images
            self._bar.total = round(state.images_seen / point.progress)
        self._bar.update(state.images_seen - self._bar.n)

    def metrics(self, state: TrainState, metrics: QuickMetrics) -> None:
        """Record the metrics of the averaged generator."""
        values = dataclasses.asdict(metrics)
        self._write_line(state, **values)
        for name, value in values.items():
            self._writer.add_scalar(f"quality/{name}", value, state.images_seen)
        self._bar.set_postfix_str(
            f"GAN-test {metrics.gan_test:.1%}, coverage {metrics.coverage:.2f}", refresh=False
        )

    def event(self, state: TrainState, text: str) -> None:
        """Record a rollback, and warn of it."""
        self._write_line(state, event=text)
        logger.warning("%s", text)

    def samples(self, state: TrainState) -> None:
        """Write a grid of samples of the averaged generator."""
        recompute_batch_norm(state.ema, batches=20)
        pixels = class_grid(state.ema, columns=10)
        save_png(self._folder.samples / f"{state.images_seen:010d}.png", pixels, scale=2)
        self._writer.add_image("samples", pixels, state.images_seen, dataformats="HWC")

    def _write_line(self, state: TrainState, **values: float | str) -> None:
        line = {"images_seen": state.images_seen, "elapsed_s": round(state.elapsed_s, 3), **values}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()


@contextmanager
def open_run_log(folder: RunFolder, state: TrainState) -> Iterator[RunLogger | None]:
    """Open the records of a run in the main process; yield None in the others."""
    if not state.world.is_main_process:
        yield None
        return
    folder.samples.mkdir(parents=True, exist_ok=True)
    _truncate_log(folder.log, state.images_seen)
    bar = tqdm(
        total=state.config.images,
        initial=state.images_seen,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.1,
    )
    # Purging starts at this step; the last point before the checkpoint must remain.
    writer = SummaryWriter(str(folder.tensorboard), purge_step=state.images_seen + 1)
    with folder.log.open("a", encoding="utf-8") as log, writer, bar:
        yield RunLogger(folder, bar, log, writer)


def _truncate_log(path: Path, images_seen: int) -> None:
    """Drop the lines that were logged after the checkpoint."""
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
