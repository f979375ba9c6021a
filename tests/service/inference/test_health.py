"""A real process whose device fails: see `tests.support.faulty_engines`."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.faulty_engines import FITS, LOST, MEMORY, NAN
from tests.support.processes import REPOSITORY
from tests.support.serving import ServiceProcess

MLP = REPOSITORY / "weights" / "mnist-mlp.safetensors"


@pytest.fixture
def faulty() -> Iterator[ServiceProcess]:
    with ServiceProcess("--models", str(MLP), module="tests.support.faulty_engines") as running:
        yield running


def kind(answer: dict[str, str]) -> str:
    return answer["type"].removeprefix("urn:cgan:problem:")


def test_a_row_that_is_not_finite_fails_its_own_request_only(faulty: ServiceProcess) -> None:
    whole = faulty.client.post("/generate?label=3&n=4&seed=1").content
    failed = faulty.client.post(f"/generate?label=3&label={NAN}&n=4&seed=1")
    assert failed.status_code == 503
    assert kind(failed.json()) == "forward-failed"
    with ThreadPoolExecutor(8) as pool:
        queries = [f"label={label}&n=4&seed=1" for label in (3, NAN) * 20]
        answers = list(pool.map(lambda query: faulty.client.post(f"/generate?{query}"), queries))
    assert [answer.status_code for answer in answers] == [200, 503] * 20
    assert {answer.content for answer in answers[::2]} == {whole}
    assert faulty.client.get("/readyz").status_code == 200


def test_a_batch_that_does_not_fit_the_memory_is_computed_in_halves(faulty: ServiceProcess) -> None:
    for n, status in ((FITS, 200), (2 * FITS, 200), (4 * FITS, 503)):
        assert faulty.client.post(f"/generate?label={MEMORY}&n={n}").status_code == status
    whole, halves = (
        faulty.client.post(f"/generate?label={MEMORY}&n={n}&seed=1&format=json").json()["images"]
        for n in (FITS, 2 * FITS)
    )
    assert halves[:FITS] == whole


def test_a_lost_device_ends_the_process_with_a_status_that_asks_for_another(
    faulty: ServiceProcess,
) -> None:
    answer = faulty.client.post(f"/generate?label={LOST}")
    assert answer.status_code == 503
    assert kind(answer.json()) == "device-lost"
    assert faulty.wait() == os.EX_TEMPFAIL
    assert any("unspecified launch failure" in line for line in faulty.errors)
