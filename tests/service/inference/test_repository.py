from pathlib import Path

import pytest

from service.inference import repository as repository_module
from service.inference.repository import ModelRepository, load_repository
from service.settings import Settings
from tests.conftest import make_artifact
from training import artifact
from training.artifact import Artifact, ArtifactError
from training.machine import DeviceError


def settings(weights: Path, device: str = "cpu", default_model: str | None = None) -> Settings:
    return Settings(models=weights, device=device, max_batch=8, default_model=default_model)


def test_models_of_a_folder_are_named_after_their_files_and_sorted(tmp_path: Path) -> None:
    for name in ("fashion", "digits-2"):
        make_artifact(tmp_path / f"{name}.safetensors")
    (tmp_path / "README.md").write_text("not a model")
    repository = load_repository(settings(tmp_path))
    assert repository.names == ["digits-2", "fashion"]
    assert repository.default.name == "digits-2"
    assert repository.get("fashion") in list(repository)
    assert repository.get("none") is None


def test_mnist_is_the_default_also_if_it_is_not_the_first(tmp_path: Path) -> None:
    for name in ("fashion-mnist", "mnist", "mnist-mlp"):
        make_artifact(tmp_path / f"{name}.safetensors")
    assert load_repository(settings(tmp_path)).default.name == "mnist"
    assert (
        load_repository(settings(tmp_path, default_model="mnist-mlp")).default.name == "mnist-mlp"
    )


def test_a_missing_default_is_an_error(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_artifact(tmp_path / f"{name}.safetensors")
    with pytest.raises(ArtifactError, match="no model 'c' to be the default; expected one of a, b"):
        load_repository(settings(tmp_path, default_model="c"))


def test_a_single_file_may_be_named(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "one.safetensors")
    make_artifact(tmp_path / "two.safetensors")
    assert load_repository(settings(path)).names == ["one"]


@pytest.mark.parametrize("name", ["熊", "a b", "a\nb", "x" * 101])
def test_a_name_that_no_header_could_carry_is_an_error(tmp_path: Path, name: str) -> None:
    path = make_artifact(tmp_path / f"{name}.safetensors")
    with pytest.raises(ArtifactError, match="not a valid name for a model; allowed are"):
        load_repository(settings(path))


def test_one_bad_file_is_named_and_nothing_is_served(tmp_path: Path) -> None:
    make_artifact(tmp_path / "good.safetensors")
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"")
    with pytest.raises(ArtifactError) as caught:
        load_repository(settings(tmp_path))
    assert caught.value.path == bad


def test_an_unknown_device_is_an_error(tmp_path: Path) -> None:
    make_artifact(tmp_path / "good.safetensors")
    with pytest.raises(DeviceError, match="unknown device 'tpu'; expected auto, cpu, cuda"):
        load_repository(settings(tmp_path, device="tpu"))


HIDDEN = (".hidden.safetensors", "._a.safetensors", ".a.safetensors.x1y2", ".a.safetensors")
SYSTEM = (".DS_Store", "Thumbs.db", "desktop.ini", "a.safetensors~", "#a.safetensors#")
FOLDERS = {
    "@eaDir": "a.safetensors@SynoEAStream",
    "__MACOSX": "._a.safetensors",
    "lost+found": "b.safetensors",
    ".ipynb_checkpoints": "a-checkpoint.safetensors",
    ".git": "index",
    "..2026_12_01": "a.safetensors",
    ".Trash.safetensors": "a.safetensors",
    "$RECYCLE.BIN": "$R1.safetensors",
    "System Volume Information": "a.safetensors",
}


def add_hidden_and_system_files(folder: Path) -> None:
    for name in (*HIDDEN, *SYSTEM):
        (folder / name).write_bytes(b"\0\5\26\7")  # as AppleDouble files begin
    for name, file in FOLDERS.items():
        (folder / name).mkdir()
        (folder / name / file).write_bytes(b"")
    (folder / "lost+found").chmod(0)
    (folder / ".broken.safetensors").symlink_to("nowhere")


def test_hidden_and_system_files_are_no_models_at_start_nor_later(tmp_path: Path) -> None:
    empty, folder = tmp_path / "empty", tmp_path / "weights"
    for each in (empty, folder):
        each.mkdir()
    add_hidden_and_system_files(empty)
    with pytest.raises(ArtifactError, match=r"holds no \*\.safetensors file"):
        load_repository(settings(empty))
    repository = load(folder, "a")
    before = list(repository)
    add_hidden_and_system_files(folder)
    for force in (False, True):
        assert rescan(repository, force=force) == {}
        assert list(repository) == before
    assert load_repository(settings(folder)).names == ["a"]


