"""Reports of certificates: the table in a terminal, and the page beside the models."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tests.support import tiny_training as tiny
from tests.support.processes import REPOSITORY
from training.loading import load_artifact
from training.quality.certificate import (
    Certificate,
    Int8Quality,
    Quality,
    QualitySpread,
    with_certificate,
)
from training.quality.gan_train import GANTrain, GANTrainSpread
from training.quality.memorisation import Memorisation, MemorisationSpread
from training.quality.parzen import Parzen
from training.quality.report import TABLE_CLASSES, render_page, render_table, write_report
from training.saving import save_artifact

QUALITY = Quality(
    gan_test=0.98765,
    gan_test_per_class=(1.0, 0.9753),
    precision=0.1234,
    recall=0.2345,
    density=1.3456,
    coverage=0.4567,
    frechet_distance=12.3456,
    kid=0.123456,
    kid_std=0.00111,
)
CERTIFICATE = Certificate(
    dataset="tiny",
    dataset_sha256="beef",
    classifier_sha256="f00d",
    classifier_accuracy=0.9912,
    images=1100,
    neighbours=5,
    seed=0,
    generated=QUALITY,
    reference=replace(
        QUALITY, gan_test=0.5, gan_test_per_class=(0.25, 0.75), frechet_distance=0.001
    ),
    gan_train=GANTrain(images=60_000, accuracies=(0.97, 0.98, 0.99), real=0.9951),
    memorisation=Memorisation(
        median=0.21,
        first_percentile=0.11,
        test_median=0.22,
        test_first_percentile=0.12,
        close=0.0123,
    ),
    parzen=None,
    parzen_reference=None,
)
WITH_PARZEN = replace(
    CERTIFICATE,
    parzen=Parzen(mean=231.42, standard_error=1.84, sigma=0.2),
    parzen_reference=Parzen(mean=242.71, standard_error=1.79, sigma=0.2),
)
SPREAD = QualitySpread(
    gan_test=0.0101,
    gan_test_per_class=(0.0202, 0.0303),
    precision=0.011,
    recall=0.012,
    density=0.013,
    coverage=0.014,
    frechet_distance=0.5,
)
BRIEF = replace(
    CERTIFICATE,
    images=110,
    generated=replace(QUALITY, spread=SPREAD),
    reference=replace(CERTIFICATE.reference, spread=replace(SPREAD, gan_test=0.05)),
    gan_train=GANTrain(
        images=250,
        accuracies=(0.97,),
        real=0.9951,
        spread=GANTrainSpread(shown=1000, generated=0.0111, real=0.0022),
    ),
    memorisation=replace(
        CERTIFICATE.memorisation,
        spread=MemorisationSpread(
            images=50,
            median=0.001,
            first_percentile=0.002,
            test_median=0.003,
            test_first_percentile=0.004,
            close=0.005,
        ),
    ),
    brief="110 images; `training evaluate FILE` completes it",
    test_images=110,
)
ROWS = [
    ["", "generated", "real images"],
    ["GAN-train", "98.00% ± 1.00%", "99.51%"],
    ["GAN-test", "98.77%", "50.00%"],
    ["GAN-test, left", "100.00%", "25.00%"],
    ["GAN-test, right", "97.53%", "75.00%"],
    ["precision", "0.123", "0.123"],
    ["recall", "0.234", "0.234"],
    ["density", "1.346", "1.346"],
    ["coverage", "0.457", "0.457"],
    ["Fréchet distance", "12.346", "0.001"],
    ["KID", "0.12346 ± 0.00111", "0.12346 ± 0.00111"],
    ["nearest training image, median", "0.2100", "0.2200"],
    ["nearest training image, 1st percentile", "0.1100", "0.1200"],
    ["nearest training image, close", "1.23%", "1.00%"],
]


def cells(text: str) -> list[list[str]]:
    """The rows of a Markdown table as GitHub's specification reads them."""
    header, rule, *body = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in text.split("\n")
    )
    assert [row[0] for row in (header, rule, *body)] == [""] * (len(body) + 2)
    assert [row[-1] for row in (header, rule, *body)] == [""] * (len(body) + 2)
    assert all(re.fullmatch(":?-+:?", cell) for cell in rule[1:-1])
    assert len(rule) == len(header)
    return [[cell.replace("\\|", "|") for cell in row[1:-1]] for row in (header, *body)]


