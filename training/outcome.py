"""The end of a run: its certificate, its copies, and the commands that come next."""

import shlex

import click

from training.data.folder import is_folder
from training.files import write_atomically
from training.loading import load_artifact
from training.prepare import PreparedRun
from training.quality.certificate import with_certificate
from training.quality.estimate import describe
from training.quality.report import render_table
from training.run import Run
from training.saving import save_artifact
from training.settings import TrainSettings


def report_finished(prepared: PreparedRun, settings: TrainSettings) -> None:
    """Report a complete run; evaluate and export the generator if the settings ask for it."""
    run, measuring = prepared.run, prepared.plan.measuring
    artifact, images = run.folder.artifact, run.state.images_seen
    click.echo(f"{artifact}: the best generator of {images:,} images; {_describe(run)}")
    if settings.certify:
        assert prepared.evaluator is not None
        loaded = load_artifact(artifact)
        certificate = prepared.evaluator.certify(
            loaded.generator.to(run.dataset.labels.device),
            size=measuring.size,
            seconds=measuring.certificate_s,
        )
        info = with_certificate(loaded.info, certificate)
        save_artifact(artifact, loaded.generator, info, int8=True)
        click.echo(render_table(certificate, loaded.info.class_names))
    if settings.export_to is not None:
        write_atomically(settings.export_to, artifact.read_bytes())
        click.echo(f"{settings.export_to}: a copy")
    if excess := prepared.excess:
        click.echo(excess)
    if not settings.certify:
        # The artifact contains the name of a folder of images, but not its path.
        named = ["--dataset", settings.dataset] if is_folder(settings.dataset) else []
        if settings.data_dir is not None:
            named += ["--data-dir", str(settings.data_dir)]
        click.echo(f"Evaluate it: {_command(settings, 'evaluate', str(artifact), *named)}")


def report_stopped(run: Run | None, settings: TrainSettings) -> None:
    """Report the file of a run that a signal stopped, and the command that continues it.

    Without a run it was stopped before that began, perhaps in its search for gamma.
    """
    if run is None:
        click.echo("Stopped before the run or in its search for gamma; nothing was kept.", err=True)
        return
    images, exported = run.state.images_seen, run.exported
    text = f"Stopped after {images:,} images."
    if exported is not None:
        newest = exported.images_seen == images
        kind = "the newest generator" if newest else f"the best, of {exported.images_seen:,} images"
        text += f" {run.folder.artifact}: {kind}; {_describe(run)}"
    click.echo(text, err=True)
    options = ["--resume", "--out", str(run.folder.path)]
    # The end of a run is not part of it: a checkpoint knows nothing of these.
    options += ["--certify"] if settings.certify else []
    if settings.export_to is not None:
        options += ["--export-to", str(settings.export_to)]
    click.echo(f"Continue it: {_command(settings, 'train', *options)}", err=True)


def _describe(run: Run) -> str:
    assert run.exported is not None
    return describe(run.exported.metrics, run.dataset.num_classes)


def _command(settings: TrainSettings, *arguments: str) -> str:
    """Return a command line for the device of a run."""
    device = [] if settings.device == "auto" else ["--device", settings.device]
    return shlex.join(["python", "-m", "training", *arguments, *device])
