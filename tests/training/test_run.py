"""A run: its files, its best generator, rollbacks and resumption."""

import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)
from torch import Tensor

from tests.support import processes
from tests.support import tiny_training as tiny
from training import loop
from training import run as run_module
from training.__main__ import main
from training.checkpoint import CheckpointError, RunMetadata, read_checkpoint, save_checkpoint
from training.config import TrainingConfig
from training.gamma_search import EvaluateFn
from training.loading import load_artifact
from training.loop import DivergedError, StepFn, make_eager_step
from training.networks import Generator
from training.prepare import resume
from training.quality.estimate import Estimate, read_estimate
from training.quality.evaluator import QUICK_IMAGES, Evaluator, QuickMetrics
from training.run import (
    EVALUATION_BUDGET,
    EVALUATIONS,
    MAX_ROLLBACKS,
    Run,
    StopFlag,
    source_commit,
)
from training.run_log import RunFolder
from training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
METADATA = RunMetadata(
    dataset="tiny", dataset_digest="ab", preset="mlp", seed=3, config=tiny.CONFIG, minutes=None
)
# Two classes down, ten latents along, 8 pixels each, twice as large, beside the longer name.
SHEET = (38 + 10 * 8 * 2, 2 * 8 * 2)
LOSSES = ("discriminator", "generator", "real_logit", "fake_logit", "penalty")


@pytest.fixture(autouse=True)
def _small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOG_EVERY_IMAGES", 160)
    monkeypatch.setattr(run_module, "SAMPLE_SHEETS", 2)
    monkeypatch.setattr("training.prepare.generator_config", tiny.network_of)
    monkeypatch.setattr("training.quality.evaluator.QUICK_IMAGES", 100)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


@pytest.fixture(scope="module")
def real_evaluate() -> EvaluateFn:
    """The quick evaluation of a run, on the tiny data set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.quality.evaluator.get_classifier", tiny.feature_classifier)
        return Evaluator.create(DATA, DATA).evaluate_quick


class StopAfter(StopFlag):
    """Set after so many questions: one before every step, and one at every log point."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.signal = signal.SIGTERM
        return super().__call__()


NEVER = StopFlag()


@dataclass
class FakeEvaluator:
    """Returns the given coverages, the last one repeatedly, and keeps the weights it was shown."""

    coverages: list[float] = field(default_factory=lambda: [0.5])
    shown: list[dict[str, Tensor]] = field(default_factory=list)

    def __call__(self, generator: Generator) -> QuickMetrics:
        coverage = self.coverages[min(len(self.shown), len(self.coverages) - 1)]
        self.shown.append(deepcopy(generator.state_dict()))
        return QuickMetrics(gan_test=1.0, coverage=coverage, frechet_distance=1.0, score=coverage)


def fresh(
    folder: RunFolder,
    evaluate: EvaluateFn = None,
    config: TrainingConfig = tiny.CONFIG,
    **given: Any,
) -> Run:
    metadata = replace(METADATA, config=config)
    return Run(
        folder, tiny.state(config), DATA, metadata, evaluate=evaluate or FakeEvaluator(), **given
    )


def resumed(folder: RunFolder, evaluate: EvaluateFn = None, budget_s: float | None = None) -> Run:
    checkpoint = read_checkpoint(folder.checkpoint)
    return Run(
        *(folder, resume(checkpoint, DATA, seconds=budget_s), DATA, checkpoint.metadata),
        evaluate=evaluate or FakeEvaluator(),
        best=checkpoint.best,
    )


def log_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.log.read_text().splitlines()]


def losses_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [line for line in log_of(folder) if "generator" in line]


def metrics_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [line for line in log_of(folder) if "coverage" in line]


def events_of(folder: RunFolder) -> list[str]:
    return [line["event"] for line in log_of(folder) if "event" in line]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def seen(lines: list[dict[str, Any]]) -> list[int]:
    return [line["images_seen"] for line in lines]


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if not k.endswith("_s")} for line in lines]


