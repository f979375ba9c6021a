"""The last lines of a run, and the commands that they name."""

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import Tensor

from tests.support import tiny_training as tiny
from training import loop
from training.__main__ import main
from training.artifact import load_artifact
from training.state import TrainState

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = r"[a-z, ]+: GAN-test \d+\.\d %, coverage \d\.\d\d"


@pytest.fixture(autouse=True)
def _tiny_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch, tmp_path / "data")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def invoke_stopped(*arguments: str | Path, after: int) -> Result:
    """Invoke a command that receives SIGINT during the step after so many images."""
    train_step = loop.train_step

    def step(state: TrainState, *given: Any, **options: Any) -> Tensor:
        if state.images_seen == after:
            os.kill(os.getpid(), signal.SIGINT)
        return train_step(state, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", step)
        result = invoke(*arguments)
    assert result.exit_code == 128 + signal.SIGINT, result.output
    return result


def command_in(result: Result, said: str) -> list[str]:
    """Return the arguments of a command that the output of a run names."""
    found = re.search(f"^{said}: python -m training (.*)$", result.output, re.MULTILINE)
    assert found is not None, result.output
    return shlex.split(found[1])


def test_a_complete_run_says_in_words_what_it_made(out: Path) -> None:
    result = invoke("train", "mnist", "--device", "cpu", "--out", out, "--images", "32")
    artifact = out / "generator.safetensors"
    said = f"^{artifact}: the best generator of 32 images; {WORDS}$"
    assert re.search(said, result.stdout, re.MULTILINE), result.stdout


def test_the_command_that_evaluates_has_the_folder_of_the_data_and_the_device(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CGAN_DATA_DIR")
    data = tmp_path / "data"
    result = invoke(
        *("train", "mnist", "--device", "cpu", "--out", out, "--images", "32", "--data-dir", data)
    )
    command = command_in(result, "Evaluate it")
    assert command == [
        *("evaluate", str(out / "generator.safetensors"), "--data-dir", str(data)),
        *("--device", "cpu"),
    ]
    assert invoke(*command).exit_code == 0


def test_a_stopped_run_says_what_it_exported_and_how_to_continue(out: Path) -> None:
    result = invoke_stopped(
        *("train", "mnist", "--preset", "mlp", "--device", "cpu", "--out", out), after=64
    )
    artifact = out / "generator.safetensors"
    said = f"^Stopped after 80 images. {artifact}: the newest generator; {WORDS}$"
    assert re.search(said, result.stderr, re.MULTILINE), result.stderr
    assert load_artifact(artifact).info.images_seen == 80
    assert command_in(result, "Continue it") == [
        *("train", "mnist", "--resume", "--out", str(out), "--device", "cpu")
    ]
