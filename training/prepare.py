"""From the options of `train` to a run: data, configuration, checkpoints and the time budget."""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from training.artifact import ArtifactError, check_model_name
from training.checkpoint import Checkpoint, CheckpointError, RunMetadata, read_checkpoint
from training.config import PRESETS, TrainingConfig
from training.data.folder import check_outside, is_folder, is_inside, read_folder
from training.data.named import FILES, Dataset, default_data_dir, load_dataset
from training.devices import describe, has_native_bfloat16, resolve_device
from training.distributed import SINGLE_PROCESS, DistributedContext, local_device
from training.files import prepare_folder
from training.gamma_search import DEFAULT_GAMMA, EvaluateFn, choose_gamma, is_worthwhile
from training.networks import build_generator
from training.quality.evaluator import MIN_TRAINING_SHARE, Evaluator
from training.run import Run, StopFlag
from training.run_log import RunFolder
from training.state import TrainState, create_state, generator_config

# A discriminator memorises fewer images than this unless they are distorted.
SMALL_DATASET = 20_000
DEFAULT_PRESET = "conv"

logger = logging.getLogger(__name__)


class SettingsError(Exception):
    """Options that contradict each other, the data set or the device."""


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The options of the command `train`; None for an option that was not given."""

    dataset: str
    device: str = "auto"
    data_dir: Path | None = None
    out: Path | None = None
    preset: str | None = None
    seed: int | None = None
    images: int | None = None
    minutes: float | None = None
    r1_gamma: float | None = None
    mismatch_weight: float | None = None
    batch_size: int | None = None
    precision: str | None = None
    image_size: int | None = None
    flip: bool | None = None
    augment: bool | None = None
    certify: bool = False
    export_to: Path | None = None
    init_from: Path | None = None
    resume: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.images is not None and self.minutes is not None:
            raise SettingsError("--images and --minutes exclude each other; give one of them")
        if self.init_from is not None and self.resume:
            raise SettingsError("--init-from and --resume exclude each other; give one of them")
        if self.export_to is not None and self.export_to.suffix != ".safetensors":
            raise SettingsError(f"--export-to: {self.export_to.name!r} must end in .safetensors")
        if self.export_to is not None:
            try:
                check_model_name(self.export_to)
            except ArtifactError as error:
                raise SettingsError(f"--export-to: {error.path.name!r} {error.cause}") from error
            check_outside(self.dataset, "--export-to", self.export_to, self.export_to.parent)
        if self.out is not None:
            check_outside(self.dataset, "--out", self.out, RunFolder(self.out).samples)
        if self.image_size is not None and not is_folder(self.dataset):
            raise SettingsError(
                f"--image-size applies to folders of images; {self.dataset} has a fixed size"
            )

    @property
    def overrides(self) -> dict[str, Any]:
        """The options that replace fields of the preset's configuration."""
        fields = {field.name for field in dataclasses.fields(TrainingConfig)}
        given = dataclasses.asdict(self).items()
        return {name: value for name, value in given if name in fields and value is not None}


