"""Models that are added, replaced and removed while a service answers."""

import gc
import io
import os
import shutil
import signal
import threading
import weakref
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from service.app import create_app
from service.inference import reload
from service.inference.repository import Model, ModelRepository, ModelSet, load_repository
from service.settings import Settings
from tests.conftest import make_artifact
from tests.service.api.test_health import samples
from tests.support.engines import GatedEngine
from tests.support.serving import ServiceProcess, serving
from tests.support.wire import wait_until
from tests.support.workers import client_of, logged, pids
from training.loading import load_artifact

RECIPE = "/generate?label=cat&n=3&seed=11"


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Artifacts of the same size with different weights."""
    folder = tmp_path_factory.mktemp("variants")
    return [make_artifact(folder / str(seed), seed=seed) for seed in range(4)]


@pytest.fixture(scope="module")
def shared(
    variants: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[ServiceProcess, Path]]:
    weights = tmp_path_factory.mktemp("weights")
    put(variants[0], weights / "small.safetensors")
    with ServiceProcess("--models", str(weights), "--max-batch", "8") as service:
        yield service, weights


@pytest.fixture
def service(shared: tuple[ServiceProcess, Path]) -> ServiceProcess:
    return shared[0]


@pytest.fixture
def weights(shared: tuple[ServiceProcess, Path], variants: list[Path]) -> Iterator[Path]:
    """The folder that `service` serves, with `small` alone; so it is left behind."""
    service, weights = shared
    yield weights
    put(variants[0], weights / "small.safetensors")
    for path in weights.iterdir():
        if path.name != "small.safetensors":
            path.unlink()
    service.signal(signal.SIGHUP)
    wait_until(
        lambda: served(service.client) == {"small": digest(variants[0])} and not refused(service),
        "it is as it was",
    )


def put(source: Path, target: Path) -> None:
    """Copy beside the target and rename, as an export does."""
    beside = target.with_name(f".{target.name}.new")
    shutil.copy(source, beside)
    beside.replace(target)


def digest(path: Path) -> str:
    return load_artifact(path).sha256


def served(client: httpx.Client) -> dict[str, str]:
    return {each["name"]: each["sha256"] for each in client.get("/models").json()["models"]}


def default(service: ServiceProcess) -> list[str]:
    models = service.client.get("/models").json()["models"]
    return [each["name"] for each in models if each["default"]]


def refused(service: ServiceProcess) -> dict[str, str]:
    listed = service.client.get("/models").json()
    errors = {each["file"]: each["error"] for each in listed["load_errors"]}
    assert {each["file"]: each["cause"] for each in listed["refused"]} == errors  # deprecated
    return errors


def named(answer: httpx.Response) -> str:
    """The digest that an answer says it comes from."""
    assert answer.status_code == 200, answer.text
    return answer.headers["X-Model"].partition("@sha256:")[2]


def reloads(service: ServiceProcess, outcome: str) -> float:
    return samples(service.client).get(("cgan_reloads_total", (("outcome", outcome),)), 0.0)


def of_models(service: ServiceProcess) -> set[tuple[str, str]]:
    """The name and digest of every model that the metrics know."""
    found = samples(service.client)
    labels = [dict(each) for name, each in found if name == "cgan_model_info"]
    return {(each["model"], each["sha256"]) for each in labels}


# What changes ------------------------------------------------------------------------------------


def test_a_replaced_file_is_served_within_moments_and_named_everywhere(
    service: ServiceProcess, weights: Path, variants: list[Path]
) -> None:
    old, new = digest(variants[0]), digest(variants[1])
    schema = service.client.get("/openapi.json").content
    before = service.client.post(RECIPE)
    loaded = reloads(service, "loaded")
    put(variants[1], weights / "small.safetensors")
    wait_until(lambda: served(service.client) == {"small": new}, "the new file is served")
    after = service.client.post(RECIPE)
    assert (named(before), named(after)) == (old, new)
    assert after.content != before.content
    assert of_models(service) == {("small", new)}
    assert reloads(service, "loaded") == loaded + 1
    assert service.client.get("/openapi.json").content == schema
    wait_until(lambda: logged(service, "a model was loaded")[-1]["sha256"] == new, "it is logged")


def test_a_file_is_added_and_removed_from_the_metrics_too(
    service: ServiceProcess, weights: Path, variants: list[Path]
) -> None:
    put(variants[1], weights / "more.safetensors")
    wait_until(lambda: "more" in served(service.client), "it is added")
    assert service.client.post(RECIPE + "&model=more").status_code == 200
    assert any(("model", "more") in labels for _, labels in samples(service.client))
    (weights / "more.safetensors").unlink()
    wait_until(lambda: "more" not in served(service.client), "it is removed")
    assert not any(("model", "more") in labels for _, labels in samples(service.client))
    answer = service.client.post(RECIPE + "&model=more")
    assert answer.status_code == 404
    assert "allowed: small" in answer.json()["detail"]


def test_the_default_is_chosen_again_by_the_same_rule(
    service: ServiceProcess, weights: Path, variants: list[Path]
) -> None:
    assert default(service) == ["small"]
    put(variants[1], weights / "mnist.safetensors")
    wait_until(lambda: default(service) == ["mnist"], "mnist is the default")
    (weights / "mnist.safetensors").unlink()
    wait_until(lambda: default(service) == ["small"], "the first one is the default")


def test_the_last_model_is_served_on_when_its_file_is_removed(
    service: ServiceProcess, weights: Path
) -> None:
    (weights / "small.safetensors").unlink()
    wait_until(lambda: bool(refused(service)), "an error is reported")
    assert refused(service) == {weights.name: "holds no *.safetensors file"}
    assert service.client.post(RECIPE).status_code == 200


# What is refused ---------------------------------------------------------------------------------


def test_a_bad_file_leaves_the_old_model_in_service_and_is_reported_everywhere(
    service: ServiceProcess, weights: Path, variants: list[Path], tmp_path: Path
) -> None:
    before = reloads(service, "refused")
    damaged = bytearray(variants[1].read_bytes())
    damaged[-2] ^= 1
    (tmp_path / "damaged").write_bytes(damaged)
    put(tmp_path / "damaged", weights / "small.safetensors")
    put(tmp_path / "damaged", weights / "new.safetensors")
    wait_until(lambda: len(refused(service)) == 2, "both are refused")
    cause = "is damaged: its contents are not the ones that were written"
    assert refused(service) == {"new.safetensors": cause, "small.safetensors": cause}
    assert reloads(service, "refused") == before + 2
    assert named(service.client.post(RECIPE)) == digest(variants[0])
    assert service.client.post(RECIPE + "&model=new").status_code == 404
    causes = {line["path"]: line["cause"] for line in logged(service, "a file was refused")}
    assert causes[str(weights / "small.safetensors")] == cause
    put(variants[1], weights / "small.safetensors")
    wait_until(lambda: list(refused(service)) == ["new.safetensors"], "a good one is not")
    assert named(service.client.post(RECIPE)) == digest(variants[1])
    assert reloads(service, "refused") == before + 2  # the other one was not tried again


def test_a_file_that_is_written_in_place_is_taken_when_it_is_complete(
    service: ServiceProcess, weights: Path, variants: list[Path]
) -> None:
    data = variants[1].read_bytes()
    with (weights / "small.safetensors").open("wb") as file:
        file.write(data[: len(data) // 2])
        file.flush()
        wait_until(lambda: bool(refused(service)), "a half is refused")
        assert named(service.client.post(RECIPE)) == digest(variants[0])
        file.write(data[len(data) // 2 :])
    wait_until(lambda: not refused(service), "the whole is taken")
    assert named(service.client.post(RECIPE)) == digest(variants[1])


def test_hidden_files_beside_a_new_model_stop_nothing(
    service: ServiceProcess, weights: Path, variants: list[Path]
) -> None:
    before = reloads(service, "refused")
    for name in ("._small.safetensors", "._more.safetensors", ".DS_Store"):
        (weights / name).write_bytes(b"\0\5\26\7")
    put(variants[1], weights / "more.safetensors")
    wait_until(lambda: set(served(service.client)) == {"more", "small"}, "the new model is served")
    assert refused(service) == {}
    assert reloads(service, "refused") == before


# Under load --------------------------------------------------------------------------------------


def test_swaps_under_load_lose_no_request_and_no_byte(
    service: ServiceProcess, weights: Path, variants: list[Path]
) -> None:
    digests = [digest(path) for path in variants]

    def swap(number: int) -> None:
        put(variants[number % 4], weights / "small.safetensors")
        service.signal(signal.SIGHUP)
        expected = {"small": digests[number % 4]}
        wait_until(lambda: served(service.client) == expected, f"swap {number}")

    expected = {}
    for number in (1, 2, 3, 0):
        swap(number)
        expected[digests[number]] = service.client.post(RECIPE).content
    assert len({Image.open(io.BytesIO(png)).tobytes() for png in expected.values()}) == 4

    finished = threading.Event()

    def load() -> Counter[str]:
        answered: Counter[str] = Counter()
        with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
            while not finished.is_set():
                answer = client.post(RECIPE)
                assert answer.content == expected[named(answer)]
                answered[named(answer)] += 1
        return answered

    with ThreadPoolExecutor(3) as pool:
        try:
            answers = [pool.submit(load) for _ in range(3)]
            for number in range(1, 21):  # `python -m tests.faults` does 200, and sees the memory
                swap(number)
                assert named(service.client.post(RECIPE)) == digests[number % 4]
        finally:
            finished.set()
    total = sum((each.result() for each in answers), Counter[str]())
    assert 1 < len(total) <= len(digests)
    assert total.total() >= 20


def gated(weights: Path, engine: GatedEngine) -> ModelRepository:
    """Return a repository of the files that serves a model which can be held up."""
    repository = load_repository(Settings(models=weights, device="cpu", max_batch=8))
    repository.replace(ModelSet([Model("small", engine)], "small"))
    return repository


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make_artifact(tmp_path / "small.safetensors")


def test_a_request_in_flight_is_answered_by_the_old_model_which_is_then_released(
    path: Path,
) -> None:
    engine = GatedEngine(load_artifact(path))
    gate, old = engine.gate, engine.artifact.sha256
    alive, started = weakref.ref(engine), engine.started
    app = create_app(Settings(), gated(path.parent, engine))
    del engine
    with serving(app) as client, ThreadPoolExecutor(1) as pool:
        in_flight = pool.submit(client.post, "/generate?label=cat&n=20&format=json")
        started.acquire()
        put(make_artifact(path.with_name("next"), seed=1), path)
        wait_until(lambda: served(client) != {"small": old}, "the new file is served")
        assert alive() is not None
        gate.set()
        answer = in_flight.result()
        assert named(answer) == old
        assert len(answer.json()["images"]) == 20
        assert named(client.post(RECIPE)) == digest(path) != old
        wait_until(lambda: alive() is None, "nothing holds the old engine")


def test_a_replaced_model_leaves_nothing_behind(path: Path) -> None:
    repository = load_repository(Settings(models=path.parent, device="cpu", max_batch=8))
    engine = repository.default.engine
    left = [weakref.ref(each) for each in (repository.default, engine, engine._network)]
    del engine
    with serving(create_app(Settings(), repository)) as client:
        assert named(client.post(RECIPE)) == digest(path)
        put(make_artifact(path.with_name("next"), seed=1), path)
        wait_until(lambda: served(client) == {"small": digest(path)}, "the new file is served")
        wait_until(lambda: gc.collect() >= 0 and not any(each() for each in left), "it is released")


def test_a_service_that_cannot_watch_says_so_and_serves(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def no_watch(*_: object, **__: object) -> AsyncIterator[set[Any]]:
        raise OSError(28, "No space left on device")
        yield set()

    monkeypatch.setattr(reload, "awatch", no_watch)
    repository = load_repository(Settings(models=path, device="cpu", max_batch=8))
    with serving(create_app(Settings(), repository)) as client:
        assert client.post(RECIPE).status_code == 200
    assert "cannot watch the models" in caplog.text


# Signals -----------------------------------------------------------------------------------------


def overwrite(path: Path, data: bytes) -> None:
    """Write to a file that seems unchanged, so that only reading it tells."""
    stat = path.stat()
    assert stat.st_size == len(data)
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_sighup_has_every_worker_read_all_files_again(variants: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    put(variants[0], path)
    with ServiceProcess("--workers", "2", "--models", str(path), "--max-batch", "8") as service:
        workers = pids(service)
        overwrite(path, variants[1].read_bytes())
        service.signal(signal.SIGHUP)
        wait_until(lambda: len(logged(service, "a model was loaded")) == 2, "both have loaded it")
        for pid in workers:
            with closing(client_of(service, pid)) as client:
                assert named(client.post(RECIPE)) == digest(variants[1])
        wait_until(lambda: of_models(service) == {("small", digest(variants[1]))}, "it is reported")
        service.signal()
        assert service.wait() == 0


def test_sighup_leaves_a_file_of_the_same_bytes_alone(
    service: ServiceProcess, weights: Path
) -> None:
    loaded = reloads(service, "loaded")
    broken = weights / "broken.safetensors"
    broken.write_bytes(b"")
    wait_until(lambda: bool(refused(service)), "one is refused")
    before = reloads(service, "refused")
    service.signal(signal.SIGHUP)
    wait_until(lambda: reloads(service, "refused") > before, "it is tried again")
    assert reloads(service, "loaded") == loaded
