"""The byte contract and the life of the process, through `python -m service` on a real socket."""

import io
import random
import signal
import zipfile
from concurrent.futures import ThreadPoolExecutor

import httpx

from tests.support.serving import ServiceProcess

Recipe = tuple[int, int, int]  # label, seed, n


def images(client: httpx.Client, recipe: Recipe) -> list[bytes]:
    """The single PNGs of a request, in order."""
    label, seed, n = recipe
    answer = client.post(f"/generate?label={label}&seed={seed}&n={n}&format=zip")
    assert answer.status_code == 200
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        return [archive.read(f"{label:04d}-{index:04d}.png") for index in range(n)]


KNOWN: Recipe = (7, 20_141_111, 20)
LONG = (*KNOWN[:2], 150)  # more than a batch
PATIENT = ("--max-queue-images", "100000", "--timeout-s", "600")


def crowd(count: int) -> list[Recipe]:
    """Requests of mixed classes, seeds and sizes, the known one among them."""
    rng = random.Random(0)
    mixed = [(rng.randrange(10), rng.getrandbits(64), rng.randrange(1, 90)) for _ in range(count)]
    mixed[count // 2] = KNOWN
    mixed[count // 3] = LONG
    return mixed


def test_the_same_seed_gives_the_same_bytes_in_a_crowd_after_a_restart_and_with_fewer_threads() -> (
    None
):
    two_threads = {"OMP_NUM_THREADS": "2"}
    with ServiceProcess(*PATIENT, environment=two_threads) as service:
        alone = images(service.client, KNOWN)
        requests = crowd(64)
        with ThreadPoolExecutor(64) as pool:
            crowded = list(pool.map(lambda each: images(service.client, each), requests))
        assert crowded[32] == alone
        assert crowded[21][:20] == alone, "a smaller n is the prefix of a larger one"
        quiet = [images(service.client, each) for each in requests]
        assert quiet == crowded
        batches = batch_sizes(service.client)
        assert batches[">1 request"] > 0, "nothing rode together, so nothing was shown"
    one_thread = {"OMP_NUM_THREADS": "1"}
    with ServiceProcess("--max-batch", "24", environment=one_thread) as restarted:
        assert images(restarted.client, KNOWN) == alone
        assert images(restarted.client, LONG) == crowded[21]
        restarted.signal(signal.SIGINT)
        assert restarted.wait() == 0
    assert not [line for line in restarted.errors if '"level": "error"' in line]


def batch_sizes(client: httpx.Client) -> dict[str, float]:
    """Count full batches, which a request of at most 89 images seldom fills by itself."""
    found = {}
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("cgan_batch_images_bucket"):
            found[line.split('"')[1]] = float(line.rsplit(" ", 1)[1])
    return {">1 request": found["64.0"] - found["48.0"]}


def test_float32_keeps_the_contract_too() -> None:
    with ServiceProcess("--dtype", "float32") as service:
        assert images(service.client, LONG)[:20] == images(service.client, KNOWN)


def test_sigterm_under_load_answers_what_was_admitted_and_exits_0() -> None:
    with ServiceProcess(*PATIENT) as service, ThreadPoolExecutor(16) as pool:
        url = "/generate?label=7&n=1024&format=zip"
        answers = [pool.submit(service.client.post, url) for _ in range(16)]
        while in_progress(service.client) < 4:
            assert not all(answer.done() for answer in answers), "there was no load to stop under"
        service.signal()
        for answer in answers:
            with zipfile.ZipFile(io.BytesIO(answer.result().content)) as archive:
                assert len(archive.namelist()) == 1025
        assert service.wait() == 0
    assert not [line for line in service.errors if '"level": "error"' in line]


def in_progress(client: httpx.Client) -> float:
    for line in client.get("/metrics").text.splitlines():
        if line.startswith("cgan_requests_in_progress "):
            return float(line.split()[1])
    raise AssertionError("no such metric")
