"""The benchmarks of training: options, continuation, tables and the picture."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.benchmarks.quality import (
    OTHER,
    THIS,
    FailedRun,
    Result,
    append_result,
    check_trained,
    draw,
    list_runs,
    parse_options,
    read_curve,
    read_results,
    render_table,
)
from tests.benchmarks.step_rate import render_rates
from tests.support.processes import REPOSITORY


def result(seed: int = 0, build: str = THIS, **values: float) -> Result:
    made = Result(
        data="mnist",
        minutes=5.0,
        seed=seed,
        build=build,
        commit="2de422f" if build == OTHER else "0123456",
        taken=5.1,
        images=100_000,
        gan_train=0.9,
        gan_test=0.95,
        coverage=0.5,
        curve=[[1.0, 0.5, 0.1], [5.0, 0.95, 0.5]],
    )
    return replace(made, **values)  # type: ignore[arg-type]


# Options ------------------------------------------------------------------------------------------


def test_data_sets_have_their_minutes_and_folders(tmp_path: Path) -> None:
    options = parse_options(
        ["mnist=5", "letters=0.5", "--folder", f"letters={tmp_path}", "--against", str(REPOSITORY)]
    )

    assert options.budgets == {"mnist": 5.0, "letters": 0.5}
    assert options.folder == {"letters": tmp_path}
    assert options.against == REPOSITORY


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["mnist"], "mnist is not NAME=MINUTES"),
        (["mnist=-1"], "mnist=-1 is not NAME=MINUTES"),
        (["mnist=nan"], "mnist=nan is not NAME=MINUTES"),
        (["letters=5"], "give its images with --folder letters=DIR"),
        (["letters=5", "--folder", "letters=/nowhere"], "not NAME=DIR with a folder of images"),
        (["mnist=5", "--against", "/nowhere"], "is not a working tree of this project"),
        ([], "give NAME=MINUTES to measure, or --draw"),
        (["mnist=5", "--draw"], "give NAME=MINUTES to measure, or --draw"),
    ],
)
def test_wrong_options_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    with pytest.raises(SystemExit):
        parse_options(arguments)

    assert error in capsys.readouterr().err


# Continuation -------------------------------------------------------------------------------------


def test_builds_alternate_and_finished_runs_are_skipped() -> None:
    runs = list_runs({"mnist": 5.0}, seeds=2, builds=[OTHER, THIS], results=[result(0, OTHER)])

    assert [(run.seed, run.build) for run in runs] == [(0, THIS), (1, THIS), (1, OTHER)]


def test_a_run_of_other_minutes_is_another_run() -> None:
    runs = list_runs({"mnist": 6.0}, seeds=1, builds=[THIS], results=[result()])

    assert [str(run) for run in runs] == ["mnist, 6 minutes, seed 0, this build"]


def test_results_are_read_as_written_without_a_line_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    append_result(path, result(0))
    with path.open("a") as file:
        file.write('{"data": "mni')

    assert read_results(path) == [result(0)]
    append_result(path, result(1))
    assert read_results(path) == [result(0), result(1)]


@pytest.mark.parametrize("status", [0, 1])
def test_a_run_that_ends_with_a_generator_counts(tmp_path: Path, status: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "generator.safetensors").touch()

    check_trained(result().run, tmp_path, status)


@pytest.mark.parametrize("status", [130, 143, -9])
def test_a_run_that_was_stopped_does_not_count(tmp_path: Path, status: int) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "generator.safetensors").touch()

    with pytest.raises(FailedRun, match=f"exit status {status}"):
        check_trained(result().run, tmp_path, status)


def test_a_run_without_a_generator_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(FailedRun, match=r"no generator; see .*train\.txt"):
        check_trained(result().run, tmp_path, 0)


def test_the_minutes_of_a_curve_count_from_the_start_of_the_command(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    lines = [
        {"images_seen": 10, "elapsed_s": 30.0, "discriminator": 0.7},
        {"images_seen": 10, "elapsed_s": 30.0, "gan_test": 0.8, "coverage": 0.2},
        {"images_seen": 40, "elapsed_s": 90.0, "gan_test": 0.9, "coverage": 0.4},
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(log, (1120.0, 1120.0))

    assert read_curve(log, started_at=1000.0) == ([[1.0, 0.8, 0.2], [2.0, 0.9, 0.4]], 40)


# Tables and the picture ---------------------------------------------------------------------------


def test_the_table_has_medians_and_the_commits() -> None:
    results = [result(seed, coverage=coverage) for seed, coverage in enumerate((0.1, 0.9, 0.7))]
    table = render_table([*results, result(0, OTHER, gan_test=0.25)]).splitlines()

    assert table[2] == "| `mnist` | 5 | 5.1 | 2de422f | 90.0% | 25.0% | 0.50 | 100,000 | 1 |"
    assert table[3] == "| `mnist` | 5 | 5.1 | this build | 90.0% | 95.0% | 0.70 | 100,000 | 3 |"
    assert table[-1] == "Commits of this build: 0123456"


def test_the_picture_is_small_and_shows_both_builds(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install -e '.[dev]'")
    path = tmp_path / "quality.png"
    unmeasured = replace(result(1), curve=[])
    draw([result(0), unmeasured, result(0, OTHER, coverage=0.1)], path)

    assert path.stat().st_size < 60_000
    with Image.open(path) as image:
        assert image.size == (900, 300)
        colours = image.convert("RGB").getcolors(1 << 20)
    assert colours is not None
    assert {(0x1F, 0x5F, 0xA8), (0xC8, 0x50, 0x2D)} <= {colour for _, colour in colours}


def test_rates_are_compared_with_the_first_build() -> None:
    table = render_rates(128, {"before": [100.0, 300.0, 200.0], "after": [400.0]}).splitlines()

    assert table[1].split() == ["before", "200", "100", "300", "1.00"]
    assert table[2].split() == ["after", "400", "400", "400", "2.00"]
