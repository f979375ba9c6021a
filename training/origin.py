"""The files that a run continues or starts with, compared with its options."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.checkpoint import Checkpoint, CheckpointError, RunMetadata, read_checkpoint
from training.config import PRESETS
from training.data.folder import folder_name, is_folder, is_inside
from training.data.named import DATASETS
from training.run_log import RunFolder
from training.settings import DEFAULT_PRESET, SettingsError, TrainSettings
from training.transfer import Source, read_source


@dataclass(frozen=True)
class Origin:
    """The folder of a run and what it starts with: a source, a checkpoint, or neither."""

    folder: RunFolder
    preset: str
    source: Source | None = None
    resumed: Checkpoint | None = None

    def image_options(self, settings: TrainSettings) -> dict[str, int | None]:
        """Return size and channels for the images of a folder; those of earlier networks."""
        if self.source is not None:
            network = self.source.network
        else:
            network = self.resumed.metadata.network if self.resumed else None
        if network is None:
            return {"size": settings.image_size}
        return {"size": network.image_size, "channels": network.channels}


def find_origin(settings: TrainSettings) -> Origin:
    """Read the files that a run continues or starts with, and compare the options with them."""
    folder = is_folder(settings.dataset)
    name = folder_name(Path(settings.dataset)) if folder else settings.dataset
    if settings.resume:
        run = RunFolder(settings.out or _find_run(settings, name))
        resumed = _read_resumed(run, name, settings)
        return Origin(run, resumed.metadata.preset, resumed=resumed)
    source, preset = None, settings.preset or DEFAULT_PRESET
    if settings.init_from is not None:
        source = read_source(settings.init_from, settings.preset, settings.image_size)
        preset = source.preset
    run = RunFolder(settings.out or _default_out(settings.dataset, f"{name}-{preset}"))
    if run.checkpoint.exists() and not settings.dry_run:
        raise SettingsError(
            f"{run.path} already contains a run; continue it with --resume, or choose another --out"
        )
    return Origin(run, preset, source=source)


def find_data(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of `train` without DATASET, with the data of the run to resume.

    Raises:
        CheckpointError: the checkpoint is missing or not valid, or its images are not found.
        SettingsError: no run to resume is given.
    """
    out = options["out"]
    if out is None or not options["resume"]:
        raise SettingsError(
            f"DATASET is missing; give {', '.join(DATASETS)} or a folder of images, or continue a "
            "run with --resume --out FOLDER"
        )
    checkpoint = read_checkpoint(RunFolder(out).checkpoint)
    name, stored = checkpoint.metadata.dataset, checkpoint.metadata.data_path
    if not is_folder(name):
        data_dir = options["data_dir"] or (stored and Path(stored))
        return {**options, "dataset": name, "data_dir": data_dir}
    if stored is not None and Path(stored).is_dir():
        return {**options, "dataset": stored}
    cause = f"the folder of its images, {stored}, does not exist any more"
    if stored is None:
        cause = f"it has the name of its images, {name}, but not their folder"
    raise CheckpointError(
        checkpoint.path, f"{cause}; give the folder: train DATASET --resume --out {out}"
    )


def data_path(settings: TrainSettings) -> str | None:
    """Return the path of the data for a checkpoint; None for the default place of a named set."""
    given = Path(settings.dataset) if is_folder(settings.dataset) else settings.data_dir
    return None if given is None else str(given.resolve())


def _default_out(dataset: str, name: str) -> Path:
    """Return the folder of a run: in `runs`, which are beside the images instead of inside."""
    out = Path("runs") / name
    return Path(dataset).resolve().parent / out if is_inside(dataset, out) else out


def _find_run(settings: TrainSettings, name: str) -> Path:
    """Return the default folder of the run to resume, of the given preset or of any."""
    presets = PRESETS if settings.preset is None else [settings.preset]
    folders = {each: _default_out(settings.dataset, f"{name}-{each}") for each in presets}
    found = [folder for folder in folders.values() if RunFolder(folder).checkpoint.exists()]
    if len(found) > 1:
        shown = ", ".join(map(str, found))
        raise SettingsError(f"there are several runs: {shown}; give one with --out")
    return found[0] if found else folders[settings.preset or DEFAULT_PRESET]


def _read_resumed(folder: RunFolder, dataset: str, settings: TrainSettings) -> Checkpoint:
    """Read the checkpoint to resume from, compare the options with it, and apply another budget.

    Options that were not given are those of the run.
    """
    checkpoint = read_checkpoint(folder.checkpoint)
    stored = checkpoint.metadata
    had = {**dataclasses.asdict(stored.config), **dataclasses.asdict(stored)}
    had["image_size"] = stored.network.image_size if stored.network else settings.image_size
    given = {"preset": settings.preset, "seed": settings.seed, "image_size": settings.image_size}
    given = {"dataset": dataset, **given, **settings.overrides, "images": None}
    for name, want in given.items():
        if want is not None and want != had[name]:
            option = "DATASET" if name == "dataset" else f"--{name.replace('_', '-')}"
            raise CheckpointError(
                checkpoint.path,
                f"{option} of this run is {'not set' if had[name] is None else repr(had[name])}, "
                f"but {want!r} was given; leave it out, or start a new run in another --out",
            )
    metadata = _extend(checkpoint, settings)
    metadata = dataclasses.replace(metadata, data_path=data_path(settings) or stored.data_path)
    return dataclasses.replace(checkpoint, metadata=metadata)


def _extend(checkpoint: Checkpoint, settings: TrainSettings) -> RunMetadata:
    """Return the description of a run with the budget of the options, if they give one.

    It may be larger or smaller than that of the run, and of the other kind, but must exceed what
    the run has used, unless it is the same as before.
    """
    stored, state = checkpoint.metadata, checkpoint.state
    if settings.minutes is not None:
        extended = dataclasses.replace(stored, minutes=float(settings.minutes))
        minutes = (stored.prepared_s + state["elapsed_s"]) / 60
        used, over = f"{minutes:.2f} minutes", minutes >= settings.minutes
        given = f"--minutes {settings.minutes:.12g}"
    elif settings.images is not None:
        config = dataclasses.replace(stored.config, images=settings.images)
        extended = dataclasses.replace(stored, minutes=None, config=config)
        used, over = f"{state['images_seen']} images", state["images_seen"] >= settings.images
        given = f"--images {settings.images}"
    else:
        return stored
    if over and extended != stored:
        raise CheckpointError(
            checkpoint.path,
            f"this run has used {used}, but {given} was given; give a larger number to continue it",
        )
    return extended
