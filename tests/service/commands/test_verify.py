"""The command that tells whether a file is what it says, on real files in a real process."""

from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.conftest import make_artifact
from tests.support.processes import Ended, run
from tests.support.serving import ServiceProcess


def verify(*arguments: str) -> Ended:
    return run("-m", "service", "verify", *arguments)


@pytest.fixture
def sheet(service: ServiceProcess, tmp_path: Path) -> Path:
    path = tmp_path / "sevens.png"
    path.write_bytes(service.client.post("/generate?label=7&n=4&scale=2&seed=1").content)
    return path


def test_a_file_of_the_service_is_the_very_same(sheet: Path) -> None:
    ended = verify(str(sheet))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("The file is identical. Made by mnist@sha256:")


def test_a_file_that_was_touched_is_not(sheet: Path) -> None:
    with Image.open(sheet) as image:
        text = PngInfo()
        text.add_text("Recipe", image.info["Recipe"])
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(sheet, pnginfo=text)
    ended = verify(str(sheet))
    assert ended.returncode == 1
    assert "pixels differ" in ended.stdout


def test_a_file_that_tells_nothing_ends_in_one_line_with_path_and_cause(
    sheet: Path, tmp_path: Path
) -> None:
    other = make_artifact(tmp_path / "other.safetensors")
    plain = tmp_path / "plain.png"
    Image.new("L", (28, 28)).save(plain)
    for arguments, cause in [
        ([str(tmp_path / "none.png")], "No such file"),
        ([str(other)], "is not a PNG file"),
        ([str(plain)], "no text chunk named Recipe"),
        ([str(sheet), "--models", str(other)], "no model with the digest"),
        ([str(sheet), "--device", "tpu"], "tpu"),
    ]:
        ended = verify(*arguments)
        assert ended.returncode == 2
        assert ended.stderr.count("\n") == 1
        assert cause in ended.stderr
