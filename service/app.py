"""The app: wires the parts together, and owns start-up and drain."""

import asyncio
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager

from fastapi import FastAPI

from service import problems
from service.batcher import Batcher
from service.generation import Generation
from service.metrics import Metrics
from service.observation import Observe
from service.registry import Registry
from service.routes import native, operations
from service.settings import Settings

DESCRIPTION = """\
Labelled synthetic images on demand. The same model, label, seed and index always give the same
image, whatever else the service is doing.
"""


class Drain:
    """The way from serving to stopped: refuse what is new, finish what was admitted."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._begun = False
        metrics.ready.set(0)

    def __call__(self) -> bool:
        """Whether it has begun."""
        return self._begun

    def begin(self) -> None:
        """Turn readiness off."""
        self._begun = True
        self._metrics.ready.set(0)


def create_app(settings: Settings, registry: Registry) -> FastAPI:
    """An app that serves the models of a registry.

    Starting it starts the engine thread; stopping it finishes what was admitted.
    """
    metrics = Metrics()
    drain = Drain(metrics)
    batcher = Batcher(settings.max_queue, settings.timeout_ms / 1e3, metrics)
    encoders = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="encoder")
    for model in registry:
        engine = model.engine
        dtype = str(engine.dtype).removeprefix("torch.")
        metrics.model.labels(model.name, model.sha256, str(engine.device), dtype).set(1)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        batcher.start()
        metrics.observe_queue(lambda: batcher.queued_rows)
        metrics.ready.set(1)
        try:
            yield
        finally:
            drain.begin()
            await batcher.close()
            await asyncio.to_thread(encoders.shutdown)

    app = FastAPI(title="cgan-service", description=DESCRIPTION, version="0.1.0", lifespan=lifespan)
    app.state.drain = drain
    app.state.batcher = batcher
    problems.install(app)
    app.include_router(native.create_router(Generation(registry, batcher, metrics, encoders)))
    app.include_router(operations.create_router(metrics, drain))
    app.add_middleware(Observe, metrics=metrics)
    return app
