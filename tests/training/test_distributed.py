"""Several processes train the generator that one would, and leave the same files."""

import json
import os
import subprocess
import sys
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
from tests.support.processes import REPOSITORY
from training.__main__ import main
from training.artifact import load_artifact
from training.checkpoint import read_checkpoint
from training.distributed import SINGLE_PROCESS, DistributedContext, init_distributed, local_device
from training.loop import sample_batch
from training.run_log import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
IMAGES = 640
# No batch norm, which normalises each share by itself, and no distortions, which each share draws.
TRAIN = ("train", "mnist", "--preset", "conv", "--device", "cpu", "--no-augment")
PATIENCE_S = 180.0  # a hung test fails by it; no test passes by it


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
import os, signal, sys, time
from pathlib import Path
import pytest
from tests.support import tiny_training as tiny
from training import loop
from training.__main__ import main

folder, images, last_step = Path(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
tiny.install(pytest.MonkeyPatch(), folder / os.environ["RANK"], images=images)
train_step, made = loop.train_step, 0

def step(*given, **options):
    global made
    made += 1
    if made == last_step and os.environ["RANK"] == "0":
        handler = signal.getsignal(signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGTERM)  # the launcher, which tells all of its processes
        while signal.getsignal(signal.SIGTERM) is handler:  # until it has reached this one
            time.sleep(0.01)
    return train_step(*given, **options)

loop.train_step = step
main(prog_name="training")
"""


@dataclass(frozen=True)
class Ended:
    """What two processes printed and how their launcher ended."""

    status: int
    errors: list[str]
    outputs: list[str]


def launch(
    folder: RunFolder, scratch: Path, *options: str, images: int = IMAGES, last_step: int = 0
) -> Ended:
    """The real command in two processes on the loopback; SIGTERM comes during `last_step`."""
    scratch.mkdir()
    (scratch / "script.py").write_text(SCRIPT)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONPATH": str(REPOSITORY),
    }
    ended = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "--redirects", "3", "--log-dir", str(scratch / "logs")),
            *(str(scratch / "script.py"), str(scratch / "data"), str(images), str(last_step)),
            *(*TRAIN, "--out", str(folder.path), *options),
        ],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE_S,
    )

    def printed(name: str) -> list[str]:
        found = sorted((scratch / "logs").glob(f"*/attempt_0/*/{name}.log"))
        assert len(found) == 2, ended.stderr
        return [path.read_text() for path in found]

    return Ended(ended.returncode, printed("stderr"), printed("stdout"))


Command = Callable[..., None]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command in one process, which is this one."""

    def train(folder: RunFolder, *options: str) -> None:
        with pytest.MonkeyPatch.context() as patch:
            tiny.install(patch, tmp_path_factory.mktemp("alone"), images=IMAGES)
            main([*TRAIN, "--out", str(folder.path), *options], standalone_mode=False)

    return train


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory, alone: Command) -> RunFolder:
    """What one process leaves."""
    folder = RunFolder(tmp_path_factory.mktemp("single") / "run")
    alone(folder)
    return folder


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, Ended]:
    """What two processes leave that were told to end at their 27th step of 40."""
    folder = RunFolder(tmp_path_factory.mktemp("stopped") / "run")
    return folder, launch(folder, tmp_path_factory.mktemp("first") / "run", last_step=27)


@pytest.fixture(scope="module")
def resumed(
    tmp_path_factory: pytest.TempPathFactory, stopped: tuple[RunFolder, Ended]
) -> tuple[RunFolder, Ended]:
    """The same, gone on with by two processes to the end."""
    folder = RunFolder(tmp_path_factory.mktemp("resumed") / "run")
    copytree(stopped[0].path, folder.path)
    return folder, launch(folder, tmp_path_factory.mktemp("second") / "run", "--resume")


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


def test_two_processes_report_the_losses_of_one(
    single: RunFolder,
    stopped: tuple[RunFolder, Ended],
    resumed: tuple[RunFolder, Ended],
) -> None:
    """Sums in another order differ in their last bits, and training makes a little more of it."""
    expected, early, late = losses_of(single), losses_of(stopped[0]), losses_of(resumed[0])
    assert list(expected) == [160, 320, 480, 640]
    for images_seen in (160, 320):
        assert early[images_seen] == pytest.approx(expected[images_seen], rel=1e-4)
    assert late[640] == pytest.approx(expected[640], rel=1e-3)


def test_a_signal_to_the_launcher_stops_all_processes_with_one_checkpoint(
    stopped: tuple[RunFolder, Ended],
) -> None:
    folder, ended = stopped
    assert ended.status != 0
    assert not any("Traceback" in errors for errors in ended.errors)
    images_seen = read_checkpoint(folder.checkpoint).state["images_seen"]
    assert images_seen in (26 * 16, 27 * 16)
    said = f"Stopped after {images_seen:,} images; continue with --resume."
    assert [said in errors for errors in ended.errors] == [True, False]
    assert load_artifact(folder.artifact).info.images_seen <= images_seen


def test_two_processes_go_on_to_the_end_and_leave_the_files_of_one(
    single: RunFolder, resumed: tuple[RunFolder, Ended]
) -> None:
    folder, ended = resumed
    assert ended.status == 0, ended.errors
    assert not any("Traceback" in errors for errors in ended.errors)
    assert str(folder.artifact) in ended.outputs[0]
    assert ended.outputs[1] == ""  # one of them speaks

    def files(of: RunFolder) -> list[str]:
        return sorted(
            str(path.relative_to(of.path))
            for path in of.path.rglob("*")
            if path.parent.name != "tensorboard"
        )

    assert files(folder) == files(single)
    # Every resumption begins a file of its own, in the one process that writes.
    assert len(list(folder.tensorboard.iterdir())) == 2
    info = load_artifact(folder.artifact).info
    assert info.training["processes"] == 2
    assert list(losses_of(folder))[-2:] == [480, 640]


def test_one_process_goes_on_with_what_two_began(
    tmp_path: Path, stopped: tuple[RunFolder, Ended], single: RunFolder, alone: Command
) -> None:
    folder = RunFolder(tmp_path / "run")
    copytree(stopped[0].path, folder.path)
    alone(folder, "--resume")
    assert load_artifact(folder.artifact).info.training["processes"] == 1
    losses = losses_of(folder)
    assert losses[640] == pytest.approx(losses_of(single)[640], rel=1e-3)


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
    assert "3 processes cannot share a batch of 16 images evenly." in result.stderr
    assert not out.exists()
