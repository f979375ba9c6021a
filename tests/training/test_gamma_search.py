"""The gamma search tries each gamma from the same start and continues from the best."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch

from tests.support import tiny_training as tiny
from tests.training.test_checkpoint import differing
from training import gamma_search
from training.checkpoint import RunMetadata
from training.config import PRESETS, TrainingConfig
from training.gamma_search import (
    DEFAULT_GAMMA,
    GAMMAS,
    MIN_SCORE,
    SHARE,
    best_of,
    choose_gamma,
    is_worthwhile,
)
from training.networks import Generator
from training.prepare import start
from training.quality.evaluator import QuickMetrics
from training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
OPEN = replace(tiny.CONFIG, r1_gamma=None, images=3200)
METADATA = RunMetadata(
    dataset="tiny", dataset_digest="ab", preset="mlp", seed=3, config=OPEN, minutes=None
)
SEARCHED = -(-int(SHARE * OPEN.images) // OPEN.batch_size) * OPEN.batch_size  # whole batches


@dataclass
class Scores:
    """An evaluator that returns the given scores, one after the other."""

    scores: list[float]
    shown: list[Generator] = field(default_factory=list)

    def __call__(self, generator: Generator) -> QuickMetrics:
        assert not generator.training
        self.shown.append(generator)
        score = self.scores[len(self.shown) - 1]
        return QuickMetrics(gan_test=1.0, coverage=score, frechet_distance=1.0, score=score)


@dataclass
class Starts:
    """Creates fresh states as a run does, and keeps them."""

    spoil: float | None = None  # with this gamma a state is not finite from the start
    budget_s: float | None = None
    made: list[tuple[TrainingConfig, TrainState]] = field(default_factory=list)

    def __call__(self, config: TrainingConfig) -> TrainState:
        state = tiny.state(config, seed=3)
        state.budget_s = self.budget_s
        if config.r1_gamma == self.spoil:
            with torch.no_grad():
                state.generator.label_embedding.weight.fill_(float("nan"))
        self.made.append((config, state))
        return state


def choose(
    starts: Starts,
    evaluate: Callable[[Generator], QuickMetrics],
    *,
    config: TrainingConfig = OPEN,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[TrainState, TrainingConfig, dict[str, float]]:
    state, scores = choose_gamma(config, starts, DATA, evaluate, stop=stop)
    return state, state.config, scores


@pytest.mark.parametrize("best", range(len(GAMMAS)))
def test_the_gamma_whose_generator_scores_best_is_chosen(
    best: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    scores = [0.25, 0.125, 0.375]
    scores[best] = 0.75
    starts, evaluate = Starts(), Scores(scores)

    state, config, recorded = choose(starts, evaluate)

    assert config == replace(OPEN, r1_gamma=GAMMAS[best])
    assert state is starts.made[best][1]
    assert [it.r1_gamma for it, _ in starts.made] == list(GAMMAS)
    assert recorded == {f"{p:g}": score for p, score in zip(GAMMAS, scores, strict=True)}
    assert caplog.messages == [
        f"gamma {p:g}: score {score:.3f}, Fréchet distance 1.00"
        for p, score in zip(GAMMAS, scores, strict=True)
    ]
    for generator, (_, tried) in zip(evaluate.shown, starts.made, strict=True):
        assert generator is tried.ema


def metrics_of(score: float, distance: float) -> QuickMetrics:
    return QuickMetrics(gan_test=1.0, coverage=score, frechet_distance=distance, score=score)


def test_a_score_goes_before_the_distance_unless_all_scores_are_chance() -> None:
    found = {
        0.2: metrics_of(0.0002, 40.0),
        1.0: metrics_of(0.0006, 30.0),
        5.0: metrics_of(0.0007, 50.0),
    }
    assert best_of(found) == 1.0
    assert best_of({**found, 5.0: metrics_of(MIN_SCORE, 50.0)}) == 5.0


def test_every_gamma_is_tried_for_the_same_share_of_the_run_from_the_same_start() -> None:
    beginnings = []

    class Noting(Starts):
        def __call__(self, config: TrainingConfig) -> TrainState:
            state = super().__call__(config)
            beginnings.append(state.generator.label_embedding.weight.detach().clone())
            return state

    starts = Noting()
    choose(starts, Scores([0.1, 0.2, 0.3]))
    assert [state.images_seen for _, state in starts.made] == [SEARCHED] * 3
    assert SHARE * OPEN.images <= SEARCHED < SHARE * OPEN.images + OPEN.batch_size
    assert all(torch.equal(beginnings[0], other) for other in beginnings)
    ends = [state.generator.label_embedding.weight for _, state in starts.made]
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[1], ends[2])


@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.CONV], ids=["mlp", "conv"])
def test_the_run_continues_as_if_the_chosen_gamma_had_been_given(config: TrainingConfig) -> None:
    config = replace(config, r1_gamma=None, images=3200)
    state, chosen, _ = choose(Starts(), Scores([0.1, 0.3, 0.2]), config=config)
    given = replace(config, r1_gamma=GAMMAS[1])
    assert chosen == given
    plain = tiny.state(given, seed=3)
    tiny.steps(plain, SEARCHED // given.batch_size)

    for _ in range(2):
        assert {
            name
            for name in differing(state, plain)
            if not name.startswith("ema.") or not ("running" in name or "num_batches" in name)
        } == set()
        tiny.steps(state, 4)
        tiny.steps(plain, 4)


def test_a_gamma_with_which_training_diverges_scores_nothing() -> None:
    evaluate = Scores([0.01, 0.02])
    state, config, recorded = choose(Starts(spoil=GAMMAS[1]), evaluate)
    assert recorded == {"0.2": 0.01, "1": 0.0, "5": 0.02}
    assert config.r1_gamma == 5.0
    assert len(evaluate.shown) == 2
    assert all(p.isfinite().all() for p in state.generator.parameters())


def test_a_gamma_that_diverges_is_never_chosen() -> None:
    for spoilt in GAMMAS:
        _, config, _ = choose(Starts(spoil=spoilt), Scores([0.0, 0.0]))
        assert config.r1_gamma != spoilt


def test_a_stop_during_the_search_ends_it_at_once() -> None:
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 10

    starts = Starts()
    _, config, recorded = choose(starts, Scores([0.5, 0.6]), stop=stop)
    images = [state.images_seen for _, state in starts.made]
    assert images[0] == SEARCHED
    assert len(images) == 2
    assert 0 < images[1] < SEARCHED
    assert len(recorded) == 2
    assert config.r1_gamma is not None


def test_in_a_run_with_a_time_budget_each_gamma_has_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now_s)

    def take_time(state: TrainState, *given: object) -> Callable[[float], torch.Tensor]:
        def step(progress: float) -> torch.Tensor:
            nonlocal now_s
            now_s += 1.0
            state.images_seen += OPEN.batch_size
            return torch.zeros(5)

        return step

    monkeypatch.setattr(gamma_search, "make_step", take_time)
    starts = Starts(budget_s=400.0)
    choose(starts, Scores([0.1, 0.2, 0.3]))
    assert [state.images_seen for _, state in starts.made] == [12 * OPEN.batch_size] * 3
    assert now_s == pytest.approx(3 * SHARE * 400.0)


# Whether there is one


@pytest.mark.parametrize(
    ("images", "seconds", "worthwhile"),
    [
        (gamma_search.MIN_IMAGES / SHARE + 100, None, True),
        (gamma_search.MIN_IMAGES / SHARE - 100, None, False),
        (1, gamma_search.MIN_SECONDS / SHARE + 1, True),
        (10**9, gamma_search.MIN_SECONDS / SHARE - 1, False),
    ],
)
def test_a_search_is_worthwhile_if_its_share_is_long_enough(
    images: float, seconds: float | None, worthwhile: bool
) -> None:
    assert is_worthwhile(replace(OPEN, images=int(images)), seconds) == worthwhile


def begin(config: TrainingConfig, evaluate: Scores) -> tuple[TrainState, RunMetadata]:
    return start(replace(METADATA, config=config), DATA, evaluate, stop=lambda: False)


@pytest.fixture(autouse=True)
def _small_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.prepare.generator_config", tiny.network_of)


def test_a_short_run_takes_the_default_without_a_search() -> None:
    evaluate = Scores([])
    state, metadata = begin(OPEN, evaluate)
    assert metadata.config == replace(OPEN, r1_gamma=DEFAULT_GAMMA)
    assert (metadata.gamma_scores, state.images_seen, evaluate.shown) == (None, 0, [])


def test_a_long_run_begins_with_the_search_and_records_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gamma_search, "MIN_IMAGES", 50)
    state, metadata = begin(OPEN, Scores([0.125, 0.25, 0.5]))
    assert metadata.config.r1_gamma == 5.0
    assert metadata.gamma_scores == {"0.2": 0.125, "1": 0.25, "5": 0.5}
    assert state.images_seen == SEARCHED


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_a_gamma_that_is_given_is_taken(monkeypatch: pytest.MonkeyPatch, gamma: float) -> None:
    monkeypatch.setattr(gamma_search, "MIN_IMAGES", 50)
    config = replace(OPEN, r1_gamma=gamma)
    _, metadata = begin(config, Scores([]))
    assert (metadata.config, metadata.gamma_scores) == (config, None)


def test_only_the_preset_paper_sets_gamma() -> None:
    assert {name: config.r1_gamma for name, config in PRESETS.items()} == {
        "paper": 0.0,
        "mlp": None,
        "conv": None,
    }
    assert DEFAULT_GAMMA in GAMMAS