def test_models_are_listed_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ("b", "a", "a-b"):
        make_artifact(tmp_path / f"{name}.safetensors")
    assert load_repository(settings(tmp_path)).names == ["a", "a-b", "b"]


# Rescans ----------------------------------------------------------------------------------------


def load(folder: Path, *names: str, default_model: str | None = None) -> ModelRepository:
    for name in names:
        make_artifact(folder / f"{name}.safetensors")
    return load_repository(settings(folder, default_model=default_model))


def rescan(repository: ModelRepository, *, force: bool = False) -> dict[str, str]:
    """Serve the models that the folder holds now; return the load errors by file name."""
    assert repository.loader is not None
    repository.replace(repository.loader.rescan(repository, force=force))
    return {path.name: cause for path, cause in repository.load_errors.items()}


def test_a_file_is_read_again_when_it_changed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = load(tmp_path, "a", "b")
    (tmp_path / "bad.safetensors").write_bytes(b"")
    rescan(repository)
    before = {model.name: model for model in repository}
    read: list[str] = []

    def read_artifact(path: Path) -> Artifact:
        read.append(path.stem)
        return artifact.read_artifact(path)

    monkeypatch.setattr(repository_module, "read_artifact", read_artifact)
    rescan(repository)
    assert read == []
    assert [path.name for path in repository.load_errors] == ["bad.safetensors"]
    make_artifact(tmp_path / "b.safetensors", seed=1)
    rescan(repository)
    assert read == ["b"]
    assert repository.get("a") is before["a"]
    assert repository.get("b") is not before["b"]
    rescan(repository, force=True)
    assert read == ["b", "a", "b", "bad"]
    assert repository.get("a") is before["a"]


def test_a_file_that_is_moved_away_and_back_is_served_again(tmp_path: Path) -> None:
    repository = load(tmp_path, "a", "b")
    (tmp_path / "b.safetensors").rename(tmp_path / "away")
    assert rescan(repository) == {}
    assert repository.names == ["a"]
    (tmp_path / "away").rename(tmp_path / "b.safetensors")
    assert rescan(repository) == {}
    assert repository.names == ["a", "b"]


def test_a_removed_file_is_still_served_if_it_has_to_be_the_default(tmp_path: Path) -> None:
    repository = load(tmp_path, "a", "b", default_model="b")
    (tmp_path / "b.safetensors").unlink()
    cause = "was removed; it is still served, because no other file may be the default"
    assert rescan(repository) == {"b.safetensors": cause}
    assert rescan(repository) == {"b.safetensors": cause}
    assert (repository.names, repository.default.name) == (["a", "b"], "b")
    make_artifact(tmp_path / "b.safetensors", seed=1)
    assert rescan(repository) == {}
    assert repository.default is repository.get("b")


def test_the_last_good_model_is_served_on_if_only_bad_files_are_left(tmp_path: Path) -> None:
    repository = load(tmp_path, "a")
    (tmp_path / "a.safetensors").rename(tmp_path / "a b.safetensors")
    assert rescan(repository).keys() == {"a.safetensors", "a b.safetensors"}
    assert repository.names == ["a"]


@pytest.mark.parametrize("what", ["empty", "missing"])
def test_all_models_are_served_on_if_the_folder_is_empty_or_missing(
    tmp_path: Path, what: str
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    repository = load(folder, "a", "b")
    folder.rename(tmp_path / "away")
    if what == "empty":
        folder.mkdir()
    causes = {"empty": "holds no *.safetensors file"}
    causes["missing"] = "cannot be read: No such file or directory"
    assert rescan(repository) == {"weights": causes[what]}
    assert repository.names == ["a", "b"]
    if what == "empty":
        folder.rmdir()
    (tmp_path / "away").rename(folder)
    assert rescan(repository) == {}


def test_a_device_without_memory_for_another_engine_is_a_load_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = load(tmp_path, "a")

    def no_room(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA out of memory.\nTried to allocate a lot")

    monkeypatch.setattr(repository_module, "Engine", no_room)
    make_artifact(tmp_path / "a.safetensors", seed=1)
    assert rescan(repository) == {"a.safetensors": "cannot be served: CUDA out of memory."}
    assert repository.names == ["a"]
