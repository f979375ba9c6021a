"""The commands that convert files: import, export and upgrade."""

from pathlib import Path
from typing import get_args

import click

from training.artifact import (
    ArtifactError,
    Precision,
    check_model_name,
    list_artifacts,
    list_names,
    read_artifact,
)
from training.cli import FILE, data_dir_option, device_option
from training.data.named import DATASETS, DataError
from training.evaluation import certify_artifact, image_shape
from training.files import check_folder, prepare_folder, write_atomically
from training.importing import ForeignCheckpointError, load_foreign, read_class_names
from training.loading import load_artifact
from training.onnx_graph import GraphError, to_onnx
from training.quality.certificate import with_certificate
from training.quality.classifier import ClassifierError
from training.quality.report import render_table
from training.saving import save_artifact

PATH = click.Path(path_type=Path)
_UNMEASURED = "To import it without an evaluation, give --no-certify."


@click.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The artifact to write, NAME.safetensors; must not exist.",
)
@click.option(
    "--classes",
    help="Names of the classes in the order of their labels: separated by commas, or a text file "
    'with one a line. [default: those of --dataset, else "0", "1", …]',
)
@click.option(
    "--dataset",
    type=click.Choice(sorted(DATASETS)),
    help="Data set that it was trained on: names the classes, and the evaluation compares with it.",
)
@click.option(
    "--certify/--no-certify",
    default=None,
    help="Evaluate it as the command evaluate does. [default: certify if there is a --dataset]",
)
@device_option
@data_dir_option
def import_command(
    *,
    checkpoint: Path,
    out: Path,
    classes: str | None,
    dataset: str | None,
    certify: bool | None,
    device: str,
    data_dir: Path | None,
) -> None:
    """Convert a foreign CHECKPOINT to an artifact.

    CHECKPOINT is a generator's state dict as CGAN-PyTorch or PyTorch-GAN save it.
    """
    if certify and dataset is None:
        raise click.UsageError("--certify needs --dataset, the images to compare with")
    _check_new_artifact(out)
    check_folder(out.parent)
    try:
        names = None if classes is None else read_class_names(classes)
        generator, info = load_foreign(checkpoint, class_names=names, dataset=dataset)
    except ValueError as error:
        option = "--dataset" if classes is None else "--classes"
        raise click.BadParameter(str(error), param_hint=option) from error
    prepare_folder(out.parent)
    if dataset is not None and certify is not False:
        if "dataset" not in info.training:
            made = f"generates images of {image_shape(info.network)}, unlike {dataset}"
            raise ForeignCheckpointError(checkpoint, f"{made}\n{_UNMEASURED}")
        try:
            certificate = certify_artifact(
                checkpoint, generator, info, dataset, device=device, data_dir=data_dir
            )
        except (ArtifactError, DataError, ClassifierError) as error:
            raise click.ClickException(f"{error}\n{_UNMEASURED}") from error
        info = with_certificate(info, certificate)
        click.echo(render_table(certificate, info.class_names))
    save_artifact(out, generator, info, int8=True)
    click.echo(f"{out}: imported from {checkpoint}, SHA-256 {load_artifact(out).sha256}")
    click.echo(f"Classes: {list_names(info.class_names)}")
    if classes is None and dataset is None:
        click.echo("Name the classes with --classes; evaluate with --dataset.")


def _check_new_artifact(path: Path) -> None:
    if path.suffix != ".safetensors":
        raise click.BadParameter(f"{path} must end in .safetensors", param_hint="--out")
    check_model_name(path)
    if path.exists():
        raise click.BadParameter(f"{path} already exists; choose another name", param_hint="--out")


@click.command("export")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--onnx", "out", type=FILE, required=True, help="The file to write, NAME.onnx.")
@click.option(
    "--precision",
    type=click.Choice(get_args(Precision)),
    default="float32",
    help="Precision of the network.",
)
def export_command(*, artifact: Path, out: Path, precision: Precision) -> None:
    """Write the network of ARTIFACT as a model of ONNX.

    It maps `latents` (N, latent_dim) float32, which are standard normal, and `labels` (N,) int64 to
    `images` (N, C, H, W) float32 in [-1, 1].
    """
    if out.suffix != ".onnx":
        raise click.BadParameter(f"{out} must end in .onnx", param_hint="--onnx")
    loaded = load_artifact(artifact)
    if precision not in loaded.graphs:
        raise ArtifactError(
            artifact,
            f"has no graph in {precision}; add it with: python -m training upgrade {artifact}",
        )
    check_folder(out.parent)
    try:
        model = to_onnx(loaded, precision)
    except GraphError as error:
        raise ArtifactError(artifact, f"was not exported: {error}") from error
    write_atomically(out, model)
    classes = list_names(loaded.info.class_names)
    click.echo(f"{out}: the network of {artifact} in {precision}; classes {classes}")


def _list(path: Path) -> list[Path]:
    found = list_artifacts(path) if path.is_dir() else [path]
    if not found:
        raise ArtifactError(path, "holds no *.safetensors file")
    return found


@click.command("upgrade")
@click.argument("paths", metavar="ARTIFACT…", nargs=-1, required=True, type=PATH)
def upgrade_command(*, paths: tuple[Path, ...]) -> None:
    """Write ARTIFACT, or all of a folder, again as this release does; nothing is trained.

    It gets compute graphs, and with them another SHA-256.
    """
    failed = 0
    for path in [each for given in paths for each in _list(given)]:
        try:
            loaded = load_artifact(path)
            save_artifact(path, loaded.generator, loaded.info, int8=True)
        except ArtifactError as error:
            click.echo(f"Error: {error}", err=True)
            failed += 1
        else:
            click.echo(f"{path}: SHA-256 {read_artifact(path).sha256}, before {loaded.sha256}")
    if failed:
        raise click.exceptions.Exit(1)
