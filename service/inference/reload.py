"""Keeps what is served the same as what the weights hold: on every change of them, and on SIGHUP.

Files are read, and engines built and checked, on a thread of their own. The event loop only swaps
the finished models in, so a request either had the old ones or has the new ones, and what is in
flight keeps its model until it is answered.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from watchfiles import awatch

from service.inference.repository import Found, Model, ModelRepository, Weights
from service.telemetry.metrics import Metrics, ModelLabels

_STEP_MS = 200  # a change is acted on when nothing else changed for so long
# The files are looked at so often even if no change was reported: a network disk reports none.
_LOOK_AT_LEAST_EVERY_MS = 10_000

log = logging.getLogger("service.inference.reload")


class Reloader:
    """Replaces the models of a registry; all methods are for the event loop.

    Args:
        registry: does not change unless its models are from files.
        metrics: told of the models there are.
    """

    def __init__(self, registry: ModelRepository, metrics: Metrics) -> None:
        self._registry = registry
        self._metrics = metrics
        # It has as many PyTorch threads as the engine's, so that what is checked is what will be
        # computed, and as much of the cores: at a lower priority it would be left waiting while it
        # holds the interpreter's lock, and with it every request.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._one_at_a_time = asyncio.Lock()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        for model in registry:
            metrics.model_loaded(_labels(model), model.info.certificate)

    def start(self) -> None:
        """Watch the weights from now on."""
        if self._registry.weights is not None:
            self._tasks.add(asyncio.ensure_future(self._watch(self._registry.weights)))

    def on_hangup(self) -> None:
        """Read all files again, also those that seem not to have changed."""
        if self._registry.weights is not None and not self._closing.is_set():
            task = asyncio.ensure_future(self._reload(self._registry.weights, afresh=True))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Watch no longer, and wait for a file that is being loaded."""
        self._closing.set()
        await asyncio.gather(*self._tasks)
        self._thread.shutdown()

    async def _watch(self, weights: Weights) -> None:
        # The folder also of a single file: one that is renamed into its place is another file.
        folder = weights.path if weights.path.is_dir() else weights.path.parent
        changes = awatch(
            folder,
            watch_filter=None,  # a change may be of a link that the files' own links go through
            step=_STEP_MS,
            stop_event=self._closing,
            rust_timeout=_LOOK_AT_LEAST_EVERY_MS,
            yield_on_timeout=True,
            recursive=False,
        )
        try:
            async for _ in changes:
                await self._reload(weights)
        except (OSError, RuntimeError):  # there may be too many watches on this machine
            log.exception("the weights are not watched", extra={"fields": {"path": str(folder)}})

    async def _reload(self, weights: Weights, *, afresh: bool = False) -> None:
        async with self._one_at_a_time:
            if self._closing.is_set():
                return
            look_again = partial(weights.look_again, self._registry, afresh=afresh)
            found = await asyncio.get_running_loop().run_in_executor(self._thread, look_again)
            self._swap(found)

    def _swap(self, found: Found) -> None:
        """Serve what was found, and tell what is different."""
        before, refused_before = list(self._registry), self._registry.refused
        self._registry.replace(found)
        for model in before:
            if model not in found.models:
                self._metrics.model_removed(_labels(model))
            if self._registry.find(model.name) is None:
                self._tell("removed", logging.INFO, model=model.name, sha256=model.sha256)
        for model in found.models:
            if model not in before:
                self._metrics.model_loaded(_labels(model), model.info.certificate)
                self._tell("loaded", logging.INFO, model=model.name, sha256=model.sha256)
        for name, refusal in found.refused.items():
            if refused_before.get(name) is not refusal:
                self._tell("refused", logging.ERROR, path=str(refusal.path), cause=refusal.cause)

    def _tell(self, outcome: str, level: int, **fields: str) -> None:
        self._metrics.reloads.labels(outcome).inc()
        subject = "a model" if "model" in fields else "a file"
        log.log(level, f"{subject} was {outcome}", extra={"fields": fields})


def _labels(model: Model) -> ModelLabels:
    engine = model.engine
    dtype = str(engine.dtype).removeprefix("torch.")
    return ModelLabels(model.name, model.sha256, str(engine.device), dtype)
