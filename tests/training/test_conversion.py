"""The commands `export` and `upgrade`; tests/training/test_importing.py has those of `import`."""

from pathlib import Path

import onnx
import pytest
import safetensors.torch
from click.testing import CliRunner, Result

from tests.conftest import make_artifact
from training.__main__ import main
from training.artifact import read_artifact
from training.loading import load_artifact
from training.saving import save_artifact


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "small.safetensors")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


def make_old(path: Path) -> None:
    """Write an artifact as the first release did: without graphs."""
    loaded = load_artifact(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    metadata["artifact"] = metadata["artifact"].replace('"version": 2', '"version": 1')
    for key in ("contents_sha256", "graphs"):
        start = metadata["artifact"].index(f'"{key}"')
        end = metadata["artifact"].index(', "', metadata["artifact"].index(": ", start))
        if key == "graphs":
            end = metadata["artifact"].index("}, ", start) + 1
        metadata["artifact"] = metadata["artifact"][:start] + metadata["artifact"][end + 2 :]
    path.write_bytes(safetensors.torch.save(loaded.generator.state_dict(), metadata))


def test_an_artifact_of_the_first_release_is_upgraded_in_place(path: Path) -> None:
    make_old(path)
    old = load_artifact(path)
    assert (old.info.version, old.graphs, old.reference) == (1, {}, None)
    lines = [line.split(maxsplit=1) for line in invoke("inspect", path).output.splitlines()]
    assert ["graphs", "none; add them with: python -m training upgrade"] in lines
    result = invoke("upgrade", path)
    assert result.exit_code == 0, result.output
    new = load_artifact(path)
    assert result.output == f"{path}: SHA-256 {new.sha256}, before {old.sha256}\n"
    assert (new.info.version, sorted(new.graphs)) == (2, ["float32", "int8"])
    assert new.reference is not None
    for name, tensor in old.generator.state_dict().items():
        assert new.generator.state_dict()[name].equal(tensor)


def test_all_artifacts_of_a_folder_are_upgraded(path: Path) -> None:
    other = make_artifact(path.with_name("other.safetensors"), seed=1)
    path.with_name("notes.txt").write_text("not a model")
    result = invoke("upgrade", path.parent)
    assert [line.partition(":")[0] for line in result.output.splitlines()] == [
        str(other),
        str(path),
    ]
    assert all(sorted(read_artifact(each).graphs) == ["float32", "int8"] for each in (path, other))


def test_a_file_that_cannot_be_upgraded_is_left_as_it_is(path: Path) -> None:
    path.write_bytes(b"nothing")
    result = invoke("upgrade", path)
    assert result.exit_code == 1
    assert f"Error: {path}: " in result.output
    assert path.read_bytes() == b"nothing"


def test_an_export_is_a_valid_model(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "small.onnx"
    result = invoke("export", path, "--onnx", out)
    assert result.exit_code == 0, result.output
    assert f"{out}: the network of {path} in float32; classes " in result.output
    onnx.checker.check_model(str(out), full_check=True)


def test_int8_is_exported_where_the_artifact_has_it(path: Path, tmp_path: Path) -> None:
    arguments = ("export", path, "--onnx", tmp_path / "small.onnx", "--precision", "int8")
    refused = invoke(*arguments)
    assert refused.exit_code == 1
    assert "has no graph in int8; add it with: python -m training upgrade " in refused.output
    loaded = load_artifact(path)
    save_artifact(path, loaded.generator, loaded.info, int8=True)
    assert sorted(read_artifact(path).graphs) == ["float32", "int8"]
    assert invoke(*arguments).exit_code == 0


def test_another_suffix_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    result = invoke("export", tmp_path / "none.safetensors", "--onnx", tmp_path / "out.pb")
    assert result.exit_code == 2
    assert f"{tmp_path / 'out.pb'} must end in .onnx" in result.output


def test_a_bad_file_of_a_folder_keeps_no_other_from_its_upgrade(path: Path) -> None:
    bad = path.with_name("bad.safetensors")
    bad.write_bytes(path.read_bytes()[:-1])
    result = invoke("upgrade", path.parent)
    assert result.exit_code == 1
    assert f"Error: {bad}: is not a valid safetensors file" in result.output
    assert f"{path}: SHA-256 {read_artifact(path).sha256}" in result.output


def test_a_folder_without_artifacts_is_an_error(tmp_path: Path) -> None:
    result = invoke("upgrade", tmp_path)
    assert (result.exit_code, f"{tmp_path}: holds no *.safetensors file" in result.output) == (
        1,
        True,
    )
