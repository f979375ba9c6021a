"""The budget of a run in minutes holds for all of it, by a clock that only work moves on."""

from pathlib import Path

import pytest

from tests.support import tiny_training as tiny
from training.checkpoint import read_checkpoint
from training.distributed import SINGLE_PROCESS
from training.loading import load_artifact
from training.loop import measure_progress
from training.plan import (
    MIN_TRAINING_SHARE,
    RESERVED_SHARE,
    START_S,
    RunPlan,
    plan_run,
    render_plan,
)
from training.prepare import PreparedRun, prepare_run
from training.quality import classifier
from training.quality.budget import MEASURING_SHARE, Costs, MeasuringPlan
from training.quality.certificate import CertificateSize
from training.run import StopFlag
from training.settings import TrainSettings

pytestmark = pytest.mark.usefixtures("one_thread")

IMAGE_S = 0.0015  # of generating, classifying or learning from an image
PAIR_S = 1e-8
STEPS = 60  # of the generator and the discriminator in a budget
FULL = CertificateSize(images=2000, gan_train_images=6000)
COSTS = Costs(
    generate_s=IMAGE_S,
    classify_s=IMAGE_S,
    pair_s=PAIR_S,
    nearest_s=1e-4,
    classifier_s=IMAGE_S,
    gan_train_s=IMAGE_S,
)


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tiny.FakeClock:
    """A tiny data set, and the time that its images would take on a slow machine."""
    tiny.install(monkeypatch, tmp_path / "data")
    monkeypatch.setattr("training.quality.evaluator.get_classifier", classifier.get_classifier)
    monkeypatch.setattr("training.quality.budget.plan_epochs", classifier.plan_epochs)
    for name in ("evaluator", "budget"):
        monkeypatch.setattr(f"training.quality.{name}.default_cache", lambda: tmp_path / "cache")
    for name in ("budget", "certificate"):
        monkeypatch.setattr(f"training.quality.{name}.FULL", FULL)
    monkeypatch.setattr("training.quality.classifier.BATCH", 16)
    clock = tiny.FakeClock(monkeypatch)
    for module in ("budget", "certificate"):
        clock.spend(
            f"training.quality.{module}.generate_dataset",
            lambda *_given, images, **_how: IMAGE_S * images,
        )
    for name in ("classifier", "gan_train"):
        clock.spend(f"training.quality.{name}.to_images", lambda pixels: IMAGE_S * len(pixels))
    clock.spend("torch.cdist", lambda few, many: PAIR_S * few.shape[0] * many.shape[0])
    return clock


def settings(tmp_path: Path, **options: object) -> TrainSettings:
    given = {"dataset": "mnist", "device": "cpu", "out": tmp_path / "run", "r1_gamma": 0.5}
    return TrainSettings(**{**given, **options})  # type: ignore[arg-type]


def prepare(given: TrainSettings) -> PreparedRun:
    with StopFlag() as stop:
        return prepare_run(given, SINGLE_PROCESS, stop)


def finish(clock: tiny.FakeClock, given: TrainSettings) -> PreparedRun:
    """Do what the command `train` does, by steps of a sixtieth of the budget."""
    assert given.minutes is not None
    clock.spend("training.loop.optimize", 60 * given.minutes / STEPS)
    prepared = prepare(given)
    assert prepared.run.finish(lambda: False)
    measuring = prepared.plan.measuring
    if given.certify:
        assert prepared.evaluator is not None
        generator = load_artifact(prepared.run.folder.artifact).generator
        certificate = prepared.evaluator.certify(
            generator, size=measuring.size, seconds=measuring.certificate_s
        )
        assert certificate.brief is not None
    return prepared


@pytest.mark.parametrize(("minutes", "certify"), [(2, True), (5, False)])
def test_a_run_takes_its_minutes_and_trains_for_four_fifths_of_them(
    tmp_path: Path, clock: tiny.FakeClock, minutes: float, certify: bool
) -> None:
    finished = finish(clock, settings(tmp_path, minutes=minutes, certify=certify))
    total_s = 60 * minutes
    assert 0.85 * total_s < clock.now_s <= total_s - START_S
    trained = finished.run.state.images_seen / tiny.CONV.batch_size / STEPS
    assert trained >= 1 - MEASURING_SHARE - RESERVED_SHARE - START_S / total_s - 1 / STEPS
    assert finished.excess is None


