"""The command line, run in this process on a tiny data set under a real one's name."""

import errno
import hashlib
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

import training.__main__ as command_line
from tests.support import processes
from tests.support import tiny_training as tiny
from tests.support.image_folders import fill
from tests.support.other_systems import WINDOWS, as_on
from tests.support.processes import run
from training import choice
from training.__main__ import main
from training.checkpoint import read_checkpoint
from training.cli import RENAMED_OPTIONS
from training.config import PRESETS
from training.data import named as data
from training.data.named import Dataset
from training.devices import has_native_bfloat16
from training.generator_config import GeneratorConfig
from training.loading import load_artifact
from training.quality import classifier as classifier_module
from training.quality.budget import Costs
from training.quality.certificate import read_certificate
from training.quality.classifier import load_bundled_classifier
from training.quality.report import render_table
from training.state import generator_config

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _tiny_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.install(monkeypatch, tmp_path / "data")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return tiny.artifact_file(tmp_path / "a.safetensors", training={"dataset": "mnist"})


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    expected = result.exception is None or isinstance(result.exception, SystemExit)
    assert expected, result.exception  # a user would see a traceback
    return result


def train(out: Path, *options: str) -> Result:
    return invoke("train", "mnist", "--device", "cpu", "--out", out, *options)


# Every image takes a second.
SLOW = Costs(generate_s=1, classify_s=1, pair_s=0, nearest_s=1, classifier_s=1, gan_train_s=1)
PREPARE = """
import sys
from pathlib import Path
import pytest
from tests.support import tiny_training as tiny
tiny.CLASS_NAMES = ("犬", "猫")
tiny.install(pytest.MonkeyPatch(), Path(sys.argv.pop(1)))
"""


