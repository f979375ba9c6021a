"""The progress bar of a run, and the words that it prints above it."""

import io
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import tiny_training as tiny
from training import run_log
from training.quality.evaluator import QuickMetrics
from training.run_log import ProgressBar, RunFolder, RunLogger, open_run_log
from training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")


class Terminal(io.StringIO):
    """A terminal that keeps what is written to it."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    @property
    def percentages(self) -> list[int]:
        return [int(found) for found in re.findall(r"(\d+)%\|", self.getvalue())]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setattr(run_log, "REFRESH_S", 0.0)
    return Terminal()


class Clock:
    """Stands in for the clock of a run and of its bar."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 100.0
        tiny.set_clock(monkeypatch, lambda: self.now_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def begun(clock: Clock, budget_s: float | None = None) -> TrainState:
    state = tiny.state()
    state.budget_s, state.started_at = budget_s, clock.now_s
    return state


# The bar


def test_the_bar_of_a_time_budget_moves_from_the_first_step_and_shows_the_time_left(
    terminal: Terminal, clock: Clock
) -> None:
    state = begun(clock, budget_s=200.0)
    with ProgressBar(state, terminal) as bar:
        for _ in range(4):
            bar.advance()
            clock.now_s += 30.0
            state.images_seen += 1500
    assert terminal.percentages == [0, 0, 15, 30, 45, 60]
    assert "02:20 left, 3,000 images, 50/s" in terminal.getvalue()


def test_the_bar_of_a_number_of_images_counts_these(terminal: Terminal, clock: Clock) -> None:
    state = begun(clock)
    with ProgressBar(state, terminal) as bar:
        for _ in range(5):
            bar.advance()
            clock.now_s += 1.0
            state.images_seen += 144  # the last step exceeds the 640 images of the run
        bar.advance()
    assert terminal.percentages == [0, 0, 22, 45, 68, 90, 100, 100]
    assert set(re.findall(r"/(\d+) \[", terminal.getvalue())) == {"640"}


def test_a_resumed_run_begins_where_it_stopped(terminal: Terminal, clock: Clock) -> None:
    state = begun(clock, budget_s=200.0)
    clock.now_s += 50.0
    with ProgressBar(state, terminal) as bar:
        bar.advance()
    assert set(terminal.percentages) == {25}


def test_the_bar_shows_the_speed_and_the_metrics_of_the_last_log_points(
    terminal: Terminal, clock: Clock
) -> None:
    state = begun(clock, budget_s=200.0)
    with ProgressBar(state, terminal) as bar:
        bar.images_per_s = 1234.5
        bar.metrics = QuickMetrics(0.5, 0.25, 1.0, 0.125)
        bar.advance()
    assert "0 images, 1,234/s, GAN-test 50.0%, coverage 0.25" in terminal.getvalue()


def test_many_steps_are_shown_a_few_times_a_second(
    terminal: Terminal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "REFRESH_S", 0.25)
    state = begun(clock, budget_s=200.0)
    with ProgressBar(state, terminal) as bar:
        for _ in range(1000):
            bar.advance()
            clock.now_s += 1 / 1024
    assert len(terminal.percentages) == 1 + 4 + 1  # at the beginning, in one second, at the end


def test_a_file_gets_a_line_a_minute(clock: Clock) -> None:
    file, state = io.StringIO(), begun(clock, budget_s=200.0)
    with ProgressBar(state, file) as bar:
        for _ in range(180):
            bar.advance()
            clock.now_s += 1.0
    assert file.getvalue().count("left") == 3 + 1


# The words

PREPARED_S = 12.0


@pytest.fixture
def log(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[RunLogger, TrainState]]:
    state = begun(clock, budget_s=6000.0)
    folder = RunFolder(tmp_path / "run")
    with open_run_log(folder, state, tiny.CLASS_NAMES, PREPARED_S) as opened:
        assert opened is not None
        yield opened, state


def look(log: tuple[RunLogger, TrainState], clock: Clock, minutes: float, coverage: float) -> None:
    """Record an evaluation of legible images, so many minutes after the start of the run."""
    logger, state = log
    clock.now_s = state.started_at + 60.0 * minutes - PREPARED_S
    state.images_seen += 12_800
    logger.metrics(state, QuickMetrics(0.97, coverage, 1.0, 0.97 * coverage))


def test_the_meaning_of_an_evaluation_is_said_when_it_changes(
    log: tuple[RunLogger, TrainState], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for minutes, coverage in ((1, 0.10), (2, 0.09), (3, 0.3), (4, 0.15), (5, 0.6), (6, 0.7)):
        look(log, clock, minutes, coverage)
    assert caplog.messages == [
        "After 1.0 minutes and 12,800 images: "
        "legible, but repeats itself: GAN-test 97.0%, coverage 0.10",
        "After 3.0 minutes and 38,400 images: "
        "legible, with some variety: GAN-test 97.0%, coverage 0.30",
        "After 5.0 minutes and 64,000 images: legible and varied: GAN-test 97.0%, coverage 0.60",
    ]


def test_a_forecast_is_said_once_there_is_a_basis_for_it(
    log: tuple[RunLogger, TrainState], clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for minutes, coverage in ((1, 0.06), (1.5, 0.12), (2, 0.18), (2.5, 0.19)):
        look(log, clock, minutes, coverage)
    assert [line.partition("; ")[2] for line in caplog.messages] == [
        "",
        "expect varied images from about 16 minutes on",
    ]
