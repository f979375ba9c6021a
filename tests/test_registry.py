from pathlib import Path

import pytest

from service.registry import load_registry
from service.settings import Settings
from tests.conftest import make_artifact
from training.artifact import ArtifactError
from training.devices import DeviceError


def settings(weights: Path, device: str = "cpu", default_model: str | None = None) -> Settings:
    return Settings(weights=weights, device=device, max_batch=8, default_model=default_model)


def test_models_of_a_folder_are_named_after_their_files_and_sorted(tmp_path: Path) -> None:
    for name in ("fashion", "digits-2"):
        make_artifact(tmp_path / f"{name}.safetensors")
    (tmp_path / "README.md").write_text("not a model")
    registry = load_registry(settings(tmp_path))
    assert registry.names == ["digits-2", "fashion"]
    assert registry.default.name == "digits-2"
    assert registry.find("fashion") in list(registry)
    assert registry.find("none") is None


def test_mnist_is_the_default_where_it_is_not_the_first(tmp_path: Path) -> None:
    for name in ("fashion-mnist", "mnist", "mnist-mlp"):
        make_artifact(tmp_path / f"{name}.safetensors")
    assert load_registry(settings(tmp_path)).default.name == "mnist"
    assert load_registry(settings(tmp_path, default_model="mnist-mlp")).default.name == "mnist-mlp"


def test_a_default_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_artifact(tmp_path / f"{name}.safetensors")
    with pytest.raises(ArtifactError, match="no model 'c' to be the default; allowed are a, b"):
        load_registry(settings(tmp_path, default_model="c"))


def test_a_single_file_may_be_named(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "one.safetensors")
    make_artifact(tmp_path / "two.safetensors")
    assert load_registry(settings(path)).names == ["one"]


@pytest.mark.parametrize("name", ["熊", "a b", ".hidden", "a\nb", "x" * 101])
def test_a_name_that_no_header_could_carry_is_refused(tmp_path: Path, name: str) -> None:
    path = make_artifact(tmp_path / f"{name}.safetensors")
    with pytest.raises(ArtifactError, match="name that is not allowed; allowed are"):
        load_registry(settings(path))


def test_one_bad_file_is_named_and_nothing_is_served(tmp_path: Path) -> None:
    make_artifact(tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        load_registry(settings(tmp_path))
    assert caught.value.path == bad


def test_a_device_that_is_none_is_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "good.safetensors")
    with pytest.raises(DeviceError, match="'tpu' is none; allowed are auto, cpu, cuda"):
        load_registry(settings(tmp_path, device="tpu"))


def test_models_are_listed_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "a-b"):
        make_artifact(tmp_path / f"{name}.safetensors")
    assert load_registry(settings(tmp_path)).names == ["a", "a-b", "b"]
