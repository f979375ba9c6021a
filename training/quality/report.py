"""Certificates for people: a table for a terminal, a page for a folder of artifacts."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from training.artifact import Artifact, load_artifact
from training.files import write_atomically
from training.images import class_grid, save_png
from training.networks import count_parameters
from training.quality.certificate import Certificate, Quality, certificate_of
from training.quality.parzen import PUBLISHED, Parzen

# Of more classes than this, a table shows the worst.
TABLE_CLASSES = 20

_INTRODUCTION = """\
# Models

Each `*.safetensors` file here is a generator that the service serves under the file's name. The
figures come from the certificate inside the file. This page is written by
`python -m training evaluate FILE --report`.
"""

_EXPLANATION = """\
## What the figures say

The judge is a classifier that learnt from real training images only. All figures compare with the
real test images, which neither the judge nor the generator ever saw; the column of real images
shows what as many real training images reach, and is the most that can be asked for.

- **GAN-test**: share of generated images that the judge gives the label they were generated for.
- **GAN-train**: accuracy on the real test images of a classifier that learnt from generated images
  only; mean and standard deviation of several. It is high only where images are right *and* varied.
- **Precision, recall**: share of generated images that lie among the real ones, and the reverse.
- **Density, coverage**: how densely real images surround the generated ones, and the share of real
  images that have a generated one as a near neighbour. A collapsed generator covers little.
- **Fréchet distance, KID**: how far apart the two sets are in the judge's features; 0 is equal.
- **Nearest training image**: the distance of an image's pixels, in [0, 1], to the nearest training
  image, for generated images and for real test images. A generator that repeats its training images
  comes closer than test images do; *close* counts those that are closer than 99 % of test images.
- **Parzen window**: the log-likelihood, in nats, that the papers of 2014 report, with their values.
  It prefers averages to images (arXiv 1511.01844): real training images do not score best by it.
"""


def table(certificate: Certificate, class_names: tuple[str, ...]) -> str:
    """A certificate in columns; valid Markdown."""
    header = ("", "generated", "real images")
    rows = [header, *_rows(certificate, class_names)]
    rows = [(name.replace("|", "\\|").replace("\n", " "), a, b) for name, a, b in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"| {a:<{widths[0]}} | {b:>{widths[1]}} | {c:>{widths[2]}} |" for a, b, c in rows]
    rule = f"|{'-' * (widths[0] + 2)}|{'-' * (widths[1] + 1)}:|{'-' * (widths[2] + 1)}:|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _rows(certificate: Certificate, class_names: tuple[str, ...]) -> list[tuple[str, str, str]]:
    made, real = certificate.generated, certificate.real
    taught, copies = certificate.gan_train, certificate.memorisation
    rows = [
        ("GAN-train", f"{taught.mean:.2%} ± {taught.spread:.2%}", f"{taught.real:.2%}"),
        ("GAN-test", f"{made.gan_test:.2%}", f"{real.gan_test:.2%}"),
        *_class_rows(certificate, class_names),
    ]
    for name in ("precision", "recall", "density", "coverage"):
        rows.append((name, f"{getattr(made, name):.3f}", f"{getattr(real, name):.3f}"))
    rows += [
        ("Fréchet distance", f"{made.frechet_distance:.3f}", f"{real.frechet_distance:.3f}"),
        ("KID", _kid(made), _kid(real)),
        ("nearest training image, median", f"{copies.median:.4f}", f"{copies.test_median:.4f}"),
        (
            "nearest training image, 1st percentile",
            f"{copies.first_percentile:.4f}",
            f"{copies.test_first_percentile:.4f}",
        ),
        ("nearest training image, close", f"{copies.close:.2%}", "1.00%"),
    ]
    if certificate.parzen is not None and certificate.parzen_real is not None:
        both = (certificate.parzen, certificate.parzen_real)
        rows.append(("Parzen window, nats", _nats(both[0]), _nats(both[1])))
        rows += [(f"Parzen window of {paper}", value, "") for paper, value in PUBLISHED.items()]
    return rows


def _kid(figures: Quality) -> str:
    return f"{figures.kid:.5f} ± {figures.kid_spread:.5f}"


def _nats(figure: Parzen) -> str:
    return f"{figure.mean:.1f} ± {figure.standard_error:.1f}"


def _class_rows(
    certificate: Certificate, class_names: tuple[str, ...]
) -> list[tuple[str, str, str]]:
    """A row for each class, or for the worst of very many."""
    classes = [
        (name, made, real)
        for name, made, real in zip(
            class_names,
            certificate.generated.gan_test_per_class,
            certificate.real.gan_test_per_class,
            strict=True,
        )
    ]
    what = "GAN-test, {}"
    if len(classes) > TABLE_CLASSES:
        classes = sorted(classes, key=lambda row: 1.0 if row[1] is None else row[1])
        classes = classes[:TABLE_CLASSES]
        what = f"GAN-test, {{}} (of the worst {TABLE_CLASSES} of {len(class_names)})"
    return [(what.format(name), _share(made), _share(real)) for name, made, real in classes]


def _share(value: float | None) -> str:
    return "no image" if value is None else f"{value:.2%}"


def write_report(folder: Path) -> None:
    """Write `README.md` and a picture of each artifact into the folder that holds them.

    Raises:
        ArtifactError: a file in the folder is no valid artifact.
        OSError: a file cannot be written.
    """
    artifacts = [load_artifact(path) for path in _by_name(folder)]
    for artifact in artifacts:
        save_png(picture_path(artifact), class_grid(artifact.generator, columns=16), scale=2)
    write_atomically(folder / "README.md", render(artifacts).encode())


def _by_name(folder: Path) -> list[Path]:
    """The artifacts of a folder, in the order of the models' names."""
    return sorted(folder.glob("*.safetensors"), key=lambda path: path.stem)


