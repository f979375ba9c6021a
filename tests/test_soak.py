"""The conclusions of `python -m tests.soak`; the soak itself takes minutes."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.soak import Point, draw, judge, slope_per_hour
from tests.support.clients import Held

REST = Held(memory_mb=400.0, files=14, threads=8)


def points(memory_mb: Callable[[float], float], *, hours: float = 1.0) -> list[Point]:
    times = [hours * 3600 * share / 100 for share in range(1, 101)]
    return [Point(at, memory_mb(at / 3600), 40, 8, 0.0, 200.0, 1.0, 5.0) for at in times]


def bad(seen: list[Point], after: Held = REST, unexpected: int = 0) -> list[str]:
    verdicts = judge(seen, REST, after, unexpected)
    return [verdict.text.split(":")[0] for verdict in verdicts if not verdict.good]


def test_what_stays_as_it_is_is_good() -> None:
    assert bad(points(lambda _: 480.0)) == []


def test_what_grew_while_it_warmed_up_is_good() -> None:
    assert bad(points(lambda hour: 400.0 + min(hour, 0.3) * 300)) == []


def test_a_leak_of_20_mb_an_hour_is_told() -> None:
    assert bad(points(lambda hour: 480.0 + 20.0 * hour)) == ["memory"]


def test_a_single_peak_is_no_leak() -> None:
    assert bad(points(lambda hour: 900.0 if hour > 0.98 else 480.0)) == []


def test_in_a_short_run_only_what_is_more_than_noise_is_told() -> None:
    assert bad(points(lambda hour: 480.0 + 20.0 * hour, hours=0.1)) == []
    assert bad(points(lambda hour: 480.0 + 200.0 * hour, hours=0.1)) == ["memory"]


@pytest.mark.parametrize(
    ("after", "unexpected", "expected"),
    [
        (Held(400.0, 15, 8), 0, ["files"]),
        (Held(400.0, 14, 9), 0, ["threads"]),
        (REST, 1, ["unexpected outcomes"]),
    ],
)
def test_what_is_left_over_and_what_nobody_expects_is_told(
    after: Held, unexpected: int, expected: list[str]
) -> None:
    assert bad(points(lambda _: 480.0), after, unexpected) == expected


def test_a_slope_is_by_the_hour() -> None:
    assert slope_per_hour([0.0, 1800.0, 3600.0], [1.0, 2.0, 3.0]) == pytest.approx(2.0)


def test_the_plot_shows_its_lines(tmp_path: Path) -> None:
    draw(points(lambda _: 480.0), tmp_path / "soak.png")
    with Image.open(tmp_path / "soak.png") as image:
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert {(0x1F, 0x5F, 0xA8), (0xC8, 0x50, 0x2D), (255, 255, 255)} <= {c for _, c in colours}
