"""Several processes train the generator that one would, and leave the same files."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.support import tiny_training as tiny
from tests.support.processes import torchrun
from training.__main__ import main
from training.checkpoint import read_checkpoint
from training.distributed import SINGLE_PROCESS, DistributedContext, init_distributed, local_device
from training.loading import load_artifact
from training.loop import sample_batch
from training.run_log import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
# No batch norm, which normalises each share by itself, and no distortions, which each share draws.
TRAIN = ("train", "mnist", "--preset", "conv", "--device", "cpu", "--no-augment")
TIMEOUT_S = 180.0  # a hung test fails; no test passes by it


# One process


@given(size=st.integers(1, 6), each=st.integers(1, 8))
def test_shares_are_disjoint_and_make_up_the_batch(size: int, each: int) -> None:
    whole = torch.arange(size * each)
    shares = [DistributedContext(rank, size).shard(whole) for rank in range(size)]
    assert [len(share) for share in shares] == [each] * size
    assert sorted(torch.cat(shares).tolist()) == whole.tolist()


@given(size=st.sampled_from([1, 2, 4, 8]), seed=st.integers(0, 99))
def test_processes_that_draw_alike_show_each_image_of_a_batch_once(size: int, seed: int) -> None:
    def draw(world: DistributedContext) -> list[tuple[int, ...]]:
        images, labels = sample_batch(DATA, 16, torch.Generator().manual_seed(seed), world)
        assert len(images) == len(labels) == 16 // world.size
        pixels = ((images + 1) * 127.5).round().int().flatten(1)
        return [
            (*image, label) for image, label in zip(pixels.tolist(), labels.tolist(), strict=True)
        ]

    shown = [image for rank in range(size) for image in draw(DistributedContext(rank, size))]
    assert sorted(shown) == sorted(draw(SINGLE_PROCESS))


def test_exactly_one_process_is_the_main_process() -> None:
    main = [DistributedContext(rank, 3).is_main_process for rank in range(3)]
    assert main == [True, False, False]
    assert SINGLE_PROCESS.is_main_process


def test_alone_everything_is_as_it_is_given() -> None:
    network, values = nn.Linear(2, 2), torch.tensor([1.0, 2.0])
    assert SINGLE_PROCESS.parallel(network) is network
    assert SINGLE_PROCESS.broadcast(1.5, 2.5) == [1.5, 2.5]
    assert (SINGLE_PROCESS.any(True), SINGLE_PROCESS.any(False)) == (True, False)
    assert torch.equal(SINGLE_PROCESS.mean(values), values)


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1", "RANK": "0"}])
def test_where_torchrun_started_no_others_a_process_is_alone(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with init_distributed() as world:
        assert world == SINGLE_PROCESS
    assert not torch.distributed.is_initialized()


def test_each_process_of_a_machine_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert local_device(torch.device("cuda")) == torch.device("cuda:3")
    assert local_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert local_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.delenv("LOCAL_RANK")
    assert local_device(torch.device("cuda")) == torch.device("cuda:0")


# Two processes

SCRIPT = """
import os, signal, sys
from pathlib import Path
import pytest
from tests.support import tiny_training as tiny
from tests.support.processes import end_with_input
from training import loop
from training.__main__ import main

end_with_input()
scratch, rank = Path(sys.argv.pop(1)), os.environ["RANK"]
tiny.install(pytest.MonkeyPatch(), scratch / f"{rank}{sys.argv[-1]}")
train_step = loop.train_step

def step(state, *given, **options):
    if state.images_seen == 26 * 16 and rank == "1":
        os.kill(os.getpid(), signal.SIGTERM)
    return train_step(state, *given, **options)

if "--resume" in sys.argv:
    main(prog_name="training")
loop.train_step = step
try:
    main(prog_name="training")
except SystemExit as error:  # torchrun would end the other process for another status than 0
    (scratch / f"status{rank}").write_text(str(error.code))
"""


@dataclass(frozen=True)
class Ended:
    """Two processes: the folder when they stopped and at the end, their statuses and outputs."""

    stopped: RunFolder
    resumed: RunFolder
    statuses: list[str]
    errors: list[str]
    outputs: list[str]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The command in two processes: SIGTERM to the second stops both at step 27; they resume."""
    scratch = tmp_path_factory.mktemp("pair")
    script = scratch / "script.py"
    script.write_text(SCRIPT)
    folders = RunFolder(scratch / "stopped"), RunFolder(scratch / "run")
    command = [str(scratch), *TRAIN, "--out", str(scratch / "run")]
    environment = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    printed = {"stdout": ["", ""], "stderr": ["", ""]}
    for number, options in enumerate([[], ["--resume"]]):
        logs = scratch / f"logs{number}"
        with torchrun(script, *command, *options, logs=logs, environment=environment) as process:
            process.wait(timeout=TIMEOUT_S)
        for name, texts in printed.items():
            found = sorted(logs.glob(f"*/attempt_0/*/{name}.log"))
            texts[:] = [text + path.read_text() for text, path in zip(texts, found, strict=True)]
        assert process.returncode == 0, printed["stderr"]
        if not options:
            copytree(folders[1].path, folders[0].path)
    statuses = [(scratch / f"status{rank}").read_text() for rank in (0, 1)]
    return Ended(*folders, statuses, printed["stderr"], printed["stdout"])