def picture_path(artifact: Artifact) -> Path:
    """Where an artifact's picture lies."""
    return artifact.path.with_suffix(".png")


def render(artifacts: list[Artifact]) -> str:
    """The page's Markdown: all models in one table, then each with its picture and figures."""
    return "\n".join(
        [_INTRODUCTION, _summary(artifacts), "", *map(_section, artifacts), _EXPLANATION]
    )


def _summary(artifacts: list[Artifact]) -> str:
    lines = [
        "| model | network | parameters | GAN-train | GAN-test | coverage | Fréchet distance |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for artifact in artifacts:
        known = _certificate(artifact)
        figures = ["", "", "", ""]
        if isinstance(known, Certificate):
            made = known.generated
            figures = [f"{known.gan_train.mean:.2%}", f"{made.gan_test:.2%}"]
            figures += [f"{made.coverage:.3f}", f"{made.frechet_distance:.3f}"]
        name, kind = artifact.path.stem, artifact.info.network.kind
        cells = [f"[{name}](#{name})", f"`{kind}`", f"{count_parameters(artifact.generator):,}"]
        lines.append(f"| {' | '.join([*cells, *figures])} |")
    return "\n".join(lines)


def _certificate(artifact: Artifact) -> Certificate | str:
    """The certificate, or why there is none to show."""
    try:
        return certificate_of(artifact.info) or "Not certified."
    except ValidationError:
        return "Certified by another version of this code; evaluate it again."


def _runs_before(training: Mapping[str, Any]) -> Iterator[int]:
    """Images seen by the runs that a run began with the networks of, the latest first."""
    origin = training.get("began_with")
    while origin is not None:
        yield origin["images_seen"]
        origin = origin.get("began_with")


def _section(artifact: Artifact) -> str:
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
    before = list(_runs_before(training))
    if before:
        line += f", after {' and '.join(f'{images:,}' for images in before)} in runs before it"
    known = _certificate(artifact)
    if isinstance(known, str):
        figures = [known]
    else:
        figures = [
            table(known, info.class_names),
            "",
            f"{known.images:,} generated images, {known.gan_train.images:,} for GAN-train, k = "
            f"{known.neighbours}; the judge is right on {known.judge_accuracy:.2%} of the real "
            "test images.",
        ]
    picture = (
        f"![A row per class, the same latents down each column]({picture_path(artifact).name})"
    )
    return "\n".join([f"## {name}", "", f"{line}.", "", picture, "", *figures, ""])
