"""The page beside a folder of artifacts: a table and a picture of each, written by code alone."""

from pathlib import Path

from training.artifact import Artifact, load_artifact
from training.evaluation import certificate_of, table
from training.files import write_atomically
from training.networks import count_parameters
from training.pictures import class_grid, save_png

_INTRODUCTION = """\
# Models

Each `*.safetensors` file here is a generator that the service serves under the file's name. The
figures are the certificate inside the file, next to the same figures for as many real training
images, all of them against the real test images and in the features of a judge that was trained on
real images only. This page is written by `python -m training evaluate FILE --report`.
"""


def write_report(folder: Path) -> None:
    """Write `README.md` and a picture of each artifact into the folder that holds them.

    Raises:
        ArtifactError: a file in the folder is no valid artifact.
        OSError: a file cannot be written.
    """
    artifacts = [load_artifact(path) for path in sorted(folder.glob("*.safetensors"))]
    for artifact in artifacts:
        save_png(picture_path(artifact), class_grid(artifact.generator, columns=16), scale=2)
    write_atomically(folder / "README.md", render(artifacts).encode())


def picture_path(artifact: Artifact) -> Path:
    """Where an artifact's picture lies."""
    return artifact.path.with_suffix(".png")


def render(artifacts: list[Artifact]) -> str:
    """The page's Markdown."""
    return "\n".join([_INTRODUCTION, *(_section(artifact) for artifact in artifacts)])


def _section(artifact: Artifact) -> str:
    info, name = artifact.info, artifact.path.stem
    training = info.training
    network = info.network
    line = (
        f"`{network.kind}` generator, {count_parameters(artifact.generator):,} parameters, "
        f"{network.num_classes} classes, {network.image_size}x{network.image_size}x"
        f"{network.channels}; {info.images_seen:,} real images seen"
    )
    if {"preset", "dataset", "elapsed_s", "device"} <= training.keys():
        line += (
            f" of the data set `{training['dataset']}`, with the preset `{training['preset']}`, in "
            f"{training['elapsed_s'] / 60:.0f} minutes on the device `{training['device']}`"
        )
    facts = [
        f"{line}.",
        "",
        f"![A row per class, the same latents down each column]({picture_path(artifact).name})",
        "",
    ]
    certificate = certificate_of(info)
    if certificate is None:
        return "\n".join([f"## {name}", "", *facts, "Not certified.", ""])
    judged = (
        f"{certificate.images:,} images, k = {certificate.neighbours}; the judge is right on "
        f"{certificate.judge_accuracy:.2%} of the real test images."
    )
    return "\n".join(
        [f"## {name}", "", *facts, table(certificate, info.class_names), "", judged, ""]
    )
