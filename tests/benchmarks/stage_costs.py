"""`python -m tests.benchmarks.stage_costs`: what each step of a request costs, on one core.

Prints microseconds of processor time, the least of several rounds: of a request, and of one image
where it says so. HTTP itself is in `tests.benchmarks.serving`, as the floors.
"""

import asyncio
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import uvloop
from numpy.typing import NDArray

from service.api.parameters import parse_query
from service.disconnect import Client
from service.encoding.images import encode_sheet, encode_zip
from service.encoding.png import encode_contact_sheet
from service.encoding.timeslice import finish
from service.generation import Generation, GenerationRequest, ResolvedRequest
from service.inference.batcher import Batcher
from service.inference.engine import Engine
from service.inference.latents import draw_latents
from service.inference.repository import Model, ModelRepository
from service.inference.scheduling import GenerationResult
from service.telemetry.metrics import Metrics
from tests.benchmarks.serving import WEIGHTS
from tests.support.engines import EngineStub
from training.artifact import list_artifacts, read_artifact

ROUNDS = 7


def microseconds(function: Callable[[], object], calls: int = 100) -> float:
    """Processor time of one call."""
    best = float("inf")
    for _ in range(ROUNDS):
        began = time.process_time()
        for _ in range(calls):
            function()
        best = min(best, (time.process_time() - began) / calls * 1e6)
    return best


def paint_nothing(seeds: NDArray[np.uint64], *_: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return blank images at once, so that the batcher is all that is measured."""
    return np.zeros((len(seeds), 28, 28, 1), np.uint8)


def batching(rows: int, together: int = 64, rounds: int = 200) -> float:
    """Return the processor time of a request of `rows` rows in the batcher, on both threads."""

    async def main() -> float:
        batcher = Batcher(1 << 20, 60.0, Metrics())
        batcher.start()
        engine = EngineStub(256, paint_nothing)
        seeds, numbers = np.zeros(rows, np.uint64), np.arange(rows)
        began = time.process_time()
        for _ in range(rounds):
            requests = [batcher.admit(engine, seeds, numbers, numbers) for _ in range(together)]
            await asyncio.gather(*map(batcher.wait, requests))
        spent = time.process_time() - began
        await batcher.close()
        return spent / (rounds * together) * 1e6

    return min(uvloop.run(main()) for _ in range(3))


def forwards(engine: Engine) -> None:
    """Print what latents, network and pixels of an image cost, by batch size."""
    print(f"{engine.artifact.path.stem}, {engine.dtype}")
    latent_dim = engine.artifact.info.network.latent_dim
    for rows in (1, 8, 16, 64, 128, 256):
        seeds, numbers = np.full(rows, 5, np.uint64), np.arange(rows)
        latents = microseconds(partial(draw_latents, seeds, numbers, latent_dim), 30)
        whole = microseconds(partial(engine, seeds, numbers, numbers % 10), 30)
        print(
            f"batch of {rows:>3}: {whole / rows:7.1f} us an image, its latent {latents / rows:.1f}"
        )


def whole_zip(request: ResolvedRequest, result: GenerationResult) -> bytes:
    """All single PNGs in one file."""
    return finish(encode_zip(request, result, 1))


def main() -> None:
    """Measure all steps of requests for 1, 16 and 64 images."""
    for path in list_artifacts(WEIGHTS.parent):
        artifact = read_artifact(path)
        for dtype in artifact.graphs:
            forwards(Engine(artifact, device="cpu", dtype=dtype, max_batch=256))
    engine = Engine(read_artifact(WEIGHTS), device="cpu", dtype="auto", max_batch=256)
    print(f"{WEIGHTS.stem}, {engine.dtype}")
    metrics = Metrics()
    batcher = Batcher(4096, 10.0, metrics)
    registry = ModelRepository([Model(WEIGHTS.stem, engine)], WEIGHTS.stem)
    generation = Generation(registry, batcher, metrics)
    for n in (1, 16, 64):
        asked = GenerationRequest(labels=["3"], n=n, seed=5)
        request = generation.resolve(asked)
        pixels = engine(request.seeds, request.indices, request.labels)
        result = GenerationResult(pixels, 0.0, 0.0)
        steps: dict[str, Callable[[], object]] = {
            "parse and validate": partial(parse_query, b"label=3&n=16&seed=5"),
            "resolve": partial(generation.resolve, asked),
            "sheet and PNG": partial(encode_contact_sheet, pixels, {}),
            "sheet, PNG and recipe": partial(encode_sheet, request, result, 1),
            "zip": partial(whole_zip, request, result),
            "record": partial(generation.record_sent, request, Client()),
        }
        found = ", ".join(f"{name} {microseconds(step):.1f}" for name, step in steps.items())
        print(f"n={n}: batcher {batching(n):.1f}, {found}")


if __name__ == "__main__":
    main()
