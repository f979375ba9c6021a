"""One run in one folder: what it leaves there, and how it is interrupted and gone on with."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]
    EventAccumulator,
)

from tests import tiny
from tests.serving import REPOSITORY
from training import run as run_module
from training.artifact import load_artifact
from training.checkpoint import CheckpointError, Identity, read_checkpoint, restore, save_checkpoint
from training.loop import TrainState
from training.run import RunFolder, StopFlag, run, source_commit, stop_on_signals

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = tiny.dataset()
IDENTITY = Identity(
    dataset="tiny", dataset_digest="ab", preset="mlp", seed=3, config=tiny.CONFIG, minutes=None
)
PATIENCE_S = 120.0  # a hung test fails by it; no test passes by it


@pytest.fixture(autouse=True)
def _small_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "LOG_EVERY_IMAGES", 160)
    monkeypatch.setattr(run_module, "SAMPLE_GRIDS", 2)


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


class StopAfter(StopFlag):
    """Set after so many questions."""

    def __init__(self, questions: int) -> None:
        super().__init__()
        self.left = questions

    def __call__(self) -> bool:
        self.left -= 1
        if self.left < 0:
            self.signal = signal.SIGTERM
        return super().__call__()


def resumed(folder: RunFolder) -> TrainState:
    _, contents = read_checkpoint(folder.checkpoint)
    state = tiny.state()
    restore(folder.checkpoint, contents, state)
    return state


def log_of(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in folder.log.read_text().splitlines()]


def events_of(folder: RunFolder) -> EventAccumulator:
    events = EventAccumulator(str(folder.tensorboard))
    events.Reload()
    return events


# A whole run


def test_a_run_leaves_its_artifact_checkpoint_log_pictures_and_events(folder: RunFolder) -> None:
    state = tiny.state()
    assert run(folder, state, DATA, IDENTITY, StopFlag())

    assert sorted(path.name for path in folder.path.iterdir()) == [
        *("checkpoint.pt", "generator.safetensors", "log.jsonl", "samples", "tensorboard")
    ]
    assert [line["images_seen"] for line in log_of(folder)] == [160, 320, 480, 640]
    for line in log_of(folder):
        assert set(line) == {
            *("images_seen", "elapsed_s", "images_per_s"),
            *("discriminator", "generator", "real_logit", "fake_logit", "penalty"),
        }
        assert all(np.isfinite(value) for value in line.values())
    assert resumed(folder).images_seen == 640


def test_the_artifact_is_the_averaged_generator_with_its_circumstances(folder: RunFolder) -> None:
    state = tiny.state()
    run(folder, state, DATA, replace(IDENTITY, dataset_digest=DATA.digest), StopFlag())

    loaded = load_artifact(folder.artifact)
    info = loaded.info
    assert info.network == tiny.NETWORK
    assert (info.class_names, info.images_seen) == (tiny.CLASS_NAMES, 640)
    assert info.certificate is None
    assert info.source_commit == source_commit()
    recorded = info.training
    assert recorded["config"]["batch_size"] == tiny.CONFIG.batch_size
    assert (recorded["dataset"], recorded["preset"], recorded["seed"]) == ("tiny", "mlp", 3)
    assert (recorded["dataset_sha256"], recorded["device"]) == (DATA.digest, "cpu")
    for stored, averaged in zip(loaded.generator.parameters(), state.ema.parameters(), strict=True):
        assert torch.equal(stored, averaged)
    norm = loaded.generator.main[3]
    assert norm.num_batches_tracked == 200  # measured for these weights, not left by training


def test_pictures_are_readable_and_named_by_progress(folder: RunFolder) -> None:
    run(folder, tiny.state(), DATA, IDENTITY, StopFlag())

    pictures = sorted((folder.path / "samples").iterdir())
    assert [picture.name for picture in pictures] == ["0000000320.png", "0000000640.png"]
    with Image.open(pictures[0]) as picture:
        # Two classes down, ten latents along, 8 pixels each, twice as large.
        assert (picture.mode, picture.size) == ("L", (10 * 8 * 2, 2 * 8 * 2))


def test_tensorboard_shows_what_the_log_says_and_the_pictures(folder: RunFolder) -> None:
    run(folder, tiny.state(), DATA, IDENTITY, StopFlag())

    events, log = events_of(folder), log_of(folder)
    names = ("discriminator", "generator", "real_logit", "fake_logit", "penalty")
    assert set(events.Tags()["scalars"]) == {*(f"losses/{name}" for name in names), "images_per_s"}
    for name in names:
        shown = [(event.step, event.value) for event in events.Scalars(f"losses/{name}")]
        assert [step for step, _ in shown] == [line["images_seen"] for line in log]
        assert [v for _, v in shown] == pytest.approx([line[name] for line in log], rel=1e-5)
    pictures = events.Images("samples")
    assert [picture.step for picture in pictures] == [320, 640]
    assert (pictures[0].width, pictures[0].height) == (80, 16)


# Interruption


def test_a_stopped_run_leaves_a_checkpoint_and_no_artifact(folder: RunFolder) -> None:
    state = tiny.state()
    assert not run(folder, state, DATA, IDENTITY, StopAfter(14))
    assert 160 < state.images_seen < 320
    assert not folder.artifact.exists()
    assert resumed(folder).images_seen == state.images_seen
    assert log_of(folder)[-1]["images_seen"] == state.images_seen


@pytest.mark.parametrize("questions", range(9, 16))
def test_a_stop_at_any_moment_leaves_a_checkpoint_of_the_present_state(
    folder: RunFolder, questions: int
) -> None:
    state = tiny.state()
    assert not run(folder, state, DATA, IDENTITY, StopAfter(questions))
    assert resumed(folder).images_seen == state.images_seen


def test_an_interrupted_run_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    whole, parts = RunFolder(tmp_path / "whole"), RunFolder(tmp_path / "parts")
    run(whole, tiny.state(), DATA, IDENTITY, StopFlag())

    run(parts, tiny.state(), DATA, IDENTITY, StopAfter(14))
    run(parts, resumed(parts), DATA, IDENTITY, StopFlag())

    one, two = load_artifact(whole.artifact), load_artifact(parts.artifact)
    for name, tensor in one.generator.state_dict().items():
        assert torch.equal(two.generator.state_dict()[name], tensor), name
    seen = [line["images_seen"] for line in log_of(parts)]
    assert seen == sorted(set(seen))
    assert seen[-4:] == [192, 320, 480, 640]


def test_what_was_logged_after_the_checkpoint_is_dropped_when_it_is_gone_on_from(
    folder: RunFolder,
) -> None:
    run(folder, tiny.state(), DATA, IDENTITY, StopAfter(14))
    reached = log_of(folder)
    line = {**reached[-1], "images_seen": 400}
    with folder.log.open("a") as log:
        log.write(json.dumps(line) + "\n" + '{"images_se')  # as a crash leaves it

    run(folder, resumed(folder), DATA, IDENTITY, StopFlag())

    seen = log_of(folder)
    assert seen[: len(reached)] == reached
    assert [line["images_seen"] for line in seen[len(reached) :]] == [320, 480, 640]


def test_a_last_line_without_its_end_does_not_swallow_the_next(folder: RunFolder) -> None:
    run(folder, tiny.state(), DATA, IDENTITY, StopAfter(14))
    folder.log.write_text(folder.log.read_text().rstrip("\n"))
    run(folder, resumed(folder), DATA, IDENTITY, StopFlag())
    assert [line["images_seen"] for line in log_of(folder)] == [160, 192, 320, 480, 640]


def test_tensorboard_keeps_every_point_of_an_interrupted_run_once(folder: RunFolder) -> None:
    run(folder, tiny.state(), DATA, IDENTITY, StopAfter(14))
    run(folder, resumed(folder), DATA, IDENTITY, StopFlag())
    steps = [event.step for event in events_of(folder).Scalars("losses/generator")]
    assert steps == [line["images_seen"] for line in log_of(folder)]


def test_the_log_of_a_run_that_never_came_to_a_checkpoint_is_begun_again(
    folder: RunFolder,
) -> None:
    folder.path.mkdir()
    folder.log.write_text('{"images_seen": 160}\n')
    run(folder, tiny.state(), DATA, IDENTITY, StopFlag())
    assert [line["images_seen"] for line in log_of(folder)] == [160, 320, 480, 640]


def test_checkpoints_are_written_along_the_way(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "CHECKPOINT_EVERY_S", 0.0)
    written: list[int] = []

    def remember(path: Path, state: TrainState, identity: Identity) -> None:
        written.append(state.images_seen)
        save_checkpoint(path, state, identity)

    monkeypatch.setattr(run_module, "save_checkpoint", remember)
    run(folder, tiny.state(), DATA, IDENTITY, StopFlag())
    assert written == [160, 320, 480, 640]


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_its_cause(
    folder: RunFolder,
) -> None:
    folder.checkpoint.mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt: cannot be written: Is a directory"):
        run(folder, tiny.state(), DATA, IDENTITY, StopFlag())
    assert not folder.artifact.exists()


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_sets_the_flag_and_the_second_acts_as_always(
    number: signal.Signals,
) -> None:
    received: list[int] = []
    before = signal.signal(number, lambda it, _frame: received.append(it))
    try:
        with stop_on_signals() as stop:
            assert not stop()
            os.kill(os.getpid(), number)
            assert stop()
            assert (stop.signal, received) == (number, [])
            os.kill(os.getpid(), number)
            assert received == [number]
        with stop_on_signals() as unused:
            assert not unused()
        os.kill(os.getpid(), number)
        assert received == [number] * 2
    finally:
        signal.signal(number, before)


COMMAND = """
import sys
from pathlib import Path
import pytest
from tests import tiny
from training.__main__ import main

