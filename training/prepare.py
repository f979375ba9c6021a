"""From the options of `train` to a run: data, configuration, checkpoints and the time budget."""

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from training.checkpoint import Checkpoint, CheckpointError, RunMetadata
from training.choice import choose
from training.config import PRESETS, TrainingConfig
from training.data.folder import is_folder, read_folder
from training.data.named import FILES, Dataset, default_data_dir, load_dataset
from training.devices import describe, has_native_bfloat16, resolve_device
from training.distributed import SINGLE_PROCESS, DistributedContext, local_device
from training.files import check_folder, prepare_folder
from training.gamma_search import DEFAULT_GAMMA, EvaluateFn, choose_gamma, is_worthwhile
from training.loop import measure_progress
from training.origin import data_path, find_origin
from training.plan import RunPlan, plan_run
from training.quality.evaluator import Evaluator
from training.run import Run, StopFlag
from training.settings import SettingsError, TrainSettings
from training.state import TrainState, create_state, generator_config
from training.transfer import Source

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRun:
    """A run, and for the main process what surrounds its training."""

    run: Run
    evaluator: Evaluator | None  # of a run that is not dry
    plan: RunPlan  # in other processes than the main one, without limits

    @property
    def excess(self) -> str | None:
        """A line that says how much longer than its budget a run took, if it did."""
        return self.plan.render_excess(self.run.metadata.prepared_s, self.run.state.elapsed_s)


def prepare_run(settings: TrainSettings, world: DistributedContext, stop: StopFlag) -> PreparedRun:
    """Start or resume a run; a dry run writes and trains nothing.

    Options that contradict each other or the files of a run are refused before images are read.
    `stop` listens to signals once the slow preparations, which cannot be resumed, are over. The
    budget of a run in minutes includes them; its schedules begin when they end.

    Raises:
        CheckpointError: the checkpoint to resume or to start from does not fit.
        DataError: the data set cannot be loaded.
        DeviceError: the device does not exist.
        OSError: a folder cannot be written.
        SettingsError: the options do not fit the data set, the device or the folder.
        TransferError: the networks to start with do not fit.
    """
    started_at = time.perf_counter()
    device, origin = local_device(select_device(settings.device)), find_origin(settings)
    source, resumed = origin.source, origin.resumed
    config = resumed.metadata.config if resumed else _configure(origin.preset, settings, device)
    _check_batch_size(config, world)
    folders = [origin.folder.samples, *([settings.export_to.parent] if settings.export_to else [])]
    for folder in folders:
        check_folder(folder)
    train_set, test_set = load_splits(
        settings.dataset, settings.data_dir, device, **origin.image_options(settings)
    )
    if resumed is not None:
        metadata = _continue(resumed, train_set)
    else:
        choice = choose(config, settings, train_set, world)
        logger.info("%s", choice.render(train_set))
        metadata = _describe(settings, origin.preset, choice.config, train_set)
    assert metadata.network is not None
    if source is not None:
        source.check(metadata.network)
    plan = _plan(metadata, train_set, test_set, world, settings)
    evaluator = best = None
    if not settings.dry_run:
        for folder in folders:
            prepare_folder(folder)
        evaluator = _create_evaluator(train_set, test_set, plan) if world.is_main_process else None
        stop.listen()
    evaluate = evaluator.evaluate_quick if evaluator else None
    if resumed is None:
        metadata = dataclasses.replace(metadata, prepared_s=time.perf_counter() - started_at)
    seconds = _training_seconds(metadata, plan, world)
    if resumed is not None:
        state, best = resume(resumed, train_set, world, seconds), resumed.best
        _report_progress(state, metadata)
    else:
        state, metadata = start(
            *(metadata, train_set, evaluate),
            seconds=seconds,
            stop=stop,
            world=world,
            source=source,
            search=not settings.dry_run,
        )
    run = Run(origin.folder, state, train_set, metadata, evaluate=evaluate, best=best)
    return PreparedRun(run, evaluator, plan)


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


def _configure(preset: str, settings: TrainSettings, device: torch.device) -> TrainingConfig:
    """Adapt a preset to the options and the device."""
    config = dataclasses.replace(PRESETS[preset], **settings.overrides)
    if config.mismatch_weight and config.discriminator == "mlp":
        raise SettingsError(
            f"--mismatch-weight {config.mismatch_weight:g} needs a discriminator with a class "
            "projection; with --preset paper it must be 0"
        )
    if config.precision == "bfloat16" and not has_native_bfloat16(device):
        if settings.precision is not None:
            raise SettingsError(
                f"--precision bfloat16 is not native on {describe(device)}; use float32"
            )
        config = dataclasses.replace(config, precision="float32")
    return config