def board_of(folder: RunFolder) -> EventAccumulator:
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    return board


def weights_in(artifact: Path) -> dict[str, Tensor]:
    return load_artifact(artifact).generator.state_dict()


def assert_same_weights(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(other[name], tensor), name


def assert_same_parameters(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Compare all but the batch-norm statistics, which an export measures with more images."""
    parameters = [name for name in one if "running" not in name and "num_batches" not in name]
    assert len(parameters) > 5
    for name in parameters:
        assert torch.equal(one[name], other[name]), name


# A whole run


def test_a_run_leaves_its_artifact_checkpoint_log_pictures_and_events(folder: RunFolder) -> None:
    assert fresh(folder).finish(NEVER)

    assert sorted(path.name for path in folder.path.iterdir()) == [
        *("checkpoint.pt", "generator.safetensors", "log.jsonl", "samples", "tensorboard")
    ]
    assert seen(losses_of(folder)) == seen(metrics_of(folder)) == [160, 320, 480, 640]
    for line in log_of(folder):
        names = LOSSES if "generator" in line else ("gan_test", "coverage", "frechet_distance")
        extra = "images_per_s" if "generator" in line else "score"
        assert set(line) == {"images_seen", "elapsed_s", extra, *names}
        assert all(np.isfinite(value) for value in line.values())
    assert resumed(folder).state.images_seen == 640


def test_the_artifact_is_the_averaged_generator_with_its_circumstances(folder: RunFolder) -> None:
    run = Run(
        folder,
        tiny.state(),
        DATA,
        replace(METADATA, dataset_digest=DATA.digest, gamma_scores={"1": 0.5}),
        evaluate=FakeEvaluator([0.1, 0.2, 0.3, 0.4]),
    )
    run.finish(NEVER)

    loaded = load_artifact(folder.artifact)
    info = loaded.info
    assert info.network == tiny.NETWORK
    assert (info.class_names, info.images_seen) == (tiny.CLASS_NAMES, 640)
    assert info.certificate is None
    assert info.source_commit == source_commit()
    recorded = info.training
    assert recorded["config"]["batch_size"] == tiny.CONFIG.batch_size
    assert (recorded["dataset"], recorded["preset"], recorded["seed"]) == ("tiny", "mlp", 3)
    assert (recorded["dataset_sha256"], recorded["device"]) == (DATA.digest, "cpu")
    assert (recorded["gamma_scores"], recorded["processes"]) == ({"1": 0.5}, 1)
    assert read_estimate(info) == Estimate(
        gan_test=1.0, coverage=0.4, frechet_distance=1.0, images=QUICK_IMAGES
    )
    averages = run.state.ema.parameters()
    for stored, averaged in zip(loaded.generator.parameters(), averages, strict=True):
        assert torch.equal(stored, averaged)
    # Measured for these weights, not left by training.
    assert loaded.generator.state_dict()["main.3.num_batches_tracked"] == 50


def test_pictures_are_readable_and_named_by_progress(folder: RunFolder) -> None:
    fresh(folder).finish(NEVER)

    pictures = sorted((folder.path / "samples").iterdir())
    assert [picture.name for picture in pictures] == ["0000000320.png", "0000000640.png"]
    with Image.open(pictures[0]) as picture:
        assert (picture.mode, picture.size) == ("L", SHEET)


def test_tensorboard_shows_what_the_log_says_and_the_pictures(folder: RunFolder) -> None:
    fresh(folder, FakeEvaluator([0.1, 0.4, 0.3, 0.5])).finish(NEVER)

    board = board_of(folder)
    qualities = ("gan_test", "coverage", "frechet_distance", "score")
    shown_as = {
        **{f"losses/{name}": losses_of(folder) for name in LOSSES},
        **{f"quality/{name}": metrics_of(folder) for name in qualities},
    }
    assert set(board.Tags()["scalars"]) == {*shown_as, "images_per_s"}
    for tag, lines in shown_as.items():
        points = [(event.step, event.value) for event in board.Scalars(tag)]
        assert [step for step, _ in points] == seen(lines)
        logged = [line[tag.split("/")[1]] for line in lines]
        assert [value for _, value in points] == pytest.approx(logged, rel=1e-5)
    pictures = board.Images("samples")
    assert [picture.step for picture in pictures] == [320, 640]
    assert (pictures[0].width, pictures[0].height) == SHEET


# The best so far


def test_an_artifact_exists_from_the_first_log_point_on(folder: RunFolder) -> None:
    served: list[int | None] = []

    def evaluate(generator: Generator) -> QuickMetrics:
        there = folder.artifact.exists()
        served.append(load_artifact(folder.artifact).info.images_seen if there else None)
        return FakeEvaluator([0.1 * len(served)])(generator)

    fresh(folder, evaluate).finish(NEVER)
    assert served == [None, 160, 320, 480]
    assert load_artifact(folder.artifact).info.images_seen == 640


def test_a_run_that_gets_worse_keeps_what_it_made_before(folder: RunFolder) -> None:
    evaluate = FakeEvaluator([0.5, 0.8, 0.7, 0.6])
    fresh(folder, evaluate).finish(NEVER)

    assert load_artifact(folder.artifact).info.images_seen == 320
    assert_same_parameters(weights_in(folder.artifact), evaluate.shown[1])
    assert not torch.equal(evaluate.shown[1]["main.0.weight"], evaluate.shown[3]["main.0.weight"])


def test_of_two_equal_evaluations_the_later_one_is_kept(folder: RunFolder) -> None:
    fresh(folder, FakeEvaluator([0.5, 0.8, 0.8, 0.6])).finish(NEVER)
    assert load_artifact(folder.artifact).info.images_seen == 480


def test_the_best_so_far_is_still_the_best_after_an_interruption(folder: RunFolder) -> None:
    evaluate = FakeEvaluator([0.5, 0.8, 0.7])
    fresh(folder, evaluate).finish(StopAfter(3 * 11 + 4))
    resumed(folder, FakeEvaluator([0.75])).finish(NEVER)
    assert load_artifact(folder.artifact).info.images_seen == 320
    assert_same_parameters(weights_in(folder.artifact), evaluate.shown[1])


def test_an_evaluation_measures_the_average_with_statistics_of_its_own(folder: RunFolder) -> None:
    evaluate = FakeEvaluator()
    run = fresh(folder, evaluate)
    run.finish(NEVER)
    assert_same_parameters(evaluate.shown[-1], run.state.ema.state_dict())
    assert [int(it["main.3.num_batches_tracked"]) for it in evaluate.shown] == [20] * 4


def test_evaluations_come_at_the_first_and_last_log_point_and_regularly_between(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "LOG_EVERY_IMAGES", 16)
    fresh(folder, config=replace(tiny.CONFIG, images=1600)).finish(NEVER)
    assert len(losses_of(folder)) == 100
    assert seen(metrics_of(folder)) == [16, *range(80, 1601, 80)]
    assert len(metrics_of(folder)) == EVALUATIONS + 1


@pytest.mark.parametrize("questions", [5, 24, 37, 50, 53, 54])
def test_an_interruption_neither_adds_nor_omits_an_evaluation(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, questions: int
) -> None:
    """Otherwise the best generator could be another one. Points are 2 or 3 steps apart."""
    monkeypatch.setattr(run_module, "LOG_EVERY_IMAGES", 40)
    monkeypatch.setattr(run_module, "EVALUATIONS", 5)
    whole = RunFolder(folder.path / "whole")
    fresh(whole).finish(NEVER)
    parts = RunFolder(folder.path / "parts")
    assert not fresh(parts).finish(StopAfter(questions))
    assert resumed(parts).finish(NEVER)
    assert seen(metrics_of(parts)) == seen(metrics_of(whole)) == [48, 128, 288, 400, 528, 640]


# A run that is given time


class Clock:
    """In the place of `time.perf_counter`; stands still but for what is said to take time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, step_s: float) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)

        def timed(state: TrainState, *given: Any) -> StepFn:
            step = make_eager_step(state, *given)

            def take_time(progress: float) -> Tensor:
                self.now_s += step_s
                return step(progress)

            return take_time

        monkeypatch.setattr(run_module, "make_step", timed)


