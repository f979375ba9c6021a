import asyncio
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


async def never() -> Message:
    """The messages of a client that stays."""
    future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
    return await future


def test_work_is_awaited_while_the_client_stays() -> None:
    async def scene() -> str:
        async def work() -> str:
            return "done"

        return await unless_disconnected(never, work())

    assert asyncio.run(scene()) == "done"


def test_work_is_cancelled_when_the_client_goes() -> None:
    cancelled = []

    async def scene() -> None:
        messages: asyncio.Queue[Message] = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": b"", "more_body": False})

        async def work() -> None:
            messages.put_nowait({"type": "http.disconnect"})
            try:
                await asyncio.get_running_loop().create_future()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        with pytest.raises(Disconnected):
            await unless_disconnected(messages.get, work())
        await asyncio.sleep(0)

    asyncio.run(scene())
    assert cancelled == [True]


def test_an_error_of_the_work_is_the_callers() -> None:
    async def scene() -> None:
        async def work() -> None:
            raise Problem(429, "overloaded", "later")

        with pytest.raises(Problem, match="later"):
            await unless_disconnected(never, work())

    asyncio.run(scene())
