from pathlib import Path

import pytest
import torch

from service.inference import repository as registry_module
from service.inference.repository import ModelRepository, Weights, load_repository
from service.settings import Settings
from tests.conftest import make_artifact
from training import artifact
from training.artifact import Artifact, ArtifactError
from training.devices import DeviceError


def settings(weights: Path, device: str = "cpu", default_model: str | None = None) -> Settings:
    return Settings(models=weights, device=device, max_batch=8, default_model=default_model)


def test_models_of_a_folder_are_named_after_their_files_and_sorted(tmp_path: Path) -> None:
    for name in ("fashion", "digits-2"):
        make_artifact(tmp_path / f"{name}.safetensors")
    (tmp_path / "README.md").write_text("not a model")
    registry = load_repository(settings(tmp_path))
    assert registry.names == ["digits-2", "fashion"]
    assert registry.default.name == "digits-2"
    assert registry.find("fashion") in list(registry)
    assert registry.find("none") is None


def test_mnist_is_the_default_where_it_is_not_the_first(tmp_path: Path) -> None:
    for name in ("fashion-mnist", "mnist", "mnist-mlp"):
        make_artifact(tmp_path / f"{name}.safetensors")
    assert load_repository(settings(tmp_path)).default.name == "mnist"
    assert (
        load_repository(settings(tmp_path, default_model="mnist-mlp")).default.name == "mnist-mlp"
    )


def test_a_default_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_artifact(tmp_path / f"{name}.safetensors")
    with pytest.raises(ArtifactError, match="no model 'c' to be the default; allowed are a, b"):
        load_repository(settings(tmp_path, default_model="c"))


def test_a_single_file_may_be_named(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "one.safetensors")
    make_artifact(tmp_path / "two.safetensors")
    assert load_repository(settings(path)).names == ["one"]


@pytest.mark.parametrize("name", ["熊", "a b", ".hidden", "a\nb", "x" * 101])
def test_a_name_that_no_header_could_carry_is_refused(tmp_path: Path, name: str) -> None:
    path = make_artifact(tmp_path / f"{name}.safetensors")
    with pytest.raises(ArtifactError, match="name that is not allowed; allowed are"):
        load_repository(settings(path))


def test_one_bad_file_is_named_and_nothing_is_served(tmp_path: Path) -> None:
    make_artifact(tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        load_repository(settings(tmp_path))
    assert caught.value.path == bad


def test_a_device_that_is_none_is_refused(tmp_path: Path) -> None:
    make_artifact(tmp_path / "good.safetensors")
    with pytest.raises(DeviceError, match="unknown device 'tpu'; expected auto, cpu, cuda"):
        load_repository(settings(tmp_path, device="tpu"))


def test_models_are_listed_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "a-b"):
        make_artifact(tmp_path / f"{name}.safetensors")
    assert load_repository(settings(tmp_path)).names == ["a", "a-b", "b"]


# Looking again -----------------------------------------------------------------------------------


def load(
    folder: Path, *names: str, default_model: str | None = None
) -> tuple[Weights, ModelRepository]:
    for name in names:
        make_artifact(folder / f"{name}.safetensors")
    weights = Weights(settings(folder, default_model=default_model))
    return weights, weights.load()


def look(weights: Weights, registry: ModelRepository, *, afresh: bool = False) -> dict[str, str]:
    """Take what there is now; the causes of what is refused, by file name."""
    registry.replace(weights.look_again(registry, afresh=afresh))
    return {name: refusal.cause for name, refusal in registry.refused.items()}


def test_a_file_is_read_again_when_it_changed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, registry = load(tmp_path, "a", "b")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    look(weights, registry)
    before, known = {model.name: model for model in registry}, registry.refused
    read: list[str] = []

    def load_artifact(path: Path) -> Artifact:
        read.append(path.stem)
        return artifact.load_artifact(path)

    monkeypatch.setattr(registry_module, "load_artifact", load_artifact)
    look(weights, registry)
    assert read == []
    assert registry.refused["bad.safetensors"] is known["bad.safetensors"]
    make_artifact(tmp_path / "b.safetensors", seed=1)
    look(weights, registry)
    assert read == ["b"]
    assert registry.find("a") is before["a"]
    assert registry.find("b") is not before["b"]
    look(weights, registry, afresh=True)
    assert read == ["b", "a", "b", "bad"]
    assert registry.find("a") is before["a"]
    assert registry.refused["bad.safetensors"] is not known["bad.safetensors"]


def test_a_file_that_is_moved_away_and_back_is_served_again(tmp_path: Path) -> None:
    weights, registry = load(tmp_path, "a", "b")
    (tmp_path / "b.safetensors").rename(tmp_path / "away")
    assert look(weights, registry) == {}
    assert registry.names == ["a"]
    (tmp_path / "away").rename(tmp_path / "b.safetensors")
    assert look(weights, registry) == {}
    assert registry.names == ["a", "b"]


def test_the_default_that_was_asked_for_is_served_on_when_it_is_removed(tmp_path: Path) -> None:
    weights, registry = load(tmp_path, "a", "b", default_model="b")
    (tmp_path / "b.safetensors").unlink()
    cause = "was removed; it is still served, because no other file may be the default"
    assert look(weights, registry) == {"b.safetensors": cause}
    told = registry.refused["b.safetensors"]
    assert look(weights, registry) == {"b.safetensors": cause}
    assert registry.refused["b.safetensors"] is told
    assert (registry.names, registry.default.name) == (["a", "b"], "b")
    make_artifact(tmp_path / "b.safetensors", seed=1)
    assert look(weights, registry) == {}
    assert registry.default is registry.find("b")


def test_the_last_good_model_is_served_on_where_only_bad_files_are_left(tmp_path: Path) -> None:
    weights, registry = load(tmp_path, "a")
    (tmp_path / "a.safetensors").rename(tmp_path / "a b.safetensors")
    assert look(weights, registry).keys() == {"a.safetensors", "a b.safetensors"}
    assert registry.names == ["a"]


@pytest.mark.parametrize("what", ["empty", "gone"])
def test_all_models_are_served_on_where_the_folder_is_empty_or_gone(
    tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    weights, registry = load(folder, "a", "b")
    folder.rename(tmp_path / "away")
    if what == "empty":
        folder.mkdir()
    causes = {"empty": "holds no *.safetensors file"}
    causes["gone"] = "cannot be read: No such file or directory"
    assert look(weights, registry) == {"weights": causes[what]}
    assert registry.names == ["a", "b"]
    if what == "empty":
        folder.rmdir()
    (tmp_path / "away").rename(folder)
    assert look(weights, registry) == {}


def test_a_device_without_room_for_another_engine_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, registry = load(tmp_path, "a")

    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate a lot")

    monkeypatch.setattr(registry_module, "Engine", no_room)
    make_artifact(tmp_path / "a.safetensors", seed=1)
    assert look(weights, registry) == {"a.safetensors": "is not served: CUDA out of memory."}
    assert registry.names == ["a"]
