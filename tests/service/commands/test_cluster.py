"""The service on a real Ray cluster of this machine, two replicas of it."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from service.settings import ClusterSettings, parse
from tests.support.processes import run
from tests.support.serving import ServiceProcess

SEED = 20_141_111


@pytest.fixture(scope="module")
def cluster(bundled: Path) -> Iterator[ServiceProcess]:
    replicas = ("--min-replicas", "2", "--max-replicas", "2")
    with ServiceProcess(
        *("--models", str(bundled), "--device", "cpu", *replicas),
        command="cluster",
    ) as cluster:
        yield cluster
        cluster.signal()
        assert cluster.wait() == 0
        assert not replicas_of(cluster), "they end with the cluster that they were started for"


def replicas_of(cluster: ServiceProcess) -> list[int]:
    """Their processes, which are children of children of the cluster's."""
    listed = subprocess.run(
        ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True
    ).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    family = {cluster.process.pid}
    while grown := {int(pid) for pid, parent, *_ in rows if int(parent) in family} - family:
        family |= grown
    return [
        int(pid)
        for pid, _, command in rows
        if int(pid) in family and "ray::ServeReplica" in command
    ]


def ask(client: httpx.Client, path: str) -> httpx.Response:
    """The answer of a client that tries again."""
    until = time.monotonic() + 60.0
    while True:
        try:
            answer = client.post(path)
            if answer.status_code < 500:
                return answer
        except httpx.TransportError:
            pass
        assert time.monotonic() < until, "it was lost"


def test_the_replicas_give_the_same_bytes(cluster: ServiceProcess) -> None:
    path = f"/generate?label=7&n=16&seed={SEED}"
    seen: dict[str, set[bytes]] = {}
    with ThreadPoolExecutor(8) as clients:
        while len(seen) < 2:
            for answer in clients.map(lambda _: ask(cluster.client, path), range(32)):
                assert answer.status_code == 200
                seen.setdefault(answer.headers["X-Replica"], set()).add(answer.content)
    first, second = seen.values()
    assert len(first | second) == 1


def test_errors_and_pages_are_those_of_the_service(cluster: ServiceProcess) -> None:
    wrong = cluster.client.post("/generate?label=99")
    assert wrong.status_code == 422
    assert wrong.headers["Content-Type"] == "application/problem+json"
    assert cluster.client.get("/readyz").json() == {"status": "ready"}
    assert [each["name"] for each in cluster.client.get("/models").json()["models"]] == ["mnist"]
    assert cluster.client.get("/").headers["Content-Type"].startswith("text/html")
    # They would be those of whichever replica answers.
    assert cluster.client.get("/metrics").status_code == 404


def test_replicas_give_way_to_nothing_else_on_the_machine(cluster: ServiceProcess) -> None:
    replicas = replicas_of(cluster)
    assert len(replicas) == 2
    for replica in replicas:
        assert os.getpriority(os.PRIO_PROCESS, replica) == os.getpriority(os.PRIO_PROCESS, 0)


def test_a_killed_replica_is_replaced_and_nothing_is_lost_to_who_asks_again(
    cluster: ServiceProcess,
) -> None:
    before = replicas_of(cluster)
    assert len(before) == 2
    path = f"/generate?label=7&n=16&seed={SEED}"
    expected = ask(cluster.client, path).content
    killed = before[0]

    def work(number: int) -> bytes:
        if number == 40:
            os.kill(killed, signal.SIGKILL)
        return ask(cluster.client, path).content

    with ThreadPoolExecutor(8) as clients:
        assert set(clients.map(work, range(400))) == {expected}
    until = time.monotonic() + 60.0
    while len(set(replicas_of(cluster)) - {killed}) < 2:
        assert time.monotonic() < until, "it was not replaced"
        assert ask(cluster.client, path).content == expected


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        (
            ["--min-replicas", "3", "--max-replicas", "2"],
            "--max-replicas (or CGAN_MAX_REPLICAS): must be at least --min-replicas, which is 3, "
            "not 2",
        ),
        (
            ["--device", "cuda:1"],
            "--device (or CGAN_DEVICE): Ray assigns the GPUs; expected auto, cpu or cuda, "
            "not 'cuda:1'",
        ),
    ],
)
def test_what_cannot_be_is_said(arguments: list[str], cause: str) -> None:
    with pytest.raises(ValueError, match=re.escape(cause)):
        parse(ClusterSettings, arguments)


def test_a_cluster_that_is_not_there_ends_it_in_words() -> None:
    ended = run("-m", "service", "cluster", "--ray-address", "nowhere://x")
    assert ended.returncode == 1
    assert "--ray-address nowhere://x: " in ended.stderr.splitlines()[-1]


NO_PROXY = """
import sys
from ray import serve
from ray.exceptions import ActorDiedError
from service.__main__ import main
from service.commands import cluster

def start(**options):
    raise ActorDiedError

serve.start = start
cluster._connect = lambda address: None
sys.argv[1:] = ["cluster"]
sys.exit(main())
"""


def test_a_proxy_that_does_not_come_up_ends_it_in_words() -> None:
    ended = run("-c", NO_PROXY)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("Ray cannot serve the models: The actor died")
