"""One training run in one folder: progress bar, log, sample grids, checkpoints, and the export."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Never, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from training.artifact import ArtifactInfo, save_artifact
from training.checkpoint import Checkpoint, RunMetadata, save_checkpoint
from training.config import TrainingConfig
from training.cuda_graph import make_stepper
from training.data.named import Dataset
from training.distributed import DistributedContext
from training.files import prepare_folder
from training.gamma_search import DEFAULT_PENALTY, Look, agreed, choose_penalty, is_worthwhile
from training.images import class_grid, save_png
from training.loop import (
    DivergedError,
    LogPoint,
    Stepper,
    TrainState,
    create_state,
    generator_config,
    recompute_batch_norm,
    train,
    used_fraction,
)
from training.quality.evaluator import QuickMetrics

LOG_EVERY_IMAGES = 12_800
SAMPLE_GRIDS = 40  # over the whole run
LOOKS = 20  # over the whole run
LOOK_SHARE = 0.05  # of the time of a run that is given minutes
COLLAPSE = 0.5  # of the best coverage so far
MAX_ROLLBACKS = 3
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

    def prepare(self) -> None:
        """Make sure that the folder is there and takes files, before time is spent.

        Raises:
            OSError: it cannot be made, or not be written.
        """
        prepare_folder(self.path / "samples")


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


class Run:
    """One run: what it is made of, and the best that it has made so far.

    Every so often the averaged generator is looked at. The best one is exported at once, so that
    there is always a file to serve; and where diversity has fallen to half of the best, or a loss
    is no number any more, the run goes back to the best and on from there at half the learning
    rate.

    Attributes:
        folder: where the files go; only the first process writes.
        state: of the networks.
        dataset: resident on the state's device.
        identity: what the run is.
        look: measures a generator.
        seconds: the time for steps and looks, where time ends the run.
        best: the best look so far, with the state that it saw.
        last_look: in which part of the run, of `LOOKS`, the last look was; -1 for none.
    """

    def __init__(
        self,
        folder: RunFolder,
        state: TrainState,
        dataset: Dataset,
        identity: RunMetadata,
        *,
        look: Look,
        seconds: float | None = None,
        best: "BestSnapshot | None" = None,
        last_look: int = -1,
    ) -> None:
        self.folder, self.state, self.dataset, self.identity = folder, state, dataset, identity
        self.look, self.seconds, self.best, self.last_look = look, seconds, best, last_look
        self._writes = state.world.writes
        self._last_grid = self._part(SAMPLE_GRIDS)
        self._look_s, self._looked_at = 0.0, state.elapsed_s
        self._journal: RunLogger | None = None

    def finish(self, stop: Callable[[], bool]) -> bool:
        """Train to the end of the budget, or until stopped; then export, or leave a checkpoint.

        Returns:
            whether the run is complete and its artifact written.

        Raises:
            CheckpointError: a checkpoint cannot be written (a full disk, say); the last one
                survives.
            DivergedError: the run broke down again and again, or before there was anything to go
                back to. The best artifact so far is there.
            OSError: another file of the run cannot be written.
        """
        with _journal(self.folder, self.state, self.identity.config) as self._journal:
            while True:
                # Captured anew after every return to the best, which replaces tensors.
                stepper = make_stepper(self.state, self.dataset, self.identity.config, tqdm.write)
                try:
                    finished = self._follow(stepper, stop)
                    break
                except DivergedError as error:
                    self._roll_back(str(error))
        if finished:
            self._export_best(batches=50)
        return finished

    def _follow(self, stepper: Stepper, stop: Callable[[], bool]) -> bool:
        last_checkpoint, saved_at = time.monotonic(), -1
        for point in train(
            self.state,
            self.identity.config,
            stepper,
            seconds=self.seconds,
            log_every=LOG_EVERY_IMAGES,
            stop=stop,
        ):
            self._note(point)
            if point.losses is not None and self._look_is_due(point):
                self._look()
            if self._writes and time.monotonic() - last_checkpoint >= CHECKPOINT_EVERY_S:
                self.save()
                last_checkpoint, saved_at = time.monotonic(), self.state.images_seen
        # Not where `stop` is set: it may have been another process that was told to stop.
        if self._writes and saved_at != self.state.images_seen:
            self.save()
        return point.finished

    def save(self) -> None:
        """Write the checkpoint."""
        best = None
        if self.best is not None:
            best = {**self.best.as_dict(), "last_look": self.last_look}
        save_checkpoint(self.folder.checkpoint, self.state, self.identity, best)

    def _part(self, parts: int) -> int:
        return int(used_fraction(self.state, self.identity.config, self.seconds) * parts)

    def _note(self, point: LogPoint) -> None:
        if self._journal is None or point.losses is None:
            return
        self._journal.losses(self.state, point)
        part = int(point.used * SAMPLE_GRIDS)  # asking the clock again takes all processes
        if part != self._last_grid or point.finished:
            self._last_grid = part
            self._journal.samples(self.folder, self.state)

    def _look_is_due(self, point: LogPoint) -> bool:
        if not point.regular:  # else an interrupted run would see more than another one
            return False
        if point.finished or self.best is None:
            return True
        part = int(point.used * LOOKS)
        if part == self.last_look:
            return False
        # In a run that is given minutes, looking takes a small share of them.
        since = self.state.elapsed_s - self._looked_at
        (affordable,) = self.state.world.agree(
            self.seconds is None or self._look_s <= LOOK_SHARE * since
        )
        return bool(affordable)

    def _look(self) -> None:
        """Measure the averaged generator; keep it where it is the best, or go back to the best.

        Raises:
            DivergedError: its diversity has collapsed.
        """
        began = self.state.elapsed_s
        recompute_batch_norm(self.state.ema, batches=20)
        glance = agreed(self.state.world, self.look, self.state.ema)
        self.last_look = self._part(LOOKS)
        if self._journal is not None:
            self._journal.glance(self.state, glance)
        if self.best is not None and glance.coverage < COLLAPSE * self.best.glance.coverage:
            raise DivergedError(
                f"collapsed: coverage is {glance.coverage:.3f} after {self.state.images_seen:,} "
                f"images, and was {self.best.glance.coverage:.3f}"
            )
        if self.best is None or glance.score >= self.best.glance.score:
            self.best = BestSnapshot(glance, deepcopy(self.state.state_dict()))
            self._export_best(batches=20)
        self._look_s, self._looked_at = self.state.elapsed_s - began, self.state.elapsed_s

    def _roll_back(self, reason: str) -> None:
        """Go back to the best networks, with less of a learning rate, and other random draws.

        Raises:
            DivergedError: there is nothing to go back to, or it has been done too often.
        """
        state = self.state
        if self.best is None:
            raise DivergedError(f"{reason}; nothing had been learnt before")
        if state.lr_scale <= 0.5**MAX_ROLLBACKS:
            raise DivergedError(
                f"{reason}, after {MAX_ROLLBACKS} returns to the best so far, which is in "
                f"{self.folder.artifact}"
            )
        now = state.state_dict()
        # Progress and random draws go on: the same steps again would end the same way.
        onward = {name: now[name] for name in ("images_seen", "elapsed_s", "rng")}
        scale = state.lr_scale / 2
        state.load_state_dict({**self.best.contents, **onward, "lr_scale": scale})
        if self._journal is not None:
            self._journal.event(state, f"{reason}; back to the best, at {scale:g} of the rate")

    def _export_best(self, *, batches: int) -> None:
        """Write the best averaged generator so far, with batch-norm statistics of its own."""
        if self.best is None or not self._writes:
            return
        generator = deepcopy(self.state.ema)
        generator.load_state_dict(self.best.contents["ema"])
        recompute_batch_norm(generator, batches=batches)
        save_artifact(self.folder.artifact, generator, self._describe(self.best))

    def _describe(self, best: "BestSnapshot") -> ArtifactInfo:
        identity, state = self.identity, self.state
        return ArtifactInfo(
            network=state.ema.config,
            class_names=self.dataset.class_names,
            training={
                "dataset": identity.dataset,
                "dataset_sha256": identity.dataset_digest,
                "preset": identity.preset,
                "seed": identity.seed,
                "minutes": identity.minutes,
                "probe": identity.probe,
                "began_with": identity.began_with,
                "processes": state.world.size,
                "elapsed_s": round(state.elapsed_s, 1),
                "device": state.rng.device.type,
                "torch": torch.__version__,
                "config": dataclasses.asdict(identity.config),
            },
            images_seen=best.contents["images_seen"],
            source_commit=source_commit(),
        )


@dataclass(frozen=True)
class BestSnapshot:
    """The best look of a run, and the state that it saw."""

    glance: QuickMetrics
    contents: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {"glance": dataclasses.asdict(self.glance), "contents": self.contents}

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> "BestSnapshot":
        """What `as_dict` gave."""
        return cls(QuickMetrics(**stored["glance"]), stored["contents"])


def start_run(
    folder: RunFolder,
    dataset: Dataset,
    identity: RunMetadata,
    *,
    look: Look,
    world: DistributedContext,
    seconds: float | None,
    stop: Callable[[], bool],
    begin: Checkpoint | None = None,
) -> Run:
    """A fresh run; where its penalty is open, a probe chooses it.

    With `begin`, it has the networks of that checkpoint, and its penalty where its own is open.

    A run that is stopped meanwhile has nothing to go on from.
    """
    shape = generator_config(identity.config, dataset)
    device = dataset.labels.device

    def fresh(config: TrainingConfig) -> TrainState:
        return create_state(config, shape, device, identity.seed, world)

    config, probe = identity.config, None
    if begin is not None:
        if config.penalty is None:
            config = dataclasses.replace(config, penalty=begin.identity.config.penalty)
        identity = dataclasses.replace(identity, config=config, began_with=begin.origin())
        state = fresh(config)
        begin.begin(state)
        return Run(folder, state, dataset, identity, look=look, seconds=seconds)
    if config.penalty is None and is_worthwhile(config, seconds):
        report = tqdm.write if world.writes else _say_nothing
        state, config, probe = choose_penalty(
            config, fresh, dataset, look, seconds=seconds, stop=stop, report=report
        )
    else:
        if config.penalty is None:
            config = dataclasses.replace(config, penalty=DEFAULT_PENALTY)
        state = fresh(config)
    identity = dataclasses.replace(identity, config=config, probe=probe)
    return Run(folder, state, dataset, identity, look=look, seconds=seconds)


def resume_run(
    folder: RunFolder,
    dataset: Dataset,
    checkpoint: Checkpoint,
    *,
    look: Look,
    world: DistributedContext,
    seconds: float | None,
) -> Run:
    """The run of a checkpoint, where it stopped.

    Raises:
        CheckpointError: the checkpoint does not fit its own configuration.
    """
    identity = checkpoint.identity
    shape = generator_config(identity.config, dataset)
    state = create_state(identity.config, shape, dataset.labels.device, identity.seed, world)
    checkpoint.restore(state)
    best, last_look = None, -1
    if checkpoint.best is not None:
        best, last_look = BestSnapshot.from_dict(checkpoint.best), checkpoint.best["last_look"]
    return Run(
        folder,
        state,
        dataset,
        identity,
        look=look,
        seconds=seconds,
        best=best,
        last_look=last_look,
    )


def _say_nothing(_text: str) -> None:
    """What a process that does not write reports."""


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


class RunLogger:
    """What a run tells while it is under way: the bar, the log, TensorBoard, and the samples."""

    def __init__(self, bar: "tqdm[Never]", log: TextIO, writer: SummaryWriter) -> None:
        self._bar, self._log, self._writer = bar, log, writer

    def losses(self, state: TrainState, point: LogPoint) -> None:
        """Note the losses of a log point that has some."""
        assert point.losses is not None
        losses = dataclasses.asdict(point.losses)
        self._line(state, images_per_s=round(point.images_per_s, 1), **losses)
        for name, value in losses.items():
            self._writer.add_scalar(f"losses/{name}", value, state.images_seen)
        self._writer.add_scalar("images_per_s", point.images_per_s, state.images_seen)
        if point.used > 0:  # a budget in minutes shows as the images it will come to
            self._bar.total = round(state.images_seen / point.used)
        self._bar.update(state.images_seen - self._bar.n)

    def glance(self, state: TrainState, glance: QuickMetrics) -> None:
        """Note a look at the averaged generator."""
        seen = dataclasses.asdict(glance)
        self._line(state, **seen)
        for name, value in seen.items():
            self._writer.add_scalar(f"quality/{name}", value, state.images_seen)
        self._bar.set_postfix_str(
            f"GAN-test {glance.gan_test:.1%}, coverage {glance.coverage:.2f}", refresh=False
        )

    def event(self, state: TrainState, text: str) -> None:
        """Note something that a person must see."""
        self._line(state, event=text)
        tqdm.write(text, file=sys.stderr)

    def samples(self, folder: RunFolder, state: TrainState) -> None:
        """Draw a grid of samples of the averaged generator."""
        recompute_batch_norm(state.ema, batches=20)
        picture = class_grid(state.ema, columns=10)
        save_png(folder.sample(state.images_seen), picture, scale=2)
        self._writer.add_image("samples", picture, state.images_seen, dataformats="HWC")

    def _line(self, state: TrainState, **values: float | str) -> None:
        line = {"images_seen": state.images_seen, "elapsed_s": round(state.elapsed_s, 3), **values}
        self._log.write(json.dumps(line) + "\n")
        self._log.flush()


@contextmanager
def _journal(
    folder: RunFolder, state: TrainState, config: TrainingConfig
) -> Iterator[RunLogger | None]:
    """The journal of the process that writes; None in the others."""
    if not state.world.writes:
        yield None
        return
    (folder.path / "samples").mkdir(parents=True, exist_ok=True)
    _truncate_log(folder.log, state.images_seen)
    bar = tqdm(
        total=config.images,
        initial=state.images_seen,
        unit="img",
        unit_scale=True,
        dynamic_ncols=True,
        smoothing=0.1,
    )
    # Purging begins at its step, and the last point before the checkpoint is to stay.
    writer = SummaryWriter(str(folder.tensorboard), purge_step=state.images_seen + 1)
    with folder.log.open("a", encoding="utf-8") as log, writer, bar:
        yield RunLogger(bar, log, writer)


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