tiny.install(pytest.MonkeyPatch(), Path(sys.argv.pop(1)), images=10**9)
main(prog_name="training")
"""


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_a_checkpoint_and_the_shells_status(
    tmp_path: Path, folder: RunFolder, number: signal.Signals, status: int
) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", COMMAND, str(tmp_path / "data")),
            *("train", "mnist", "--device", "cpu", "--out", str(folder.path)),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (folder.log.exists() and "\n" in folder.log.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE_S)

    assert process.returncode == status
    state = resumed(folder)
    assert state.images_seen >= 160
    assert f"Stopped after {state.images_seen:,} images; go on with --resume." in errors
    assert "Traceback" not in errors
    assert not folder.artifact.exists()


# Where the code comes from


def test_the_source_commit_is_unknown_outside_a_clone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "run.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert source_commit() is None


def test_the_source_commit_is_unknown_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert source_commit() is None


def test_the_source_commit_says_whether_files_differ_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=n", "-c", "user.email=e@example.org")
        command = ["git", *identity, *arguments]
        ended = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
        return ended.stdout.strip()

    monkeypatch.setattr(run_module, "__file__", str(tmp_path / "run.py"))
    (tmp_path / "run.py").write_text("one")
    git("init", "--quiet")
    git("add", "run.py")
    git("commit", "--quiet", "--message", "one")
    assert source_commit() == git("rev-parse", "HEAD")
    (tmp_path / "run.py").write_text("two")
    assert source_commit() == f"{git('rev-parse', 'HEAD')}-dirty"
