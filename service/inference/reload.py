"""Hot reload: keep the served models in step with their files, on every change and on SIGHUP.

One thread reads files, builds engines and tests them. The event loop only swaps the finished models
in, so a request uses either the old models or the new ones, and a request in flight keeps its model
until it is answered.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from watchfiles import awatch

from service.inference.repository import Model, ModelLoader, ModelRepository, ModelSet
from service.telemetry.metrics import Metrics, ModelLabels

_DEBOUNCE_MS = 200  # reload when nothing has changed for this long
_RESCAN_MS = 10_000  # rescan at least this often: a network disk reports no changes

log = logging.getLogger("service.inference.reload")


class Reloader:
    """Replaces the models of a repository, if they are from files.

    Call all methods on the event loop.
    """

    def __init__(self, repository: ModelRepository, metrics: Metrics) -> None:
        self._repository = repository
        self._metrics = metrics
        # It has the priority of the engine thread: a slower thread would hold the interpreter's
        # lock for longer, and with it every request.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._lock = asyncio.Lock()
        self._closing = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        for model in repository:
            metrics.model_loaded(_labels(model), model.info.certificate)

    def start(self) -> None:
        """Watch the files from now on."""
        if self._repository.loader is not None:
            self._tasks.add(asyncio.ensure_future(self._watch(self._repository.loader)))

    def on_sighup(self) -> None:
        """Read all files again, also those that seem unchanged."""
        if self._repository.loader is not None and not self._closing.is_set():
            task = asyncio.ensure_future(self._reload(self._repository.loader, force=True))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop watching, and wait for a file that is being loaded."""
        self._closing.set()
        await asyncio.gather(*self._tasks)
        self._thread.shutdown()

    async def _watch(self, loader: ModelLoader) -> None:
        # Also of a single file the folder: one that is renamed into its place is another file.
        folder = loader.path if loader.path.is_dir() else loader.path.parent
        changes = awatch(
            folder,
            watch_filter=None,  # the files may be links to a link that changes
            step=_DEBOUNCE_MS,
            stop_event=self._closing,
            rust_timeout=_RESCAN_MS,
            yield_on_timeout=True,
            recursive=False,
        )
        try:
            async for _ in changes:
                await self._reload(loader)
        except (OSError, RuntimeError):  # for example too many watches on this machine
            log.exception("cannot watch the models", extra={"fields": {"path": str(folder)}})

    async def _reload(self, loader: ModelLoader, *, force: bool = False) -> None:
        async with self._lock:
            if self._closing.is_set():
                return
            rescan = partial(loader.rescan, self._repository, force=force)
            found = await asyncio.get_running_loop().run_in_executor(self._thread, rescan)
            self._swap(found, force=force)

    def _swap(self, found: ModelSet, *, force: bool) -> None:
        """Serve these models, and report what is different, or with `force` every error."""
        before, errors_before = list(self._repository), self._repository.load_errors
        self._repository.replace(found)
        for model in before:
            if model not in found.models:
                self._metrics.model_removed(_labels(model))
            if self._repository.get(model.name) is None:
                self._report("removed", logging.INFO, model=model.name, sha256=model.sha256)
        for model in found.models:
            if model not in before:
                self._metrics.model_loaded(_labels(model), model.info.certificate)
                self._report("loaded", logging.INFO, model=model.name, sha256=model.sha256)
        for path, cause in found.load_errors.items():
            if force or errors_before.get(path) != cause:
                self._report("refused", logging.ERROR, path=str(path), cause=cause)

    def _report(self, outcome: str, level: int, **fields: str) -> None:
        self._metrics.reloads.labels(outcome).inc()
        subject = "a model" if "model" in fields else "a file"
        log.log(level, f"{subject} was {outcome}", extra={"fields": fields})


def _labels(model: Model) -> ModelLabels:
    engine = model.engine
    return ModelLabels(model.name, model.sha256, engine.device, engine.dtype)