def prepare_run(
    settings: TrainSettings, world: DistributedContext, stop: StopFlag
) -> tuple[Run, Evaluator | None]:
    """Start or resume a run; a dry run writes and trains nothing.

    `stop` listens to signals once the slow preparations, which cannot be resumed, are over.

    Returns:
        the run and, in the main process of a run that is not dry, its evaluator.

    Raises:
        CheckpointError: the checkpoint to resume or to start from does not fit.
        DataError: the data set cannot be loaded.
        DeviceError: the device does not exist.
        OSError: a folder cannot be written.
        SettingsError: the options do not fit the data set, the device, the folder or the time.
    """
    started_at = time.perf_counter()
    device = local_device(select_device(settings.device))
    train_set, test_set = load_splits(
        settings.dataset, settings.data_dir, device, size=settings.image_size
    )
    preset = settings.preset or DEFAULT_PRESET
    folder = RunFolder(settings.out or _default_out(settings.dataset, f"{train_set.name}-{preset}"))
    metadata = RunMetadata(
        dataset=train_set.name,
        dataset_digest=train_set.digest,
        preset=preset,
        seed=settings.seed or 0,
        config=_configure(PRESETS[preset], train_set, settings.overrides, world.size),
        minutes=settings.minutes,
    )
    source = _read_source(settings.init_from, preset) if settings.init_from else None
    resumed = _read_resumed(folder, metadata, settings) if settings.resume else None
    if resumed is not None:
        metadata = resumed.metadata
    evaluator, seconds = None, None
    if not settings.dry_run:
        _prepare_folders(folder, settings)
        if world.is_main_process:
            evaluator = Evaluator.create(train_set, test_set, minutes=metadata.minutes)
        spent = 0.0 if resumed else time.perf_counter() - started_at
        seconds = _training_seconds(metadata, train_set, evaluator, world, settings, spent)
        stop.listen()
    evaluate = evaluator.evaluate_quick if evaluator else None
    best = None
    if resumed is not None:
        state, best = resume(resumed, train_set, world, seconds), resumed.best
    else:
        state, metadata = start(
            *(metadata, train_set, evaluate),
            seconds=seconds,
            stop=stop,
            world=world,
            source=source,
            search=not settings.dry_run,
        )
        state.started_at = started_at
    run = Run(folder, state, train_set, metadata, evaluate=evaluate, best=best)
    return run, evaluator


def _default_out(dataset: str, name: str) -> Path:
    """Return the folder of a run: in `runs`, which are beside the images instead of inside."""
    out = Path("runs") / name
    return Path(dataset).resolve().parent / out if is_inside(dataset, out) else out


def select_device(name: str) -> torch.device:
    """Resolve the option --device, and log what it is."""
    device = resolve_device(name)
    logger.info("Device: %s", describe(device))
    return device


def load_splits(
    name: str,
    data_dir: Path | None,
    device: torch.device,
    *,
    size: int | None = None,
    channels: int | None = None,
) -> tuple[Dataset, Dataset]:
    """Load training and test images onto the device; log the contents of a folder."""
    if is_folder(name):
        folder = read_folder(Path(name), size=size, channels=channels)
        logger.info("%s", folder.report.render())
        return folder.train.to(device), folder.test.to(device)
    data_dir = data_dir or default_data_dir()
    train_set, test_set = (load_dataset(name, split, data_dir) for split in FILES)
    return train_set.to(device), test_set.to(device)


def _configure(
    preset: TrainingConfig, dataset: Dataset, overrides: dict[str, Any], processes: int
) -> TrainingConfig:
    """Adapt a preset to the options, the data set, its device and the number of processes."""
    small = len(dataset.labels) < SMALL_DATASET and preset.r1_gamma != 0.0
    config = dataclasses.replace(preset, **{"augment": small, **overrides})
    if config.mismatch_weight and config.discriminator == "mlp":
        raise SettingsError(
            f"--mismatch-weight {config.mismatch_weight:g} needs a discriminator with a class "
            "projection; with --preset paper it must be 0"
        )
    if config.batch_size % processes:
        raise SettingsError(
            f"--batch-size {config.batch_size} is not divisible by the {processes} processes"
        )
    if config.precision == "bfloat16" and not has_native_bfloat16(dataset.labels.device):
        if "precision" in overrides:
            raise SettingsError(
                f"--precision bfloat16 is not native on {describe(dataset.labels.device)}; "
                "use float32"
            )
        config = dataclasses.replace(config, precision="float32")
    return config


def _read_source(run: Path, preset: str) -> Checkpoint:
    """Read the checkpoint whose networks the run starts with."""
    source = read_checkpoint(RunFolder(run).checkpoint)
    have = source.metadata.preset
    if have != preset:
        raise CheckpointError(source.path, f"its preset is {have!r}, but {preset!r} was given")
    return source


