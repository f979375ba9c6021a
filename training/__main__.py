"""The command line: `python -m training COMMAND`, or `cgan-train COMMAND`."""

import json
import logging
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NEEDED = "torch", "onnx", "onnxscript", "click", "pooch", "tensorboard", "tqdm"
if absent := [name for name in NEEDED if not find_spec(name)]:
    sys.exit(f"training needs {', '.join(absent)}; run: pip install -e '.[train]'")

import click
import torch

from training.artifact import ArtifactError, list_names, printable
from training.choice import MANY_PASSES, SMALL_DATASET
from training.cli import FILE, FOLDER, Commands, data_dir_option, device_option
from training.config import PRESETS, TrainingConfig
from training.conversion import export_command, import_command, upgrade_command
from training.data.folder import check_outside
from training.data.image_file import MAX_SIZE, MIN_SIZE
from training.distributed import init_distributed
from training.evaluation import certify_artifact
from training.files import check_folder, prepare_folder
from training.gamma_search import DEFAULT_GAMMA
from training.images import class_grid, grid, save_png
from training.inspection import render_picture, render_summary, summary
from training.loading import load_artifact
from training.origin import find_data
from training.outcome import report_finished, report_stopped
from training.plan import render_plan
from training.prepare import load_splits, prepare_run, select_device
from training.quality.certificate import with_certificate
from training.quality.classifier import (
    EPOCHS,
    FeatureClassifier,
    save_classifier,
    train_classifier,
)
from training.quality.report import render_table, write_report
from training.run import StopFlag
from training.sampling import generate
from training.saving import save_artifact
from training.settings import DEFAULT_PRESET, TrainSettings

MAX_SHEET_PIXELS = 200_000_000  # limits the memory that a sheet of images takes

logger = logging.getLogger("training")


@click.group(cls=Commands, context_settings={"show_default": True, "max_content_width": 100})
@click.version_option(package_name="cgan-service", prog_name="cgan-train")
def main() -> None:
    """Train and evaluate class-conditional image generators."""


seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Seed of every random draw."
)
image_size_option = click.option(
    "--image-size",
    type=click.IntRange(MIN_SIZE, MAX_SIZE),
    help="Crop the images of a folder to their central square and resize them to N x N pixels.",
)
dataset_argument = click.argument("dataset", metavar="DATASET")


def _per_preset(default: Callable[[TrainingConfig], str]) -> str:
    return "[default: " + ", ".join(f"{name} {default(it)}" for name, it in PRESETS.items()) + "]"


@main.command("train")
@click.argument("dataset", required=False)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    help="Networks and objective. conv: convolutional generator and discriminator; mlp: MLP "
    "generator, convolutional discriminator; paper: the MLPs and the loss of Mirza & Osindero. "
    f"[default: {DEFAULT_PRESET}, adapted to the budget of a short run]",
)
@device_option
@data_dir_option
@click.option(
    "--out",
    type=FOLDER,
    help="Folder of the run: checkpoint.pt, log.jsonl, samples, tensorboard, and the best "
    "generator so far, generator.safetensors. [default: runs/DATASET-PRESET, outside DATASET]",
)
@click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), help="Seed of every random draw. [default: 0]"
)
@click.option(
    "--images",
    type=click.IntRange(1),
    help=f"Length of the run in real images shown. {_per_preset(lambda it: f'{it.images:,}')}",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Length of the run in minutes, all of it included; replaces --images.",
)
@click.option(
    "--r1-gamma",
    type=click.FloatRange(0),
    help="Weight of the gradient penalty. [default: chosen by a short search, or "
    f"{DEFAULT_GAMMA:g} if the run is too short for one; paper 0]",
)
@click.option(
    "--mismatch-weight",
    type=click.FloatRange(0),
    help="Weight of real images with wrong labels. Higher values give purer classes, lower values "
    f"more variety. {_per_preset(lambda it: f'{it.mismatch_weight:g}')}",
)
@click.option(
    "--batch-size",
    type=click.IntRange(2),
    help=f"Images per step. {_per_preset(lambda it: str(it.batch_size))}",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    help="Precision of matrix products; weights stay float32. Devices without native bfloat16 use "
    f"float32. {_per_preset(lambda it: it.precision)}",
)
@image_size_option
@click.option(
    "--flip/--no-flip", default=None, help="Mirror half of the real images. [default: no-flip]"
)
@click.option(
    "--augment/--no-augment",
    default=None,
    help="Distort real and fake images before the discriminator. [default: augment if fewer "
    f"than {SMALL_DATASET:,} training images are shown more than {MANY_PASSES} times]",
)
@click.option(
    "--certify",
    is_flag=True,
    help="Evaluate the generator at the end of the run: "
    "in full, or as far as a fifth of --minutes allows.",
)
@click.option(
    "--export-to",
    type=FILE,
    help="Copy the finished artifact to this path, NAME.safetensors. A service that watches the "
    "folder serves it as NAME.",
)
@click.option(
    "--init-from",
    type=click.Path(path_type=Path),
    help="Start with the networks of a run (its folder) or of a model file, for the same or other "
    "classes. The images of a folder are converted to its size and colours.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Continue the run in --out exactly where it stopped, with its options and, if DATASET is "
    "left out, its images. --images or --minutes give it another length, from its beginning.",
)
@click.option("--dry-run", is_flag=True, help="Print the configuration and the estimated time.")
def train_command(**options: Any) -> None:
    """Train a generator on DATASET and export it.

    DATASET is mnist, fashion-mnist, cifar-10, or a folder with one sub-folder of images per class:
    DIR/CLASS/1.png, or DIR/train/CLASS/1.png with DIR/test/CLASS/2.png.
    With several GPUs: torchrun --nproc-per-node N -m training train …
    """
    settings = TrainSettings(**(options if options["dataset"] else find_data(options)))
    with init_distributed() as world, StopFlag() as stop:
        if not world.is_main_process:
            logger.setLevel(logging.CRITICAL)
        prepared = prepare_run(settings, world, stop)
        if settings.dry_run:
            plan = render_plan(prepared.run, prepared.plan)  # every process takes part
            click.echo(plan if world.is_main_process else "", nl=world.is_main_process)
            return
        started = not world.any(stop())
        if started and prepared.run.finish(stop):
            if world.is_main_process:
                report_finished(prepared, settings)
            return
        if world.is_main_process:
            report_stopped(prepared.run if started else None, settings)
        sys.exit(128 + (stop.signal or 0))


