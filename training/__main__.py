"""The command line: `python -m training {train,evaluate,sample,judge}`."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import click
import torch

from training.artifact import ArtifactError, load_artifact, save_artifact
from training.checkpoint import CheckpointError, Identity, read_checkpoint, restore
from training.config import PRESETS
from training.data import DATASETS, DataError, Dataset, default_data_dir, load_dataset
from training.devices import DeviceError, describe, has_native_bfloat16, resolve_device
from training.evaluation import certify, generate, table, with_certificate
from training.judge import DIGESTS, Judge, JudgeError, load_judge, save_judge, train_classifier
from training.loop import DivergedError, TrainState, create_state, generator_config, train
from training.networks import GeneratorConfig, count_parameters
from training.pictures import grid, save_png
from training.report import write_report
from training.run import RunFolder, run, stop_on_signals

# What a person can mend; anything else is a defect of this code and shows its traceback.
EXPECTED = (
    ArtifactError,
    CheckpointError,
    DataError,
    DeviceError,
    DivergedError,
    JudgeError,
    OSError,
)


class _Commands(click.Group):
    """Expected errors end in one line on stderr and status 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except EXPECTED as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"show_default": True, "max_content_width": 100})
def main() -> None:
    """Train class-conditional generators, measure them, and sample from them."""


device_option = click.option(
    "--device",
    default="auto",
    help="auto (CUDA where there is one, else the CPU), cpu, cuda, cuda:1.",
)
data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Where the data sets lie or are downloaded to: DIR/mnist/train-images-idx3-ubyte.gz … "
    "[default: $CGAN_DATA_DIR, else a cache folder of yours]",
)
seed_option = click.option(
    "--seed", type=click.IntRange(0, 2**63 - 1), default=0, help="Decides every random draw."
)
dataset_argument = click.argument("dataset", type=click.Choice(sorted(DATASETS)))


@main.command("train")
@dataset_argument
@click.option("--preset", type=click.Choice(list(PRESETS)), default="mlp")
@device_option
@data_dir_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder of the run: checkpoint.pt, log.jsonl, samples, tensorboard, and at the end "
    "generator.safetensors. [default: runs/DATASET-PRESET]",
)
@seed_option
@click.option(
    "--images", type=click.IntRange(1), help="Length of the run in real images. [default: preset's]"
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Length of the run in minutes of training, in place of images.",
)
@click.option("--resume", is_flag=True, help="Go on exactly where the run in --out stopped.")
@click.option("--dry-run", is_flag=True, help="Print the configuration and the estimated time.")
def train_command(
    *,
    dataset: str,
    preset: str,
    device: str,
    data_dir: Path | None,
    out: Path | None,
    seed: int,
    images: int | None,
    minutes: float | None,
    resume: bool,
    dry_run: bool,
) -> None:
    """Train a generator on DATASET and export it."""
    if images is not None and minutes is not None:
        raise click.UsageError("--images and --minutes both end the run; give one of them.")
    torch_device = _device(device)
    folder = RunFolder(out or Path("runs") / f"{dataset}-{preset}")
    data = load_dataset(dataset, "train", data_dir or default_data_dir())
    config = PRESETS[preset]
    if not has_native_bfloat16(torch_device):
        config = dataclasses.replace(config, precision="float32")
    if images is not None:
        config = dataclasses.replace(config, images=images)
    identity = Identity(
        dataset=dataset,
        dataset_digest=data.digest,
        preset=preset,
        seed=seed,
        config=config,
        minutes=minutes,
    )
    state, identity = _start(folder, data, identity, torch_device, resume=resume)
    if dry_run:
        _print_plan(folder, state, data.to(torch_device), identity)
        return
    with stop_on_signals() as stop:
        finished = run(folder, state, data.to(torch_device), identity, stop)
    if finished:
        click.echo(f"{folder.artifact}: exported after {state.images_seen:,} images")
        click.echo(f"Measure it: python -m training evaluate {folder.artifact}")
        return
    click.echo(f"Stopped after {state.images_seen:,} images; go on with --resume.", err=True)
    sys.exit(128 + (stop.signal or 0))


def _start(
    folder: RunFolder, data: Dataset, wanted: Identity, device: torch.device, *, resume: bool
) -> tuple[TrainState, Identity]:
    """A fresh state, or the checkpoint's with the budget that it was given."""
    shape = generator_config(data)
    if not resume:
        if folder.checkpoint.exists():
            raise click.UsageError(
                f"{folder.path} holds a run already: go on with --resume, or name another --out."
            )
        return create_state(wanted.config, shape, device, wanted.seed), wanted
    stored, contents = read_checkpoint(folder.checkpoint)
    _refuse_other_run(folder.checkpoint, stored, wanted)
    state = create_state(stored.config, shape, device, stored.seed)
    restore(folder.checkpoint, contents, state)
    return state, stored


def _refuse_other_run(path: Path, stored: Identity, wanted: Identity) -> None:
    context = click.get_current_context()
    for field in ("dataset", "dataset_digest", "preset", "seed", "minutes"):
        have, want = getattr(stored, field), getattr(wanted, field)
        given = context.get_parameter_source(field)
        if have != want and given is not click.core.ParameterSource.DEFAULT:
            raise CheckpointError(f"{path}: {field} is {have!r} there, but {want!r} was given")
    images = context.params["images"]
    if images is not None and images != stored.config.images:
        raise CheckpointError(
            f"{path}: images is {stored.config.images} there, but {images} was given"
        )


