"""Quality over minutes: training runs of this build beside another one's, as a user starts them.

    python -m tests.benchmarks.quality NAME=MINUTES ... [--folder NAME=DIR] [--data-dir DIR]
        [--against CHECKOUT] [--seeds 3] [--out FOLDER]

NAME is a named data set, or any name to which --folder gives a folder of images. For each data set
and each seed, `training train` runs with default options and `--minutes`, in this working tree and
in CHECKOUT in turn, one run at a time. Every run has an empty cache, so none profits from the
classifier of an earlier one. Then `training evaluate` of this working tree takes the full
certificate of both generators, with one classifier.

FOLDER keeps the runs, their output and `results.jsonl`. Called again with the same FOLDER, the
command continues: it skips the results that are there. It prints a table of medians over the seeds,
and draws the evaluations during the runs, with the medians of the certificates as dots. `--draw`
does both from the results alone. Run nothing else meanwhile.
"""

import argparse
import dataclasses
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support.processes import REPOSITORY
from training.data.named import DATASETS, default_data_dir, load_dataset
from training.loading import load_artifact
from training.quality.certificate import read_certificate

THIS, OTHER = "this build", "other build"
COLOURS = {THIS: "#1f5fa8", OTHER: "#c8502d"}
LATE, GRACE_S = 4.0, 1800.0  # a run that takes this many times its minutes, and this, is ended
EVALUATION_S = 3 * 3600.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run.

    Attributes:
        data: name of the data set.
        minutes: its budget.
        seed: of the run.
        build: `THIS` or `OTHER`.
    """

    data: str
    minutes: float
    seed: int
    build: str

    def __str__(self) -> str:
        return f"{self.data}, {self.minutes:g} minutes, seed {self.seed}, {self.build}"


@dataclass(frozen=True, kw_only=True)
class Result(Run):
    """A run, and its measurements.

    Attributes:
        commit: of the build.
        taken: minutes from the start of the command to its end.
        images: real images shown.
        gan_train: of the full certificate, as the next two.
        gan_test: share of generated images that are classified as their own label.
        coverage: share of real images with a generated image as a near neighbour.
        curve: minutes since the start, GAN-test and coverage of each evaluation during the run.
    """

    commit: str
    taken: float
    images: int
    gan_train: float
    gan_test: float
    coverage: float
    curve: list[list[float]]

    @property
    def run(self) -> Run:
        """Return the run alone."""
        return Run(data=self.data, minutes=self.minutes, seed=self.seed, build=self.build)


# Results ------------------------------------------------------------------------------------------


def read_results(path: Path) -> list[Result]:
    """Return the results of a file; a last line that an interruption cut short is removed."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    complete = text[: text.rfind("\n") + 1]
    if complete != text:
        path.write_text(complete, encoding="utf-8")
    return [Result(**json.loads(line)) for line in complete.splitlines()]


def append_result(path: Path, result: Result) -> None:
    """Add a result to a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(dataclasses.asdict(result)) + "\n")


def list_runs(
    budgets: Mapping[str, float], *, seeds: int, builds: Sequence[str], results: Iterable[Result]
) -> Iterator[Run]:
    """Yield the runs that have no result yet, the first seed of all data sets first.

    The builds take turns in being first.
    """
    finished = {result.run for result in results}
    for seed in range(seeds):
        for data, minutes in budgets.items():
            for build in builds if seed % 2 == 0 else builds[::-1]:
                run = Run(data=data, minutes=minutes, seed=seed, build=build)
                if run not in finished:
                    yield run


def read_curve(log: Path, started_at: float) -> tuple[list[list[float]], int]:
    """Return the evaluations of a run's log, and the images shown.

    The times in a log leave out the preparation, which differs from build to build. The last line
    was written when the file was last changed, which gives the offset.

    Args:
        log: `log.jsonl` of the run.
        started_at: time of the start of the command.
    """
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    offset = log.stat().st_mtime - started_at - lines[-1]["elapsed_s"]
    curve = [
        [(offset + line["elapsed_s"]) / 60.0, line["gan_test"], line["coverage"]]
        for line in lines
        if "coverage" in line
    ]
    return curve, max(line["images_seen"] for line in lines)


# Measuring ----------------------------------------------------------------------------------------


def describe(checkout: Path) -> str:
    """Return the commit of a working tree, marked if its files differ from it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--exclude", "*"]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    return ended.stdout.strip()


