"""The command line: `python -m training {train,evaluate,sample,judge,import,inspect}`."""

import dataclasses
import json
import logging
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch

from training.artifact import ArtifactError, ArtifactInfo, load_artifact, save_artifact
from training.checkpoint import Checkpoint, CheckpointError, RunMetadata, read_checkpoint
from training.config import PRESETS, TrainingConfig
from training.cuda_graph import make_stepper
from training.data.folder import MAX_SIZE, MIN_SIZE, is_folder, read_folder
from training.data.named import DATASETS, DataError, Dataset, Split, default_data_dir, load_dataset
from training.devices import (
    DeviceError,
    describe,
    has_native_bfloat16,
    limit_threads,
    resolve_device,
)
from training.distributed import DistributedContext, join, local_device
from training.files import prepare_folder, write_atomically
from training.gamma_search import DEFAULT_PENALTY
from training.images import class_grid, grid, save_png
from training.importing import ForeignCheckpointError, describe_foreign, load_foreign
from training.inspection import render_picture, render_summary, summary
from training.loop import DivergedError, create_state, generator_config, train
from training.networks import Generator, GeneratorConfig, build_generator, count_parameters
from training.quality.certificate import Certificate, with_certificate
from training.quality.classifier import (
    EPOCHS,
    ClassifierError,
    FeatureClassifier,
    save_classifier,
    train_classifier,
)
from training.quality.evaluator import MIN_TRAINING_SHARE, Evaluator, QuickMetrics
from training.quality.report import render_table, write_report
from training.run import Run, RunFolder, StopFlag, resume_run, start_run, stop_on_signals
from training.sampling import generate

# Fewer images than this are learnt by heart unless they are distorted.
SMALL_DATASET = 20_000
SPLITS: tuple[Split, Split] = ("train", "test")