def _print_plan(folder: RunFolder, state: TrainState, data: Dataset, identity: Identity) -> None:
    plan = {
        **dataclasses.asdict(identity),
        "out": str(folder.path),
        "network": dataclasses.asdict(state.generator.config),
        "generator_parameters": count_parameters(state.generator),
        "discriminator_parameters": count_parameters(state.discriminator),
    }
    click.echo(json.dumps(plan, indent=2))
    if identity.minutes is not None:
        click.echo(f"Estimated time: {identity.minutes:g} minutes, as asked for.")
        return
    left = identity.config.images - state.images_seen
    if left <= 0:
        click.echo("Estimated time: none; the run is complete.")
        return
    until = time.monotonic() + 5.0
    points = train(
        state, data, identity.config, log_every=2**62, stop=lambda: time.monotonic() > until
    )
    speed = next(points).images_per_s
    click.echo(f"Estimated time: {left / speed / 60:.1f} minutes at {speed:,.0f} images/s.")


def _device(name: str) -> torch.device:
    """Resolve --device, and say in the first line what it is."""
    device = resolve_device(name)
    click.echo(f"Device: {describe(device)}")
    return device


@main.command("evaluate")
@click.argument("artifact", type=click.Path(path_type=Path))
@device_option
@data_dir_option
@click.option("--report", is_flag=True, help="Also write README.md and pictures beside ARTIFACT.")
def evaluate_command(*, artifact: Path, device: str, data_dir: Path | None, report: bool) -> None:
    """Measure ARTIFACT and write the certificate into it."""
    loaded = load_artifact(artifact)
    torch_device = _device(device)
    name = loaded.info.training.get("dataset")
    if not isinstance(name, str) or name not in DIGESTS:
        raise ArtifactError(artifact, f"was trained on {name!r}, for which there is no judge")
    train_set, test_set = (
        load_dataset(name, split, data_dir or default_data_dir()).to(torch_device)
        for split in ("train", "test")
    )
    made, real = _shape(loaded.info.network), _shape(generator_config(test_set))
    if made != real:
        raise ArtifactError(artifact, f"makes images of {made}, but those of {name} are of {real}")
    judge = load_judge(test_set)
    generator = loaded.generator.to(torch_device)
    certificate = certify(generator, judge, train=train_set, test=test_set)
    save_artifact(artifact, generator, with_certificate(loaded.info, certificate))
    click.echo(table(certificate, loaded.info.class_names))
    if report:
        write_report(artifact.parent)


def _shape(network: GeneratorConfig) -> str:
    size = f"{network.image_size}x{network.image_size}x{network.channels}"
    return f"{size} in {network.num_classes} classes"


@main.command("sample")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--label", multiple=True, required=True, help="Class index or name; may repeat.")
@click.option("--n", type=click.IntRange(1, 10_000), default=16, help="Images of each label.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@seed_option
@click.option("--scale", type=click.IntRange(1, 16), default=1, help="Whole-pixel enlargement.")
@device_option
def sample_command(
    *,
    artifact: Path,
    label: tuple[str, ...],
    n: int,
    out: Path,
    seed: int,
    scale: int,
    device: str,
) -> None:
    """Write a sheet of images from ARTIFACT as a PNG."""
    if out.suffix.lower() != ".png":
        raise click.BadParameter(f"{out} must end in .png", param_hint="--out")
    loaded = load_artifact(artifact)
    try:
        wanted = [loaded.info.label(each) for each in label]
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--label") from error
    torch_device = _device(device)
    labels = torch.tensor(wanted, device=torch_device).repeat_interleave(n)
    pixels = generate(loaded.generator.to(torch_device), labels, seed=seed)
    save_png(out, grid(pixels, columns=int((len(labels) - 1) ** 0.5) + 1), scale=scale)
    click.echo(f"{out}: {len(labels)} images")


@main.command("judge")
@dataset_argument
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), required=True)
@click.option("--epochs", type=click.IntRange(1), default=12)
@seed_option
@device_option
@data_dir_option
def judge_command(
    *, dataset: str, out: Path, epochs: int, seed: int, device: str, data_dir: Path | None
) -> None:
    """Train the classifier that measures generators of DATASET, on real images only."""
    torch_device = _device(device)
    train_set, test_set = (
        load_dataset(dataset, split, data_dir or default_data_dir()).to(torch_device)
        for split in ("train", "test")
    )
    classifier = train_classifier(
        train_set,
        epochs=epochs,
        seed=seed,
        report=lambda epoch, loss: click.echo(f"epoch {epoch + 1} of {epochs}: loss {loss:.4f}"),
    )
    accuracy = Judge(classifier, digest="").accuracy(test_set)
    digest = save_judge(out, classifier, dataset=dataset, epochs=epochs, seed=seed)
    click.echo(f"{out}: {accuracy:.2%} of the real test images, SHA-256 {digest}")


if __name__ == "__main__":
    main(prog_name="python -m training")
