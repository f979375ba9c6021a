import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from service.errors import Problem
from service.generation import Client, Disconnected, GeneratedImages, Generation, Steps
from service.inference.batcher import Batcher
from service.inference.engine import Engine
from service.inference.repository import Model, ModelRepository
from service.telemetry.metrics import Metrics
from training.artifact import Artifact


@pytest.fixture
def generation(small_artifact: Artifact) -> Generation:
    engine = Engine(small_artifact, device=torch.device("cpu"), dtype=torch.float32, max_batch=16)
    metrics = Metrics()
    registry = ModelRepository([Model("small", engine), Model("twin", engine)], "small")
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
    def current_thread() -> bytes:
        return threading.current_thread().name.encode()

    async def thread(pixels: int) -> bytes:
        encoded, seconds = await generation.encode(current_thread, pixels=pixels)
        assert seconds >= 0
        return encoded

    async def scene() -> None:
        assert await thread(64 * 28 * 28) == current_thread()
        assert await thread(1024 * 28 * 28) != current_thread()

    asyncio.run(scene())


def test_steps_of_large_work_let_others_have_their_turn_and_are_taken_one_by_one(
    generation: Generation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def steps(name: str) -> Steps:
        for _ in range(3):
            seen.append(name)
            yield
        return name.encode()

    async def scene(pixels: int) -> None:
        works = [generation.encode(steps(name), pixels=pixels) for name in ("a", "b")]
        tasks = [asyncio.ensure_future(work) for work in works]
        for _ in range(20):
            await asyncio.sleep(0)
            seen.append("-")
        assert [(await task)[0] for task in tasks] == [b"a", b"b"]

    monkeypatch.setattr("service.generation._LONG_STRIDE_S", 1e-9)
    asyncio.run(scene(1024 * 28 * 28))
    told = "".join(seen)
    assert told.replace("-", "") == "aaabbb"
    assert "aa" not in told

    seen.clear()
    asyncio.run(scene(100))
    assert "".join(seen).startswith("aaabbb")


class Scene:
    """An order that waits for an engine, and whoever waits for it."""

    def __init__(self, generation: Generation) -> None:
        self.gate = threading.Event()
        engine = generation.registry.default.engine
        forward = engine._eager

        def held(inputs: Any) -> Any:
            assert self.gate.wait(60)
            return forward(inputs)

        engine._eager = held  # type: ignore[method-assign]
        self.generation, self.client = generation, Client()

    async def play(
        self, act: Callable[["asyncio.Task[GeneratedImages]"], object]
    ) -> GeneratedImages:
        """Act while the engine is held, then let it go on."""
        batcher = self.generation._batcher
        batcher.start()
        order = self.generation.order(labels=["cat"], n=40, seed=1, model=None)
        task = asyncio.ensure_future(self.generation.fulfil(order, self.client))
        await asyncio.sleep(0)
        try:
            act(task)
            await asyncio.sleep(0)
        finally:
            self.gate.set()
            await batcher.close()
        return await task


def test_an_order_is_fulfilled_while_its_client_stays(generation: Generation) -> None:
    scene = Scene(generation)
    images = asyncio.run(scene.play(lambda _: None))
    assert images.pixels.shape == (40, 12, 12, 1)
    assert scene.client.on_gone is None


def test_an_order_is_dropped_when_its_client_goes(generation: Generation) -> None:
    scene = Scene(generation)

    def leave(_: object) -> None:
        scene.client.gone = True
        assert scene.client.on_gone is not None
        scene.client.on_gone()

    with pytest.raises(Disconnected):
        asyncio.run(scene.play(leave))
    assert generation._batcher.queued_rows == 0


def test_a_client_that_went_before_gets_nothing_made(generation: Generation) -> None:
    scene = Scene(generation)
    scene.client.gone = True
    with pytest.raises(Disconnected):
        asyncio.run(scene.play(lambda _: None))


def test_a_cancellation_that_is_not_the_clients_stays_one(generation: Generation) -> None:
    scene = Scene(generation)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(scene.play(lambda task: task.cancel()))