def _read_resumed(folder: RunFolder, wanted: RunMetadata, settings: TrainSettings) -> Checkpoint:
    """Read the checkpoint to resume from, and compare it with the options that were given."""
    checkpoint = read_checkpoint(folder.checkpoint)
    stored = checkpoint.metadata
    given = {"dataset": wanted.dataset, **settings.overrides}
    for name in ("preset", "seed", "minutes"):
        if getattr(settings, name) is not None:
            given[name] = getattr(settings, name)
    for name, want in given.items():
        have = getattr(stored.config if name in settings.overrides else stored, name)
        if have != want:
            option = "DATASET" if name == "dataset" else f"--{name.replace('_', '-')}"
            raise CheckpointError(
                checkpoint.path,
                f"{option} of this run is {'not set' if have is None else repr(have)}, but "
                f"{want!r} was given; give the same value, or start a new run in another --out",
            )
    if stored.dataset_digest != wanted.dataset_digest:
        raise CheckpointError(
            checkpoint.path,
            f"the images of {stored.dataset} have changed: their SHA-256 was "
            f"{stored.dataset_digest[:12]}… and is {wanted.dataset_digest[:12]}… now; restore "
            "them, or start a new run in another --out",
        )
    return checkpoint


def _prepare_folders(folder: RunFolder, settings: TrainSettings) -> None:
    if not settings.resume and folder.checkpoint.exists():
        raise SettingsError(
            f"{folder.path} already contains a run; continue it with --resume, or choose another "
            "--out"
        )
    prepare_folder(folder.samples)
    if settings.export_to is not None:
        prepare_folder(settings.export_to.parent)


def _training_seconds(
    metadata: RunMetadata,
    dataset: Dataset,
    evaluator: Evaluator | None,
    world: DistributedContext,
    settings: TrainSettings,
    spent: float,
) -> float | None:
    """Return the part of the time budget for training, the same in every process."""
    if metadata.minutes is None:
        return None
    seconds = 0.0
    if evaluator is not None:
        generator = build_generator(generator_config(metadata.config, dataset))
        generator = generator.to(dataset.labels.device).eval()
        try:
            seconds = evaluator.seconds_for_training(
                metadata.minutes, generator, certified=settings.certify
            )
        except ValueError as error:
            raise SettingsError(f"--minutes: {error}") from error
        if spent > (1.0 - MIN_TRAINING_SHARE) * seconds:
            raise SettingsError(
                f"--minutes {metadata.minutes:g} is too short: preparation took {spent:.1f} s of it"
            )
    return world.broadcast(seconds)[0]


def start(
    metadata: RunMetadata,
    dataset: Dataset,
    evaluate: EvaluateFn,
    *,
    seconds: float | None = None,
    stop: Callable[[], bool],
    world: DistributedContext = SINGLE_PROCESS,
    source: Checkpoint | None = None,
    search: bool = True,
) -> tuple[TrainState, RunMetadata]:
    """Create the state of a new run, with the networks of `source` or with fresh ones.

    An open `r1_gamma` is taken from `source`, or chosen by a search if `search` is set and the run
    is long enough. A run that is stopped during the search cannot be resumed.
    """
    config, shape = metadata.config, generator_config(metadata.config, dataset)
    origin, scores = None, None

    def fresh(config: TrainingConfig) -> TrainState:
        return create_state(config, shape, dataset.labels.device, metadata.seed, world, seconds)

    if source is not None:
        if config.r1_gamma is None:
            config = dataclasses.replace(config, r1_gamma=source.metadata.config.r1_gamma)
        state = fresh(config)
        source.initialise(state)
        images_seen = source.state["images_seen"]
        origin = {**dataclasses.asdict(source.metadata), "images_seen": images_seen}
    elif config.r1_gamma is None and search and is_worthwhile(config, seconds):
        state, scores = choose_gamma(config, fresh, dataset, evaluate, stop=stop)
    else:
        if config.r1_gamma is None and search:
            config = dataclasses.replace(config, r1_gamma=DEFAULT_GAMMA)
        state = fresh(config)
    return state, dataclasses.replace(
        metadata, config=state.config, gamma_scores=scores, initialised_from=origin
    )


def resume(
    checkpoint: Checkpoint,
    dataset: Dataset,
    world: DistributedContext = SINGLE_PROCESS,
    seconds: float | None = None,
) -> TrainState:
    """Return the state of a checkpoint.

    Raises:
        CheckpointError: the checkpoint does not fit its own configuration.
    """
    config, seed = checkpoint.metadata.config, checkpoint.metadata.seed
    shape = generator_config(config, dataset)
    state = create_state(config, shape, dataset.labels.device, seed, world, seconds)
    checkpoint.restore(state)
    return state
