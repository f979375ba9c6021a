"""The meaning of quick metrics in words, and the forecast of variety."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.quality.estimate import describe, forecast_varied_s, judge, render_forecast
from training.quality.evaluator import QuickMetrics


def metrics(gan_test: float, coverage: float) -> QuickMetrics:
    return QuickMetrics(gan_test, coverage, frechet_distance=1.0, score=gan_test * coverage)


# The words


def test_one_image_per_class_is_named_and_given_with_its_figures() -> None:
    assert describe(metrics(0.95, 0.1), 26) == (
        "legible, but repeats itself: GAN-test 95.0%, coverage 0.10"
    )


@pytest.mark.parametrize(
    ("gan_test", "coverage", "words"),
    [
        (0.287, 0.006, "not legible yet"),
        (0.70, 0.10, "partly legible, and repeats itself"),
        (0.70, 0.30, "partly legible, with some variety"),
        (0.70, 0.60, "varied, and often of the right class"),
        (0.95, 0.30, "legible, with some variety"),
        (0.99, 0.60, "legible and varied"),
        (0.99, 0.86, "legible, and nearly as varied as real images"),
        (0.20, 0.30, "some variety, but mostly of the wrong class"),
        (0.20, 0.80, "varied, but mostly of the wrong class"),
    ],
)
def test_words_depend_on_fidelity_and_variety(gan_test: float, coverage: float, words: str) -> None:
    assert judge(metrics(gan_test, coverage), 26) == words


def test_the_share_that_guesses_reach_is_not_legible() -> None:
    assert judge(metrics(0.5, 0.0), 2) == "not legible yet"
    assert judge(metrics(0.51, 0.0), 1000) == "partly legible, and repeats itself"


def test_of_one_class_every_image_has_the_right_class() -> None:
    assert judge(metrics(1.0, 0.6), 1) == "legible and varied"


# The forecast


def test_a_coverage_that_rises_in_the_logarithm_of_time_is_extended() -> None:
    history = [(60.0 * 2**i, 0.1 * (i + 1)) for i in range(4)]  # 0.1 more per doubling
    assert forecast_varied_s(history) == pytest.approx(60.0 * 2**4)


@pytest.mark.parametrize(
    "history",
    [
        [],
        [(60.0, 0.1), (120.0, 0.2)],
        [(60.0, 0.1), (120.0, 0.3), (180.0, 0.2)],
        [(60.0, 0.2), (120.0, 0.2), (180.0, 0.2)],
        [(60.0, 0.100), (120.0, 0.101), (180.0, 0.102)],
        [(60.0, 0.4), (120.0, 0.45), (180.0, 0.6)],
        [(0.0, 0.1), (0.0, 0.2), (0.0, 0.3)],
    ],
    ids=["nothing", "too few", "falls", "stands", "too slow", "varied already", "no time"],
)
def test_without_a_basis_there_is_no_forecast(history: list[tuple[float, float]]) -> None:
    assert forecast_varied_s(history) is None


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(0, 1)), max_size=6, unique_by=lambda point: point[0]
    )
)
def test_a_forecast_is_later_than_now_and_bounded(history: list[tuple[float, float]]) -> None:
    history.sort()
    found = forecast_varied_s(history)
    if found is not None:
        assert history[-1][0] <= found <= 10.001 * history[-1][0]
        assert math.isfinite(found)


RISING = [(60.0 * 2**i, 0.1 * (i + 1)) for i in range(4)]  # varied after 16 minutes


@pytest.mark.parametrize(
    ("end_s", "prepared_s", "text"),
    [
        (1200.0, 0.0, "; expect varied images from about 16 minutes on"),
        (1200.0, 90.0, "; expect varied images from about 18 minutes on"),
        (600.0, 0.0, "; varied images would take about 16 minutes, more than this run has"),
    ],
)
def test_a_forecast_counts_from_the_start_of_the_run_and_knows_its_end(
    end_s: float, prepared_s: float, text: str
) -> None:
    assert render_forecast(RISING, end_s, prepared_s) == text
    assert render_forecast(RISING[:2], end_s, prepared_s) == ""
