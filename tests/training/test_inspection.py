"""Summaries and pictures of artifacts, and the command that shows them."""

import hashlib
import io
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from tests.conftest import make_artifact
from tests.support import tiny_training as tiny
from training.__main__ import main
from training.inspection import render_ansi, render_picture, render_summary, summary
from training.loading import LoadedArtifact, load_artifact
from training.networks import count_parameters
from training.quality.certificate import read_certificate
from training.quality.report import TABLE_CLASSES, render_table
from training.saving import save_artifact

pytestmark = pytest.mark.usefixtures("one_thread")

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "a.safetensors")


def described(path: Path, **changes: Any) -> str:
    """The description of the artifact at `path` once this was changed in it."""
    artifact = load_artifact(path)
    save_artifact(path, artifact.generator, replace(artifact.info, **changes))
    return render_summary(load_artifact(path))


# The summary


def test_the_summary_has_all_of_the_description(path: Path) -> None:
    artifact = load_artifact(path)
    found = json.loads(json.dumps(summary(artifact)))
    assert found["path"] == str(path)
    assert found["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["size_bytes"] == path.stat().st_size
    assert found["parameters"] == count_parameters(artifact.generator)
    assert found["network"]["hidden"] == [16, 32, 24]
    assert found["class_names"] == ["cat", "dog", "emu"]
    assert (found["images_seen"], found["certificate"]) == (5, None)
    assert (found["format"], found["version"]) == ("cgan-generator", 2)
    assert found["graphs"] == ["float32"]


def test_the_text_has_a_line_for_each_value(path: Path) -> None:
    text = described(path, training={"preset": "mlp", "seed": 3}, source_commit="0123abc")
    artifact = load_artifact(path)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == str(path)
    for expected in (
        f"SHA-256 {artifact.sha256}",
        f"size {path.stat().st_size:,} bytes",
        f"network mlp, {count_parameters(artifact.generator):,} parameters",
        "hidden [16, 32, 24]",
        "classes cat, dog, emu",
        "images seen 5",
        "source commit 0123abc",
        'preset "mlp"',
        "seed 3",
        "Not certified.",
    ):
        assert expected in lines


def test_of_very_many_classes_the_first_are_shown_with_their_number(tmp_path: Path) -> None:
    names = tuple(f"class {i}" for i in range(1000))
    network = replace(tiny.NETWORK, num_classes=1000)
    path = tiny.artifact_file(tmp_path / "a.safetensors", network=network, class_names=names)
    (line,) = (
        each for each in render_summary(load_artifact(path)).splitlines() if "class 0" in each
    )
    assert line.split(maxsplit=1)[1].startswith("class 0, class 1, ")
    assert line.endswith(f"{names[TABLE_CLASSES - 1]}, … (1,000 in all)")
    assert summary(load_artifact(path))["class_names"] == names


def test_what_is_not_known_is_called_unknown(path: Path) -> None:
    """An imported generator's images were not counted."""
    text = described(path, training={"images_seen": None}, images_seen=0)
    assert re.search(r"^images seen +unknown$", text, re.MULTILINE)
    assert re.search(r"^source commit +unknown$", text, re.MULTILINE)


def test_without_training_circumstances_that_is_said(path: Path) -> None:
    assert re.search(r"^training +not recorded$", described(path, training={}), re.MULTILINE)


def test_the_certificate_is_shown_as_its_table(bundled: Path) -> None:
    artifact = load_artifact(bundled)
    certificate = read_certificate(artifact.info)
    assert certificate is not None
    assert render_summary(artifact).endswith(render_table(certificate, artifact.info.class_names))


ESTIMATE = {"gan_test": 0.95, "coverage": 0.1, "frechet_distance": 2.345, "images": 3000}


def test_without_a_certificate_the_estimate_of_the_run_is_shown_in_words(path: Path) -> None:
    assert described(path, training={"quick_metrics": ESTIMATE}).endswith(
        "\n\nNot certified.\nEstimated during training, from 3,000 images against training images: "
        "legible, but repeats itself: GAN-test 95.0%, coverage 0.10, Fréchet distance 2.35."
    )


@pytest.mark.parametrize("stored", [None, 3, {"gan_test": 0.5}, {**ESTIMATE, "images": "many"}])
def test_an_estimate_that_this_version_cannot_read_is_left_out(path: Path, stored: object) -> None:
    text = described(path, training={"quick_metrics": stored})
    assert text.endswith("\n\nNot certified.")


def test_a_certificate_of_another_version_is_shown_as_it_is(path: Path) -> None:
    text = described(path, certificate={"beauty": 0.5})
    assert 'Certified by another version of this code:\n{\n  "beauty": 0.5\n}' in text


def test_no_text_in_a_file_steers_the_terminal(path: Path) -> None:
    names = ("\x1b[31mred", "\x9b2J", "Bär 熊")
    text = described(path, class_names=names, training={"\x07": "\u202e"})
    assert r"\x1b[31mred, \x9b2J, Bär 熊" in text
    assert all(character.isprintable() or character == "\n" for character in text)


# The picture


def pixels_of(picture: str) -> list[list[tuple[int, ...]]]:
    """Rows of RGB pixels, two for each line of a picture."""
    cell = re.compile(r"\x1b\[38;2;(\d+);(\d+);(\d+);48;2;(\d+);(\d+);(\d+)m▀")
    rows = []
    for line in picture.splitlines():
        cells = [tuple(map(int, values)) for values in cell.findall(line)]
        rows += [[c[:3] for c in cells], [c[3:] for c in cells]]
    return rows


@pytest.mark.parametrize("channels", [1, 3])
def test_a_character_is_two_pixels(channels: int) -> None:
    pixels = torch.randint(0, 256, (6, 5, channels), dtype=torch.uint8)
    assert pixels_of(render_ansi(pixels)) == [
        [tuple(pixel) for pixel in row] for row in pixels.expand(-1, -1, 3).tolist()
    ]


def test_an_odd_row_at_the_end_stands_on_black() -> None:
    assert pixels_of(render_ansi(torch.full((1, 1, 1), 9, dtype=torch.uint8))) == [
        [(9, 9, 9)],
        [(0, 0, 0)],
    ]


def test_every_line_gives_the_terminal_its_colours_back() -> None:
    lines = render_ansi(torch.zeros(4, 2, 3, dtype=torch.uint8)).splitlines()
    assert len(lines) == 2
    assert all(line.endswith("▀\x1b[0m") for line in lines)


@pytest.mark.parametrize(
    ("columns", "width", "height"),
    [(1000, 36, 6), (36, 36, 6), (35, 18, 3), (12, 12, 2), (3, 3, 1), (1, 3, 1)],
)
def test_a_picture_is_as_wide_as_the_terminal_allows(
    small_artifact: LoadedArtifact, columns: int, width: int, height: int
) -> None:
    """Three classes of 12x12 pixels, shrunk by whole numbers."""
    lines = ESCAPE.sub("", render_picture(small_artifact, columns)).splitlines()
    assert [len(line) for line in lines] == [width] * height


def test_more_than_five_classes_take_more_lines(bundled: Path) -> None:
    lines = ESCAPE.sub("", render_picture(load_artifact(bundled), 80)).splitlines()
    assert [len(line) for line in lines] == [5 * 14] * 14


# The command


def invoke(*arguments: str | Path) -> Result:
    result = CliRunner().invoke(main, ["inspect", *map(str, arguments)])
    expected = result.exception is None or isinstance(result.exception, SystemExit)
    assert expected, result.exception  # a traceback
    return result


def test_inspect_prints_the_description_and_no_picture_into_a_pipe(path: Path) -> None:
    result = invoke(path)
    assert result.exit_code == 0, result.output
    assert result.stdout == render_summary(load_artifact(path)) + "\n"


def test_inspect_prints_one_json_object_for_machines(path: Path) -> None:
    result = invoke(path, "--json")
    assert json.loads(result.stdout) == json.loads(json.dumps(summary(load_artifact(path))))


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_inspect_writes_a_picture_and_prints_the_same(path: Path, options: tuple[str, ...]) -> None:
    out = path.with_name("sheet.png")
    assert invoke(path, *options, "--picture", out).stdout == invoke(path, *options).stdout
    with Image.open(out) as picture:
        assert picture.size == (16 * 12 * 2, 3 * 12 * 2)


def test_inspect_refuses_a_picture_in_another_format(path: Path) -> None:
    result = invoke(path, "--picture", path.with_name("a.jpg"))
    assert result.exit_code == 2
    assert "a.jpg must end in .png" in result.stderr


def test_inspect_refuses_a_file_that_is_no_artifact(tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_bytes(b"\x80\x04.")
    result = invoke(tmp_path / "a.pth")
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: {tmp_path / 'a.pth'}: is a pickle")


def test_a_terminal_gets_a_picture_of_its_width(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setenv("COLUMNS", "20")
    main(["inspect", str(path)], standalone_mode=False)
    artifact = load_artifact(path)
    assert terminal.getvalue() == f"{render_summary(artifact)}\n{render_picture(artifact, 20)}\n"