def test_classes_that_no_code_page_has_are_trained_on_windows(tmp_path: Path, out: Path) -> None:
    for label, name in enumerate(("犬", "猫")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(10):
            pixels = np.full((28, 28), 100 * label + number, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    options = ("--preset", "mlp", "--device", "cpu", "--out", str(out))
    photos = str(tmp_path / "photos")
    dry = run(*as_on(WINDOWS, "training"), "train", photos, "--dry-run", *options)
    assert dry.returncode == 0, dry.stderr
    assert r"\u72ac" in dry.stdout
    program, folder = as_on(WINDOWS + PREPARE, "training"), str(tmp_path / "tiny")
    trained = run(*program, folder, "train", "mnist", "--r1-gamma", "1", *options)
    assert trained.returncode == 0, trained.stderr
    assert load_artifact(out / "generator.safetensors").info.class_names == ("犬", "猫")


def refused(result: Result, *said: str, status: int = 1) -> None:
    assert result.exit_code == status, result.output
    for text in said:
        assert text in result.stderr
    assert "Traceback" not in result.output


def interrupt(out: Path, *options: str) -> None:
    """A run that was stopped at its third step, without signals."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "StopFlag", StopEarly)
        assert train(out, *options).exit_code == 143


class StopEarly:
    signal = 15

    def __init__(self) -> None:
        self.left = 3

    def __enter__(self) -> "StopEarly":
        return self

    def __exit__(self, *_error: object) -> None:
        pass

    def listen(self) -> None:
        pass

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


# train


@pytest.mark.parametrize("preset", ["conv", "mlp", "paper"])
def test_train_exports_an_artifact_and_says_how_to_measure_it(out: Path, preset: str) -> None:
    result = train(out, "--preset", preset, "--seed", "7")

    assert result.exit_code == 0, result.output
    exported = out / "generator.safetensors"
    assert "Device: the CPU" in result.stdout
    assert f"{exported}: the best generator of 640 images" in result.stdout
    assert f"python -m training evaluate {exported}" in result.stdout
    info = load_artifact(exported).info
    assert (info.training["preset"], info.training["seed"]) == (preset, 7)
    assert info.class_names == tiny.CLASS_NAMES


def test_the_artifact_is_copied_to_where_a_service_serves_it(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "weights" / "fresh.safetensors"
    result = train(out, "--images", "32", "--export-to", str(target))
    assert result.exit_code == 0, result.output
    assert f"{target}: a copy" in result.stdout
    assert target.read_bytes() == (out / "generator.safetensors").read_bytes()


def test_a_name_that_no_service_would_serve_is_refused_before_training(out: Path) -> None:
    refused(train(out, "--export-to", "fresh.pt"), "--export-to: 'fresh.pt' must end in", status=2)
    for name in ("my photos.safetensors", "-x.safetensors", f"{'x' * 101}.safetensors"):
        said = f"--export-to: '{name}' is not a valid name for a model; allowed are up to 100"
        refused(train(out, f"--export-to={name}"), said, status=2)
    assert not out.exists()
    result = invoke("import", "theirs.pth", "--out", "é.safetensors", "--no-certify")
    refused(result, "é.safetensors: is not a valid name for a model; allowed are")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of images of two classes."""
    for seed, name in enumerate(("cat", "dog")):
        fill(tmp_path / "pets" / name, 8, seed=seed)
    return tmp_path / "pets"


def test_a_run_never_lies_inside_its_images(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.prepare.generator_config", generator_config)
    options = ("--device", "cpu", "--images", "16", "--r1-gamma", "1")
    for folder, dataset in ((pets, "."), (pets / "cat", "..")):
        monkeypatch.chdir(folder)
        for again in ((), ("--resume",)):
            result = invoke("train", dataset, *options, *again)
            assert result.exit_code == 0, result.output
            assert f"{tmp_path / 'runs' / 'pets-conv' / 'generator.safetensors'}: " in result.stdout
        shutil.rmtree(tmp_path / "runs")
    assert {path.name for path in pets.iterdir()} == {"cat", "dog"}


@pytest.mark.parametrize(
    ("command", "option", "value"),
    [
        ("train", "--out", "."),
        ("train", "--out", "run"),
        ("train", "--out", "cat/run"),
        ("train", "--export-to", "weights/a.safetensors"),
        ("train", "--export-to", "cat/a.safetensors"),
        ("train-classifier", "--out", "models/a.safetensors"),
    ],
)
def test_nothing_is_written_where_it_would_be_a_class(
    pets: Path, monkeypatch: pytest.MonkeyPatch, command: str, option: str, value: str
) -> None:
    monkeypatch.chdir(pets)
    result = invoke(command, ".", option, value)
    refused(result, f"{option}: {value} is inside the images of .", "choose a folder outside")
    assert {path.name for path in pets.rglob("*") if path.is_dir()} == {"cat", "dog"}


def test_a_folder_whose_name_is_not_text_is_trained_on(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pets.rename(pets.with_name(os.fsdecode(b"b\xe4r")))
    monkeypatch.setattr("training.prepare.generator_config", generator_config)
    result = invoke("train", folder, "--device", "cpu", "--images", "16", "--r1-gamma", "1")
    assert result.exit_code == 0, result.output
    artifact = tmp_path / "runs" / r"b\udce4r-conv" / "generator.safetensors"
    assert load_artifact(artifact).info.training["dataset"] == r"b\udce4r"


def test_ambiguous_class_names_are_named_before_training_and_sampled_by_name(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (pets / "cat").rename(pets / "1")
    (pets / "dog").rename(pets / "2")
    monkeypatch.setattr("training.prepare.generator_config", generator_config)
    options = ("--device", "cpu", "--images", "16", "--r1-gamma", "1", "--out", tmp_path / "run")
    result = invoke("train", pets, *options)
    assert "class names that are also the indices of other classes: 1; the" in result.stdout
    artifact, sheet = tmp_path / "run" / "generator.safetensors", tmp_path / "ones.png"
    result = invoke("sample", artifact, "--label", "1", "--label", "0", "--out", sheet)
    assert f"{sheet}: 32 images of 1 (index 0)" in result.stdout


def test_a_run_lies_in_a_folder_of_its_data_set_and_preset_by_default(
    tmp_path: Path,
) -> None:
    assert invoke("train", "mnist", "--device", "cpu", "--images", "32").exit_code == 0
    assert (tmp_path / "runs" / "mnist-conv" / "generator.safetensors").exists()


def test_images_set_the_length_of_a_run(out: Path) -> None:
    assert train(out, "--images", "64").exit_code == 0
    info = load_artifact(out / "generator.safetensors").info
    assert info.images_seen == info.training["config"]["images"] == 64


def test_minutes_set_the_length_of_a_run(out: Path) -> None:
    assert train(out, "--minutes", "0.05").exit_code == 0
    info = load_artifact(out / "generator.safetensors").info
    assert info.training["minutes"] == 0.05
    assert info.training["elapsed_s"] > 0
    assert info.images_seen > 0


def test_the_precision_is_what_the_device_computes_in(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "conv", replace(tiny.CONV, precision="bfloat16", images=32))
    assert train(out).exit_code == 0
    used = load_artifact(out / "generator.safetensors").info.training["config"]["precision"]
    assert used == ("bfloat16" if has_native_bfloat16(tiny.CPU) else "float32")


def test_a_precision_that_the_device_does_not_compute_in_is_refused(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.prepare.has_native_bfloat16", lambda _: False)
    said = "--precision bfloat16 is not native on the CPU", "use float32"
    refused(train(out, "--precision", "bfloat16"), *said, status=2)
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "name", "value"),
    [
        (("--r1-gamma", "0.7"), "r1_gamma", 0.7),
        (("--mismatch-weight", "0.4"), "mismatch_weight", 0.4),
        (("--batch-size", "8"), "batch_size", 8),
        (("--precision", "float32"), "precision", "float32"),
        (("--flip",), "flip", True),
        (("--augment",), "augment", True),
        (("--no-augment",), "augment", False),
        (("--preset", "paper"), "augment", False),
    ],
)
def test_the_options_of_a_run_are_recorded(
    out: Path, options: tuple[str, ...], name: str, value: object
) -> None:
    assert train(out, "--images", "32", *options).exit_code == 0
    info = load_artifact(out / "generator.safetensors").info
    assert info.training["config"][name] == value


def test_a_short_run_without_a_preset_is_adapted_and_says_so(
    out: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(choice, "SHORT_IMAGES", 100)
    result = train(out, "--images", "64")
    assert result.exit_code == 0, result.output
    assert "About 64 images, 0.2 passes: batches of 32, learning rate 0.0008" in caplog.text
    info = load_artifact(out / "generator.safetensors").info
    assert info.training["config"]["batch_size"] == choice.SHORT_BATCH_SIZE


def test_a_run_measures_its_generator_on_request(out: Path) -> None:
    result = train(out, "--images", "64", "--certify")
    assert result.exit_code == 0, result.output
    info = load_artifact(out / "generator.safetensors").info
    certificate = read_certificate(info)
    assert certificate is not None
    assert render_table(certificate, info.class_names) in result.stdout
    assert certificate.dataset_sha256 == info.training["dataset_sha256"]


def test_a_dry_run_counts_the_certificate_and_the_classifier(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.plan.measure_costs", lambda *_given, **_how: SLOW)
    monkeypatch.setattr("training.quality.budget.plan_epochs", lambda *_given, **_how: 10.0)
    result = train(out, "--certify", "--dry-run")
    # 10 passes over 256 images; 3 classifiers and one of real images see 4 times 64.
    assert re.search(r"classifier +42.7 minutes\n", result.stdout)
    assert re.search(r"certificate +\d+.\d minutes: 200 images; GAN-train with 3", result.stdout)


def test_no_budget_is_too_short(out: Path) -> None:
    result = train(out, "--minutes", "0.00001", "--certify")
    assert result.exit_code == 0, result.output
    info = load_artifact(out / "generator.safetensors").info
    assert info.images_seen > 0
    certificate = read_certificate(info)
    assert certificate is not None
    assert certificate.brief is not None
    assert render_table(certificate, info.class_names) in result.stdout
    assert re.search(r"The run took \d\.\d minutes more than --minutes 1e-05", result.stdout)


def test_evaluate_completes_a_brief_certificate(out: Path) -> None:
    train(out, "--minutes", "0.00001", "--certify")
    path = out / "generator.safetensors"
    assert invoke("evaluate", path, "--device", "cpu").exit_code == 0
    certificate = read_certificate(load_artifact(path).info)
    assert certificate is not None
    assert (certificate.brief, certificate.images) == (None, 200)


def test_a_folder_of_images_is_reported_trained_on_and_sampled_by_name(tmp_path: Path) -> None:
    images, labels = tiny.arrays(120, 0)
    for position, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "sides" / ("west", "east")[label]
        folder.mkdir(parents=True, exist_ok=True)
        large = Image.fromarray(pixels).resize((28, 28), Image.Resampling.NEAREST)
        large.save(folder / f"{position}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.prepare.generator_config", generator_config)
        result = invoke(
            *("train", tmp_path / "sides", "--device", "cpu", "--images", "32", "--certify"),
            *("--r1-gamma", "1", "--out", tmp_path / "run"),
        )
    assert result.exit_code == 0, result.output
    assert "2 classes, " in result.stdout.splitlines()[1]
    artifact = tmp_path / "run" / "generator.safetensors"
    info = load_artifact(artifact).info
    assert (info.class_names, info.training["dataset"]) == (("east", "west"), "sides")
    assert info.network.image_size == 28
    sheet = tmp_path / "east.png"
    assert invoke("sample", artifact, "--label", "east", "--out", sheet).exit_code == 0
    again = invoke("evaluate", artifact, "--dataset", tmp_path / "sides", "--device", "cpu")
    assert again.exit_code == 0, again.output


def test_a_run_on_a_folder_says_how_to_measure_it_wherever_the_folder_lies(tmp_path: Path) -> None:
    folder = tmp_path / "two sides"
    for label, name in enumerate(("west", "east")):
        (folder / name).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((28, 28), 100 * label + i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.prepare.generator_config", generator_config)
        result = invoke("train", folder, "--device", "cpu", "--images", "16", "--r1-gamma", "1")
    assert result.exit_code == 0, result.output
    command = shlex.split(result.stdout.splitlines()[-1].removeprefix("Evaluate it: "))
    assert command[:4] == ["python", "-m", "training", "evaluate"]
    assert invoke(*command[3:], "--device", "cpu").exit_code == 0


def test_a_folder_that_cannot_be_trained_on_is_refused_before_anything_is_written(
    out: Path, tmp_path: Path
) -> None:
    (tmp_path / "pets" / "cat").mkdir(parents=True)
    result = invoke("train", tmp_path / "pets", "--out", out)
    refused(result, f"{tmp_path / 'pets'}: has 1 sub-folder, cat, expected one per class")
    assert not out.exists()


def test_an_output_folder_that_takes_no_files_is_named_before_time_is_spent(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spend(*_given: object, **_how: object) -> None:
        raise AssertionError("time is spent")

    def refuse(*, dir: Path) -> None:  # noqa: A002
        raise OSError(errno.EROFS, "Read-only file system", dir)

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("training.quality.evaluator.get_classifier", spend)
    monkeypatch.setattr(command_line, "train_classifier", spend)
    judge_file = tmp_path / "judge.safetensors"
    for command in (
        ("train", "mnist", "--out", tmp_path / "run"),
        ("evaluate", artifact),
        ("train-classifier", "mnist", "--out", judge_file),
    ):
        refused(invoke(*command), f"{tmp_path}", "Read-only file system; choose another one")


def test_a_run_goes_on_where_it_stopped(out: Path) -> None:
    interrupt(out)
    before = (out / "log.jsonl").read_text()

    result = train(out, "--resume")

    assert result.exit_code == 0, result.output
    assert "the best generator of 640 images" in result.stdout
    log = (out / "log.jsonl").read_text()
    assert log.startswith(before)
    assert json.loads(log.splitlines()[-1])["images_seen"] == 640


def test_a_resumed_run_has_the_budget_and_the_preset_that_it_was_given(out: Path) -> None:
    interrupt(out, "--images", "320", "--preset", "paper", "--seed", "5")
    assert train(out, "--resume").exit_code == 0
    info = load_artifact(out / "generator.safetensors").info
    assert info.images_seen == 320
    assert (info.training["preset"], info.training["seed"]) == ("paper", 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--seed", "1"), "--seed of this run is 0, but 1 was given"),
        (("--preset", "paper"), "--preset of this run is 'conv', but 'paper' was given"),
        (
            ("--images", "32"),
            "this run has used 32 images, but --images 32 was given; give a larger",
        ),
        (("--r1-gamma", "7"), "--r1-gamma of this run is 0.5, but 7.0 was given"),
        (("--flip",), "--flip of this run is False, but True was given"),
    ],
)
def test_a_run_does_not_go_on_as_another_one(
    out: Path, options: tuple[str, ...], said: str
) -> None:
    interrupt(out)
    before = (out / "checkpoint.pt").read_bytes()
    refused(train(out, "--resume", *options), f"{out / 'checkpoint.pt'}: {said}")
    assert (out / "checkpoint.pt").read_bytes() == before


def test_the_same_options_again_go_on(out: Path) -> None:
    options = ("--seed", "0", "--preset", "conv", "--images", "640")
    interrupt(out, *options)
    assert train(out, "--resume", *options).exit_code == 0


def test_a_run_does_not_go_on_with_other_data(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt(out)
    monkeypatch.setattr(tiny, "arrays", lambda count, seed: ARRAYS(count, seed + 100))
    tiny.install(monkeypatch, tmp_path / "other data")
    refused(train(out, "--resume"), "the images of mnist have changed: ", "restore them")


ARRAYS = tiny.arrays


def test_a_finished_run_goes_on_to_a_larger_budget(out: Path) -> None:
    assert train(out, "--images", "320").exit_code == 0
    result = train(out, "--resume", "--images", "640")
    assert result.exit_code == 0, result.output
    assert "Continuing after 320 images" in result.stdout
    info = load_artifact(out / "generator.safetensors").info
    assert info.training["config"]["images"] == 640
    assert read_checkpoint(out / "checkpoint.pt").state["images_seen"] == 640
    images_seen = [
        json.loads(line)["images_seen"] for line in (out / "log.jsonl").read_text().splitlines()
    ]
    assert images_seen == sorted(images_seen)
    assert {320, 640} <= set(images_seen)


def test_a_stopped_run_goes_on_to_a_larger_budget(out: Path) -> None:
    interrupt(out, "--images", "320")
    assert train(out, "--resume", "--images", "480").exit_code == 0
    assert read_checkpoint(out / "checkpoint.pt").state["images_seen"] == 480


def more_minutes(out: Path) -> float:
    """Return a budget above what a run has used; on a busy machine that may exceed its own."""
    run = read_checkpoint(out / "checkpoint.pt")
    elapsed_s: float = run.state["elapsed_s"]
    return (run.metadata.prepared_s + elapsed_s) / 60 + 0.06


def test_a_run_of_minutes_goes_on_to_a_larger_budget(out: Path) -> None:
    assert train(out, "--minutes", "0.02").exit_code == 0
    before = read_checkpoint(out / "checkpoint.pt").state["images_seen"]
    minutes = more_minutes(out)
    assert train(out, "--resume", "--minutes", str(minutes)).exit_code == 0
    assert read_checkpoint(out / "checkpoint.pt").state["images_seen"] > before
    assert load_artifact(out / "generator.safetensors").info.training["minutes"] == minutes


def test_a_run_goes_on_with_a_budget_of_the_other_kind(out: Path) -> None:
    interrupt(out)
    short = train(out, "--resume", "--minutes", "0.0001")
    refused(
        short, "this run has used 0.", " minutes, but --minutes 0.0001 was given; give a larger"
    )
    before = read_checkpoint(out / "checkpoint.pt")
    minutes = more_minutes(out)
    assert train(out, "--resume", "--minutes", str(minutes)).exit_code == 0
    timed = read_checkpoint(out / "checkpoint.pt")
    seen = timed.state["images_seen"]
    assert (timed.metadata.minutes, seen > before.state["images_seen"]) == (minutes, True)
    assert train(out, "--resume", "--images", str(seen + 32)).exit_code == 0
    counted = read_checkpoint(out / "checkpoint.pt")
    assert (counted.metadata.minutes, counted.state["images_seen"]) == (None, seen + 32)


def test_a_stopped_run_goes_on_to_a_smaller_budget(out: Path) -> None:
    interrupt(out)
    assert train(out, "--resume", "--images", "96").exit_code == 0
    assert read_checkpoint(out / "checkpoint.pt").state["images_seen"] == 96


@pytest.mark.parametrize("budget", [(), ("--images", "32")])
def test_a_finished_run_without_a_larger_budget_says_that_it_is_complete(
    out: Path, budget: tuple[str, ...]
) -> None:
    assert train(out, "--images", "32").exit_code == 0
    result = train(out, "--resume", *budget)
    assert result.exit_code == 0, result.output
    assert "complete with 32 images; a larger --images continues it" in result.stdout
    assert load_artifact(out / "generator.safetensors").info.images_seen == 32


def test_the_run_to_continue_is_found_without_its_preset(tmp_path: Path) -> None:
    command = ("train", "mnist", "--device", "cpu")
    assert invoke(*command, "--images", "16", "--preset", "mlp").exit_code == 0
    result = invoke(*command, "--resume", "--images", "32")
    assert result.exit_code == 0, result.output
    assert f"{Path('runs/mnist-mlp/generator.safetensors')}: the best" in result.stdout
    assert invoke(*command, "--images", "16").exit_code == 0
    several = "there are several runs: runs/mnist-mlp, runs/mnist-conv; give one with --out"
    refused(invoke(*command, "--resume"), several, status=2)


def test_a_run_that_is_there_is_not_begun_again(out: Path) -> None:
    interrupt(out)
    before = (out / "checkpoint.pt").read_bytes()
    refused(train(out), f"{out} already contains a run", "--resume", "another --out", status=2)
    assert (out / "checkpoint.pt").read_bytes() == before


def test_there_is_nothing_to_go_on_with_in_an_empty_folder(out: Path) -> None:
    refused(
        train(out, "--resume"), "checkpoint.pt: does not exist; give the folder of an earlier run"
    )


def test_a_damaged_checkpoint_is_named(out: Path) -> None:
    interrupt(out)
    (out / "checkpoint.pt").write_bytes((out / "checkpoint.pt").read_bytes()[:-100])
    refused(train(out, "--resume"), "checkpoint.pt: damaged")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ("--images", "64", "--minutes", "1"),
            ("--images and --minutes exclude each other",),
        ),
        (("--preset", "best"), ("'--preset': 'best'", "'paper'", "'mlp'", "'conv'")),
        (("--image-size", "32"), ("--image-size applies to folders of images; mnist",)),
        (("--r1-gamma", "-1"), ("'--r1-gamma': -1.0",)),
        (("--preset", "paper", "--mismatch-weight", "1"), ("--mismatch-weight 1 needs", "be 0")),
        (("--images", "0"), ("'--images': 0",)),
        (("--batch-size", "1"), ("'--batch-size': 1",)),
        (("--minutes", "0"), ("'--minutes': 0.0",)),
        (("--seed", "-1"), ("'--seed': -1",)),
    ],
)
def test_a_wrong_option_is_named_with_what_is_allowed(
    out: Path, options: tuple[str, ...], said: tuple[str, ...]
) -> None:
    refused(train(out, *options), *said, status=2)
    assert not out.exists()


def test_an_unknown_data_set_is_answered_with_the_ones_there_are() -> None:
    refused(invoke("train", "mnits"), "mnits: is neither a folder nor", "mnist, fashion-mnist")


def test_missing_data_is_named_with_what_to_do(out: Path, tmp_path: Path) -> None:
    result = train(out, "--data-dir", str(tmp_path / "elsewhere"))
    refused(result, str(tmp_path / "elsewhere" / "mnist"), "cannot load train-images-idx3-ubyte")
    assert not out.exists()


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "mps", ""])
def test_an_unknown_device_is_answered_with_the_ones_there_are(out: Path, name: str) -> None:
    result = invoke("train", "mnist", "--device", name, "--out", out)
    refused(result, repr(name), "expected auto, cpu, cuda or cuda:N")


def test_a_device_that_is_not_there_is_not_replaced_by_another(out: Path) -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    refused(invoke("train", "mnist", "--device", absent, "--out", out), absent, "--device cpu")
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_gpu_by_name_is_not_replaced_by_the_cpu(out: Path) -> None:
    result = invoke("train", "mnist", "--device", "cuda", "--out", out)
    refused(result, "device cuda is missing: PyTorch", "sees 0 CUDA devices")


# train --dry-run


def plan_of(result: Result) -> dict[str, object]:
    assert result.exit_code == 0, result.output
    text = result.stdout
    plan: dict[str, object] = json.loads(text[text.index("{") : text.rindex("}") + 1])
    return plan


def test_a_dry_run_shows_its_plan_and_writes_nothing(out: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))

    result = train(out, "--dry-run", "--images", "320", "--seed", "4")

    plan = plan_of(result)
    assert (plan["dataset"], plan["preset"], plan["seed"]) == ("mnist", "conv", 4)
    assert plan["out"] == str(out)
    assert isinstance(plan["config"], dict)
    assert plan["config"]["images"] == 320
    assert plan["generator_parameters"] == sum(
        p.numel() for p in tiny.state(tiny.CONV).generator.parameters()
    )
    assert re.search(
        r"Estimated time: \d\.\d minutes\n  classifier +0\.0 minutes\n  training +0\.0 minutes\n"
        r"  evaluation +\d\.\d minutes\n  certificate +0\.0 minutes\n"
        r"  The generator trains on [\d,]+ images/s\.",
        result.stdout,
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_with_minutes_estimates_these(out: Path) -> None:
    result = train(out, "--dry-run", "--minutes", "2.5")
    assert plan_of(result)["minutes"] == 2.5
    assert "Estimated time: 2.5 minutes of the 2.5 given\n" in result.stdout


def test_a_dry_run_of_a_finished_run_says_so(out: Path) -> None:
    assert train(out, "--images", "32").exit_code == 0
    result = train(out, "--resume", "--dry-run")
    plan_of(result)
    assert "Estimated time: 0 minutes; the run is complete" in result.stdout


# Names of earlier releases


def test_renamed_options_work_and_are_reported(out: Path, tmp_path: Path) -> None:
    target = tmp_path / "copy.safetensors"
    result = train(
        *(out, "--images", "16", "--gamma", "0.7"),
        *("--mismatch=0.4", "--publish", str(target)),
    )
    assert result.exit_code == 0, result.output
    config = load_artifact(target).info.training["config"]
    assert (config["r1_gamma"], config["mismatch_weight"]) == (0.7, 0.4)
    for old, new in RENAMED_OPTIONS.items():
        said = f"{old} is deprecated; use {new}\n" in result.stderr
        assert said == (old in ("--gamma", "--mismatch", "--publish"))
    help_text = invoke("train", "--help").stdout
    assert not any(f"{old} " in help_text for old in RENAMED_OPTIONS)


def test_the_command_judge_is_train_classifier() -> None:
    result = invoke("judge", "--help")
    assert result.exit_code == 0
    assert "judge is deprecated; use train-classifier" in result.stderr
    assert "train-classifier [OPTIONS] DATASET" in result.stdout


def test_the_version_is_that_of_the_package() -> None:
    assert version("cgan-service") in invoke("--version").stdout


# sample


@pytest.mark.parametrize(
    ("labels", "n", "scale", "size"),
    [(("left",), 1, 1, (8, 8)), (("0", "right"), 3, 1, (24, 16)), (("1",), 16, 3, (96, 96))],
)
def test_sample_writes_a_sheet(
    artifact: Path,
    tmp_path: Path,
    labels: tuple[str, ...],
    n: int,
    scale: int,
    size: tuple[int, int],
) -> None:
    sheet = tmp_path / "sheets" / "sheet.png"
    options = [option for label in labels for option in ("--label", label)]
    options += ["--n", str(n), "--scale", str(scale), "--device", "cpu"]

    result = invoke("sample", artifact, *options, "--out", sheet)

    assert result.exit_code == 0, result.output
    assert f"{sheet}: {n * len(labels)} images" in result.stdout
    with Image.open(sheet) as image:
        assert (image.format, image.mode, image.size) == ("PNG", "L", size)


def test_the_sheet_of_a_seed_is_always_the_same_and_a_name_is_its_index(
    artifact: Path, tmp_path: Path
) -> None:
    sheets = {}
    for name, label, seed in [
        ("first", "right", "1"),
        *(("again", "right", "1"), ("index", "1", "1")),
        *(("seed", "right", "2"), ("label", "left", "1")),
    ]:
        out = tmp_path / f"{name}.png"
        invoke("sample", artifact, "--label", label, "--seed", seed, "--out", out)
        sheets[name] = out.read_bytes()
    assert sheets["first"] == sheets["again"] == sheets["index"]
    assert len(set(sheets.values())) == 3


def test_a_colour_sheet_is_in_colour(tmp_path: Path) -> None:
    artifact = tiny.artifact_file(
        tmp_path / "rgb.safetensors", network=replace(tiny.NETWORK, channels=3)
    )
    invoke("sample", artifact, "--label", "0", "--n", "4", "--out", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as image:
        assert (image.mode, image.size) == ("RGB", (16, 16))
        assert len(np.unique(np.asarray(image))) > 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--label", "up", "--out", "a.png"), ("--label", "'up' is not a class", "left, right")),
        (("--label", "2", "--out", "a.png"), ("--label", "an index from 0 to 1")),
        (("--label", "0", "--out", "a.jpg"), ("--out", "a.jpg must end in .png")),
        (("--label", "0", "--out", "a.png", "--n", "0"), ("'--n': 0",)),
        (("--label", "0", "--out", "a.png", "--scale", "17"), ("'--scale': 17",)),
        (("--out", "a.png"), ("Missing option '--label'",)),
    ],
)
def test_sample_refuses_what_it_cannot_do_and_says_what_is_allowed(
    artifact: Path, tmp_path: Path, options: tuple[str, ...], said: tuple[str, ...]
) -> None:
    refused(invoke("sample", artifact, *options), *said, status=2)
    assert not list(tmp_path.glob("a.*g"))


def test_a_sheet_too_large_for_the_memory_is_refused(artifact: Path, tmp_path: Path) -> None:
    options = ("--label", "0", "--label", "1", "--n", "10000", "--scale", "16")
    result = invoke("sample", artifact, *options, "--out", tmp_path / "a.png")
    refused(result, "would have 327,680,000 pixels, at most 200,000,000", "smaller --n", status=2)


@pytest.mark.parametrize(
    "command", [("sample", "--label", "0", "--out"), ("inspect", "--picture")], ids=lambda it: it[0]
)
def test_a_picture_in_a_file_instead_of_a_folder_is_refused(
    artifact: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    name, *options = command
    result = invoke(name, artifact, *options, artifact / "a.png")
    refused(result, f"cannot write to the folder {artifact}: Not a directory; choose another one")


def test_a_full_disk_is_named_with_the_file_and_leaves_nothing(
    artifact: Path, tmp_path: Path
) -> None:
    out = tmp_path / "sheets" / "a.png"
    code = (
        "import resource, signal\n"
        "from training.__main__ import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (64, 64))\n"
        f"main(['sample', {str(artifact)!r}, '--label', '0', '--out', {str(out)!r}])\n"
    )
    ended = processes.run("-c", code)
    assert ended.returncode == 1
    assert ended.stderr == f"Error: {out}: File too large\n"
    assert list(out.parent.iterdir()) == []


def test_sample_refuses_a_file_that_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"\x80\x04.")
    result = invoke("sample", tmp_path / "a.bin", "--label", "0", "--out", tmp_path / "a.png")
    refused(result, f"{tmp_path / 'a.bin'}: is a pickle (a checkpoint?); nothing in it was")


# train-classifier and evaluate


def test_a_classifier_learns_from_photographs_of_any_size(tmp_path: Path) -> None:
    for seed, name in enumerate(("cat", "dog")):
        fill(tmp_path / "pets" / name, 20, seed=seed, size=100)
    command = ("train-classifier", tmp_path / "pets", "--epochs", "1", "--device", "cpu")
    path = tmp_path / "pets.safetensors"
    refused(invoke(*command, "--out", path), "100x100 (40)", "--image-size 32 crops and resizes")
    result = invoke(*command, "--out", path, "--image-size", "32")
    assert result.exit_code == 0, result.output
    assert f"{path}: accuracy " in result.stdout
    refused(
        invoke("train-classifier", "mnist", "--image-size", "32", "--out", path),
        "--image-size applies to folders of images; mnist has a fixed size",
        status=2,
    )


def test_too_little_memory_is_one_line(
    pets: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(*_given: object, **_options: object) -> None:
        raise MemoryError("Unable to allocate 12.0 GiB")

    monkeypatch.setattr("training.prepare.read_folder", exhausted)
    refused(invoke("train", pets, "--out", out), "Unable to allocate 12.0 GiB; free memory, or")


def test_train_classifier_reports_its_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "judges" / "mnist.safetensors"

    result = invoke("train-classifier", "mnist", "--epochs", "40", "--device", "cpu", "--out", path)

    assert result.exit_code == 0, result.output
    assert "epoch 40 of 40: loss " in result.stdout
    digest = result.stdout.split()[-1]
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
    test = data.load_dataset("mnist", "test", tmp_path / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier_module, "DIGESTS", {"mnist": digest})
        accuracy = load_bundled_classifier(test, path.parent).accuracy(test)
    assert f"accuracy {accuracy:.2%} on the real test images" in result.stdout
    assert accuracy > 0.9


def test_evaluate_writes_the_certificate_into_the_artifact_and_the_page_beside_it(
    artifact: Path, tmp_path: Path
) -> None:
    before = load_artifact(artifact)

    result = invoke("evaluate", artifact, "--device", "cpu", "--report")

    assert result.exit_code == 0, result.output
    after = load_artifact(artifact)
    certificate = read_certificate(after.info)
    assert certificate is not None
    assert (certificate.dataset, certificate.images) == ("mnist", 200)
    assert replace(after.info, certificate=None) == before.info
    for name, tensor in before.generator.state_dict().items():
        assert torch.equal(after.generator.state_dict()[name], tensor), name
    page = (tmp_path / "README.md").read_text()
    for line in render_table(certificate, after.info.class_names).splitlines():
        assert line in result.stdout
        assert line in page
    with Image.open(artifact.with_suffix(".png")) as picture:
        assert picture.size == (16 * 8 * 2, 2 * 8 * 2)


def test_evaluating_again_gives_the_same_file(artifact: Path) -> None:
    invoke("evaluate", artifact, "--device", "cpu")
    first = artifact.read_bytes()
    invoke("evaluate", artifact, "--device", "cpu")
    assert artifact.read_bytes() == first


@pytest.mark.parametrize("training", [{}, {"dataset": ["mnist"]}])
def test_an_artifact_that_names_no_data_set_is_measured_against_the_one_given(
    tmp_path: Path, training: dict[str, object]
) -> None:
    artifact = tiny.artifact_file(tmp_path / "a.safetensors", training=training)
    refused(invoke("evaluate", artifact), f"{artifact}: names no data set; give one with --dataset")

    assert invoke("evaluate", artifact, "--dataset", "mnist", "--device", "cpu").exit_code == 0
    assert load_artifact(artifact).info.certificate is not None


@pytest.mark.parametrize(
    ("training", "network", "said"),
    [
        ({"dataset": "pets"}, tiny.NETWORK, None),
        (
            {"dataset": "mnist", "dataset_sha256": "0" * 64},
            tiny.NETWORK,
            "was trained on other images than mnist contains now",
        ),
        (
            {"dataset": "mnist", "names": tiny.CLASS_NAMES[::-1]},
            tiny.NETWORK,
            "has its classes in another order than mnist",
        ),
        (
            {"dataset": "mnist"},
            replace(tiny.NETWORK, image_size=9),
            "generates images of 9x9x1 in 2 classes, but mnist has 8x8x1 in 2 classes",
        ),
        (
            {"dataset": "mnist"},
            replace(tiny.NETWORK, channels=3),
            "generates images of 8x8x3 in 2 classes",
        ),
        (
            {"dataset": "mnist"},
            replace(tiny.NETWORK, num_classes=1),
            "generates images of 8x8x1 in 1 classes",
        ),
    ],
)
def test_a_foreign_artifact_is_not_measured(
    tmp_path: Path, training: dict[str, object], network: GeneratorConfig, said: str | None
) -> None:
    artifact = tmp_path / "a.safetensors"
    names = training.get("names", tiny.CLASS_NAMES[: network.num_classes])
    tiny.artifact_file(artifact, network=network, training=training, class_names=names)
    before = artifact.read_bytes()
    cause = f"{artifact}: {said}" if said else "pets: is neither a folder nor one of the data sets"
    refused(invoke("evaluate", artifact, "--device", "cpu"), cause)
    assert artifact.read_bytes() == before


def test_evaluate_refuses_a_judge_that_is_not_the_committed_one(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = artifact.read_bytes()
    monkeypatch.setattr(classifier_module, "DIGESTS", {"mnist": "0" * 64})
    monkeypatch.setattr(
        "training.quality.evaluator.get_classifier",
        lambda train, **_how: load_bundled_classifier(train),
    )
    result = invoke("evaluate", artifact, "--device", "cpu")
    refused(
        result,
        "mnist.safetensors: SHA-256 is",
        f"but that of the committed classifier is {'0' * 64}",
    )
    assert artifact.read_bytes() == before


def test_help_names_every_command() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    for command in ("train", "evaluate", "sample", "train-classifier", "import", "inspect"):
        assert f"  {command} " in result.stdout


# train --init-from


def test_a_run_can_begin_with_the_networks_of_another(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PRESETS, "conv", replace(tiny.CONV, r1_gamma=None))
    assert train(out, "--images", "320", "--seed", "3", "--r1-gamma", "0.7").exit_code == 0
    second = tmp_path / "second"

    result = train(second, "--init-from", str(out), "--images", "16", "--mismatch-weight", "0.9")

    assert result.exit_code == 0, result.output
    first, info = (load_artifact(each / "generator.safetensors").info for each in (out, second))
    assert info.images_seen == 16
    assert info.training["config"]["r1_gamma"] == 0.7
    assert info.training["config"]["mismatch_weight"] == 0.9
    initialised_from = info.training["initialised_from"]
    assert (initialised_from["images_seen"], initialised_from["seed"]) == (320, 3)
    assert initialised_from["config"] == first.training["config"]
    assert first.training["initialised_from"] is None


def test_its_first_step_is_from_where_the_other_stopped(out: Path, tmp_path: Path) -> None:
    assert train(out, "--images", "320").exit_code == 0
    assert train(tmp_path / "second", "--init-from", str(out), "--images", "16").exit_code == 0
    assert train(tmp_path / "fresh", "--images", "16", "--r1-gamma", "1").exit_code == 0
    start, near, far = (
        torch.cat([value.flatten() for value in read_generator(each).values()])
        for each in (out, tmp_path / "second", tmp_path / "fresh")
    )
    assert (near - start).norm() < 0.3 * (far - start).norm()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of three classes of larger images in colour."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog", "owl"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(6):
            pixels = rng.integers(0, 255, (36, 40, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    return tmp_path / "photos"


@pytest.fixture
def _networks_of_real_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.prepare.generator_config", generator_config)


DIGITS = Dataset("digits", torch.zeros(10, 1, 28, 28), torch.arange(10), tuple("0123456789"), "")


@pytest.mark.usefixtures("_networks_of_real_sizes")
@pytest.mark.parametrize("preset", ["conv", "mlp"])
def test_a_run_on_other_classes_starts_with_a_model_file(
    out: Path, tmp_path: Path, photos: Path, preset: str
) -> None:
    model = tiny.artifact_file(
        tmp_path / "digits.safetensors",
        network=generator_config(PRESETS[preset], DIGITS),
        class_names=DIGITS.class_names,
    )
    options = ("--device", "cpu", "--images", "16", "--out", out)
    result = invoke("train", photos, "--init-from", model, *options)
    assert result.exit_code == 0, result.output
    assert f"{model}: generates 10 classes; the 3 of the data set start with new" in result.stdout
    info = load_artifact(out / "generator.safetensors").info
    assert info.class_names == ("cat", "dog", "owl")
    assert (info.network.image_size, info.network.channels) == (28, 1)
    assert info.training["preset"] == preset
    assert info.training["initialised_from"]["sha256"] == load_artifact(model).sha256
    before = load_artifact(model).generator.state_dict()
    for name, weights in read_generator(out).items():
        if name.endswith("weight") and name != "label_embedding.weight":
            assert (weights - before[name]).abs().max() < 0.01, name

    second = invoke(*("train", photos, "--init-from", out, "--device", "cpu", "--images", "16"))
    assert second.exit_code == 0, second.output


@pytest.mark.usefixtures("_networks_of_real_sizes")
def test_a_run_on_other_classes_keeps_the_discriminator_of_the_first_run(
    out: Path, tmp_path: Path, photos: Path
) -> None:
    options = ("--device", "cpu", "--images", "32", "--image-size", "28")
    assert invoke("train", photos, *options, "--out", out).exit_code == 0
    (photos / "owl").rename(tmp_path / "owl")
    result = invoke("train", photos, "--init-from", out, *options, "--out", tmp_path / "second")
    assert result.exit_code == 0, result.output
    assert "generates 3 classes; the 2 of the data set" in result.stdout
    first, second = (
        read_checkpoint(each / "checkpoint.pt").state["discriminator"]
        for each in (out, tmp_path / "second")
    )
    assert len(second["label_embedding.weight"]) == 2
    assert (first["main.0.weight"] - second["main.0.weight"]).abs().max() < 0.01


@pytest.mark.usefixtures("_networks_of_real_sizes")
def test_a_run_on_images_of_one_size_goes_on_without_repeating_it(out: Path, photos: Path) -> None:
    run = ("train", photos, "--device", "cpu", "--out", out)
    assert invoke(*run, "--image-size", "28", "--images", "16").exit_code == 0
    result = invoke(*run, "--resume", "--images", "32")
    assert result.exit_code == 0, result.output
    said = "--image-size of this run is 28, but 32 was given; leave it out"
    refused(invoke(*run, "--resume", "--image-size", "32"), said)


@pytest.mark.usefixtures("_networks_of_real_sizes")
def test_networks_of_other_images_are_refused_before_time_is_spent(
    out: Path, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spend(*_given: object, **_how: object) -> None:
        raise AssertionError("time is spent")

    monkeypatch.setattr("training.quality.evaluator.get_classifier", spend)
    network = generator_config(PRESETS["conv"], DIGITS)
    paths = {
        "digits": network,
        "colour": replace(network, channels=3),
        "wide": replace(network, latent_dim=99),
    }
    for name, each in paths.items():
        tiny.artifact_file(
            tmp_path / f"{name}.safetensors", network=each, class_names=DIGITS.class_names
        )
    start = ("--device", "cpu", "--out", out, "--init-from")
    mnist, folder = ("train", "mnist", *start), ("train", photos, *start)
    for command, said in (
        (
            (*mnist, "colour.safetensors"),
            "colour.safetensors: generates images of 28x28, colour, but the data set has 8x8, grey",
        ),
        (
            (*folder, "wide.safetensors"),
            "its generator has latent_dim 99, but that of preset 'conv' has 64; start without",
        ),
        (
            (*folder, "digits.safetensors", "--image-size", "32"),
            "generates images of 28x28, grey, but --image-size 32 was given; leave it out",
        ),
        ((*folder, "digits.safetensors", "--preset", "mlp"), "its preset is 'conv', but 'mlp' was"),
        ((*folder, photos / "cat" / "0.png"), "0.png: is a PNG image; expected an artifact"),
    ):
        refused(invoke(*command), said)
    assert not out.exists()


def read_generator(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = read_checkpoint(run / "checkpoint.pt").state["generator"]
    return weights


@pytest.mark.parametrize(
    ("options", "said", "status"),
    [
        (("--init-from", "nowhere"), "nowhere/checkpoint.pt: does not exist", 1),
        (("--init-from", "run", "--resume"), "--init-from and --resume exclude each other", 2),
        (("--init-from", "run", "--preset", "mlp"), "its preset is 'conv', but 'mlp' was given", 1),
    ],
)
def test_a_beginning_that_does_not_fit_is_refused(
    out: Path, tmp_path: Path, options: tuple[str, ...], said: str, status: int
) -> None:
    assert train(out, "--images", "16", "--r1-gamma", "1").exit_code == 0
    refused(train(tmp_path / "second", *options), said, status=status)
    assert not (tmp_path / "second").exists()
