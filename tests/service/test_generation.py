import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from service.disconnect import Client, Disconnected
from service.errors import Problem
from service.generation import Generation, GenerationRequest
from service.inference.batcher import Batcher
from service.inference.engine import Engine
from service.inference.repository import Model, ModelRepository
from service.inference.scheduling import GenerationResult
from service.telemetry.metrics import Metrics
from training.artifact import Artifact


@pytest.fixture
def generation(small_artifact: Artifact) -> Generation:
    engine = Engine(small_artifact, device="cpu", dtype="float32", max_batch=16)
    metrics = Metrics()
    registry = ModelRepository([Model("small", engine), Model("twin", engine)], "small")
    return Generation(registry, Batcher(4096, 10.0, metrics), metrics)


def test_images_of_a_class_are_numbered_over_the_whole_request(generation: Generation) -> None:
    request = generation.resolve(GenerationRequest(["dog", "cat", "1", "dog"], n=2, seed=3))
    assert request.labels.tolist() == [1, 1, 0, 0, 1, 1, 1, 1]
    assert request.indices.tolist() == [0, 1, 0, 1, 2, 3, 4, 5]


def test_a_recipe_says_all_that_an_image_is_made_from(generation: Generation) -> None:
    request = GenerationRequest(["emu"], n=2, seed=2**64 - 1, model="twin")
    assert generation.resolve(request).recipe(1) == {
        "model": "twin",
        "sha256": generation.repository.default.sha256,
        "label": 2,
        "class": "emu",
        "seed": 2**64 - 1,
        "index": 1,
    }


def test_a_seed_that_is_drawn_fits_every_json_number(generation: Generation) -> None:
    seeds = {generation.resolve(GenerationRequest(["cat"])).seed for _ in range(50)}
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
def test_a_request_that_cannot_be_resolved_names_the_field(
    generation: Generation, labels: list[str], n: int, model: str | None, status: int, field: str
) -> None:
    with pytest.raises(Problem) as caught:
        generation.resolve(GenerationRequest(labels, n=n, seed=1, model=model))
    assert caught.value.status == status
    assert caught.value.errors[0].field == field


class HeldRequest:
    """A request whose engine waits for a gate, and its client."""

    def __init__(self, generation: Generation) -> None:
        self.gate = threading.Event()
        engine = generation.repository.default.engine
        network = engine._network

        def held(latents: Any, embedded: Any) -> Any:
            assert self.gate.wait(60)
            return network(latents, embedded)

        engine._network = held
        self.generation, self.client = generation, Client()

    async def play(
        self, act: Callable[["asyncio.Task[GenerationResult]"], object]
    ) -> GenerationResult:
        """Act while the engine is held, then let it go on."""
        batcher = self.generation._batcher
        batcher.start()
        request = self.generation.resolve(GenerationRequest(["cat"], n=40, seed=1))
        task = asyncio.ensure_future(self.generation.generate(request, self.client))
        await asyncio.sleep(0)
        try:
            act(task)
            await asyncio.sleep(0)
        finally:
            self.gate.set()
            await batcher.close()
        return await task


def test_images_are_generated_while_the_client_stays(generation: Generation) -> None:
    held = HeldRequest(generation)
    result = asyncio.run(held.play(lambda _: None))
    assert result.pixels.shape == (40, 12, 12, 1)
    assert held.client.on_disconnect is None


def test_a_request_is_withdrawn_when_its_client_disconnects(generation: Generation) -> None:
    held = HeldRequest(generation)
    with pytest.raises(Disconnected):
        asyncio.run(held.play(lambda _: held.client.disconnect()))
    assert generation._batcher.queued_rows == 0


def test_a_client_that_disconnected_before_gets_no_images(generation: Generation) -> None:
    held = HeldRequest(generation)
    held.client.disconnect()
    with pytest.raises(Disconnected):
        asyncio.run(held.play(lambda _: None))


def test_a_cancellation_that_is_not_the_clients_stays_one(generation: Generation) -> None:
    held = HeldRequest(generation)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(held.play(lambda task: task.cancel()))