def many_classes(count: int) -> tuple[Certificate, tuple[str, ...]]:
    shares = tuple((i * 7 % count) / count for i in range(count))
    quality = replace(QUALITY, gan_test_per_class=shares)
    return replace(CERTIFICATE, generated=quality, reference=quality), tuple(
        f"class {i}" for i in range(count)
    )


# The table


def test_a_table_is_markdown_and_shows_every_metric() -> None:
    assert cells(render_table(CERTIFICATE, ("left", "right"))) == ROWS


def test_every_metric_of_a_brief_certificate_has_its_error() -> None:
    table, _, note = render_table(BRIEF, ("left", "right")).rpartition("\n\n")
    assert note == "Brief: 110 images; `training evaluate FILE` completes it."
    assert cells(table) == [
        ["", "generated", "real images"],
        ["GAN-train", "97.00% ± 1.11%", "99.51% ± 0.22%"],
        ["GAN-test", "98.77% ± 1.01%", "50.00% ± 5.00%"],
        ["GAN-test, left", "100.00% ± 2.02%", "25.00% ± 2.02%"],
        ["GAN-test, right", "97.53% ± 3.03%", "75.00% ± 3.03%"],
        ["precision", "0.123 ± 0.011", "0.123 ± 0.011"],
        ["recall", "0.234 ± 0.012", "0.234 ± 0.012"],
        ["density", "1.346 ± 0.013", "1.346 ± 0.013"],
        ["coverage", "0.457 ± 0.014", "0.457 ± 0.014"],
        ["Fréchet distance", "12.346 ± 0.500", "0.001 ± 0.500"],
        ["KID", "0.12346 ± 0.00111", "0.12346 ± 0.00111"],
        ["nearest training image, median", "0.2100 ± 0.0010", "0.2200 ± 0.0030"],
        ["nearest training image, 1st percentile", "0.1100 ± 0.0020", "0.1200 ± 0.0040"],
        ["nearest training image, close", "1.23% ± 0.50%", "1.00%"],
    ]


@pytest.mark.parametrize(
    ("lossless", "verdict"),
    [
        (True, "In int8 nothing is lost: no mean of GAN-test, precision, recall, "),
        (False, "In int8 something is lost: a mean of GAN-test, precision, recall, "),
    ],
)
def test_int8_has_a_column_and_a_verdict(lossless: bool, verdict: str) -> None:
    made = replace(QUALITY, gan_test=0.9812, recall=0.2222)
    int8 = Int8Quality(generated=made, change={}, std={}, seeds=5, lossless=lossless)
    table, _, note = render_table(replace(CERTIFICATE, int8=int8), ("a", "b")).rpartition("\n\n")
    assert note.startswith(verdict)
    assert note.endswith("worse than that of float32 by more than twice its standard deviation.")
    columns = {row[0]: row[2] for row in cells(table)}
    assert columns[""] == "in int8"
    assert (columns["GAN-test"], columns["recall"]) == ("98.12%", "0.222")
    assert columns["KID"] == "0.12346 ± 0.00111"
    assert columns["GAN-train"] == columns["nearest training image, close"] == ""


def test_the_legacy_metric_stands_beside_the_published_ones() -> None:
    assert cells(render_table(WITH_PARZEN, ("left", "right"))) == [
        *ROWS,
        ["Parzen window, nats", "231.4 ± 1.8", "242.7 ± 1.8"],
        ["Parzen window of CGAN (arXiv 1411.1784)", "132 ± 2", ""],
        ["Parzen window of GAN (arXiv 1406.2661)", "225 ± 2", ""],
        ["Parzen window of the best claim of an MLP CGAN", "283", ""],
    ]


def test_the_lines_of_a_table_are_aligned_for_a_terminal() -> None:
    lines = render_table(WITH_PARZEN, ("left", "right")).splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert all(line.startswith("|") and line.endswith("|") for line in lines)


def test_a_class_name_cannot_break_the_table() -> None:
    rows = cells(render_table(CERTIFICATE, ("a|b", "new\nline")))
    assert [len(row) for row in rows] == [3] * len(ROWS)
    assert [row[0] for row in rows[3:5]] == ["GAN-test, a|b", "GAN-test, new line"]