Command = Callable[..., None]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command in one process, which is this one."""

    def train(folder: RunFolder, *options: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            tiny.install(patch, tmp_path_factory.mktemp("alone"))
            main([*TRAIN, "--out", str(folder.path), *options], standalone_mode=False)

    return train


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, alone: Command) -> RunFolder:
    """Return the results of a single process."""
    folder = RunFolder(tmp_path_factory.mktemp("single") / "run")
    alone(folder)
    return folder


LOSSES = ("discriminator", "generator", "penalty")


def losses_of(folder: RunFolder) -> dict[int, dict[str, float]]:
    """Without the logits: what is added to all of them alike cancels in a relativistic pair, so
    that its gradient is nothing but rounding.
    """
    lines: list[dict[str, Any]] = [json.loads(it) for it in folder.log.read_text().splitlines()]
    return {
        line["images_seen"]: {name: line[name] for name in LOSSES}
        for line in lines
        if "generator" in line
    }


def test_two_processes_report_the_losses_of_one(single: RunFolder, pair: Ended) -> None:
    """Sums in another order differ in their last bits, and training amplifies the difference."""
    expected, found = losses_of(single), losses_of(pair.resumed)
    assert list(expected) == [160, 320, 480, 640]
    for images_seen in (160, 320):
        assert found[images_seen] == pytest.approx(expected[images_seen], rel=1e-4)
    assert found[640] == pytest.approx(expected[640], rel=1e-3)


def test_a_signal_to_one_process_stops_all_with_one_checkpoint(pair: Ended) -> None:
    images_seen = read_checkpoint(pair.stopped.checkpoint).state["images_seen"]
    assert images_seen == 27 * 16
    said = f"Stopped after {images_seen:,} images."
    assert [said in errors for errors in pair.errors] == [True, False]
    assert pair.statuses[0] == "128"  # the signal was received by the other process
    assert load_artifact(pair.stopped.artifact).info.images_seen <= images_seen
    assert f"{pair.resumed.artifact}: the " in pair.errors[0]  # the others waited for it


def test_two_processes_resume_and_leave_the_files_of_one(single: RunFolder, pair: Ended) -> None:
    folder = pair.resumed
    assert not any("Traceback" in errors for errors in pair.errors)
    assert str(folder.artifact) in pair.outputs[0]
    assert pair.outputs[1] == ""  # only the main process prints

    def files(of: RunFolder) -> list[str]:
        return sorted(
            str(path.relative_to(of.path))
            for path in of.path.rglob("*")
            if path.parent.name != "tensorboard"
        )

    assert set(files(folder)) == set(files(single))
    # Every resumption starts a file of its own, in the main process.
    assert len(list(folder.tensorboard.iterdir())) == 2
    info = load_artifact(folder.artifact).info
    assert info.training["processes"] == 2
    assert list(losses_of(folder))[-2:] == [480, 640]


def test_one_process_resumes_a_run_of_two(
    tmp_path: Path, pair: Ended, single: RunFolder, alone: Command
) -> None:
    folder = RunFolder(tmp_path / "run")
    copytree(pair.stopped.path, folder.path)
    alone(folder, "--resume")
    assert load_artifact(folder.artifact).info.training["processes"] == 1
    losses = losses_of(folder)
    assert losses[640] == pytest.approx(losses_of(single)[640], rel=1e-3)


HANGING = """
import sys
from threading import Event
from tests.support.processes import end_with_input

end_with_input()
alive = open(sys.argv[1], "w")
print("alive", file=alive, flush=True)
Event().wait()
"""


def test_processes_that_hang_end_with_the_test_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(HANGING)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with torchrun(tmp_path / "script.py", str(pipe), logs=tmp_path / "logs"):
        reader = pipe.open()
        assert [reader.readline() for _ in range(2)] == ["alive\n", "alive\n"]
    with reader:
        assert reader.read() == ""  # the end, once neither process holds the pipe open


def test_a_batch_that_cannot_be_shared_evenly_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.install(monkeypatch, tmp_path / "data")

    class Joined:
        def __enter__(self) -> DistributedContext:
            return DistributedContext(0, 3)

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr("training.__main__.init_distributed", Joined)
    out = tmp_path / "run"
    result = CliRunner().invoke(
        main, ["train", "mnist", "--device", "cpu", "--out", str(out)], catch_exceptions=False
    )
    assert result.exit_code == 2
    assert "--batch-size 16 is not divisible by the 3 processes" in result.stderr
    assert not out.exists()
