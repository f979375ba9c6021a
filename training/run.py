"""A training run: training, evaluation, rollback, checkpoints and export."""

import dataclasses
import logging
import signal
import subprocess
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from training.artifact import ArtifactInfo
from training.checkpoint import RunMetadata, save_checkpoint
from training.cuda_graph import make_step
from training.data.named import Dataset
from training.gamma_search import EvaluateFn, evaluate_on_main
from training.loop import (
    DivergedError,
    LogPoint,
    StepFn,
    measure_progress,
    recompute_batch_norm,
    train,
)
from training.quality.estimate import KEY, Estimate
from training.quality.evaluator import QuickMetrics
from training.run_log import RunFolder, RunLogger, open_run_log
from training.saving import save_artifact
from training.state import TrainState

LOG_EVERY_IMAGES = 12_800
SAMPLE_SHEETS = 40  # per run
EVALUATIONS = 20  # per run
EVALUATION_BUDGET = 0.05  # of the time since the last evaluation, in a run with a time budget
COLLAPSE_RATIO = 0.5  # of the best coverage so far
MAX_ROLLBACKS = 3
CHECKPOINT_EVERY_S = 120.0

logger = logging.getLogger(__name__)


class StopFlag:
    """A flag that the first SIGINT or SIGTERM after `listen` sets; a second one acts as before.

    Leaving its context restores the previous handlers.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Return True if a signal was received."""
        return self.signal is not None

    def listen(self) -> None:
        """Handle signals from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)

    def __enter__(self) -> "StopFlag":
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self.signal = number
        self.__exit__()


@dataclass(frozen=True)
class Snapshot:
    """Metrics and the training state that they measure."""

    metrics: QuickMetrics
    contents: dict[str, Any]

    @property
    def images_seen(self) -> int:
        """Real images that the generator has seen."""
        seen: int = self.contents["images_seen"]
        return seen


class Run:
    """One training run.

    The averaged generator is evaluated at regular intervals. The best one is exported at once, so
    that there is always a file to serve. If coverage falls to half of the best, or a loss is not
    finite, the run continues from the best state at half the learning rate. A run that is stopped
    exports the newest generator if it is better. Only the main process writes files.

    Attributes:
        exported: the generator in the artifact, if this process has written it.
        last_evaluation: index of the last evaluation, of `EVALUATIONS`; -1 before the first.
    """

    def __init__(
        self,
        folder: RunFolder,
        state: TrainState,
        dataset: Dataset,
        metadata: RunMetadata,
        *,
        evaluate: EvaluateFn,
        best: dict[str, Any] | None = None,
    ) -> None:
        self.folder, self.state, self.dataset, self.metadata = folder, state, dataset, metadata
        self.evaluate = evaluate
        self.best: Snapshot | None = None
        self.exported: Snapshot | None = None
        self.last_evaluation = -1
        if best is not None:
            self.best = Snapshot(QuickMetrics(**best["metrics"]), best["contents"])
            self.last_evaluation = best["last_evaluation"]
        self._last_sheet = self._interval(SAMPLE_SHEETS)
        self._evaluation_s, self._evaluated_at = 0.0, state.elapsed_s
        self._log: RunLogger | None = None

    def finish(self, stop: Callable[[], bool]) -> bool:
        """Train until the budget is used or `stop` returns True, then save and export.

        Returns:
            True if the run is complete.

        Raises:
            CheckpointError: a checkpoint cannot be written; the previous one is intact.
            DivergedError: training broke down too often, or before the first evaluation. The best
                artifact so far remains.
            OSError: another file of the run cannot be written.
        """
        names, prepared_s = self.dataset.class_names, self.metadata.prepared_s
        with open_run_log(self.folder, self.state, names, prepared_s) as self._log:
            while True:
                # Made again after every rollback, which replaces tensors that a graph has captured.
                step = make_step(self.state, self.dataset)
                try:
                    finished = self._train(step, stop)
                    break
                except DivergedError as error:
                    self._roll_back(str(error))
        if not finished:
            self._export_better()
        elif self.best is not None:
            self._export(self.best, batches=50)
        return finished

    def _train(self, step: StepFn, stop: Callable[[], bool]) -> bool:
        writes = self.state.world.is_main_process
        last_checkpoint, saved_at = time.monotonic(), -1

        def show_and_stop() -> bool:
            if self._log is not None:
                self._log.advance()
            return stop()

        for point in train(self.state, step, log_every=LOG_EVERY_IMAGES, stop=show_and_stop):
            self._record(point)
            if point.losses is not None and self._evaluation_is_due(point):
                self._evaluate()
            if writes and time.monotonic() - last_checkpoint >= CHECKPOINT_EVERY_S:
                self.save()
                last_checkpoint, saved_at = time.monotonic(), self.state.images_seen
        # `stop` does not decide this: another process may have received the signal.
        if writes and saved_at != self.state.images_seen:
            self.save()
        return point.finished

    def save(self) -> None:
        """Write the checkpoint."""
        best: dict[str, Any] | None = None
        if self.best is not None:
            metrics = dataclasses.asdict(self.best.metrics)
            best = {"metrics": metrics, "contents": self.best.contents}
            best["last_evaluation"] = self.last_evaluation
        save_checkpoint(self.folder.checkpoint, self.state, self.metadata, best)

    def _interval(self, count: int) -> int:
        return int(measure_progress(self.state) * count)

    def _record(self, point: LogPoint) -> None:
        if self._log is None or point.losses is None:
            return
        self._log.losses(self.state, point)
        interval = int(point.progress * SAMPLE_SHEETS)
        if interval != self._last_sheet or point.finished:
            self._last_sheet = interval
            self._log.samples(self.state)

    def _evaluation_is_due(self, point: LogPoint) -> bool:
        if not point.is_scheduled:  # an interruption must not add an evaluation
            return False
        if point.finished or self.best is None:
            return True
        if int(point.progress * EVALUATIONS) == self.last_evaluation:
            return False
        since = self.state.elapsed_s - self._evaluated_at
        (affordable,) = self.state.world.broadcast(
            self.state.budget_s is None or self._evaluation_s <= EVALUATION_BUDGET * since
        )
        return bool(affordable)

    def _evaluate(self) -> None:
        """Measure the averaged generator; export it if it is the best; raise if it collapsed."""
        began, state = self.state.elapsed_s, self.state
        recompute_batch_norm(state.ema, batches=20)
        metrics = evaluate_on_main(state.world, self.evaluate, state.ema)
        self.last_evaluation = self._interval(EVALUATIONS)
        if self._log is not None:
            self._log.metrics(state, metrics)
        best = self.best.metrics if self.best is not None else None
        if best is not None and metrics.coverage < COLLAPSE_RATIO * best.coverage:
            raise DivergedError(
                f"coverage collapsed from {best.coverage:.3f} to {metrics.coverage:.3f} after "
                f"{state.images_seen:,} images"
            )
        if best is None or metrics.score >= best.score:
            self.best = Snapshot(metrics, deepcopy(state.state_dict()))
            self._export(self.best, batches=20)
        self._evaluation_s, self._evaluated_at = state.elapsed_s - began, state.elapsed_s

    def _roll_back(self, reason: str) -> None:
        """Restore the best networks at half the learning rate; progress and random draws go on."""
        state = self.state
        if self.best is None:
            raise DivergedError(f"{reason} before the first evaluation; nothing was exported")
        if state.lr_scale <= 0.5**MAX_ROLLBACKS:
            raise DivergedError(
                f"{reason}, after {MAX_ROLLBACKS} rollbacks; the best generator is in "
                f"{self.folder.artifact}"
            )
        now = state.state_dict()
        # With the old random draws the same steps would diverge again.
        kept = {name: now[name] for name in ("images_seen", "elapsed_s", "rng")}
        scale = state.lr_scale / 2
        state.load_state_dict({**self.best.contents, **kept, "lr_scale": scale})
        if self._log is not None:
            self._log.event(
                state, f"{reason}; rolled back to the best state, at {scale:g} of the learning rate"
            )

    def _export_better(self) -> None:
        """Export the newest averaged generator of a stopped run, or the best if that is better.

        The checkpoint is written already and knows nothing of this, so that a resumed run ends as
        an uninterrupted one.
        """
        state = self.state
        if state.images_seen == 0:
            return
        logger.info("Stopping: the checkpoint is written; measuring the newest generator …")
        newest = deepcopy(state.ema)
        recompute_batch_norm(newest, batches=20)
        metrics = evaluate_on_main(state.world, self.evaluate, newest)
        better = Snapshot(metrics, state.state_dict())
        if self.best is not None and self.best.metrics.score > metrics.score:
            better = self.best
        self._export(better, batches=50)
        state.world.any(False)  # wait: torchrun ends all processes after the first that ends

    def _export(self, snapshot: Snapshot, *, batches: int) -> None:
        """Write a generator, with batch-norm statistics over `batches` batches."""
        if not self.state.world.is_main_process:
            return
        generator = deepcopy(self.state.ema)
        generator.load_state_dict(snapshot.contents["ema"])
        recompute_batch_norm(generator, batches=batches)
        save_artifact(self.folder.artifact, generator, self._describe(snapshot))
        self.exported = snapshot

    def _describe(self, exported: Snapshot) -> ArtifactInfo:
        metadata, state = self.metadata, self.state
        return ArtifactInfo(
            network=state.ema.config,
            class_names=self.dataset.class_names,
            training={
                "dataset": metadata.dataset,
                "dataset_sha256": metadata.dataset_digest,
                "preset": metadata.preset,
                "seed": metadata.seed,
                "minutes": metadata.minutes,
                "gamma_scores": metadata.gamma_scores,
                "initialised_from": metadata.initialised_from,
                "processes": state.world.size,
                "elapsed_s": round(metadata.prepared_s + state.elapsed_s, 1),
                "device": state.rng.device.type,
                "torch": torch.__version__,
                "config": dataclasses.asdict(metadata.config),
                KEY: dataclasses.asdict(Estimate.of(exported.metrics)),
            },
            images_seen=exported.images_seen,
            source_commit=source_commit(),
        )


def source_commit() -> str | None:
    """Return the commit of this code, with `-dirty` if files differ; None outside a clone."""
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
