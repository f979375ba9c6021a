"""From what was asked for to images: the one path that every HTTP surface shares."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from random import getrandbits

import numpy as np
from numpy.typing import NDArray

from service.batcher import (
    Batcher,
    DeadlineExceeded,
    Draining,
    ForwardFailed,
    Generated,
    Overloaded,
    Ticket,
)
from service.faults import DeviceLost
from service.metrics import Metrics
from service.problems import Problem, wrong_value
from service.registry import Model, Registry
from service.settings import MAX_IMAGES

Steps = Generator[None, None, bytes]  # work that can be interrupted wherever it yields

# What holds up the event loop for about 0.1 ms: a sheet of 64 images of 28x28 pixels.
_PIXELS_AT_ONCE = 1 << 16
# How long steps are taken before others have their turn: beside small requests, and without any for
# a second, when the caches are worth more than the turns.
_STRIDE_S, _LONG_STRIDE_S = 0.0001, 0.003

CLIENT = "client_of_connection"  # key of the scope, for a `Client`

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
        counts: images of each class, by class index.
    """

    model: Model
    seed: int
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    counts: dict[int, int]

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


class Client:
    """Whoever waits for the answers of a connection; in the scope under `CLIENT`.

    Attributes:
        gone: whether it hung up.
        on_gone: called when it does; set by the request that is being answered.
    """

    __slots__ = ("gone", "on_gone")

    def __init__(self) -> None:
        self.gone = False
        self.on_gone: Callable[[], object] | None = None


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
        self._one_in_steps = asyncio.Lock()
        self._queue_seconds, self._forward_seconds, self._encode_seconds = (
            metrics.stage_seconds.labels(stage) for stage in ("queue", "forward", "encode")
        )

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
        if seed is None:
            seed = getrandbits(53)  # as many as every JSON reader keeps without loss
        counts: dict[int, int] = {}
        firsts = []  # the number of the first image of each of the wanted labels
        for label in wanted:
            firsts.append(counts.get(label, 0))
            counts[label] = firsts[-1] + n
        if len(wanted) == 1:
            rows, numbers = np.full(n, wanted[0]), np.arange(n)
        else:
            rows = np.repeat(wanted, n)
            numbers = (np.array(firsts)[:, None] + np.arange(n)).ravel()
        return Order(chosen, seed, rows, numbers, counts)

    async def fulfil(self, order: Order, client: Client, timeout_s: float | None = None) -> Images:
        """Make an order's images, unless the client goes away.

        Args:
            order: what is wanted.
            client: who waits.
            timeout_s: how long, if that is shorter than the service lets a request take.

        Raises:
            Problem: 429 overloaded, 503 draining or failed, 504 past its deadline.
            Disconnected: nobody waits for them any more.
        """
        seeds = np.full(len(order.labels), order.seed, dtype=np.uint64)
        try:
            ticket = self._batcher.admit(
                order.model.engine, seeds, order.indices, order.labels, timeout_s
            )
            made = await self._wait(ticket, client)
        except Overloaded as error:
            seconds = max(1, math.ceil(error.retry_after_s))
            raise self._rejected(
                429, "overloaded", f"Too much waits already; try again in {seconds} s.", seconds
            ) from None
        except Draining:
            raise self._rejected(503, "draining", "The service is shutting down.", 1) from None
        except DeadlineExceeded as error:
            raise self._rejected(504, "deadline-exceeded", f"The images were {error}.") from None
        except DeviceLost as error:
            raise self._rejected(
                503, "device-lost", "The device failed; the service starts again.", 1
            ) from error
        except ForwardFailed as error:
            log.exception("a forward failed")
            raise self._rejected(
                503, "forward-failed", "The device failed; try again.", 1
            ) from error
        self._queue_seconds.observe(made.queue_s)
        self._forward_seconds.observe(made.forward_s)
        return Images(made.pixels, made.queue_s, made.forward_s)

    async def _wait(self, ticket: Ticket, client: Client) -> Generated:
        """The images of a ticket, which is cancelled when the client goes away."""
        client.on_gone = ticket.future.cancel
        if client.gone:
            ticket.future.cancel()
        try:
            return await self._batcher.wait(ticket)
        except asyncio.CancelledError:
            if client.gone:
                raise Disconnected from None
            raise
        finally:
            client.on_gone = None

    async def encode(
        self, work: Callable[[], bytes] | Steps, *, pixels: int
    ) -> tuple[bytes, float]:
        """Run an encoder of so many pixels; also its time in seconds.

        A small one runs at once: the way through another thread and back takes as long as a sheet
        of some twenty images, and nobody waits long for one of a few times as many. A large one
        that comes in steps takes a few of them at a time, one such at a time: on a thread it would
        hold the interpreter for longer than that whenever it had it. What has no steps is the
        compression of a large sheet, which does not hold it.
        """
        began = time.perf_counter()
        if not isinstance(work, Generator):
            if pixels <= _PIXELS_AT_ONCE:
                encoded = work()
            else:
                loop = asyncio.get_running_loop()
                encoded = await loop.run_in_executor(self._encoders, work)
        elif pixels <= _PIXELS_AT_ONCE:
            encoded = finish(work)
        else:
            async with self._one_in_steps:
                encoded = await self._take_steps(work)
        spent = time.perf_counter() - began
        self._encode_seconds.observe(spent)
        return encoded, spent

    async def _take_steps(self, steps: Steps) -> bytes:
        until = 0.0
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return bytes(end.value)
            now = time.perf_counter()
            if now >= until:
                await asyncio.sleep(0)
                now = time.perf_counter()
                small = now - self._batcher.small_at < 1.0
                until = now + (_STRIDE_S if small else _LONG_STRIDE_S)

    def count(self, order: Order, client: Client) -> None:
        """Count the images of an order, as sent unless nobody takes them."""
        if client.gone:
            self._metrics.wasted(len(order.labels))
            return
        for label, count in order.counts.items():
            self._metrics.images.labels(order.model.name, label).inc(count)

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
    known = model.labels.get(text)
    if known is not None:
        return known
    try:
        return model.info.label(text)
    except ValueError as error:
        raise wrong_value("label", text, str(error)) from error


def finish(steps: Steps) -> bytes:
    """Take all steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return bytes(end.value)
