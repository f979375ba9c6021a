"""The probe tries each penalty from the same start, and the run goes on from the best."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from tests.support import tiny_training as tiny
from tests.training.test_checkpoint import differing
from training import gamma_search as probe
from training.checkpoint import RunMetadata
from training.config import PRESETS, TrainingConfig
from training.distributed import SINGLE_PROCESS
from training.gamma_search import (
    DEFAULT_PENALTY,
    MIN_SCORE,
    PENALTIES,
    SHARE,
    best_of,
    choose_penalty,
    is_worthwhile,
)
from training.loop import TrainState
from training.networks import Generator
from training.quality.evaluator import QuickMetrics
from training.run import Run, RunFolder, start_run

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
OPEN = replace(tiny.CONFIG, penalty=None, images=3200)
IDENTITY = RunMetadata(
    dataset="tiny", dataset_digest="ab", preset="mlp", seed=3, config=OPEN, minutes=None
)
PROBED = -(-int(SHARE * OPEN.images) // OPEN.batch_size) * OPEN.batch_size  # whole batches


@dataclass
class Scores:
    """In the judge's place: gives the scores that it is told to, one after the other."""

    told: list[float]
    shown: list[Generator] = field(default_factory=list)

    def __call__(self, generator: Generator) -> QuickMetrics:
        assert not generator.training
        self.shown.append(generator)
        score = self.told[len(self.shown) - 1]
        return QuickMetrics(gan_test=1.0, coverage=score, frechet_distance=1.0, score=score)


@dataclass
class Starts:
    """Makes fresh states as a run does, and keeps them."""

    spoil: float | None = None  # the penalty under which a state is no number from the start
    made: list[tuple[TrainingConfig, TrainState]] = field(default_factory=list)

    def __call__(self, config: TrainingConfig) -> TrainState:
        state = tiny.state(config, seed=3)
        if config.penalty == self.spoil:
            with torch.no_grad():
                state.generator.label_embedding.weight.fill_(float("nan"))
        self.made.append((config, state))
        return state


def choose(
    starts: Starts,
    look: Callable[[Generator], QuickMetrics],
    *,
    config: TrainingConfig = OPEN,
    seconds: float | None = None,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, TrainingConfig, dict[str, float], list[str]]:
    told: list[str] = []
    chosen = choose_penalty(
        config, starts, DATA, look, seconds=seconds, stop=stop, report=told.append
    )
    return *chosen, told


@pytest.mark.parametrize("best", range(len(PENALTIES)))
def test_the_penalty_whose_generator_scores_best_is_chosen(best: int) -> None:
    scores = [0.25, 0.125, 0.375]
    scores[best] = 0.75
    starts, look = Starts(), Scores(scores)

    state, config, recorded, told = choose(starts, look)

    assert config == replace(OPEN, penalty=PENALTIES[best])
    assert state is starts.made[best][1]
    assert [it.penalty for it, _ in starts.made] == list(PENALTIES)
    assert recorded == {f"{p:g}": score for p, score in zip(PENALTIES, scores, strict=True)}
    assert told == [
        f"gamma {p:g}: score {score:.3f}, Fréchet distance 1.00"
        for p, score in zip(PENALTIES, scores, strict=True)
    ]
    for generator, (_, tried) in zip(look.shown, starts.made, strict=True):
        assert generator is tried.ema


def look_of(score: float, distance: float) -> QuickMetrics:
    return QuickMetrics(gan_test=1.0, coverage=score, frechet_distance=distance, score=score)


def test_a_score_goes_before_the_distance_and_is_left_alone_where_all_are_chance() -> None:
    looks = {0.2: look_of(0.0002, 40.0), 1.0: look_of(0.0006, 30.0), 5.0: look_of(0.0007, 50.0)}
    assert best_of(looks) == 1.0
    assert best_of({**looks, 5.0: look_of(MIN_SCORE, 50.0)}) == 5.0


