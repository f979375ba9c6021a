"""Several worker processes behind one port, through `python -m service` on a real socket."""

import io
import os
import shutil
import signal
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest

from service.app import create_app
from service.inference import devices
from service.inference.repository import load_repository
from service.server import process, supervisor
from service.server.process import assign_device
from service.settings import Settings
from tests.conftest import make_artifact
from tests.service.api.test_health import samples, total
from tests.support.processes import REPOSITORY, run
from tests.support.serving import ServiceProcess, refused, serving
from tests.support.wire import ask, wait_until
from tests.support.workers import client_of, logged, pids, stopped

PATIENT = ("--workers", "2", "--max-queue-images", "1000000", "--timeout-s", "600")
MODEL = REPOSITORY / "weights" / "mnist-mlp.safetensors"
RECIPE = "/generate?label=7&label=3&n=5&seed=11&format=zip"


def scraped(service: ServiceProcess, name: str) -> float:
    """Return a metric, by a connection of its own, which any worker may accept."""
    with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
        return total(samples(client), name)


def write_snapshots(service: ServiceProcess) -> None:
    """Scrape every worker, so that the next scrape of any of them is exact."""
    for pid in pids(service):
        with closing(client_of(service, pid)) as client:
            samples(client)


def wait_for(service: ServiceProcess, name: str, value: float) -> None:
    wait_until(lambda: scraped(service, name) == value, f"{name} is {value:g}")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def two() -> Iterator[ServiceProcess]:
    with ServiceProcess(
        *PATIENT, "--self-test-interval-s", "3600", "--models", str(MODEL)
    ) as running:
        yield running


# Serving -----------------------------------------------------------------------------------------


def test_one_line_is_printed_when_all_workers_serve(two: ServiceProcess) -> None:
    assert two.first_line.startswith("Serving mnist-mlp at http://127.0.0.1:")
    assert two.first_line.endswith(" (2 workers)\n")
    assert len(set(pids(two))) == 2


def test_every_worker_gives_the_bytes_that_a_single_process_gives(
    two: ServiceProcess,
) -> None:
    settings = Settings(models=MODEL)
    with serving(create_app(settings, load_repository(settings))) as client:
        expected = client.post(RECIPE).raise_for_status().content
    for pid in pids(two):
        with closing(client_of(two, pid)) as client:
            assert client.post(RECIPE).content == expected


def test_metrics_are_of_all_workers_whichever_is_asked(two: ServiceProcess) -> None:
    clients = [client_of(two, pid) for pid in pids(two)]
    write_snapshots(two)
    for count, client in enumerate(clients, start=1):
        before = scraped(two, "cgan_images_total")
        for _ in range(count):
            client.post("/generate?label=7&n=10").raise_for_status()
        wait_for(two, "cgan_images_total", before + 10 * count)
    from_some = samples(clients[0])
    wait_for(two, "cgan_requests_in_progress", 0)
    for client, other in zip(clients, reversed(pids(two)), strict=True):
        with stopped(other), closing(client):
            found = samples(client)
        for name in ("cgan_images_total", "cgan_batch_images_sum", "cgan_batch_images_count"):
            assert total(found, name) == total(from_some, name) > 0
        assert total(found, "cgan_ready") == total(found, "cgan_workers") == 2
        assert total(found, "cgan_queue_images") == 0
        assert total(found, "cgan_model_info") == 1
        memory = {labels for name, labels in found if name == "process_resident_memory_bytes"}
        assert memory == {(("worker", "0"),), (("worker", "1"),)}


def test_images_that_wait_in_a_worker_that_hangs_are_counted(two: ServiceProcess) -> None:
    hung, other = pids(two)
    clients = [client_of(two, hung) for _ in range(8)]
    its, others = client_of(two, hung), client_of(two, other)
    with closing(its), closing(others), ThreadPoolExecutor(8) as pool:
        large = "/generate?label=7&n=1024"
        responses = [pool.submit(client.post, large) for client in clients]
        wait_until(lambda: total(samples(its), "cgan_queue_images") > 0, "images wait")
        with stopped(hung):
            assert total(samples(others), "cgan_queue_images") > 0
        assert {response.result().status_code for response in responses} == {200}
    for client in clients:
        client.close()
    wait_for(two, "cgan_queue_images", 0)