def begun_now(budget_s: float) -> TrainState:
    state = tiny.state()
    state.budget_s = budget_s
    state.started_at = time.perf_counter()
    return state


def test_evaluation_takes_a_small_share_of_a_time_budget(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, evaluation_s, budget_s, fake = (
        Clock(monkeypatch, step_s=0.5),
        5.0,
        400.0,
        FakeEvaluator(),
    )

    def evaluate(generator: Generator) -> QuickMetrics:
        clock.now_s += evaluation_s
        return fake(generator)

    run = Run(folder, begun_now(budget_s), DATA, METADATA, evaluate=evaluate)
    assert run.finish(NEVER)

    moments = [line["elapsed_s"] for line in metrics_of(folder)]
    assert len(moments) >= 4
    assert all(b - a >= evaluation_s / EVALUATION_BUDGET for a, b in pairwise(moments[:-1]))
    assert evaluation_s * (len(moments) - 2) <= EVALUATION_BUDGET * budget_s
    assert moments[-1] >= budget_s


def test_quick_evaluations_are_as_many_in_a_run_with_a_time_budget(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "LOG_EVERY_IMAGES", 16)
    Clock(monkeypatch, step_s=1.0)
    run = Run(folder, begun_now(100.0), DATA, METADATA, evaluate=FakeEvaluator())
    assert run.finish(NEVER)
    assert [line["elapsed_s"] for line in metrics_of(folder)] == [1.0, *range(5, 101, 5)]


def test_a_time_budget_ends_a_run_and_drives_its_schedules(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, step_s=2.0)
    run = Run(folder, begun_now(60.0), DATA, METADATA, evaluate=FakeEvaluator())
    assert run.finish(NEVER)

    assert clock.now_s == 60.0
    assert run.state.images_seen == 30 * tiny.CONFIG.batch_size
    rate = run.state.generator_optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(tiny.CONFIG.lr * 0.5 * (1 + np.cos(np.pi * 58 / 60)))
    assert load_artifact(folder.artifact).info.training["elapsed_s"] == 60.0


def test_time_that_was_used_before_an_interruption_counts(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch, step_s=2.0)
    run = Run(folder, begun_now(60.0), DATA, METADATA, evaluate=FakeEvaluator())
    assert not run.finish(StopAfter(14))
    used_s = clock.now_s
    clock.now_s = 5000.0  # another process, much later
    again = resumed(folder, budget_s=60.0)
    assert again.finish(NEVER)
    assert 0 < used_s < 60.0
    assert clock.now_s == 5000.0 + 60.0 - used_s


# Going back


@dataclass
class Returns:
    """Remembers the state at the beginning, and after every return to the best."""

    states: list[dict[str, Any]] = field(default_factory=list)

    def watch(
        self, monkeypatch: pytest.MonkeyPatch, spoil: Callable[[TrainState], None] | None = None
    ) -> "Returns":
        """`spoil` is let at the state before every step."""

        def make(state: TrainState, *given: Any) -> StepFn:
            self.states.append(deepcopy(state.state_dict()))
            step = make_eager_step(state, *given)

            def spoiled(progress: float) -> Tensor:
                if spoil is not None:
                    spoil(state)
                return step(progress)

            return spoiled

        monkeypatch.setattr(run_module, "make_step", make)
        return self


class SpoilAt:
    """Makes the generator's weights no numbers, once it has seen so many images."""

    def __init__(self, *images_seen: int) -> None:
        self.left = list(images_seen)

    def __call__(self, state: TrainState) -> None:
        if self.left and state.images_seen >= self.left[0]:
            self.left.pop(0)
            with torch.no_grad():
                state.generator.label_embedding.weight.fill_(float("nan"))


def assert_went_back(returns: Returns, run: Run, *, images_seen: int, scale: float) -> None:
    """To the weights of the best, and on from there with progress and draws of its own."""
    assert run.best is not None
    now, best = returns.states[-1], run.best.contents
    for part in ("generator", "discriminator", "ema"):
        assert_same_parameters(now[part], best[part])
    for part in ("generator_optimizer", "discriminator_optimizer"):
        for number, moments in best[part]["state"].items():
            for name, value in moments.items():
                assert torch.equal(now[part]["state"][number][name], value)
    assert now["images_seen"] == images_seen > best["images_seen"]
    assert now["lr_scale"] == scale
    assert not torch.equal(now["rng"], best["rng"])


def test_a_collapse_goes_back_to_the_best_and_on_at_half_the_rate(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    returns = Returns().watch(monkeypatch)
    evaluate = FakeEvaluator([0.5, 0.8, 0.3, 0.7])
    run = fresh(folder, evaluate)

    assert run.finish(NEVER)

    assert len(returns.states) == 2
    assert_went_back(returns, run, images_seen=480, scale=0.5)
    assert seen(losses_of(folder)) == [160, 320, 480, 640]
    assert seen(metrics_of(folder)) == [160, 320, 480, 640]
    (event,) = events_of(folder)
    assert event == (
        "coverage collapsed from 0.800 to 0.300 after 480 images; "
        "rolled back to the best state, at 0.5 of the learning rate"
    )
    assert warnings_of(caplog) == [event]
    # The last of its steps went on from the best, at half of the rate.
    assert not torch.equal(evaluate.shown[3]["main.0.weight"], evaluate.shown[1]["main.0.weight"])
    rate = run.state.generator_optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(0.5 * tiny.CONFIG.lr * 0.5 * (1 + np.cos(np.pi * 624 / 640)))
    assert load_artifact(folder.artifact).info.images_seen == 320


def test_a_coverage_of_just_half_is_no_collapse(folder: RunFolder) -> None:
    run = fresh(folder, FakeEvaluator([0.8, 0.4]))
    assert run.finish(NEVER)
    assert events_of(folder) == []
    assert run.state.lr_scale == 1.0


def test_a_collapse_at_the_very_end_still_exports_the_best(folder: RunFolder) -> None:
    evaluate = FakeEvaluator([0.5, 0.8, 0.7, 0.1])
    assert fresh(folder, evaluate).finish(NEVER)
    assert len(events_of(folder)) == 1
    assert_same_parameters(weights_in(folder.artifact), evaluate.shown[1])


def test_losses_that_are_no_numbers_go_back_as_well(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    returns = Returns().watch(monkeypatch, SpoilAt(400))
    run = fresh(folder, FakeEvaluator([0.5, 0.8, 0.9]))

    assert run.finish(NEVER)

    assert len(returns.states) == 2
    assert seen(losses_of(folder)) == [160, 320, 640]
    (event,) = events_of(folder)
    assert event.startswith("the losses are not finite after 480 images; rolled back to the best")
    assert warnings_of(caplog) == [event]
    assert returns.states[1]["lr_scale"] == 0.5
    assert returns.states[1]["images_seen"] == 480
    for network in (run.state.generator, run.state.discriminator, run.state.ema):
        assert all(p.isfinite().all() for p in network.parameters())
    assert load_artifact(folder.artifact).info.images_seen == 640


def test_with_nothing_to_go_back_to_a_breakdown_ends_the_run(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    Returns().watch(monkeypatch, SpoilAt(0))
    with pytest.raises(DivergedError, match="finite after 160 images before the first evaluation"):
        fresh(folder).finish(NEVER)
    assert not folder.artifact.exists()


@pytest.mark.parametrize("kind", ["collapse", "not a number"])
def test_after_too_many_returns_the_run_ends_and_its_best_is_there(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    spoil = SpoilAt(*range(170, 2000, 160)) if kind == "not a number" else None
    returns = Returns().watch(monkeypatch, spoil)
    evaluate = FakeEvaluator([0.8, 0.1] if kind == "collapse" else [0.8])
    run = fresh(folder, evaluate, replace(tiny.CONFIG, images=3200))

    with pytest.raises(DivergedError, match=f"after {MAX_ROLLBACKS} rollbacks") as caught:
        run.finish(NEVER)

    assert str(folder.artifact) in str(caught.value)
    assert [it["lr_scale"] for it in returns.states] == [1.0, 0.5, 0.25, 0.125]
    assert [it["images_seen"] for it in returns.states] == [0, 320, 480, 640]
    assert_went_back(returns, run, images_seen=640, scale=0.125)
    assert len(events_of(folder)) == MAX_ROLLBACKS == 3
    assert load_artifact(folder.artifact).info.images_seen == 160
    assert_same_parameters(weights_in(folder.artifact), evaluate.shown[0])


def test_a_return_survives_a_checkpoint(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(tiny.CONFIG, images=3200)
    evaluate = FakeEvaluator([0.8, 0.1, 0.7])
    assert not fresh(folder, evaluate, config).finish(StopAfter(3 * 11 + 5))
    stored = read_checkpoint(folder.checkpoint).state
    assert stored["lr_scale"] == 0.5

    returns = Returns().watch(monkeypatch)
    run = resumed(folder, FakeEvaluator([0.1]))
    assert run.best is not None
    assert run.best.metrics.coverage == 0.8
    with pytest.raises(DivergedError, match="3 rollbacks"):
        run.finish(NEVER)

    # What is left of the three; and the best is what it was.
    assert [it["lr_scale"] for it in returns.states] == [0.5, 0.25, 0.125]
    assert_same_parameters(returns.states[-1]["ema"], evaluate.shown[0])
    assert load_artifact(folder.artifact).info.images_seen == 160


# Interruption


@pytest.mark.parametrize(
    ("coverages", "exported"), [([0.5, 0.6], 208), ([0.5, 0.5], 208), ([0.5, 0.4], 160)]
)
def test_a_stopped_run_leaves_a_checkpoint_and_the_better_of_newest_and_best(
    folder: RunFolder, coverages: list[float], exported: int
) -> None:
    evaluate = FakeEvaluator(coverages)
    run = fresh(folder, evaluate)
    assert not run.finish(StopAfter(14))
    assert run.state.images_seen == 208
    info = load_artifact(folder.artifact).info
    shown = evaluate.shown[1 if exported == 208 else 0]
    assert_same_parameters(weights_in(folder.artifact), shown)
    assert info.images_seen == exported
    assert info.training["quick_metrics"]["coverage"] == max(coverages)
    assert resumed(folder).state.images_seen == 208
    assert log_of(folder)[-1]["images_seen"] == 208


def test_a_run_stopped_before_its_first_evaluation_leaves_its_newest_generator(
    folder: RunFolder,
) -> None:
    assert not fresh(folder).finish(StopAfter(4))
    assert load_artifact(folder.artifact).info.images_seen == 64
    assert resumed(folder).finish(NEVER)
    assert load_artifact(folder.artifact).info.images_seen == 640


def test_a_run_stopped_before_its_first_step_exports_nothing(folder: RunFolder) -> None:
    assert not fresh(folder).finish(StopAfter(0))
    assert not folder.artifact.exists()


def test_a_run_that_collapsed_when_it_was_stopped_exports_its_best_and_goes_on(
    folder: RunFolder,
) -> None:
    """An evaluation at an interruption neither goes back nor replaces the best."""
    assert not fresh(folder, FakeEvaluator([0.8, 0.1])).finish(StopAfter(14))
    assert load_artifact(folder.artifact).info.images_seen == 160
    run = resumed(folder, FakeEvaluator([0.7]))
    assert run.best is not None
    assert run.best.metrics.coverage == 0.8
    assert run.state.lr_scale == 1.0
    assert events_of(folder) == []
    assert run.finish(NEVER)
    assert load_artifact(folder.artifact).info.images_seen == 160


@pytest.mark.parametrize("questions", [0, *range(9, 16)])
def test_a_stop_at_any_moment_leaves_a_checkpoint_of_the_present_state(
    folder: RunFolder, questions: int
) -> None:
    run = fresh(folder)
    assert not run.finish(StopAfter(questions))
    assert resumed(folder).state.images_seen == run.state.images_seen


@pytest.mark.parametrize(
    "config",
    [tiny.CONFIG, tiny.CONV, replace(tiny.CONV, flip=True, augment=True)],
    ids=["mlp", "conv", "distorted"],
)
def test_an_interrupted_run_ends_as_the_uninterrupted_one(
    tmp_path: Path, real_evaluate: EvaluateFn, config: TrainingConfig
) -> None:
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    fresh(whole, real_evaluate, config).finish(NEVER)

    fresh(parts, real_evaluate, config).finish(StopAfter(14))
    resumed(parts, real_evaluate).finish(NEVER)

    assert_same_weights(weights_in(whole.artifact), weights_in(parts.artifact))
    images_seen = seen(losses_of(parts))
    assert images_seen == sorted(set(images_seen))
    assert images_seen[-4:] == [208, 320, 480, 640]
    assert timeless(metrics_of(parts)) == timeless(metrics_of(whole))


def test_what_was_logged_after_the_checkpoint_is_dropped_when_it_is_gone_on_from(
    folder: RunFolder,
) -> None:
    fresh(folder).finish(StopAfter(14))
    reached = log_of(folder)
    line = {**reached[-1], "images_seen": 400}
    with folder.log.open("a") as log:
        log.write(json.dumps(line) + "\n" + '{"images_se')  # as a crash leaves it

    resumed(folder).finish(NEVER)

    lines = log_of(folder)
    assert lines[: len(reached)] == reached
    assert seen(lines[len(reached) :]) == [320, 320, 480, 480, 640, 640]


def test_a_last_line_without_its_end_does_not_swallow_the_next(folder: RunFolder) -> None:
    fresh(folder).finish(StopAfter(14))
    folder.log.write_text(folder.log.read_text().rstrip("\n"))
    resumed(folder).finish(NEVER)
    assert seen(losses_of(folder)) == [160, 208, 320, 480, 640]


def test_tensorboard_keeps_every_point_of_an_interrupted_run_once(folder: RunFolder) -> None:
    fresh(folder).finish(StopAfter(14))
    resumed(folder).finish(NEVER)
    board = board_of(folder)
    for tag, lines in (
        ("losses/generator", losses_of(folder)),
        ("quality/coverage", metrics_of(folder)),
    ):
        assert [event.step for event in board.Scalars(tag)] == seen(lines)


def test_the_log_of_a_run_that_never_came_to_a_checkpoint_is_begun_again(
    folder: RunFolder,
) -> None:
    folder.path.mkdir()
    folder.log.write_text('{"images_seen": 160}\n')
    fresh(folder).finish(NEVER)
    assert seen(losses_of(folder)) == [160, 320, 480, 640]


def test_checkpoints_are_written_along_the_way_and_once_at_each_place(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CHECKPOINT_EVERY_S", 0.0)
    written: list[int] = []

    def remember(path: Path, state: TrainState, *given: Any) -> None:
        written.append(state.images_seen)
        save_checkpoint(path, state, *given)

    monkeypatch.setattr(run_module, "save_checkpoint", remember)
    fresh(folder).finish(NEVER)
    assert written == [160, 320, 480, 640]


def test_a_finished_run_that_is_gone_on_from_makes_the_same_artifact(folder: RunFolder) -> None:
    fresh(folder).finish(NEVER)
    before = weights_in(folder.artifact)
    folder.artifact.unlink()
    evaluate = FakeEvaluator()
    assert resumed(folder, evaluate).finish(NEVER)
    assert_same_weights(weights_in(folder.artifact), before)
    assert evaluate.shown == []


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_its_cause(
    folder: RunFolder,
) -> None:
    folder.checkpoint.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: cannot be written: Is a directory"):
        fresh(folder).finish(NEVER)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_flag_and_the_second_acts_as_always(
    number: signal.Signals,
) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda it, _frame: received.append(it))
    try:
        with StopFlag() as stop:
            stop.listen()
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
            assert (stop.signal, received) == (number, [])
            os.kill(os.getpid(), number)
            assert received == [number]
        with StopFlag() as unused:
            unused.listen()
            assert not unused()
        os.kill(os.getpid(), number)
        assert received == [number] * 2
    finally:
        signal.signal(number, before)


Command = Callable[..., int]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command line in this process, on the tiny data set; returns its exit status."""
    tiny.install(monkeypatch, tmp_path / "data")

    def train(folder: RunFolder, *options: str) -> int:
        arguments = ["train", "mnist", "--device", "cpu", "--out", str(folder.path), *options]
        return CliRunner(catch_exceptions=False).invoke(main, arguments).exit_code

    return train


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_a_checkpoint_and_the_shells_status(
    folder: RunFolder,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
    status: int,
) -> None:
    train_step = loop.train_step

    def step(state: TrainState, *given: Any, **options: Any) -> Tensor:
        if state.images_seen == 320:
            os.kill(os.getpid(), number)
        return train_step(state, *given, **options)

    monkeypatch.setattr(loop, "train_step", step)
    assert command(folder, "--preset", "mlp") == status
    assert read_checkpoint(folder.checkpoint).state["images_seen"] == 336
    assert load_artifact(folder.artifact).info.images_seen in (160, 320, 336)


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.support import tiny_training as tiny
from training import loop
from training import run
from training.__main__ import main

tiny.install(pytest.MonkeyPatch(), Path(sys.argv.pop(1)))
run.CHECKPOINT_EVERY_S = 0.0
train_step = loop.train_step

def step(state, *given, **options):
    if state.images_seen == 416:
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(state, *given, **options)

loop.train_step = step
main(prog_name="training")
"""


def test_a_killed_command_that_is_resumed_ends_as_one_that_never_was(
    tmp_path: Path, command: Command
) -> None:
    killed, whole = RunFolder(tmp_path / "killed"), RunFolder(tmp_path / "whole")
    options = ("--preset", "conv", "--seed", "5", "--flip")
    ended = processes.run(
        *("-c", KILLED, str(tmp_path / "same data")),
        *("train", "mnist", "--device", "cpu", "--out", str(killed.path), *options),
        environment={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert read_checkpoint(killed.checkpoint).state["images_seen"] == 320

    assert command(killed, "--resume", *options) == 0
    assert command(whole, *options) == 0

    assert_same_weights(weights_in(whole.artifact), weights_in(killed.artifact))
    infos = [load_artifact(it.artifact).info for it in (whole, killed)]
    assert infos[0].images_seen == infos[1].images_seen
    assert timeless(log_of(killed)) == timeless(log_of(whole))
    assert seen(losses_of(whole)) == [160, 320, 480, 640]


# Where the code comes from


def test_the_source_commit_is_unknown_outside_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "run.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert source_commit() is None


def test_the_source_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert source_commit() is None


def test_the_source_commit_says_whether_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        metadata = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", *metadata, *arguments]
        ended = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return ended.stdout.strip()

    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "run.py"))
    (tmp_path / "run.py").write_text("one")
    git("init", "--quiet")
    git("add", "run.py")
    git("commit", "--quiet", "--message", "one")
    assert source_commit() == git("rev-parse", "HEAD")
    (tmp_path / "run.py").write_text("two")
    assert source_commit() == f"{git('rev-parse', 'HEAD')}-dirty"
