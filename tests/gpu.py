"""The checks that need a GPU, in parts that run unattended, each within ten minutes.

    python -m tests.gpu PART... [--out DIR] [--data-dir DIR] [--minutes M] [--rehearse]

    tests           those marked `gpu`, and those of whole services, which take a GPU by themselves
    training        steps beside the loop as it is published; all steps of preset `paper`
    serving         the engine by batch size, and what takes its time; 1, 4 and 12 workers
    mnist, mnist-mlp, fashion-mnist, folder
                    a run of --minutes, certified; `folder` is one of --folder DIR

Every command's output is kept in a log of its own under --out, beside what it made, and its last
lines are printed. Ends with status 1 where a command failed. --rehearse runs the same commands, cut
short, on whatever device there is, to see that they work; its figures mean nothing.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from training.data.named import default_data_dir
from training.devices import resolve_device
from training.machine import DeviceError

LIMIT_S = 590.0  # of a part
SERVICES = (
    "tests/test_end_to_end.py",
    "tests/service/inference/test_health.py",
    "tests/service/inference/test_reload.py",
    "tests/service/server/test_workers.py",
)
FAULTS = ("not_a_number", "out_of_memory", "lost_device")


@dataclasses.dataclass(frozen=True)
class Options:
    """Of the command line."""

    out: Path
    data_dir: Path
    folder: Path | None
    minutes: float
    rehearse: bool

    @property
    def device(self) -> str:
        """The device to name: one that is absent is an error, except in a rehearsal."""
        return "auto" if self.rehearse else "cuda"


Command = list[str]


def tests(options: Options) -> dict[str, Command]:
    """Return the tests marked `gpu`, and services as users start them."""
    marked = ["pytest", "-m", "gpu", "tests"]
    files = SERVICES[:1] if options.rehearse else SERVICES
    return {
        "marked": marked,
        "services": ["pytest", *files],
        "faults": ["tests.faults", *FAULTS],
    }


def training(options: Options) -> dict[str, Command]:
    """The benchmark, and the document's whole run."""
    compare = ["tests.benchmarks.training", "--device", options.device]
    compare += ["--data-dir", str(options.data_dir)]
    if options.rehearse:
        compare += ["--batches", "64", "--rounds", "1", "--seconds", "0.5"]
    else:
        compare += ["--batches", "64", "256", "1024", "--rounds", "5", "--seconds", "1"]
    commands = {"steps": compare}
    for precision in ("float32", "bfloat16"):
        name = f"paper-{precision}"
        whole = train(options, name, ["mnist", "--preset", "paper", "--precision", precision])
        commands[name] = [*whole, "--images", "6400"] if options.rehearse else whole
    return commands


def serving(options: Options) -> dict[str, Command]:
    """The engine and the service, for both kinds of generator."""
    commands = {}
    for name in ("mnist-mlp", "mnist"):
        commands[f"device-{name}"] = [
            *("tests.benchmarks.device", "--device", options.device, "--profile"),
            *("--models", f"weights/{name}.safetensors"),
            *("--json", str(options.out / f"device-{name}.json")),
            *(
                ("--workers", "1", "2", "--rounds", "1", "--seconds", "0.2")
                if options.rehearse
                else ("--workers", "1", "4", "12", "--rounds", "3", "--seconds", "2")
            ),
        ]
    return commands


def train(options: Options, name: str, what: Sequence[str]) -> Command:
    """A training run into a folder of that name."""
    return [
        *("training", "train", *what, "--device", options.device),
        *("--data-dir", str(options.data_dir), "--out", str(options.out / name)),
    ]


def model(name: str, *what: str) -> Callable[[Options], dict[str, Command]]:
    """A part that trains and certifies a model."""

    def commands(options: Options) -> dict[str, Command]:
        source = what or (str(options.folder),)
        run = train(options, name, source)
        if options.rehearse:
            return {name: [*run, "--images", "1280", "--r1-gamma", "1"]}
        return {name: [*run, "--minutes", f"{options.minutes:g}", "--certify"]}

    return commands


PARTS: dict[str, Callable[[Options], dict[str, Command]]] = {
    "tests": tests,
    "training": training,
    "serving": serving,
    "mnist": model("mnist", "mnist"),
    "mnist-mlp": model("mnist-mlp", "mnist", "--preset", "mlp"),
    "fashion-mnist": model("fashion-mnist", "fashion-mnist", "--flip"),
    "folder": model("folder"),
}


def run(name: str, command: Command, log: Path, limit_s: float) -> bool:
    """Run a command of this Python into a log; whether it ended well in time."""
    began = time.monotonic()
    print(f"{name}: python -m {' '.join(command)}", flush=True)
    with log.open("w") as output:
        try:
            status = subprocess.run(
                [sys.executable, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=max(1.0, limit_s),
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            status = -1
    for line in log.read_text(errors="replace").splitlines()[-40:]:
        print(f"    {line}")
    ended = "no end in time" if status == -1 else f"status {status}"
    print(f"{name}: {ended} after {time.monotonic() - began:.0f} s, all of it in {log}", flush=True)
    return status == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that are named; 1 where a command failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--data-dir", type=Path, default=default_data_dir())
    parser.add_argument("--folder", type=Path, help="of images, for the part of that name")
    parser.add_argument("--minutes", type=float, default=8.0, help="of a model's training")
    parser.add_argument("--rehearse", action="store_true", help="cut short, on any device")
    given = parser.parse_args(arguments)
    if "folder" in given.parts and given.folder is None:
        parser.error("the part folder needs --folder")
    if not given.rehearse:
        try:
            resolve_device("cuda")
        except DeviceError as error:
            parser.error(f"{error}; --rehearse does without")
    options = Options(given.out, given.data_dir, given.folder, given.minutes, given.rehearse)
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in given.parts:
        end = time.monotonic() + LIMIT_S
        for name, command in PARTS[part](options).items():
            log = options.out / f"{part}-{name}.log"
            if not run(name, command, log, end - time.monotonic()):
                failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all ended well")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