def _check_batch_size(config: TrainingConfig, world: DistributedContext) -> None:
    if config.batch_size % world.size:
        raise SettingsError(
            f"--batch-size {config.batch_size} is not divisible by the {world.size} processes"
        )


def _describe(
    settings: TrainSettings, preset: str, config: TrainingConfig, dataset: Dataset
) -> RunMetadata:
    """Return the description of a new run."""
    return RunMetadata(
        dataset=dataset.name,
        dataset_digest=dataset.digest,
        preset=preset,
        seed=settings.seed or 0,
        config=config,
        minutes=settings.minutes,
        network=generator_config(config, dataset),
        data_path=data_path(settings),
    )


def _continue(checkpoint: Checkpoint, dataset: Dataset) -> RunMetadata:
    """Return the description of a resumed run, whose images must be the same."""
    stored = checkpoint.metadata
    if stored.dataset_digest != dataset.digest:
        raise CheckpointError(
            checkpoint.path,
            f"the images of {stored.dataset} have changed: their SHA-256 was "
            f"{stored.dataset_digest[:12]}… and is {dataset.digest[:12]}… now; restore them, or "
            "start a new run in another --out",
        )
    return dataclasses.replace(stored, network=generator_config(stored.config, dataset))


def _report_progress(state: TrainState, metadata: RunMetadata) -> None:
    """Log how far a resumed run is."""
    timed = metadata.minutes is not None
    done = f"{state.images_seen:,} images"
    if measure_progress(state) < 1.0:
        logger.info("Continuing after %s", done)
        return
    larger = "--minutes" if timed else "--images"
    logger.info("The run is complete with %s; a larger %s continues it", done, larger)


def _plan(
    metadata: RunMetadata,
    train: Dataset,
    test: Dataset,
    world: DistributedContext,
    settings: TrainSettings,
) -> RunPlan:
    """Plan a run with a time budget, or a dry run, in the main process; log the former."""
    if not world.is_main_process or (metadata.minutes is None and not settings.dry_run):
        return RunPlan()
    assert metadata.network is not None
    plan = plan_run(
        *(metadata.network, train, test), minutes=metadata.minutes, certified=settings.certify
    )
    if not settings.dry_run:
        logger.info("%s", plan.render(plan.durations_s()))
    return plan


def _create_evaluator(train: Dataset, test: Dataset, plan: RunPlan) -> Evaluator:
    measuring = plan.measuring
    return Evaluator.create(
        *(train, test),
        epochs=measuring.epochs,
        seconds=measuring.classifier_s,
        quick_share=measuring.quick_share,
    )


def _training_seconds(
    metadata: RunMetadata, plan: RunPlan, world: DistributedContext
) -> float | None:
    """Return the part of a time budget for training, the same in every process."""
    if metadata.minutes is None:
        return None
    seconds = plan.training_s(metadata.prepared_s) or 0.0  # 0 in other processes than the main one
    return world.broadcast(seconds)[0]


def start(
    metadata: RunMetadata,
    dataset: Dataset,
    evaluate: EvaluateFn,
    *,
    seconds: float | None = None,
    stop: Callable[[], bool],
    world: DistributedContext = SINGLE_PROCESS,
    source: Source | None = None,
    search: bool = True,
) -> tuple[TrainState, RunMetadata]:
    """Create the state of a new run, with the networks of `source` or with fresh ones.

    An open `r1_gamma` is taken from `source`, or chosen by a search if `search` is set and the run
    is long enough. A run that is stopped during the search cannot be resumed.
    """
    started_at = time.perf_counter()
    config, shape = metadata.config, generator_config(metadata.config, dataset)
    origin, scores = None, None

    def fresh(config: TrainingConfig) -> TrainState:
        return create_state(config, shape, dataset.labels.device, metadata.seed, world, seconds)

    if source is not None:
        if config.r1_gamma is None:
            gamma = DEFAULT_GAMMA if source.r1_gamma is None else source.r1_gamma
            config = dataclasses.replace(config, r1_gamma=gamma)
        state = fresh(config)
        source.initialise(state)
        origin = source.origin
    elif config.r1_gamma is None and search and is_worthwhile(config, seconds):
        state, scores = choose_gamma(config, fresh, dataset, evaluate, stop=stop)
    else:
        if config.r1_gamma is None and search:
            config = dataclasses.replace(config, r1_gamma=DEFAULT_GAMMA)
        state = fresh(config)
    state.started_at = started_at  # a search is part of the run
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
