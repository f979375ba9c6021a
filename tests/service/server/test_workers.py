"""Several worker processes behind one port, through `python -m service` on a real socket."""

import io
import json
import os
import signal
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from service.server.accepting import TOLERANCE
from service.server.process import listening, on_own_device
from service.settings import Settings
from service.startup import ServiceError
from tests.conftest import make_artifact
from tests.service.api.test_health import samples, total
from tests.support.clients import port_of
from tests.support.serving import ServiceProcess, refused

DEADLINE_S = 60.0
PATIENT = ("--workers", "2", "--max-queue-images", "1000000", "--timeout-s", "600")
RECIPE = "/generate?label=cat&label=dog&n=5&seed=11&format=zip"


def wait_until(reached: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not reached():
        assert time.monotonic() < deadline, f"never happened: {what}"


def logged(service: ServiceProcess, message: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in list(service.errors)]
    return [line for line in lines if line["message"] == message]


def pids(service: ServiceProcess, count: int = 2) -> list[int]:
    """The process ids of the first workers that served, in the order of their start to serve."""
    wait_until(
        lambda: len(logged(service, "a worker serves")) >= count, f"{count} workers that serve"
    )
    return [line["pid"] for line in logged(service, "a worker serves")]


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Whatever is asked meanwhile, this worker does not answer it."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def ask(service: ServiceProcess, path: str) -> httpx.Response:
    """A request on a connection of its own, which any worker may take."""
    return httpx.post(service.client.base_url.join(path), timeout=60).raise_for_status()


def scraped(service: ServiceProcess, name: str) -> float:
    with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
        return total(samples(client), name)


def write_snapshots(service: ServiceProcess) -> None:
    """Scrape every worker, so that the next scrape of any of them is exact."""
    for other in pids(service):
        with stopped(other):
            scraped(service, "cgan_ready")


def wait_for(service: ServiceProcess, name: str, value: float) -> None:
    wait_until(lambda: scraped(service, name) == value, f"{name} is {value:g}")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("weights") / "small.safetensors")


@pytest.fixture(scope="module")
def two(artifact: Path) -> Iterator[ServiceProcess]:
    arguments = ("--workers", "2", "--self-test-interval-s", "3600", "--models", str(artifact))
    with ServiceProcess(*arguments) as running:
        yield running


# Serving -----------------------------------------------------------------------------------------


def test_one_line_is_said_when_all_of_them_serve(two: ServiceProcess) -> None:
    assert two.first_line.startswith("Serving small at http://127.0.0.1:")
    assert two.first_line.endswith(" (2 workers)\n")
    assert len(set(pids(two))) == 2


def test_every_worker_gives_the_bytes_that_a_single_process_gives(
    two: ServiceProcess, artifact: Path
) -> None:
    with ServiceProcess("--models", str(artifact)) as one:
        expected = one.client.post(RECIPE).content
    for other in pids(two):
        with stopped(other):
            assert ask(two, RECIPE).content == expected


def test_metrics_are_of_all_workers_whichever_is_asked(two: ServiceProcess) -> None:
    for count, other in enumerate(pids(two), start=1):
        write_snapshots(two)
        before = scraped(two, "cgan_images_total")
        with stopped(other):
            for _ in range(count):
                ask(two, "/generate?label=cat&n=10")
        wait_for(two, "cgan_images_total", before + 10 * count)
    with httpx.Client(base_url=two.client.base_url) as client:
        from_some = samples(client)
    for other in pids(two):
        wait_for(two, "cgan_requests_in_progress", 0)
        with stopped(other), httpx.Client(base_url=two.client.base_url) as client:
            found = samples(client)
        for name in ("cgan_images_total", "cgan_batch_images_sum", "cgan_batch_images_count"):
            assert total(found, name) == total(from_some, name) > 0
        assert total(found, "cgan_ready") == total(found, "cgan_workers") == 2
        assert total(found, "cgan_queue_images") == 0
        assert total(found, "cgan_model_info") == 1
        assert total(found, "cgan_worker_restarts_total") == 0
        memory = {labels for name, labels in found if name == "process_resident_memory_bytes"}
        assert memory == {(("worker", "0"),), (("worker", "1"),)}


def test_rows_that_wait_in_another_worker_are_seen(bundled: Path) -> None:
    """A worker that hangs is the one whose queue matters, and the one that is not scraped."""
    with (
        ServiceProcess(*PATIENT, "--models", str(bundled)) as service,
        ThreadPoolExecutor(16) as pool,
    ):
        first, second = pids(service)
        with stopped(second):
            # Of a large model, so that they wait for longer than clients take to begin.
            answers = [pool.submit(ask, service, "/generate?label=7&n=1024") for _ in range(8)]
            wait_until(lambda: scraped(service, "cgan_queue_images") > 0, "rows wait")
            os.kill(first, signal.SIGSTOP)
        assert scraped(service, "cgan_queue_images") > 0
        os.kill(first, signal.SIGCONT)
        assert {answer.result().status_code for answer in answers} == {200}
        wait_for(service, "cgan_queue_images", 0)