def test_workers_run_on_uvloop_as_a_single_process_does(two: ServiceProcess) -> None:
    """Asyncio's own loop holds small packets back on a socket that was opened elsewhere."""
    for pid in pids(two):
        assert "/uvloop/" in Path(f"/proc/{pid}/maps").read_text()


# Losing a worker ---------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_while_the_others_serve(two: ServiceProcess) -> None:
    killed, other = pids(two)
    exits, restarts = len(logged(two, "worker exited")), scraped(two, "cgan_worker_restarts_total")
    for pid in (killed, other):  # so that both count
        with closing(client_of(two, pid)) as client:
            client.post("/generate?label=7&n=10").raise_for_status()
    write_snapshots(two)
    before = counters(two)
    assert before["cgan_images_total"] >= 20
    its, watching, others = (client_of(two, pid) for pid in (killed, killed, other))
    with ThreadPoolExecutor(1) as pool, closing(its), closing(watching), closing(others):
        held = pool.submit(its.post, "/generate?label=3&n=1024&scale=4&format=zip")
        wait_until(lambda: total(samples(watching), "cgan_requests_in_progress") > 0, "it works")
        os.kill(killed, signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            held.result()
        wait_until(lambda: len(logged(two, "worker exited")) > exits, "the exit is logged")
        assert logged(two, "worker exited")[-1]["cause"] == "was killed by SIGKILL"
        wait_until(lambda: total(samples(others), "cgan_ready") == 1, "its gauges are gone")
        requests = 0
        while len(logged(two, "worker ready")) < 3:
            others.post("/generate?label=7&n=1").raise_for_status()
            requests += 1
        assert requests > 0
    wait_for(two, "cgan_ready", 2)
    wait_for(two, "cgan_requests_in_progress", 0)
    wait_for(two, "cgan_images_total", before["cgan_images_total"] + requests)
    after = counters(two)
    assert {name for name, value in before.items() if after[name] < value} == set()
    assert after["cgan_worker_restarts_total"] == restarts + 1
    with closing(client_of(two, pids(two)[0])) as client:
        client.post(RECIPE).raise_for_status()


def counters(service: ServiceProcess) -> dict[str, float]:
    """Return every metric that never decreases."""
    with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
        found = samples(client)
    names = {name for name, _ in found if name.startswith("cgan_")}
    ends = ("_total", "_sum", "_count", "_bucket")
    return {name: total(found, name) for name in names if name.endswith(ends)}


def test_a_worker_that_is_stopped_drains_and_is_replaced(two: ServiceProcess) -> None:
    exits, first = len(logged(two, "worker exited")), pids(two)[1]
    os.kill(first, signal.SIGTERM)
    wait_until(lambda: len(logged(two, "worker exited")) > exits, "the exit is logged")
    assert logged(two, "worker exited")[-1]["cause"] == "exited with status 0"
    assert first not in pids(two)


def test_workers_that_keep_exiting_end_the_service(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "small.safetensors")
    with ServiceProcess("--workers", "2", "--models", str(path)) as service:
        first = pids(service)
        path.unlink()
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        assert service.wait() == 1
    message = service.errors.pop()
    assert message.startswith("workers keep exiting")
    assert str(path) in message
    assert len(logged(service, "worker exited")) == 6


# Ends --------------------------------------------------------------------------------------------


def test_ctrl_c_in_all_of_them_under_load_answers_what_was_admitted_and_leaves_nothing(
    tmp_path: Path,
) -> None:
    """A signal to a group of processes reaches a worker directly and by the supervisor."""
    with (
        ServiceProcess(
            *PATIENT, "--models", str(MODEL), environment={"TMPDIR": str(tmp_path)}
        ) as service,
        ThreadPoolExecutor(8) as pool,
    ):
        assert len(list(tmp_path.iterdir())) == 1
        both = pids(service)
        url = service.client.base_url.join("/generate?label=7&n=1024&format=zip")
        responses = [pool.submit(httpx.post, url, timeout=60) for _ in range(8)]
        wait_until(lambda: arrived(service) == 8, "all have arrived")
        service.signal(signal.SIGINT)
        for pid in both:
            os.kill(pid, signal.SIGINT)
        for response in responses:
            with zipfile.ZipFile(io.BytesIO(response.result().content)) as archive:
                assert len(archive.namelist()) == 1025
        assert service.wait() == 0
    assert not [line for line in service.errors if '"level": "error"' in line]
    assert list(tmp_path.iterdir()) == []


def arrived(service: ServiceProcess) -> float:
    """Return the number of image requests that were answered or are being answered."""
    with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
        found = samples(client)
    answered = sum(
        value
        for (name, labels), value in found.items()
        if name == "cgan_requests_total" and ("route", "/generate") in labels
    )
    return answered + total(found, "cgan_requests_in_progress")


def test_a_second_signal_ends_it_at_once(artifact: Path) -> None:
    with ServiceProcess("--workers", "2", "--models", str(artifact)) as service:
        hung, other = pids(service)
        os.kill(hung, signal.SIGSTOP)
        service.signal()
        wait_until(lambda: has_ended(other), "the other one has drained")
        service.signal()
        assert service.wait() == 0


def has_ended(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return False
    return True


def test_no_worker_outlives_its_supervisor(artifact: Path, tmp_path: Path) -> None:
    temporary = {"TMPDIR": str(tmp_path)}  # nobody is left to remove the shared folder
    arguments = ("--workers", "2", "--models", str(artifact))
    with ServiceProcess(*arguments, environment=temporary) as service:
        pids(service)
        service.signal(signal.SIGKILL)
        assert service.wait() == -signal.SIGKILL  # and no worker holds the other end of its stderr
        with pytest.raises(httpx.ConnectError):
            service.client.get("/livez")


# Not starting ------------------------------------------------------------------------------------


def test_an_invalid_artifact_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    path.write_bytes(b"x")
    message = refused("--workers", "3", "--models", str(path))
    assert message.count("\n") == 1
    assert str(path) in message


def test_a_port_that_is_taken_is_one_line(service: ServiceProcess) -> None:
    port = service.client.base_url.port
    message = refused("--workers", "2", "--port", str(port))
    assert message == f"cannot open port {port} on 127.0.0.1: Address already in use\n"


# Temporary files ---------------------------------------------------------------------------------


def test_workers_share_memory_where_no_disk_is_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    monkeypatch.setattr(supervisor, "MEMORY_FOLDER", str(tmp_path))
    with supervisor.create_shared_folder() as folder:
        assert Path(folder).parent == tmp_path
        (Path(folder) / "0.prom").write_text("")
    assert list(tmp_path.iterdir()) == []


def test_workers_without_any_writable_folder_are_an_error_that_says_what_to_do(
    tmp_path: Path,
) -> None:
    """Nothing is writable where Python can create no folder."""
    code = f"""
import sys, tempfile
from service.__main__ import main
from service.server import supervisor
tempfile.tempdir = supervisor.MEMORY_FOLDER = {str(tmp_path / "missing")!r}
sys.exit(main())
"""
    ended = run("-c", code, "--workers", "2", "--port", "0")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "several workers need a folder for temporary files, and none is writable: make /tmp "
        "writable, set TMPDIR to a writable folder, or use --workers 1\n"
    )


# Devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("auto", 2, ["cuda:0", "cuda:1", "cuda:0"]),
        ("cuda", 4, ["cuda:0", "cuda:1", "cuda:2"]),
        ("cuda", 1, ["cuda", "cuda", "cuda"]),
        ("auto", 0, ["auto", "auto", "auto"]),
        ("cuda:1", 2, ["cuda:1", "cuda:1", "cuda:1"]),
        ("cpu", 2, ["cpu", "cpu", "cpu"]),
    ],
)
def test_workers_are_spread_over_gpus(
    device: str, gpus: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (process, devices):
        monkeypatch.setattr(module, "count_cuda_devices", lambda: gpus)
    settings = Settings(device=device)
    assert [assign_device(settings, index).device for index in range(3)] == expected


def test_workers_without_pytorch_are_assigned_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (process, devices):
        monkeypatch.setattr(module, "count_cuda_devices", lambda: 2)
    monkeypatch.setattr(devices, "has_pytorch", lambda: False)
    assert assign_device(Settings(device="auto"), 1).device == "auto"


def test_clients_are_timed_out_although_metrics_cannot_be_written(
    artifact: Path, tmp_path: Path
) -> None:
    options = ("--models", str(artifact), "--workers", "2", "--client-timeout-s", "1")
    with ServiceProcess(*options, environment={"TMPDIR": str(tmp_path)}) as service:
        (folder,) = tmp_path.glob("cgan-metrics-*")
        shutil.rmtree(folder)
        for _ in range(2):  # the second client waits for a check after the failed snapshot
            (answer,) = ask(service, b"GET /livez HTTP/1.1\r\n")
            assert answer.status == 408