def test_of_very_many_classes_the_worst_are_shown() -> None:
    certificate, names = many_classes(120)
    rows = [
        row for row in cells(render_table(certificate, names)) if row[0].startswith("GAN-test, ")
    ]
    assert len(rows) == TABLE_CLASSES
    assert rows[0] == [
        f"GAN-test, class 0 (of the worst {TABLE_CLASSES} of 120)",
        "0.00%",
        "0.00%",
    ]
    shares = [float(row[1].rstrip("%")) for row in rows]
    assert shares == sorted(shares)
    assert max(shares) == pytest.approx(100 * (TABLE_CLASSES - 1) / 120, abs=0.01)


def test_a_class_without_images_says_so() -> None:
    quality = replace(QUALITY, gan_test_per_class=(None, 0.5))
    rows = cells(render_table(replace(CERTIFICATE, reference=quality), ("left", "right")))
    assert rows[3] == ["GAN-test, left", "100.00%", "no image"]


# The page


def test_a_page_shows_all_models_first_and_then_each(tmp_path: Path) -> None:
    good = tiny.artifact_file(tmp_path / "good.safetensors")
    loaded = load_artifact(good)
    save_artifact(good, loaded.generator, with_certificate(loaded.info, WITH_PARZEN))
    plain = tiny.artifact_file(tmp_path / "plain.safetensors")

    page = render_page([load_artifact(path) for path in (good, plain)])

    summary, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    rows = cells("\n".join(line for line in summary.split("\n") if line.startswith("|")))
    assert rows[0][0] == "model"
    assert rows[1][:2] == ["[good](#good)", "`mlp`"]
    assert rows[1][3:] == ["98.00%", "98.77%", "0.457", "12.346"]
    assert rows[2][3:] == ["", "", "", ""]
    assert [section.split("\n")[0] for section in sections] == ["good", "plain"]
    assert render_table(WITH_PARZEN, tiny.CLASS_NAMES) in sections[0]
    assert "1,100 generated images, 60,000 for GAN-train, k = 5" in sections[0]
    assert "the real test images is 99.12%" in sections[0]
    assert "Not certified." in sections[1]


def test_every_row_of_the_table_is_explained_where_the_page_says() -> None:
    assert "(../training/README.md#metrics)" in render_page([])
    page = (REPOSITORY / "training" / "README.md").read_text(encoding="utf-8")
    explanation = page.partition("\n### Metrics\n")[2].partition("\n## ")[0].lower()
    for row in cells(render_table(WITH_PARZEN, ("left", "right")))[1:]:
        name = re.split(", | of ", row[0])[0]
        assert name.lower() in explanation


def test_a_certificate_of_other_code_does_not_stop_the_page(tmp_path: Path) -> None:
    path = tiny.artifact_file(tmp_path / "a.safetensors", certificate={"gan_test": 1.0})
    page = render_page([load_artifact(path)])
    assert "Certified by another version of this code; evaluate it again." in page


def test_images_that_nobody_counted_are_unknown(tmp_path: Path) -> None:
    path = tiny.artifact_file(tmp_path / "a.safetensors", training={"images_seen": None})
    assert "; unknown real images seen." in render_page([load_artifact(path)])


@pytest.mark.parametrize("name", ["initialised_from", "began_with"])
def test_the_images_of_earlier_runs_are_shown(tmp_path: Path, name: str) -> None:
    first = {"images_seen": 1500, name: None}
    second = {"images_seen": 20, name: first}
    path = tiny.artifact_file(tmp_path / "a.safetensors", training={name: second})
    assert "images seen, after 20 and 1,500 in earlier runs." in render_page([load_artifact(path)])


def test_a_report_is_the_page_and_a_picture_of_each_model(tmp_path: Path) -> None:
    for name in ("a", "b"):
        tiny.artifact_file(tmp_path / f"{name}.safetensors")
        (tmp_path / f"._{name}.safetensors").write_bytes(b"\0\5\26\7")  # of macOS

    write_report(tmp_path)

    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert page == render_page([load_artifact(tmp_path / f"{name}.safetensors") for name in "ab"])
    for name in "ab":
        assert f"]({name}.png)" in page
        with Image.open(tmp_path / f"{name}.png") as picture:
            picture.load()