def connections_of(service: ServiceProcess) -> list[int]:
    """How many connections each worker says it has; -1 where it takes none."""
    mapped = Path(f"/proc/{pids(service)[-1]}/maps").read_text().split()
    shared = next(each for each in mapped if each.endswith("/connections"))
    return [each - 1 for each in struct.unpack("2q", Path(shared).read_bytes())]


def has_connections(service: ServiceProcess, count: int) -> bool:
    return sum(connections_of(service)) == count


def test_connections_are_shared_between_workers(two: ServiceProcess) -> None:
    wait_until(lambda: connections_of(two) == [0, 0], "no worker has a connection")
    with ExitStack() as stack:
        for count in range(1, 33):
            stack.enter_context(socket.create_connection(("127.0.0.1", port_of(two))))
            wait_until(partial(has_connections, two, count), "it was taken")
        few, many = sorted(connections_of(two))
        assert many <= TOLERANCE * (few + 1)
    wait_until(lambda: connections_of(two) == [0, 0], "what was lost is counted no more")


def test_workers_run_on_uvloop_as_a_single_process_does(two: ServiceProcess) -> None:
    """Asyncio's own loop holds small packets back on a socket that was opened elsewhere."""
    for pid in pids(two):
        assert "/uvloop/" in Path(f"/proc/{pid}/maps").read_text()


# Losing a worker ---------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_while_the_others_serve(artifact: Path) -> None:
    with (
        ServiceProcess(*PATIENT, "--models", str(artifact)) as service,
        ThreadPoolExecutor(16) as pool,
    ):
        killed, other = pids(service)
        for _ in range(8):
            ask(service, "/generate?label=cat&n=10")
        with stopped(other):
            held = [
                pool.submit(ask, service, "/generate?label=dog&n=1024&scale=4&format=zip")
                for _ in range(16)
            ]
            wait_until(lambda: scraped(service, "cgan_requests_in_progress") > 3, "it is at work")
            os.kill(killed, signal.SIGKILL)
        # What its connections held is lost, and what still waited for a connection is answered.
        for each in held:
            with suppress(httpx.TransportError):
                each.result()
        wait_until(lambda: bool(logged(service, "a worker ended")), "the end is logged")
        assert logged(service, "a worker ended")[0]["cause"] == "ended by SIGKILL"
        counted = scraped(service, "cgan_images_total")
        assert counted >= 80

        asked = 0
        deadline = time.monotonic() + DEADLINE_S
        while len(logged(service, "a worker serves")) < 3:
            assert time.monotonic() < deadline, "no worker came in its place"
            ask(service, "/generate?label=cat&n=1")
            asked += 1
            assert scraped(service, "cgan_images_total") >= counted
        assert asked > 0
        wait_for(service, "cgan_ready", 2)
        with stopped(other):
            assert len(ask(service, RECIPE).content) > 0
        wait_for(service, "cgan_requests_in_progress", 0)
        wait_for(service, "cgan_images_total", counted + asked + 10)
        assert scraped(service, "cgan_worker_restarts_total") == 1
        assert scraped(service, "cgan_queue_images") == 0
        service.signal()
        assert service.wait() == 0


def test_what_was_counted_stays_and_what_was_under_way_goes_with_a_killed_worker(
    artifact: Path,
) -> None:
    with ServiceProcess("--workers", "2", "--models", str(artifact)) as service:
        killed, other = pids(service)
        for pid in (other, killed):  # so that both of them count
            with stopped(pid):
                ask(service, "/generate?label=cat&n=10")
        write_snapshots(service)
        before = counters(service)
        assert before["cgan_images_total"] == 20
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: bool(logged(service, "a worker ended")), "the end is logged")
        wait_until(lambda: -1 in connections_of(service), "nobody leaves it connections")
        wait_for(service, "cgan_ready", 1)
        pids(service, 3)
        wait_for(service, "cgan_ready", 2)
        after = counters(service)
        assert {name for name, value in before.items() if after[name] < value} == set()
        assert after["cgan_worker_restarts_total"] == 1


def counters(service: ServiceProcess) -> dict[str, float]:
    """Everything that only ever grows."""
    with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
        found = samples(client)
    names = {name for name, _ in found if name.startswith("cgan_")}
    ends = ("_total", "_sum", "_count", "_bucket")
    return {name: total(found, name) for name in names if name.endswith(ends)}


