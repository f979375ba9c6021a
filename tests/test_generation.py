import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from starlette.types import Message

from service.batcher import Batcher
from service.engine import Engine
from service.generation import Disconnected, Generation, unless_disconnected
from service.metrics import Metrics
from service.problems import Problem
from service.registry import Model, Registry
from training.artifact import Artifact


@pytest.fixture
def generation(small_artifact: Artifact) -> Generation:
    engine = Engine(small_artifact, device=torch.device("cpu"), dtype=torch.float32, max_batch=16)
    metrics = Metrics()
    registry = Registry([Model("small", engine), Model("twin", engine)], "small")
    return Generation(registry, Batcher(4096, 10.0, metrics), metrics, ThreadPoolExecutor(1))


def test_images_of_a_class_are_numbered_over_the_whole_order(generation: Generation) -> None:
    order = generation.order(labels=["dog", "cat", "1", "dog"], n=2, seed=3, model=None)
    assert order.labels.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert order.indices.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


def test_a_recipe_says_all_that_an_image_is_made_from(generation: Generation) -> None:
    order = generation.order(labels=["emu"], n=2, seed=2**64 - 1, model="twin")
    assert order.recipe(1) == {
        "model": "twin",
        "sha256": generation.registry.default.sha256,
        "label": 2,
        "class": "emu",
        "seed": 2**64 - 1,
        "index": 1,
    }


def test_a_seed_that_is_drawn_fits_every_json_number(generation: Generation) -> None:
    seeds = {generation.order(labels=["cat"], n=1, seed=None, model=None).seed for _ in range(50)}
    assert len(seeds) == 50
    assert max(seeds) < 2**53


@pytest.mark.parametrize(
    ("labels", "n", "model", "status", "field"),
    [
        (["wolf"], 1, None, 422, "label"),
        (["cat", "3"], 1, None, 422, "label"),
        (["cat"] * 2, 513, None, 422, "n"),
        (["cat"], 1, "large", 404, "model"),
    ],
)
def test_an_order_that_cannot_be_made_names_the_field(
    generation: Generation, labels: list[str], n: int, model: str | None, status: int, field: str
) -> None:
    with pytest.raises(Problem) as caught:
        generation.order(labels=labels, n=n, seed=1, model=model)
    assert caught.value.status == status
    assert caught.value.errors[0].field == field


def test_small_images_are_encoded_at_once_and_large_ones_by_another_thread(
    generation: Generation,
) -> None:
    async def thread(pixels: int) -> threading.Thread:
        encoded, seconds = await generation.encode(threading.current_thread, pixels=pixels)
        assert seconds >= 0
        return encoded

    async def scene() -> None:
        assert await thread(64 * 28 * 28) is threading.current_thread()
        assert await thread(1024 * 28 * 28) is not threading.current_thread()

    asyncio.run(scene())


class Client:
    """The messages of a client: its request, then nothing until it goes away."""

    def __init__(self) -> None:
        self.watched = 0
        self.gone = asyncio.Event()

    async def receive(self) -> Message:
        self.watched += 1
        if self.watched == 1:
            return {"type": "http.request", "body": b"", "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}


@pytest.fixture
def watched_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.generation.WATCH_AFTER_S", 0)


async def waiting(future: "asyncio.Future[str]") -> str:
    return await future


def test_work_is_awaited_while_the_client_stays(watched_at_once: None) -> None:
    async def scene() -> str:
        client = Client()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        answer = asyncio.ensure_future(unless_disconnected(client.receive, future, waiting(future)))
        while client.watched < 2:
            await asyncio.sleep(0)
        future.set_result("done")
        return await answer

    assert asyncio.run(scene()) == "done"


def test_work_is_cancelled_when_the_client_goes(watched_at_once: None) -> None:
    async def scene() -> bool:
        client = Client()
        client.gone.set()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        with pytest.raises(Disconnected):
            await unless_disconnected(client.receive, future, waiting(future))
        return future.cancelled()

    assert asyncio.run(scene())


def test_a_cancellation_that_is_not_the_clients_stays_one(watched_at_once: None) -> None:
    async def scene() -> None:
        client = Client()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        answer = asyncio.ensure_future(unless_disconnected(client.receive, future, waiting(future)))
        while client.watched < 2:
            await asyncio.sleep(0)
        answer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await answer

    asyncio.run(scene())


def test_short_work_is_not_watched_and_leaves_no_task_behind() -> None:
    async def scene() -> None:
        client = Client()
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.set_result("done")
        assert await unless_disconnected(client.receive, future, waiting(future)) == "done"
        assert client.watched == 0
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(scene())


def test_an_error_of_the_work_is_the_callers() -> None:
    async def scene() -> None:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        future.set_exception(Problem(429, "overloaded", "later"))
        with pytest.raises(Problem, match="later"):
            await unless_disconnected(Client().receive, future, waiting(future))

    asyncio.run(scene())