def test_a_dry_run_has_the_plan_of_the_run(
    tmp_path: Path, clock: tiny.FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.plan.measure_costs", lambda *_given, **_how: COSTS)
    dry, real = (
        prepare(settings(tmp_path, minutes=2, certify=True, dry_run=dry)) for dry in (True, False)
    )
    assert dry.plan == real.plan
    size = real.plan.measuring.size
    assert size is not None
    assert size.images < FULL.images
    assert render_plan(dry.run, dry.plan).endswith(
        "Estimated time: 2.0 minutes of the 2 given\n"
        "  classifier       0.2 minutes\n"
        "  training         1.6 minutes\n"
        "  evaluation       0.1 minutes\n"
        f"  certificate      0.1 minutes: {size}"
    )


def test_a_run_whose_preparation_takes_longer_than_its_budget_trains_and_says_so(
    tmp_path: Path, clock: tiny.FakeClock
) -> None:
    clock.spend("training.prepare.load_splits", 195.0)
    finished = finish(clock, settings(tmp_path, minutes=2))
    info = load_artifact(finished.run.folder.artifact).info
    assert info.images_seen >= MIN_TRAINING_SHARE * STEPS * tiny.CONV.batch_size
    assert info.training["elapsed_s"] == pytest.approx(clock.now_s, abs=0.1)
    excess = (clock.now_s - 120) / 60
    assert 1.4 < excess < 2.0
    assert finished.excess == (
        f"The run took {excess:.1f} minutes more than --minutes 2; "
        f"{finished.run.metadata.prepared_s / 60:.1f} minutes were spent before training"
    )


def test_a_schedule_begins_when_the_preparation_ends(tmp_path: Path, clock: tiny.FakeClock) -> None:
    clock.spend("training.prepare.load_splits", 60.0)
    prepared = prepare(settings(tmp_path, minutes=2))
    assert prepared.run.metadata.prepared_s == pytest.approx(clock.now_s, abs=0.1)
    assert measure_progress(prepared.run.state) == pytest.approx(0.0, abs=1e-3)


def test_a_resumed_run_counts_its_first_preparation(tmp_path: Path, clock: tiny.FakeClock) -> None:
    first = finish(clock, settings(tmp_path, minutes=2))
    assert first.run.metadata.prepared_s > 10
    checkpoint = read_checkpoint(first.run.folder.checkpoint)
    assert checkpoint.metadata.prepared_s == first.run.metadata.prepared_s
    finished = finish(clock, settings(tmp_path, resume=True, minutes=4, r1_gamma=None))
    spent_s = finished.run.metadata.prepared_s + finished.run.state.elapsed_s
    assert 0.85 * 240 < spent_s <= 240


def test_a_run_of_images_has_no_limits() -> None:
    plan = RunPlan()
    assert plan.training_s(1e9) is None
    assert plan.measuring == MeasuringPlan()
    assert plan.render_excess(1e9, 1e9) is None


def test_training_always_gets_a_share() -> None:
    late = RunPlan(minutes=2, measuring=MeasuringPlan(certificate_s=500.0))
    assert late.training_s(0.0) == late.training_s(1000.0) == MIN_TRAINING_SHARE * 120
    assert late.durations_s()["training"] == MIN_TRAINING_SHARE * 120


def test_a_plan_adds_up_to_the_minutes() -> None:
    measuring = MeasuringPlan(classifier_s=5.0, quick_s=1.0, certificate_s=10.0)
    assert sum(RunPlan(minutes=3, measuring=measuring).durations_s().values()) == 180


def test_a_short_run_says_that_its_measurements_are_rough() -> None:
    measuring = MeasuringPlan(classifier_s=5.0, certificate_s=0.0)
    for minutes, said in ((1.5, True), (2.0, False)):
        plan = RunPlan(minutes=minutes, measuring=measuring)
        assert ("rough in less than 2 minutes" in plan.render(plan.durations_s())) == said


def test_the_batch_norm_of_a_generator_is_measured_within_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.plan.measure_costs", lambda *_given, **_how: COSTS)
    monkeypatch.setattr("training.quality.budget.plan_epochs", lambda *_given, **_how: 0.0)
    mlp, conv = (
        plan_run(network, tiny.dataset(), tiny.dataset(), minutes=5, certified=False)
        for network in (tiny.NETWORK, tiny.CONV_NETWORK)
    )
    assert conv.closing_s == conv.measuring.quick_s
    assert mlp.closing_s - conv.closing_s == 50_000 * COSTS.generate_s