def test_a_worker_told_to_stop_drains_and_is_replaced(artifact: Path) -> None:
    with ServiceProcess("--workers", "2", "--models", str(artifact)) as service:
        os.kill(pids(service)[0], signal.SIGTERM)
        pids(service, 3)
        assert logged(service, "a worker ended")[0]["cause"] == "ended with 0"
        assert ask(service, RECIPE).status_code == 200


def test_workers_that_keep_ending_end_the_service(tmp_path: Path) -> None:
    path = make_artifact(tmp_path / "small.safetensors")
    with ServiceProcess("--workers", "2", "--models", str(path)) as service:
        first = pids(service)
        path.unlink()
        for pid in first:
            os.kill(pid, signal.SIGKILL)
        assert service.wait() == 1
    message = service.errors.pop()
    assert message.startswith("workers keep ending")
    assert str(path) in message
    assert len(logged(service, "a worker ended")) == 6


# Ends --------------------------------------------------------------------------------------------


def test_sigterm_to_all_of_them_under_load_answers_what_was_admitted(bundled: Path) -> None:
    """Whoever stops a group of processes signals workers twice: directly, and by the supervisor."""
    with (
        ServiceProcess(*PATIENT, "--models", str(bundled)) as service,
        ThreadPoolExecutor(8) as pool,
    ):
        both = pids(service)
        url = "/generate?label=7&n=1024&format=zip"
        answers = [pool.submit(ask, service, url) for _ in range(8)]
        wait_until(lambda: arrived(service) == 8, "all have arrived")
        service.signal()
        for pid in both:
            os.kill(pid, signal.SIGTERM)
        for answer in answers:
            with zipfile.ZipFile(io.BytesIO(answer.result().content)) as archive:
                assert len(archive.namelist()) == 1025
        assert service.wait() == 0
    assert not [line for line in service.errors if '"level": "error"' in line]


def arrived(service: ServiceProcess) -> float:
    """Requests for images that were answered or are being answered."""
    with httpx.Client(base_url=service.client.base_url, timeout=60) as client:
        found = samples(client)
    answered = sum(
        value
        for (name, labels), value in found.items()
        if name == "cgan_requests_total" and ("route", "/generate") in labels
    )
    return answered + total(found, "cgan_requests_in_progress")


def test_ctrl_c_exits_0_and_leaves_nothing(artifact: Path, tmp_path: Path) -> None:
    temporary = {"TMPDIR": str(tmp_path)}
    arguments = ("--workers", "2", "--models", str(artifact), "--log-level", "warning")
    with ServiceProcess(*arguments, environment=temporary) as service:
        assert len(list(tmp_path.iterdir())) == 1
        service.signal(signal.SIGINT)
        assert service.wait() == 0
    assert service.errors == []
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_it_at_once(artifact: Path) -> None:
    with ServiceProcess("--workers", "2", "--models", str(artifact)) as service:
        hung, other = pids(service)
        os.kill(hung, signal.SIGSTOP)
        service.signal()
        wait_until(lambda: is_gone(other), "the other one has drained")
        service.signal()
        assert service.wait() == 0


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_no_worker_outlives_its_supervisor(artifact: Path, tmp_path: Path) -> None:
    temporary = {"TMPDIR": str(tmp_path)}  # for nobody is left to remove the folder of the metrics
    arguments = ("--workers", "2", "--models", str(artifact))
    with ServiceProcess(*arguments, environment=temporary) as service:
        pids(service)
        service.signal(signal.SIGKILL)
        assert service.wait() == -signal.SIGKILL  # and nobody holds the other end of its stderr
        with pytest.raises(httpx.ConnectError):
            service.client.get("/livez")


def test_sockets_that_another_process_listens_on_are_not_served_in_silence() -> None:
    with socket.socket() as first, socket.socket() as second:
        for each in (first, second):
            each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        first.bind(("127.0.0.1", 0))
        second.bind(first.getsockname())
        second.listen()
        with pytest.raises(ServiceError, match="already in use"):
            listening(first.detach())


# Not starting ------------------------------------------------------------------------------------


def test_an_artifact_that_is_none_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    path.write_bytes(b"x")
    message = refused("--workers", "3", "--models", str(path))
    assert message.count("\n") == 1
    assert str(path) in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_absent_is_one_line() -> None:
    message = refused("--workers", "2", "--device", "cuda")
    assert message.count("\n") == 1
    assert "cuda was asked for" in message


def test_a_port_that_is_taken_is_one_line(two: ServiceProcess, artifact: Path) -> None:
    port = str(two.client.base_url.port)
    message = refused("--workers", "2", "--models", str(artifact), "--port", port)
    assert message.count("\n") == 1
    assert "address already in use" in message


# What a worker takes -----------------------------------------------------------------------------


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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    settings = Settings(device=device)
    assert [on_own_device(settings, index).device for index in range(3)] == expected