class FailedRun(RuntimeError):  # noqa: N818 (it is the run that failed)
    """A training run or its evaluation ended without a result."""


def call(checkout: Path, *arguments: str | Path, cache: Path, output: Path, seconds: float) -> int:
    """Run `training` of a working tree; return the exit status.

    Args:
        checkout: the working tree.
        arguments: of `python -m training`.
        cache: folder that takes the place of the user's cache.
        output: file for the output.
        seconds: limit of the duration.
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(cache)}
    with output.open("w", encoding="utf-8") as file:
        return subprocess.run(
            [sys.executable, "-m", "training", *map(str, arguments)],
            cwd=checkout,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            timeout=seconds,
            check=False,
        ).returncode


def train(run: Run, checkout: Path, folder: Path, data: Sequence[str | Path]) -> dict[str, Any]:
    """Train, unless this folder has a finished training; return commit, start and duration.

    Args:
        run: what to train.
        checkout: the working tree to train with.
        folder: a folder for this run alone.
        data: the data set, and the options that locate it.
    """
    finished = folder / "finished.json"
    if finished.exists():
        return dict(json.loads(finished.read_text()))
    shutil.rmtree(folder, ignore_errors=True)  # the rest of an interrupted run
    folder.mkdir(parents=True)
    options = "--minutes", f"{run.minutes:g}", "--seed", str(run.seed), "--out", folder / "run"
    commit, started_at = describe(checkout), time.time()
    status = call(
        checkout,
        *("train", *data, *options),
        cache=folder / "cache",
        output=folder / "train.txt",
        seconds=LATE * 60.0 * run.minutes + GRACE_S,
    )
    taken = (time.time() - started_at) / 60.0
    check_trained(run, folder, status)
    values = {"commit": commit, "started_at": started_at, "taken": taken}
    finished.write_text(json.dumps(values))
    return values


def check_trained(run: Run, folder: Path, status: int) -> None:
    """Raise FailedRun if the training was stopped by a signal or left no generator.

    A run that fails after too many rollbacks leaves its best generator: that is a result.
    """
    stopped = status < 0 or status > 128
    if stopped or not (folder / "run" / "generator.safetensors").exists():
        ended = "stopped" if stopped else "no generator"
        raise FailedRun(f"{run}: exit status {status}, {ended}; see {folder / 'train.txt'}")


def measure(run: Run, checkout: Path, out: Path, data: Sequence[str | Path]) -> Result:
    """Train and take the full certificate; see `train`."""
    folder = out / f"{run.data}-{run.minutes:g}-{run.seed}-{run.build.partition(' ')[0]}"
    trained = train(run, checkout, folder, data)
    artifact, output = folder / "run" / "generator.safetensors", folder / "evaluate.txt"
    status = call(
        REPOSITORY,
        *("evaluate", artifact, "--dataset", *data),
        cache=out / "cache",
        output=output,
        seconds=EVALUATION_S,
    )
    certificate = read_certificate(load_artifact(artifact).info)
    if status or certificate is None:
        raise FailedRun(f"{run}: evaluate had exit status {status}; see {output}")
    curve, images = read_curve(folder / "run" / "log.jsonl", trained["started_at"])
    return Result(
        **dataclasses.asdict(run),
        commit=trained["commit"],
        taken=trained["taken"],
        images=images,
        gan_train=certificate.gan_train.mean,
        gan_test=certificate.generated.gan_test,
        coverage=certificate.generated.coverage,
        curve=curve,
    )


# Table and picture --------------------------------------------------------------------------------


def by_budget(results: Iterable[Result]) -> dict[tuple[str, float], dict[str, list[Result]]]:
    """Return the results by data set and minutes, then by build, the other one first."""
    found: dict[tuple[str, float], dict[str, list[Result]]] = {}
    for result in sorted(results, key=lambda each: each.build):
        builds = found.setdefault((result.data, result.minutes), {})
        builds.setdefault(result.build, []).append(result)
    order = list(dict.fromkeys((result.data, result.minutes) for result in results))
    return {budget: found[budget] for budget in order}


def name_builds(results: Iterable[Result]) -> dict[str, str]:
    """Return the names that readers see; that of the other build is its commit, if it is one."""
    others = {result.commit for result in results if result.build == OTHER}
    return {THIS: THIS, OTHER: others.pop() if len(others) == 1 else OTHER}


def median(results: Sequence[Result], name: str) -> float:
    """Return the median of an attribute."""
    return float(statistics.median(getattr(result, name) for result in results))


def render_table(results: Sequence[Result]) -> str:
    """Return the medians over the seeds as a table in Markdown, and the commits below it."""
    lines = [
        "| data | minutes | taken | build | GAN-train | GAN-test | coverage | images | seeds |",
        "|---|--:|--:|---|--:|--:|--:|--:|--:|",
    ]
    names, commits = name_builds(results), dict[str, set[str]]()
    for (data, minutes), builds in by_budget(results).items():
        for build, found in builds.items():
            commits.setdefault(names[build], set()).update(result.commit for result in found)
            cells = [
                *(f"`{data}`", f"{minutes:g}", f"{median(found, 'taken'):.1f}", names[build]),
                *(f"{median(found, name):.1%}" for name in ("gan_train", "gan_test")),
                *(f"{median(found, 'coverage'):.2f}", f"{median(found, 'images'):,.0f}"),
                str(len(found)),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    of = [
        f"Commits of {name}: {', '.join(sorted(each))}"
        for name, each in commits.items()
        if name not in each
    ]
    return "\n".join([*lines, "", *of])


def draw(results: Sequence[Result], path: Path) -> None:
    """Draw a panel for each data set: GAN-test dotted, coverage solid, over the minutes."""
    from matplotlib.figure import Figure  # noqa: PLC0415 (heavy, and needed here alone)

    budgets = by_budget(results)
    figure = Figure(figsize=(9.0, 3.0), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(budgets), sharey=True, squeeze=False)[0]
    for panel, ((data, minutes), builds) in zip(panels, budgets.items(), strict=True):
        panel.set_title(data, fontsize=10)
        panel.set_xlabel("minutes", fontsize=9)
        panel.set_ylim(0.0, 1.02)
        panel.set_xlim(0.0, 1.06 * max(minutes, *(result.taken for result in results_of(builds))))
        panel.tick_params(labelsize=8)
        panel.grid(color="#dddddd", linewidth=0.6)
        for build, found in builds.items():
            for result in found:
                times, *metrics = np.array(result.curve).reshape(-1, 3).T  # perhaps no row
                for values, line in zip(metrics, (".:", ".-"), strict=True):
                    panel.plot(
                        times, values, line, markersize=3.0, color=COLOURS[build], linewidth=1.2
                    )
            end = median(found, "taken")
            for name, fill in (("gan_test", "white"), ("coverage", COLOURS[build])):
                dot = {"color": COLOURS[build], "markerfacecolor": fill, "markersize": 5.0}
                panel.plot([end], [median(found, name)], "o", clip_on=False, **dot)
    _draw_legend(figure, results)
    drawn = io.BytesIO()
    figure.savefig(drawn)
    with Image.open(drawn) as image:  # a palette takes a third of the bytes
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


def results_of(builds: Mapping[str, Sequence[Result]]) -> Iterator[Result]:
    """Yield the results of all builds."""
    for found in builds.values():
        yield from found


def _draw_legend(figure: Any, results: Sequence[Result]) -> None:
    from matplotlib.lines import Line2D  # noqa: PLC0415

    names, builds = name_builds(results), sorted({result.build for result in results})
    entries = [
        *(Line2D([], [], color=COLOURS[build], label=names[build]) for build in builds),
        Line2D([], [], color="#555555", linestyle=":", label="GAN-test"),
        Line2D([], [], color="#555555", label="coverage"),
        Line2D([], [], color="#555555", marker="o", linestyle="", label="full certificate"),
    ]
    figure.legend(
        handles=entries, loc="outside upper center", ncols=len(entries), fontsize=9, frameon=False
    )


# The command --------------------------------------------------------------------------------------


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options; ends the program if they are wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("budgets", nargs="*", type=budget, metavar="NAME=MINUTES")
    parser.add_argument("--folder", action="append", type=folder, default=[], metavar="NAME=DIR")
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="the other working tree")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/quality"), metavar="FOLDER")
    parser.add_argument("--picture", type=Path, default=REPOSITORY / "training" / "quality.png")
    parser.add_argument("--draw", action="store_true", help="use the results of --out alone")
    options = parser.parse_args(arguments)
    options.budgets, options.folder = dict(options.budgets), dict(options.folder)
    if bool(options.budgets) == options.draw:
        parser.error("give NAME=MINUTES to measure, or --draw to show results that are there")
    for name in options.budgets.keys() - options.folder.keys() - DATASETS.keys():
        known = ", ".join(sorted(DATASETS))
        parser.error(f"{name} is none of {known}; give its images with --folder {name}=DIR")
    if options.against is not None and not (options.against / "training").is_dir():
        parser.error(f"--against {options.against} is not a working tree of this project")
    return options


def budget(text: str) -> tuple[str, float]:
    """Return the name and the minutes of NAME=MINUTES."""
    name, _, minutes = text.partition("=")
    try:
        value = float(minutes)
    except ValueError:
        value = 0.0
    if not name or not 0.0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not NAME=MINUTES, as mnist=5")
    return name, value


def folder(text: str) -> tuple[str, Path]:
    """Return the name and the folder of NAME=DIR."""
    name, _, path = text.partition("=")
    if not name or not Path(path).is_dir() or not path:
        raise argparse.ArgumentTypeError(f"{text} is not NAME=DIR with a folder of images")
    return name, Path(path).resolve()


def measure_all(options: argparse.Namespace, path: Path) -> None:
    """Measure all runs that have no result yet; name those that fail, and continue."""
    out = path.parent
    out.mkdir(parents=True, exist_ok=True)
    data: dict[str, list[str | Path]] = {}
    for name in options.budgets:
        data[name] = [options.folder.get(name, name), "--data-dir", options.data_dir.resolve()]
        if name not in options.folder:  # downloads it, which would count as training
            load_dataset(name, "train", options.data_dir)
    checkouts = {THIS: REPOSITORY}
    if options.against is not None:
        checkouts = {OTHER: options.against.resolve(), THIS: REPOSITORY}
    runs = list_runs(
        options.budgets, seeds=options.seeds, builds=[*checkouts], results=read_results(path)
    )
    for run in runs:
        try:
            result = measure(run, checkouts[run.build], out, data[run.data])
        except (FailedRun, subprocess.TimeoutExpired) as error:
            print(error, file=sys.stderr, flush=True)
            continue
        append_result(path, result)
        print(
            f"{run}: took {result.taken:.1f} minutes, {result.images:,} images; "
            f"GAN-train {result.gan_train:.1%}, GAN-test {result.gan_test:.1%}, "
            f"coverage {result.coverage:.2f}",
            flush=True,
        )


def main() -> None:
    """Read the command line, measure, and show the results."""
    options = parse_options()
    if find_spec("matplotlib") is None:
        raise SystemExit("the picture needs matplotlib; run: pip install -e '.[dev]'")
    path = options.out.resolve() / "results.jsonl"
    if not options.draw:
        measure_all(options, path)
    results = read_results(path)
    if not results:
        raise SystemExit(f"{path} has no results; name data sets to measure, as mnist=5")
    print(render_table(results))
    draw(results, options.picture)
    print(f"{options.picture}: the picture")


if __name__ == "__main__":
    main()