# What a person can mend; anything else is a defect of this code and shows its traceback.
EXPECTED = (
    ArtifactError,
    CheckpointError,
    DataError,
    DeviceError,
    DivergedError,
    ForeignCheckpointError,
    ClassifierError,
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
    logger = logging.getLogger("training")
    logger.setLevel(logging.INFO)
    logger.handlers = [_EchoHandler()]


class _EchoHandler(logging.Handler):
    """A handler that prints messages as the commands print their results."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(record.getMessage())

    limit_threads()


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
dataset_argument = click.argument("dataset", metavar="DATASET")


def _by_preset(default: Callable[[TrainingConfig], str]) -> str:
    """A default that differs from preset to preset, for the help."""
    return ", ".join(f"{name} {default(preset)}" for name, preset in PRESETS.items())


@main.command("train")
@dataset_argument
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    default="conv",
    help="Networks and objective: the document's, its generator with a better teacher, or "
    "convolutions on both sides.",
)
@device_option
@data_dir_option
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder of the run: checkpoint.pt, log.jsonl, samples, tensorboard, and the best "
    "generator so far, generator.safetensors. [default: runs/DATASET-PRESET]",
)
@seed_option
@click.option(
    "--images",
    type=click.IntRange(1),
    help="Length of the run in real images shown. "
    f"[default: {_by_preset(lambda preset: f'{preset.images:,}')}]",
)
@click.option(
    "--minutes",
    type=click.FloatRange(0, min_open=True),
    help="Length of the run in minutes, all told, in place of images.",
)
@click.option(
    "--gamma",
    type=click.FloatRange(0),
    help="Weight of the gradient penalty. [default: chosen by a short probe, or "
    f"{DEFAULT_PENALTY:g} in a run too short for one; for paper 0]",
)
@click.option(
    "--mismatch",
    type=click.FloatRange(0),
    help="Weight of real images with wrong labels: more for purer classes, less for more variety. "
    f"[default: {_by_preset(lambda preset: f'{preset.mismatch:g}')}]",
)
@click.option(
    "--batch-size",
    type=click.IntRange(2),
    help=f"Images a step. [default: {_by_preset(lambda preset: str(preset.batch_size))}]",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of the matrix products; weights stay in float32. "
    f"[default: {_by_preset(lambda preset: preset.precision)}, which is float32 on a device that "
    "does not compute in bfloat16]",
)
@click.option(
    "--size",
    type=click.IntRange(MIN_SIZE, MAX_SIZE),
    help="Crop the images of a folder to their middle square, and resize them to so many pixels.",
)
@click.option("--flip", is_flag=True, help="Show real images mirrored half of the time.")
@click.option(
    "--augment/--no-augment",
    default=None,
    help="Distort real and fake images alike. [default: for fewer than "
    f"{SMALL_DATASET:,} training images]",
)
@click.option("--certify", "certified", is_flag=True, help="Measure the generator at the end.")
@click.option(
    "--publish",
    type=click.Path(dir_okay=False, path_type=Path),
    help="At the end put the artifact here, too, as NAME.safetensors: a service that watches the "
    "folder serves it as NAME.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(file_okay=False, path_type=Path),
    help="Begin with the networks of the run in this folder, which must be of the same preset.",
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
    gamma: float | None,
    mismatch: float | None,
    batch_size: int | None,
    precision: str | None,
    size: int | None,
    flip: bool,
    augment: bool | None,
    certified: bool,
    publish: Path | None,
    source: Path | None,
    resume: bool,
    dry_run: bool,
) -> None:
    """Train a generator on DATASET and export it.

    DATASET is mnist, fashion-mnist, or a folder with a sub-folder of images per class.
    With several GPUs: torchrun --nproc-per-node N -m training train …
    """
    began = time.perf_counter()
    if images is not None and minutes is not None:
        raise click.UsageError("--images and --minutes both end the run; give one of them.")
    if source is not None and resume:
        raise click.UsageError(
            "--from begins a run and --resume goes on with one; give one of them."
        )
    if publish is not None and publish.suffix != ".safetensors":
        raise click.BadParameter(
            f"has to end with .safetensors, not {publish.name!r}", param_hint="--publish"
        )
    if size is not None and not is_folder(dataset):
        raise click.UsageError(f"--size is for folders of images; {dataset} has its own.")
    with join() as world:
        report = click.echo if world.writes else _say_nothing
        torch_device = local_device(_device(device, report))
        train_set, test_set = _splits(dataset, data_dir, torch_device, report, size=size)
        given = {
            "images": images,
            "penalty": gamma,
            "mismatch": mismatch,
            "batch_size": batch_size,
            "precision": precision,
            "flip": flip or None,
            "augment": augment,
        }
        config = _configure(PRESETS[preset], train_set, world, given)
        folder = RunFolder(out or Path("runs") / f"{train_set.name}-{preset}")
        identity = RunMetadata(
            dataset=train_set.name,
            dataset_digest=train_set.digest,
            preset=preset,
            seed=seed,
            config=config,
            minutes=minutes,
        )
        begin = _beginning(RunFolder(source), identity) if source else None
        checkpoint = _checkpoint(folder, identity, given) if resume else None
        identity = checkpoint.identity if checkpoint else identity
        if dry_run:
            _print_plan(folder, train_set, identity, checkpoint)
            return
        if not resume and folder.checkpoint.exists():
            raise click.UsageError(
                f"{folder.path} holds a run already: go on with --resume, or name another --out."
            )
        folder.prepare()
        if publish is not None:
            prepare_folder(publish.parent)
        examiner = None
        if world.writes:
            examiner = Evaluator.create(train_set, test_set, minutes=identity.minutes)
        spent = 0.0 if checkpoint else time.perf_counter() - began
        seconds = _seconds(identity, train_set, examiner, world, certified=certified, spent=spent)
        with stop_on_signals() as stop:
            look = examiner.evaluate_quick if examiner else _never_asked
            if checkpoint is None:
                run = start_run(
                    folder,
                    train_set,
                    identity,
                    look=look,
                    world=world,
                    seconds=seconds,
                    stop=stop,
                    begin=begin,
                )
                run.state.began = began
            else:
                run = resume_run(
                    folder, train_set, checkpoint, look=look, world=world, seconds=seconds
                )
            finished = not stop() and run.finish(stop)
        if examiner is not None:
            _conclude(
                *(run, examiner, stop),
                dataset=dataset,
                finished=finished,
                certified=certified,
                publish=publish,
            )


def _splits(
    name: str,
    data_dir: Path | None,
    device: torch.device,
    report: Callable[[str], None],
    *,
    size: int | None = None,
    channels: int | None = None,
) -> tuple[Dataset, Dataset]:
    """Training and test images on the device; of a folder, what was found in it is told first."""
    if is_folder(name):
        folder = read_folder(Path(name), size=size, channels=channels)
        report(folder.report.render())
        splits = [folder.train, folder.test]
    else:
        data_dir = data_dir or default_data_dir()
        splits = [load_dataset(name, split, data_dir) for split in SPLITS]
    train_set, test_set = (split.to(device) for split in splits)
    return train_set, test_set


def _configure(
    preset: TrainingConfig, dataset: Dataset, world: DistributedContext, given: Mapping[str, Any]
) -> TrainingConfig:
    """A preset with what was given, as this data set and this device need it."""
    small = len(dataset.labels) < SMALL_DATASET and preset.penalty != 0.0
    chosen = {name: value for name, value in given.items() if value is not None}
    config = dataclasses.replace(preset, **{"augment": small, **chosen})
    if config.mismatch and config.discriminator == "mlp":
        raise click.BadParameter(
            f"{config.mismatch:g} needs a discriminator with a projection of the class; with "
            "--preset paper, allowed is 0",
            param_hint="--mismatch",
        )
    if config.batch_size % world.size:
        raise click.UsageError(
            f"{world.size} processes cannot share a batch of {config.batch_size} images evenly."
        )
    if config.precision == "bfloat16" and not has_native_bfloat16(dataset.labels.device):
        if "precision" in chosen:
            raise click.BadParameter(
                f"bfloat16 is not what {describe(dataset.labels.device)} computes in; allowed is "
                "float32",
                param_hint="--precision",
            )
        config = dataclasses.replace(config, precision="float32")
    return config


def _beginning(folder: RunFolder, wanted: RunMetadata) -> Checkpoint:
    """The checkpoint whose networks a run begins with.

    Raises:
        CheckpointError: there is none, or its networks are of another kind.
    """
    checkpoint = read_checkpoint(folder.checkpoint)
    have = checkpoint.identity.preset
    if have != wanted.preset:
        raise CheckpointError(
            f"{folder.checkpoint}: preset is {have!r} there, but {wanted.preset!r} was asked for"
        )
    return checkpoint


def _checkpoint(folder: RunFolder, wanted: RunMetadata, given: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint to go on from.

    Raises:
        CheckpointError: there is none, or it is of another run than the one that was asked for.
    """
    checkpoint = read_checkpoint(folder.checkpoint)
    stored = checkpoint.identity
    differences = {
        name: (getattr(stored, name), getattr(wanted, name))
        for name in ("dataset", "preset", "seed", "minutes")
        if _was_given(name)
    } | {
        name: (getattr(stored.config, name), value)
        for name, value in given.items()
        if value is not None
    }
    for name, (have, want) in differences.items():
        if have != want:
            option = {"dataset": "DATASET", "penalty": "--gamma"}.get(name, f"--{name}")
            there = "not given" if have is None else repr(have)
            raise CheckpointError(
                f"{folder.checkpoint}: {option} is {there} there, but {want!r} here; give the "
                "same, or begin another run in another --out"
            )
    if stored.dataset_digest != wanted.dataset_digest:
        raise CheckpointError(
            f"{folder.checkpoint}: the images of {stored.dataset} have changed since: SHA-256 is "
            f"{stored.dataset_digest[:12]}… there, and {wanted.dataset_digest[:12]}… now; give the "
            "same ones, or begin another run in another --out"
        )
    return checkpoint


def _was_given(name: str) -> bool:
    """Whether an option stands on the command line; what is no option counts as given."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not click.core.ParameterSource.DEFAULT


def _seconds(
    identity: RunMetadata,
    dataset: Dataset,
    examiner: Evaluator | None,
    world: DistributedContext,
    *,
    certified: bool,
    spent: float,
) -> float | None:
    """The time for training in a run that ends by time; the same in every process.

    Raises:
        click.BadParameter: so much time is spent already, or measuring takes so long, that hardly
            any is left.
    """
    if identity.minutes is None:
        return None
    seconds = 0.0
    if examiner is not None:
        generator = build_generator(generator_config(identity.config, dataset))
        generator = generator.to(dataset.labels.device).eval()
        try:
            seconds = examiner.seconds_for_training(
                identity.minutes, generator, certified=certified
            )
        except ValueError as error:
            raise click.BadParameter(
                str(error).removeprefix("minutes: "), param_hint="--minutes"
            ) from error
        if spent > (1.0 - MIN_TRAINING_SHARE) * seconds:
            raise click.BadParameter(
                f"{identity.minutes:g} are too few, because preparing took {spent:.1f} s of them",
                param_hint="--minutes",
            )
    return world.agree(seconds)[0]


def _conclude(
    run: Run,
    examiner: Evaluator,
    stop: StopFlag,
    *,
    dataset: str,
    finished: bool,
    certified: bool,
    publish: Path | None,
) -> None:
    """Say how a run on what a person calls `dataset` has ended, and what to do next."""
    artifact, images = run.folder.artifact, run.state.images_seen
    if not finished:
        click.echo(f"Stopped after {images:,} images; go on with --resume.", err=True)
        sys.exit(128 + (stop.signal or 0))
    click.echo(f"{artifact}: the best of {images:,} images")
    if certified:
        loaded = load_artifact(artifact)
        generator = loaded.generator.to(run.dataset.labels.device)
        certificate = examiner.certify(generator)
        save_artifact(artifact, generator, with_certificate(loaded.info, certificate))
        click.echo(render_table(certificate, loaded.info.class_names))
    if publish is not None:
        write_atomically(publish, artifact.read_bytes())
        click.echo(f"{publish}: the same")
    if certified:
        return
    command = ["python", "-m", "training", "evaluate", str(artifact)]
    if is_folder(dataset):  # the artifact knows its name, but not where it lies
        command += ["--dataset", dataset]
    click.echo(f"Measure it: {shlex.join(command)}")


def _print_plan(
    folder: RunFolder, dataset: Dataset, identity: RunMetadata, checkpoint: Checkpoint | None
) -> None:
    config = identity.config
    shape = generator_config(config, dataset)
    if config.penalty is None:  # what the probe will choose takes as long
        config = dataclasses.replace(config, penalty=DEFAULT_PENALTY)
    state = create_state(config, shape, dataset.labels.device, identity.seed)
    if checkpoint is not None:
        checkpoint.restore(state)
    plan = {
        **dataclasses.asdict(identity),
        "out": str(folder.path),
        "network": dataclasses.asdict(shape),
        "generator_parameters": count_parameters(state.generator),
        "discriminator_parameters": count_parameters(state.discriminator),
    }
    click.echo(json.dumps(plan, indent=2))
    if identity.minutes is not None:
        click.echo(f"Estimated time: {identity.minutes:g} minutes, as asked for.")
        return
    left = config.images - state.images_seen
    if left <= 0:
        click.echo("Estimated time: none; the run is complete.")
        return
    until = time.monotonic() + 5.0
    stepper = make_stepper(state, dataset, config, click.echo)
    points = train(state, config, stepper, log_every=2**62, stop=lambda: time.monotonic() > until)
    speed = next(points).images_per_s
    click.echo(f"Estimated time: {left / speed / 60:.1f} minutes at {speed:,.0f} images/s.")


def _never_asked(_generator: Generator) -> QuickMetrics:
    raise AssertionError("only the process that writes looks")


def _say_nothing(_text: str) -> None:
    """What a process that does not write reports."""


def _device(name: str, report: Callable[[str], None] = click.echo) -> torch.device:
    """Resolve --device, and say in the first line what it is."""
    device = resolve_device(name)
    report(f"Device: {describe(device)}")
    return device


@main.command("evaluate")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--dataset",
    help="What to measure against: a data set's name, or a folder. [default: by the name that "
    "stands in ARTIFACT]",
)
@device_option
@data_dir_option
@click.option("--report", is_flag=True, help="Also write README.md and pictures beside ARTIFACT.")
def evaluate_command(
    *, artifact: Path, dataset: str | None, device: str, data_dir: Path | None, report: bool
) -> None:
    """Measure ARTIFACT and write the certificate into it."""
    loaded = load_artifact(artifact)
    name = dataset or loaded.info.training.get("dataset")
    if not isinstance(name, str):
        raise ArtifactError(artifact, "names no data set; give one with --dataset")
    prepare_folder(artifact.parent)
    torch_device = _device(device)
    certificate = certify_artifact(
        artifact, loaded.generator, loaded.info, name, device=torch_device, data_dir=data_dir
    )
    save_artifact(artifact, loaded.generator, with_certificate(loaded.info, certificate))
    click.echo(render_table(certificate, loaded.info.class_names))
    if report:
        write_report(artifact.parent)


def certify_artifact(
    path: Path,
    generator: Generator,
    info: ArtifactInfo,
    dataset: str,
    *,
    device: torch.device,
    data_dir: Path | None,
) -> Certificate:
    """Measure a generator against a data set.

    What could be missing is looked for before anything is measured. The generator stays on the
    device.

    Raises:
        ArtifactError: its images are of another shape, or it was trained on other images.
        DataError: the data set cannot be had.
        ClassifierError: the bundled classifier is not the committed one.
    """
    shape = info.network
    train_set, test_set = _splits(
        dataset, data_dir, device, click.echo, size=shape.image_size, channels=shape.channels
    )
    made, real = _shape(shape), _shape(test_set)
    if made != real:
        raise ArtifactError(path, f"makes images of {made}, but those of {dataset} are of {real}")
    if info.training.get("dataset_sha256", train_set.digest) != train_set.digest:
        raise ArtifactError(path, f"was trained on other images than those of {dataset} now")
    return Evaluator.create(train_set, test_set).certify(generator.to(device))


def _shape(images: GeneratorConfig | Dataset) -> str:
    size = f"{images.image_size}x{images.image_size}x{images.channels}"
    return f"{size} in {images.num_classes} classes"


@main.command("sample")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--label", multiple=True, required=True, help="Class index or name; may repeat.")
@click.option("--n", type=click.IntRange(1, 10_000), default=16, help="Images of each label.")
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), required=True, help="The PNG."
)
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
@click.option(
    "--out",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The classifier's weights, a safetensors file.",
)
@click.option(
    "--epochs", type=click.IntRange(1), default=EPOCHS, help="Passes over the training images."
)
@seed_option
@device_option
@data_dir_option
def judge_command(
    *, dataset: str, out: Path, epochs: int, seed: int, device: str, data_dir: Path | None
) -> None:
    """Train the classifier that measures generators of DATASET, on real images only."""
    prepare_folder(out.parent)
    train_set, test_set = _splits(dataset, data_dir, _device(device), click.echo)
    classifier = train_classifier(train_set, epochs=epochs, seed=seed)
    accuracy = FeatureClassifier(classifier, digest="").accuracy(test_set)
    digest = save_classifier(out, classifier, dataset=dataset, epochs=epochs, seed=seed)
    click.echo(f"{out}: {accuracy:.2%} of the real test images, SHA-256 {digest}")


_UNMEASURED = "To import it unmeasured, give --no-certify."


@main.command("import")
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="The artifact, NAME.safetensors; must not exist.",
)
@click.option(
    "--dataset",
    type=click.Choice(sorted(DATASETS)),
    default="mnist",
    help="Names the classes, and what to measure against, if the images are of its shape.",
)
@click.option(
    "--certify/--no-certify", "certified", default=True, help="Measure it as evaluate does."
)
@device_option
@data_dir_option
def import_command(
    *,
    checkpoint: Path,
    out: Path,
    dataset: str,
    certified: bool,
    device: str,
    data_dir: Path | None,
) -> None:
    """Make an artifact of CHECKPOINT, a generator's state dict as CGAN-PyTorch publishes it."""
    if out.suffix != ".safetensors":
        raise click.BadParameter(f"{out} must end in .safetensors", param_hint="--out")
    if out.exists():
        raise click.BadParameter(f"{out} is there already", param_hint="--out")
    prepare_folder(out.parent)
    published = load_foreign(checkpoint)
    generator, info = published.generator, describe_foreign(published, dataset)
    if certified:
        if "dataset" not in info.training:
            made = f"makes images of {_shape(info.network)}, which are not those of {dataset}"
            raise ForeignCheckpointError(checkpoint, f"{made}\n{_UNMEASURED}")
        try:
            certificate = certify_artifact(
                checkpoint, generator, info, dataset, device=_device(device), data_dir=data_dir
            )
        except (ArtifactError, DataError, ClassifierError) as error:
            raise click.ClickException(f"{error}\n{_UNMEASURED}") from error
        info = with_certificate(info, certificate)
        click.echo(render_table(certificate, info.class_names))
    save_artifact(out, generator, info)
    click.echo(f"{out}: imported from {checkpoint}, SHA-256 {load_artifact(out).sha256}")


@main.command("inspect")
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--picture",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A PNG to write, a row per class. [default: a small picture, where a terminal shows it]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def inspect_command(*, artifact: Path, picture: Path | None, as_json: bool) -> None:
    """Show what ARTIFACT is: its network, how it was trained, its certificate, and a picture."""
    if picture is not None and picture.suffix.lower() != ".png":
        raise click.BadParameter(f"{picture} must end in .png", param_hint="--picture")
    loaded = load_artifact(artifact)
    click.echo(json.dumps(summary(loaded), indent=2) if as_json else render_summary(loaded))
    if picture is not None:
        save_png(picture, class_grid(loaded.generator, columns=16), scale=2)
    elif sys.stdout.isatty() and not as_json:
        click.echo(render_picture(loaded, shutil.get_terminal_size().columns))


if __name__ == "__main__":
    main(prog_name="python -m training")
