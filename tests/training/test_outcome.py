"""The last lines of a run, and the commands that they name."""

import os
import re
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from torch import Tensor

from tests.support import tiny_training as tiny
from tests.support.image_folders import fill
from training import loop
from training.__main__ import main
from training.checkpoint import read_checkpoint
from training.loading import load_artifact
from training.run import StopFlag
from training.state import TrainState, generator_config

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = r"[a-z, ]+: GAN-test \d+\.\d%, coverage \d\.\d\d"


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
        *("train", "--resume", "--out", str(out), "--device", "cpu")
    ]


def test_a_stop_before_the_run_says_that_nothing_was_kept(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StopFlag, "listen", lambda stop: setattr(stop, "signal", signal.SIGINT))
    result = invoke("train", "mnist", "--device", "cpu", "--out", out)
    assert result.exit_code == 128 + signal.SIGINT
    assert "Stopped before the run or in its search for gamma; nothing was kept." in result.stderr
    assert not (out / "checkpoint.pt").exists()


def test_the_command_that_continues_ends_the_run_as_it_was_asked_for(
    out: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.safetensors"
    end = ("--certify", "--export-to", str(copy))
    options = ("--device", "cpu", "--out", out, "--images", "64", *end)
    command = command_in(invoke_stopped("train", "mnist", *options, after=32), "Continue it")
    assert not copy.exists()
    assert invoke(*command).exit_code == 0
    assert load_artifact(copy).info.certificate is not None


@pytest.fixture
def pets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of images of two classes."""
    monkeypatch.setattr("training.prepare.generator_config", generator_config)
    for seed, name in enumerate(("cat", "dog")):
        fill(tmp_path / "all my pets" / name, 8, seed=seed)
    return tmp_path / "all my pets"


TRAIN = ("--device", "cpu", "--r1-gamma", "1", "--images", "64")


def test_a_run_knows_its_images_their_size_and_its_options(
    pets: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = invoke_stopped(
        "train", pets.name, "--out", out, "--image-size", "32", *TRAIN, after=32
    )
    monkeypatch.chdir(pets)  # where the given path means nothing
    again = invoke(*command_in(result, "Continue it"))
    assert again.exit_code == 0, again.output
    info = load_artifact(out / "generator.safetensors").info
    assert (info.images_seen, info.network.image_size) == (64, 32)
    assert command_in(again, "Evaluate it")[2:4] == ["--dataset", str(pets)]
    more = invoke("train", "--resume", "--out", out, "--images", "96", "--device", "cpu")
    assert more.exit_code == 0, more.output
    assert load_artifact(out / "generator.safetensors").info.images_seen == 96


def test_a_run_knows_the_folder_of_a_named_data_set(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CGAN_DATA_DIR")
    options = ("--data-dir", "data", "--out", out, "--device", "cpu")
    result = invoke_stopped("train", "mnist", *options, after=32)
    monkeypatch.chdir(tmp_path / "run")
    again = invoke(*command_in(result, "Continue it"))
    assert again.exit_code == 0, again.output
    assert read_checkpoint(out / "checkpoint.pt").metadata.data_path == str(tmp_path / "data")


def test_images_that_moved_are_named_and_given_once_more(pets: Path, out: Path) -> None:
    assert invoke("train", pets, "--out", out, *TRAIN).exit_code == 0
    moved = pets.rename(pets.with_name("elsewhere")) / pets.name
    shutil.copytree(moved.parent, moved)
    resume = ("--resume", "--out", out, "--device", "cpu", "--images")
    result = invoke("train", *resume, "80")
    assert result.exit_code == 1
    assert f"the folder of its images, {pets}, does not exist any more; give the" in result.stderr
    assert invoke("train", moved, *resume, "80").exit_code == 0
    assert invoke("train", *resume, "96").exit_code == 0


def test_a_checkpoint_without_the_folder_of_its_images_asks_for_it(
    pets: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Earlier releases did not store it."""
    monkeypatch.setattr("training.prepare.data_path", lambda _settings: None)
    assert invoke("train", pets, "--out", out, *TRAIN).exit_code == 0
    result = invoke("train", "--resume", "--out", out)
    assert result.exit_code == 1
    assert "it has the name of its images, all my pets, but not their folder" in result.stderr
    assert f"train DATASET --resume --out {out}" in result.stderr


@pytest.mark.parametrize("options", [(), ("--resume",), ("--out", "run")])
def test_without_a_data_set_a_run_to_continue_is_needed(options: tuple[str, ...]) -> None:
    result = invoke("train", *options)
    assert result.exit_code == 2
    assert "DATASET is missing; give mnist, fashion-mnist" in result.stderr


def test_no_artifact_contains_the_path_of_its_images(pets: Path, out: Path, tmp_path: Path) -> None:
    assert invoke("train", pets, "--out", out, *TRAIN).exit_code == 0
    heir = tmp_path / "heir"
    result = invoke("train", pets, "--out", heir, "--init-from", out, *TRAIN)
    assert result.exit_code == 0, result.output
    for folder in (out, heir):
        assert str(pets).encode() not in (folder / "generator.safetensors").read_bytes()
