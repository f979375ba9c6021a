"""From what was asked for to images: the one path that every HTTP surface shares."""

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from starlette.types import Receive

from service.batcher import Batcher, DeadlineExceeded, Draining, ForwardFailed, Overloaded
from service.metrics import Metrics
from service.problems import Problem, wrong_value
from service.registry import Model, Registry
from service.settings import MAX_IMAGES

T = TypeVar("T")

log = logging.getLogger("service")


@dataclass(frozen=True)
class Order:
    """A checked request for images.

    Images of a class are numbered from 0 over the whole order, so the same class named twice gives
    more images of it and not the same ones again.

    Attributes:
        model: what makes them.
        seed: of all of them.
        labels: (N,) int64 class indices.
        indices: (N,) int64, the number of each image among those of its class.
    """

    model: Model
    seed: int
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]

    def recipe(self, position: int) -> dict[str, object]:
        """What the image at a position is made from; by the byte contract, all it is made from."""
        label = int(self.labels[position])
        return {
            "model": self.model.name,
            "sha256": self.model.sha256,
            "label": label,
            "class": self.model.info.class_names[label],
            "seed": self.seed,
            "index": int(self.indices[position]),
        }


@dataclass(frozen=True)
class Images:
    """The answer to an order: (N, H, W, C) uint8, and where the time went in seconds."""

    pixels: NDArray[np.uint8]
    queue_s: float
    forward_s: float


class Disconnected(Exception):  # noqa: N818  (an event, not a fault)
    """Whoever asked has gone away."""


class Generation:
    """Turns requests into orders and orders into images."""

    def __init__(
        self,
        registry: Registry,
        batcher: Batcher,
        metrics: Metrics,
        encoders: ThreadPoolExecutor,
    ) -> None:
        self.registry = registry
        self._batcher = batcher
        self._metrics = metrics
        self._encoders = encoders

    def order(self, *, labels: Iterable[str], n: int, seed: int | None, model: str | None) -> Order:
        """Check a request against the models.

        Raises:
            Problem: 404 for an unknown model, 422 for a label that is no class of it, or for more
                than 1024 images in all.
        """
        chosen = self._find(model)
        wanted = [_label(chosen, text) for text in labels]
        if n * len(wanted) > MAX_IMAGES:
            raise wrong_value(
                "n",
                n,
                f"{len(wanted)} labels of {n} images each are {n * len(wanted)} images; "
                f"at most {MAX_IMAGES} are allowed in all",
            )
        numbers = np.tile(np.arange(n), len(wanted))
        if len(set(wanted)) != len(wanted):
            earlier = [wanted[:place].count(label) * n for place, label in enumerate(wanted)]
            numbers += np.repeat(earlier, n)
        if seed is None:
            seed = secrets.randbits(53)  # as many as every JSON reader keeps without loss
        return Order(chosen, seed, np.repeat(np.array(wanted, dtype=np.int64), n), numbers)

    async def fulfil(self, order: Order) -> Images:
        """Make an order's images.

        Raises:
            Problem: 429 overloaded, 503 draining or failed, 504 past its deadline.
        """
        seeds = np.full(len(order.labels), order.seed, dtype=np.uint64)
        try:
            made = await self._batcher.submit(
                order.model.engine, seeds, order.indices, order.labels
            )
        except Overloaded as error:
            seconds = max(1, math.ceil(error.retry_after_s))
            raise self._rejected(
                429, "overloaded", f"Too much waits already; try again in {seconds} s.", seconds
            ) from error
        except Draining as error:
            raise self._rejected(503, "draining", "The service is shutting down.", 1) from error
        except DeadlineExceeded as error:
            raise self._rejected(504, "deadline-exceeded", "The images took too long.") from error
        except ForwardFailed as error:
            log.exception("a forward failed")
            raise self._rejected(
                503, "forward-failed", "The device failed; try again.", 1
            ) from error
        self._metrics.stage_seconds.labels("queue").observe(made.queue_s)
        self._metrics.stage_seconds.labels("forward").observe(made.forward_s)
        return Images(made.pixels, made.queue_s, made.forward_s)

    async def encode(self, function: Callable[[], T]) -> tuple[T, float]:
        """Run an encoder off the event loop and the engine's thread; also its time in seconds."""
        began = time.perf_counter()
        encoded = await asyncio.get_running_loop().run_in_executor(self._encoders, function)
        spent = time.perf_counter() - began
        self._metrics.stage_seconds.labels("encode").observe(spent)
        return encoded, spent

    def count(self, order: Order) -> None:
        """Count the images of an order as sent."""
        labels, counts = np.unique(order.labels, return_counts=True)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
            self._metrics.images.labels(order.model.name, str(label)).inc(count)

    def _find(self, name: str | None) -> Model:
        if name is None:
            return self.registry.default
        model = self.registry.find(name)
        if model is None:
            known = ", ".join(self.registry.names)
            raise wrong_value(
                "model", name, f"is not loaded; allowed is one of: {known}", status=404
            )
        return model

    def _rejected(
        self, status: int, kind: str, detail: str, retry_after_s: int | None = None
    ) -> Problem:
        self._metrics.rejections.labels(kind).inc()
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        return Problem(status, kind, detail, headers=headers)


def _label(model: Model, text: str) -> int:
    try:
        return model.info.label(text)
    except ValueError as error:
        raise wrong_value("label", text, str(error)) from error


async def unless_disconnected(receive: Receive, work: Awaitable[T]) -> T:
    """Await `work`, but cancel it when the client goes away.

    Raises:
        Disconnected: it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnection(receive))
    try:
        await asyncio.wait((task, watch), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise Disconnected
        return task.result()
    finally:
        watch.cancel()
        task.cancel()


async def _disconnection(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
