"""Models that Keras saved are named as such by the command `import`."""

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

os.environ.setdefault("KERAS_BACKEND", "torch")
keras = pytest.importorskip("keras")

from training.__main__ import main  # noqa: E402  (Keras reads its backend when it is imported)


@pytest.mark.filterwarnings("ignore")  # of Keras: the format .h5 is of an earlier version
@pytest.mark.parametrize(
    ("name", "kind"), [("generator.keras", "a Keras model"), ("generator.h5", "an HDF5 file")]
)
def test_a_keras_model_is_not_taken_for_a_damaged_file(
    tmp_path: Path, name: str, kind: str
) -> None:
    layers = [keras.Input((4,)), keras.layers.Dense(4)]
    keras.Sequential(layers).save(tmp_path / name)
    out = tmp_path / "a.safetensors"
    result = CliRunner().invoke(main, ["import", str(tmp_path / name), "--out", str(out)])
    assert result.exit_code == 1
    assert f"{name}: is {kind}" in result.stderr
    assert "expected the state dict of a generator" in result.stderr
    assert not out.exists()
