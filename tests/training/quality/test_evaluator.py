"""What a run asks of the judge, and how much of its time that takes."""

import itertools
from collections.abc import Iterator

import pytest
import torch

from tests.support import tiny_training as tiny
from training.data.named import Dataset
from training.networks import Generator
from training.quality import evaluator as module
from training.quality.classifier import FeatureClassifier
from training.quality.evaluator import CERTIFICATION_MARGIN, JUDGE_SHARE, RESERVED_SHARE, Evaluator
from training.quality.quick_metrics import glance, make_reference

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN, TEST = tiny.dataset(256, 0), tiny.dataset(120, 1)


def ignore(_text: str) -> None:
    pass


@pytest.fixture(scope="module")
def examiner(one_thread: None) -> Iterator[Evaluator]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "judge_for", tiny.judge)
        patch.setattr("training.quality.quick_metrics.IMAGES", 100)
        yield Evaluator.prepare(TRAIN, TEST, ignore)


@pytest.fixture(scope="module")
def generator(one_thread: None) -> Generator:
    return tiny.state().ema.eval()


def test_a_look_is_a_glance_against_training_images(
    examiner: Evaluator, generator: Generator
) -> None:
    reference = make_reference(examiner.judge, TRAIN)
    assert examiner.look(generator) == glance(generator, examiner.judge, reference)


def test_a_look_leaves_the_random_state_as_it_was(
    examiner: Evaluator, generator: Generator
) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = examiner.look(generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert examiner.look(generator) == first


@pytest.fixture
def _a_look_takes_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))


@pytest.mark.usefixtures("_a_look_takes_a_second")
def test_a_run_without_certificate_has_nearly_all_of_its_time(
    examiner: Evaluator, generator: Generator
) -> None:
    found = examiner.seconds_for_training(5, generator, certified=False)
    assert found == pytest.approx(300 * (1 - RESERVED_SHARE) - 1)


@pytest.mark.usefixtures("_a_look_takes_a_second")
def test_the_time_of_the_certificate_is_reserved(
    examiner: Evaluator, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "estimate_certification_s", lambda *_a, **_k: 60.0)
    found = examiner.seconds_for_training(5, generator, certified=True)
    assert found == pytest.approx(300 * (1 - RESERVED_SHARE) - 1 - 60 * CERTIFICATION_MARGIN)


@pytest.mark.usefixtures("_a_look_takes_a_second")
def test_too_little_time_is_refused_and_the_least_that_is_allowed_is_enough(
    examiner: Evaluator, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "estimate_certification_s", lambda *_a, **_k: 240.0)
    with pytest.raises(ValueError, match=r"minutes: 5 are too few.*is 5\.7 or more"):
        examiner.seconds_for_training(5, generator, certified=True)
    assert examiner.seconds_for_training(5.7, generator, certified=True) > 0


def test_training_a_judge_takes_a_small_share_of_a_budget_and_else_what_it_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[float | None] = []

    def note(
        train: Dataset, _test: Dataset, *, seconds: float | None, **_how: object
    ) -> FeatureClassifier:
        given.append(seconds)
        return tiny.judge(train)

    monkeypatch.setattr(module, "judge_for", note)
    for minutes in (5.0, None):
        Evaluator.prepare(TRAIN, TEST, ignore, minutes=minutes)
    assert given == [pytest.approx(300 * JUDGE_SHARE), None]
