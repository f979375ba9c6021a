"""The records of a run: progress bar, JSON lines, TensorBoard events and sheets of samples."""

import dataclasses
import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Never, Self, TextIO

from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.images import save_png
from training.loop import LogPoint, recompute_batch_norm
from training.quality.estimate import describe, judge, render_forecast
from training.quality.evaluator import QuickMetrics
from training.sheet import class_sheet
from training.state import TrainState

REFRESH_S = 0.25  # of the progress bar, in a terminal
REFRESH_FILE_S = 60.0
TIMED_FORMAT = "{percentage:3.0f}%|{bar}| {desc}"

logger = logging.getLogger(__name__)


class RunFolder:
    """The files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "checkpoint.pt"  # the state that `--resume` continues from
        self.artifact = path / "generator.safetensors"  # the best generator so far
        self.log = path / "log.jsonl"  # one JSON object per line, one line per log point
        self.tensorboard = path / "tensorboard"  # its event files
        self.samples = path / "samples"  # sheets of samples, named by images seen


class ProgressBar:
    """A bar over the images of a run, or over the seconds of its time budget."""

    def __init__(self, state: TrainState, file: TextIO) -> None:
        self._state = state
        timed = state.budget_s is not None
        self._bar: tqdm[Never] = tqdm(
            total=state.budget_s if timed else state.config.images,
            initial=self._position(),
            file=file,
            unit="img",
            unit_scale=True,
            dynamic_ncols=True,
            bar_format=TIMED_FORMAT if timed else None,
        )
        # A file keeps every state of the bar.
        self._interval_s = REFRESH_S if file.isatty() else REFRESH_FILE_S
        self._next_at = 0.0
        self._opened_at, self._images_before = time.monotonic(), state.images_seen
        self.images_per_s: float | None = None  # measured at the last log point
        self.metrics: QuickMetrics | None = None  # the last ones

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._update(time.monotonic())
        self._bar.close()

    def advance(self) -> None:
        """Show the progress, a few times a second at most."""
        now = time.monotonic()
        if now >= self._next_at:
            self._next_at = now + self._interval_s
            self._update(now)
            self._bar.refresh()

    def _update(self, now: float) -> None:
        state, quality = self._state, []
        if self.metrics is not None:
            quality = [
                f"GAN-test {self.metrics.gan_test:.1%}, coverage {self.metrics.coverage:.2f}"
            ]
        if state.budget_s is not None:
            speed = self.images_per_s
            if speed is None:  # before the first log point
                speed = (state.images_seen - self._images_before) / (now - self._opened_at + 1e-9)
            left = tqdm.format_interval(max(0.0, state.budget_s - state.elapsed_s))
            notes = [f"{left} left", f"{state.images_seen:,} images", f"{speed:,.0f}/s", *quality]
            self._bar.set_description_str(", ".join(notes), refresh=False)
        else:
            self._bar.set_postfix_str(", ".join(quality), refresh=False)
        self._bar.n = self._position()

    def _position(self) -> float:
        """Return the images seen or the seconds passed; a last step may exceed the total."""
        state = self._state
        if state.budget_s is not None:
            return min(state.elapsed_s, state.budget_s)
        return min(state.images_seen, state.config.images)


class RunLogger:
    """Writes the records of a run; only the main process has one."""

    def __init__(
        self,
        folder: RunFolder,
        class_names: tuple[str, ...],
        prepared_s: float,
        bar: ProgressBar,
        log: TextIO,
        writer: SummaryWriter,
    ) -> None:
        self._folder, self._class_names, self._prepared_s = folder, class_names, prepared_s
        self._bar, self._log, self._writer = bar, log, writer
        self._history: list[tuple[float, float]] = []  # seconds of training and coverage
        self._said: set[tuple[str, bool]] = set()

    def advance(self) -> None:
        """Move the progress bar before a step; waits for no device."""
        self._bar.advance()

    def losses(self, state: TrainState, point: LogPoint) -> None:
        """Record the losses of a log point."""
        assert point.losses is not None
        losses = dataclasses.asdict(point.losses)
        self._write_line(state, images_per_s=round(point.images_per_s, 1), **losses)
        for name, value in losses.items():
            self._writer.add_scalar(f"losses/{name}", value, state.images_seen)
        self._writer.add_scalar("images_per_s", point.images_per_s, state.images_seen)
        self._bar.images_per_s = point.images_per_s

    def metrics(self, state: TrainState, metrics: QuickMetrics) -> None:
        """Record the metrics of the averaged generator."""
        names = ("gan_test", "coverage", "frechet_distance", "score")
        values = {name: getattr(metrics, name) for name in names}
        self._write_line(state, **values)
        for name, value in values.items():
            self._writer.add_scalar(f"quality/{name}", value, state.images_seen)
        self._bar.metrics = metrics
        self._describe(state, metrics)

    def _describe(self, state: TrainState, metrics: QuickMetrics) -> None:
        """Print the meaning of the metrics, each one once, and once more with a forecast."""
        classes, train_s = state.ema.config.num_classes, state.budget_s
        if train_s is None:
            train_s = state.elapsed_s * state.config.images / state.images_seen
        self._history.append((state.elapsed_s, metrics.coverage))
        forecast = render_forecast(self._history, train_s, self._prepared_s)
        elapsed_s = self._prepared_s + state.elapsed_s
        meaning = judge(metrics, classes), bool(forecast)
        if meaning not in self._said:
            self._said.add(meaning)
            moment = f"After {elapsed_s / 60:.1f} minutes and {state.images_seen:,} images"
            logger.info("%s: %s%s", moment, describe(metrics, classes), forecast)

    def event(self, state: TrainState, text: str) -> None:
        """Record a rollback, and warn of it."""
        self._write_line(state, event=text)
        logger.warning("%s", text)

    def samples(self, state: TrainState) -> None:
        """Write a sheet of samples of the averaged generator."""
        recompute_batch_norm(state.ema, batches=20)
        pixels = class_sheet(state.ema, self._class_names)
        save_png(self._folder.samples / f"{state.images_seen:010d}.png", pixels)
        self._writer.add_image("samples", pixels, state.images_seen, dataformats="HWC")

    def _write_line(self, state: TrainState, **values: float | str) -> None:
        line = {"images_seen": state.images_seen, "elapsed_s": round(state.elapsed_s, 3), **values}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()


@contextmanager
def open_run_log(
    folder: RunFolder, state: TrainState, class_names: tuple[str, ...], prepared_s: float = 0.0
) -> Iterator[RunLogger | None]:
    """Open the records of a run in the main process; yield None in the others."""
    if not state.world.is_main_process:
        yield None
        return
    folder.samples.mkdir(parents=True, exist_ok=True)
    _truncate_log(folder.log, state.images_seen)
    # Purging starts at this step; the last point before the checkpoint must remain.
    writer = SummaryWriter(str(folder.tensorboard), purge_step=state.images_seen + 1)
    with (
        folder.log.open("a", encoding="utf-8") as log,
        writer,
        ProgressBar(state, sys.stderr) as bar,
    ):
        yield RunLogger(folder, class_names, prepared_s, bar, log, writer)


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
