"""Reports of certificates: a table for a terminal, and a page for a folder of artifacts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training.artifact import list_artifacts
from training.files import write_atomically
from training.images import class_grid, save_png
from training.loading import LoadedArtifact, load_artifact
from training.networks import count_parameters
from training.quality.certificate import (
    Certificate,
    Int8Quality,
    Quality,
    QualitySpread,
    read_certificate,
)
from training.quality.gan_train import GANTrainSpread
from training.quality.memorisation import Memorisation, MemorisationSpread
from training.quality.parzen import PUBLISHED, Parzen

# A table shows at most this many classes, the worst ones.
TABLE_CLASSES = 20

_INTRODUCTION = """\
# Models

Each `*.safetensors` file here is a generator that the service serves under the file's name. The
metrics come from the certificate inside the file; [training](../training/README.md#metrics)
explains them. `python -m training evaluate FILE --report` writes this page.
"""


def render_table(certificate: Certificate, class_names: tuple[str, ...]) -> str:
    """Return a certificate as an aligned Markdown table; a brief one says so below it."""
    rows: list[tuple[str, ...]] = [("", "generated", "real images")]
    rows += _rows(certificate, class_names)
    notes = [] if certificate.brief is None else ["", f"Brief: {certificate.brief}."]
    if certificate.int8 is not None:
        in_int8 = {"": "in int8", **_int8_values(certificate.int8)}
        rows = [(name, fake, in_int8.get(name, ""), real) for name, fake, real in rows]
        notes += ["", _int8_note(certificate.int8)]
    rows = [(name.replace("|", "\\|").replace("\n", " "), *cells) for name, *cells in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"| {name:<{widths[0]}} | "
        + " | ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:], strict=True))
        + " |"
        for name, *cells in rows
    ]
    rule = "".join(f"{'-' * (width + 1)}:|" for width in widths[1:])
    return "\n".join([lines[0], f"|{'-' * (widths[0] + 2)}|{rule}", *lines[1:], *notes])


def _int8_values(int8: Int8Quality) -> dict[str, str]:
    made = int8.generated
    metrics = {name: _metric(made, name) for name in ("precision", "recall", "density", "coverage")}
    distance = {"Fréchet distance": _metric(made, "frechet_distance"), "KID": _kid(made)}
    return {"GAN-test": _share(made.gan_test, None), **metrics, **distance}


def _int8_note(int8: Int8Quality) -> str:
    """Return the meaning of the column of int8."""
    verdict, which = ("nothing", "no") if int8.lossless else ("something", "a")
    return (
        f"In int8 {verdict} is lost: {which} mean of GAN-test, precision, recall, density, "
        f"coverage or Fréchet distance over {int8.seeds} seeds is worse than that of float32 by "
        "more than twice its standard deviation."
    )


def _rows(certificate: Certificate, class_names: tuple[str, ...]) -> Iterator[tuple[str, str, str]]:
    fake, real = certificate.generated, certificate.reference
    gan_train = certificate.gan_train
    trained = _share(gan_train.real, _error(gan_train.spread, "real"))
    yield "GAN-train", _share(gan_train.mean, gan_train.std), trained
    shares = [_share(each.gan_test, _error(each.spread, "gan_test")) for each in (fake, real)]
    yield "GAN-test", shares[0], shares[1]
    yield from _class_rows(certificate, class_names)
    for name in ("precision", "recall", "density", "coverage"):
        yield name, _metric(fake, name), _metric(real, name)
    yield "Fréchet distance", _metric(fake, "frechet_distance"), _metric(real, "frechet_distance")
    yield "KID", _kid(fake), _kid(real)
    yield from _distance_rows(certificate.memorisation)
    if certificate.parzen is not None and certificate.parzen_reference is not None:
        yield "Parzen window, nats", _nats(certificate.parzen), _nats(certificate.parzen_reference)
        for paper, value in PUBLISHED.items():
            yield f"Parzen window of {paper}", value, ""


def _distance_rows(distances: Memorisation) -> Iterator[tuple[str, str, str]]:
    nearest = "nearest training image, {}"
    for name, field in (("median", "median"), ("1st percentile", "first_percentile")):
        values = [
            _with_error(f"{getattr(distances, each):.4f}", _error(distances.spread, each), ".4f")
            for each in (field, f"test_{field}")
        ]
        yield nearest.format(name), values[0], values[1]
    close = _share(distances.close, _error(distances.spread, "close"))
    yield nearest.format("close"), close, "1.00%"


def _error(
    spread: QualitySpread | GANTrainSpread | MemorisationSpread | None, name: str
) -> float | None:
    """Return the standard error of a metric in a brief certificate."""
    return None if spread is None else float(getattr(spread, name))


def _metric(quality: Quality, name: str) -> str:
    return _with_error(f"{getattr(quality, name):.3f}", _error(quality.spread, name), ".3f")


def _share(value: float, error: float | None) -> str:
    return _with_error(f"{value:.2%}", error, ".2%")


def _with_error(value: str, error: float | None, form: str) -> str:
    return value if error is None else f"{value} ± {error:{form}}"


def _kid(quality: Quality) -> str:
    return f"{quality.kid:.5f} ± {quality.kid_std:.5f}"


def _nats(likelihood: Parzen) -> str:
    return f"{likelihood.mean:.1f} ± {likelihood.standard_error:.1f}"


def _class_rows(
    certificate: Certificate, class_names: tuple[str, ...]
) -> Iterator[tuple[str, str, str]]:
    """Yield a row per class, or the rows of the worst `TABLE_CLASSES` classes."""
    labels, note = list(range(len(class_names))), ""
    if len(labels) > TABLE_CLASSES:
        shares = certificate.generated.gan_test_per_class
        labels.sort(key=lambda label: 1.0 if (share := shares[label]) is None else share)
        note = f" (of the worst {TABLE_CLASSES} of {len(class_names)})"
    for label in labels[:TABLE_CLASSES]:
        generated, expected = (
            _class_share(quality, label)
            for quality in (certificate.generated, certificate.reference)
        )
        yield f"GAN-test, {class_names[label]}{note}", generated, expected


def _class_share(quality: Quality, label: int) -> str:
    share = quality.gan_test_per_class[label]
    if share is None:
        return "no image"
    return _share(
        share, None if quality.spread is None else quality.spread.gan_test_per_class[label]
    )


def write_report(folder: Path) -> None:
    """Write `README.md` and a picture of each artifact into the folder of the artifacts.

    Raises:
        ArtifactError: a file in the folder is not a valid artifact.
        OSError: a file cannot be written.
    """
    artifacts = [load_artifact(path) for path in list_artifacts(folder)]
    for artifact in artifacts:
        save_png(picture_path(artifact), class_grid(artifact.generator, columns=16), scale=2)
    write_atomically(folder / "README.md", render_page(artifacts).encode())


def picture_path(artifact: LoadedArtifact) -> Path:
    """Return the path of an artifact's picture."""
    return artifact.path.with_suffix(".png")


def render_page(artifacts: list[LoadedArtifact]) -> str:
    """Return the page in Markdown: a table of all models, then a section per model."""
    return "\n".join([_INTRODUCTION, _overview(artifacts), "", *map(_section, artifacts)])


def _overview(artifacts: list[LoadedArtifact]) -> str:
    lines = [
        "| model | network | parameters | GAN-train | GAN-test | coverage | Fréchet distance |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for artifact in artifacts:
        certificate = _certificate(artifact)
        metrics = ["", "", "", ""]
        if isinstance(certificate, Certificate):
            fake = certificate.generated
            metrics = [f"{certificate.gan_train.mean:.2%}", f"{fake.gan_test:.2%}"]
            metrics += [f"{fake.coverage:.3f}", f"{fake.frechet_distance:.3f}"]
        name, kind = artifact.path.stem, artifact.info.network.kind
        cells = [f"[{name}](#{name})", f"`{kind}`", f"{count_parameters(artifact.generator):,}"]
        lines.append(f"| {' | '.join([*cells, *metrics])} |")
    return "\n".join(lines)


def _certificate(artifact: LoadedArtifact) -> Certificate | str:
    """Return the certificate, or the reason for its absence."""
    try:
        return read_certificate(artifact.info) or "Not certified."
    except ValidationError:
        return "Certified by another version of this code; evaluate it again."


def _earlier_runs(training: Mapping[str, Any]) -> Iterator[int]:
    """Yield the images seen by the runs whose networks a run was initialised from, latest first."""
    # Older artifacts, the bundled ones among them, have the name began_with.
    while origin := training.get("initialised_from") or training.get("began_with"):
        yield origin["images_seen"]
        training = origin


def _section(artifact: LoadedArtifact) -> str:
    info, name = artifact.info, artifact.path.stem
    network, training = info.network, info.training
    seen = training.get("images_seen", info.images_seen)
    line = (
        f"`{network.kind}` generator, {count_parameters(artifact.generator):,} parameters, "
        f"{network.num_classes} classes, {network.image_size}x{network.image_size}x"
        f"{network.channels}; {'unknown' if seen is None else f'{seen:,}'} real images seen"
    )
    if {"preset", "dataset", "elapsed_s", "device"} <= training.keys():
        line += (
            f" of the data set `{training['dataset']}`, with the preset `{training['preset']}`, in "
            f"{training['elapsed_s'] / 60:.0f} minutes on the device `{training['device']}`"
        )
    earlier = " and ".join(f"{images:,}" for images in _earlier_runs(training))
    if earlier:
        line += f", after {earlier} in earlier runs"
    certificate = _certificate(artifact)
    if isinstance(certificate, str):
        metrics = [certificate]
    else:
        metrics = [
            render_table(certificate, info.class_names),
            "",
            f"{certificate.images:,} generated images, {certificate.gan_train.images:,} for "
            f"GAN-train, k = {certificate.neighbours}; the classifier's accuracy on the real test "
            f"images is {certificate.classifier_accuracy:.2%}.",
        ]
    picture = (
        f"![A row per class, the same latents down each column]({picture_path(artifact).name})"
    )
    return "\n".join([f"## {name}", "", f"{line}.", "", picture, "", *metrics, ""])