@main.command("evaluate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--dataset",
    help="Data set to compare with: a name or a folder. [default: the one named in ARTIFACT]",
)
@device_option
@data_dir_option
@click.option("--report", is_flag=True, help="Also write README.md and pictures beside ARTIFACT.")
def evaluate_command(
    *, artifact: Path, dataset: str | None, device: str, data_dir: Path | None, report: bool
) -> None:
    """Evaluate ARTIFACT and write its certificate into it.

    The certificate is an evaluation report that is stored inside the file.
    """
    loaded = load_artifact(artifact)
    name = dataset or loaded.info.training.get("dataset")
    if not isinstance(name, str):
        raise ArtifactError(artifact, "names no data set; give one with --dataset")
    prepare_folder(artifact.parent)
    certificate = certify_artifact(
        artifact, loaded.generator, loaded.info, name, device=device, data_dir=data_dir
    )
    info = with_certificate(loaded.info, certificate)
    save_artifact(artifact, loaded.generator, info, int8=True)
    click.echo(render_table(certificate, loaded.info.class_names))
    if report:
        write_report(artifact.parent)


@main.command("sample")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--label", multiple=True, required=True, help="Class index or name; repeatable.")
@click.option("--n", type=click.IntRange(1, 10_000), default=16, help="Images per label.")
@click.option("--out", type=FILE, required=True, help="The PNG file.")
@seed_option
@click.option("--scale", type=click.IntRange(1, 16), default=1, help="Integer enlargement.")
@device_option
def sample_command(
    *, artifact: Path, label: tuple[str, ...], n: int, out: Path, seed: int, scale: int, device: str
) -> None:
    """Write images of ARTIFACT to one PNG sheet."""
    if out.suffix.lower() != ".png":
        raise click.BadParameter(f"{out} must end in .png", param_hint="--out")
    check_folder(out.parent)
    loaded = load_artifact(artifact)
    try:
        wanted = [loaded.info.label(each) for each in label]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--label") from error
    pixels = len(wanted) * n * (scale * loaded.info.network.image_size) ** 2
    if pixels > MAX_SHEET_PIXELS:
        raise click.UsageError(
            f"the sheet would have {pixels:,} pixels, at most {MAX_SHEET_PIXELS:,} are allowed; "
            "give a smaller --n or --scale, or fewer labels"
        )
    torch_device = select_device(device)
    labels = torch.tensor(wanted, device=torch_device).repeat_interleave(n)
    images = generate(loaded.generator.to(torch_device), labels, seed=seed)
    save_png(out, grid(images, columns=int((len(labels) - 1) ** 0.5) + 1), scale=scale)
    classes = [f"{loaded.info.class_names[each]} (index {each})" for each in dict.fromkeys(wanted)]
    click.echo(printable(f"{out}: {len(labels)} images of {list_names(classes)}"))


@main.command("train-classifier")
@dataset_argument
@click.option("--out", type=FILE, required=True, help="The safetensors file to write.")
@click.option(
    "--epochs", type=click.IntRange(1), default=EPOCHS, help="Passes over the training images."
)
@image_size_option
@seed_option
@device_option
@data_dir_option
def train_classifier_command(
    *,
    dataset: str,
    out: Path,
    epochs: int,
    image_size: int | None,
    seed: int,
    device: str,
    data_dir: Path | None,
) -> None:
    """Train the reference classifier of DATASET.

    It learns from real images only; evaluations classify generated images with it.
    """
    size = TrainSettings(dataset=dataset, image_size=image_size).image_size
    check_outside(dataset, "--out", out, out.parent)
    prepare_folder(out.parent)
    train_set, test_set = load_splits(dataset, data_dir, select_device(device), size=size)
    classifier = train_classifier(train_set, epochs=epochs, seed=seed)
    accuracy = FeatureClassifier(classifier, digest="").accuracy(test_set)
    digest = save_classifier(out, classifier, dataset=train_set.name, epochs=epochs, seed=seed)
    click.echo(f"{out}: accuracy {accuracy:.2%} on the real test images, SHA-256 {digest}")


@main.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--picture",
    type=FILE,
    help="A PNG file to write, one row per class. [default: a small picture in the terminal]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(*, artifact: Path, picture: Path | None, as_json: bool) -> None:
    """Show network, training and certificate of ARTIFACT."""
    if picture is not None and picture.suffix.lower() != ".png":
        raise click.BadParameter(f"{picture} must end in .png", param_hint="--picture")
    if picture is not None:
        check_folder(picture.parent)
    loaded = load_artifact(artifact)
    click.echo(json.dumps(summary(loaded), indent=2) if as_json else render_summary(loaded))
    if picture is not None:
        save_png(picture, class_grid(loaded.generator, columns=16), scale=2)
    elif sys.stdout.isatty() and not as_json:
        click.echo(render_picture(loaded, shutil.get_terminal_size().columns))


for command in (import_command, export_command, upgrade_command):
    main.add_command(command)

if __name__ == "__main__":
    main(prog_name="python -m training")