def test_every_penalty_is_tried_for_the_same_share_of_the_run_from_the_same_start() -> None:
    beginnings = []

    class Noting(Starts):
        def __call__(self, config: TrainingConfig) -> TrainState:
            state = super().__call__(config)
            beginnings.append(state.generator.label_embedding.weight.detach().clone())
            return state

    starts = Noting()
    choose(starts, Scores([0.1, 0.2, 0.3]))
    assert [state.images_seen for _, state in starts.made] == [PROBED] * 3
    assert SHARE * OPEN.images <= PROBED < SHARE * OPEN.images + OPEN.batch_size
    assert all(torch.equal(beginnings[0], other) for other in beginnings)
    ends = [state.generator.label_embedding.weight for _, state in starts.made]
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.CONV], ids=["mlp", "conv"])
def test_the_run_goes_on_as_if_the_chosen_penalty_had_been_given(config: TrainingConfig) -> None:
    config = replace(config, penalty=None, images=3200)
    state, chosen, *_ = choose(Starts(), Scores([0.1, 0.3, 0.2]), config=config)
    given = replace(config, penalty=PENALTIES[1])
    assert chosen == given
    plain = tiny.state(given, seed=3)
    tiny.steps(plain, given, PROBED // given.batch_size)

    for _ in range(2):
        assert {
            name
            for name in differing(state, plain)
            if not name.startswith("ema.") or not ("running" in name or "num_batches" in name)
        } == set()
        tiny.steps(state, chosen, 4)
        tiny.steps(plain, given, 4)


def test_a_penalty_under_which_training_breaks_down_scores_nothing() -> None:
    look = Scores([0.01, 0.02])
    state, config, recorded, _ = choose(Starts(spoil=PENALTIES[1]), look)
    assert recorded == {"0.2": 0.01, "1": 0.0, "5": 0.02}
    assert config.penalty == 5.0
    assert len(look.shown) == 2
    assert all(p.isfinite().all() for p in state.generator.parameters())


def test_one_that_breaks_down_is_not_chosen_however_little_the_others_learn() -> None:
    for spoilt in PENALTIES:
        _, config, *_ = choose(Starts(spoil=spoilt), Scores([0.0, 0.0]))
        assert config.penalty != spoilt


def test_a_stop_during_the_probe_ends_it_at_once() -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    starts = Starts()
    _, config, recorded, _ = choose(starts, Scores([0.5, 0.6]), stop=stop)
    images = [state.images_seen for _, state in starts.made]
    assert images[0] == PROBED
    assert len(images) == 2
    assert 0 < images[1] < PROBED
    assert len(recorded) == 2
    assert config.penalty is not None


def test_in_a_run_that_is_given_time_each_penalty_has_its_share_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now_s)

    def take_time(state: TrainState, *given: object) -> Callable[[float], torch.Tensor]:
        def step(used: float) -> torch.Tensor:
            nonlocal now_s
            now_s += 1.0
            state.images_seen += OPEN.batch_size
            return torch.zeros(5)

        return step

    monkeypatch.setattr(probe, "make_stepper", take_time)
    starts = Starts()
    choose(starts, Scores([0.1, 0.2, 0.3]), seconds=400.0)
    assert [state.images_seen for _, state in starts.made] == [12 * OPEN.batch_size] * 3
    assert now_s == pytest.approx(3 * SHARE * 400.0)


# Whether there is one


@pytest.mark.parametrize(
    ("images", "seconds", "worthwhile"),
    [
        (probe.MIN_IMAGES / SHARE + 100, None, True),
        (probe.MIN_IMAGES / SHARE - 100, None, False),
        (1, probe.MIN_SECONDS / SHARE + 1, True),
        (10**9, probe.MIN_SECONDS / SHARE - 1, False),
    ],
)
def test_a_probe_is_worth_it_where_its_share_is_long_enough(
    images: float, seconds: float | None, worthwhile: bool
) -> None:
    assert is_worthwhile(replace(OPEN, images=int(images)), seconds) == worthwhile


def begin(folder: Path, config: TrainingConfig, look: Scores) -> Run:
    return start_run(
        RunFolder(folder),
        DATA,
        replace(IDENTITY, config=config),
        look=look,
        world=SINGLE_PROCESS,
        seconds=None,
        stop=lambda: False,
    )


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.run.generator_config", tiny.network_of)


def test_a_short_run_takes_the_default_and_probes_nothing(tmp_path: Path) -> None:
    look = Scores([])
    run = begin(tmp_path, OPEN, look)
    assert run.identity.config == replace(OPEN, penalty=DEFAULT_PENALTY)
    assert (run.identity.probe, run.state.images_seen, look.shown) == (None, 0, [])


def test_a_long_run_begins_with_the_probe_and_records_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "MIN_IMAGES", 50)
    run = begin(tmp_path, OPEN, Scores([0.125, 0.25, 0.5]))
    assert run.identity.config.penalty == 5.0
    assert run.identity.probe == {"0.2": 0.125, "1": 0.25, "5": 0.5}
    assert run.state.images_seen == PROBED


@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_a_penalty_that_is_given_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, penalty: float
) -> None:
    monkeypatch.setattr(probe, "MIN_IMAGES", 50)
    config = replace(OPEN, penalty=penalty)
    run = begin(tmp_path, config, Scores([]))
    assert (run.identity.config, run.identity.probe) == (config, None)


def test_presets_leave_the_penalty_open_but_for_the_documents() -> None:
    assert {name: config.penalty for name, config in PRESETS.items()} == {
        "paper": 0.0,
        "mlp": None,
        "conv": None,
    }
    assert DEFAULT_PENALTY in PENALTIES
