"""From what was asked for to images: the one path that every HTTP surface shares."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, lru_cache
from random import getrandbits

import numpy as np
from numpy.typing import NDArray
from prometheus_client import Counter as CounterMetric

from service.errors import Problem, wrong_value
from service.inference.batcher import Batcher
from service.inference.errors import (
    DeadlineExceeded,
    DeviceLost,
    Draining,
    ForwardFailed,
    Overloaded,
)
from service.inference.latents import SamplingOptions
from service.inference.repository import Model, ModelRepository
from service.inference.scheduling import BatchRecord, GenerationResult, PendingRequest
from service.settings import MAX_IMAGES
from service.telemetry.metrics import Metrics

Steps = Generator[None, None, bytes]  # work that can be interrupted wherever it yields

# What holds up the event loop for about 0.1 ms: a sheet of 64 images of 28x28 pixels.
_PIXELS_AT_ONCE = 1 << 16
# How long steps are taken before others have their turn: beside small requests, and without any for
# a second, when the caches are worth more than the turns.
_STRIDE_S, _LONG_STRIDE_S = 0.0001, 0.003

MIXTURE = "mix"  # in the metrics, in place of a class index
CLIENT = "client_of_connection"  # key of the scope, for a `Client`

log = logging.getLogger("service")


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of the time that a request took, by `perf_counter`.

    Attributes:
        name: `queue`, `forward` or `encode`.
        began: when.
        ended: when.
        forwards: the batches with rows of the request, of a `forward`.
    """

    name: str
    began: float
    ended: float
    forwards: Sequence[BatchRecord] = ()


# The stages of the request that is being answered; None where nobody wants to know.
stages: ContextVar[list[Stage] | None] = ContextVar("stages", default=None)
_MOST_STAGES = 128  # that are kept of one request: a data set has thousands


@dataclass(frozen=True)
class Interpolation:
    """From the images of one seed to those of another, along the arc between their latents.

    Attributes:
        to_seed: where it leads.
        at: how far each of its images is on the way, in [0, 1].
    """

    to_seed: int
    at: Sequence[float]


@dataclass(frozen=True)
class GenerationRequest:
    """A checked request for images.

    Attributes:
        model: what makes them.
        seeds: (N,) uint64.
        labels: (N,) int64 class indices; of a mixture, the class that weighs most.
        indices: (N,) int64, the number of each image among those of its seed and class.
        counts: images of each class, by its index, or of a mixture; for the metrics.
        variation: what makes them other than plain draws of a class.
    """

    model: Model
    seeds: NDArray[np.uint64]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]
    counts: Mapping[int | str, int]
    variation: SamplingOptions | None = None

    def recipe(self, position: int) -> dict[str, object]:
        """What the image at a position is made from; by the byte contract, all it is made from."""
        label = int(self.labels[position])
        recipe: dict[str, object] = {
            "model": self.model.name,
            "sha256": self.model.sha256,
            "label": label,
            "class": self.model.info.class_names[label],
            "seed": int(self.seeds[position]),
            "index": int(self.indices[position]),
        }
        if self.variation is not None:
            _add_variation(recipe, self, position)
        return recipe

    def recipe_of_all(self) -> dict[str, object]:
        """What several images on one sheet are made from."""
        recipe: dict[str, object] = {
            "model": self.model.name,
            "sha256": self.model.sha256,
            "labels": self.labels.tolist(),
            "seed": self.seed,
            "indices": self.indices.tolist(),
        }
        if self.variation is not None:
            _add_variation(recipe, self)
        return recipe

    @property
    def seed(self) -> int:
        """Of the images, where they share one; of the first, where each has its own."""
        return int(self.seeds[0])


@dataclass(frozen=True)
class GeneratedImages:
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
        registry: ModelRepository,
        batcher: Batcher,
        metrics: Metrics,
        encoders: ThreadPoolExecutor,
    ) -> None:
        self.registry = registry
        self._batcher = batcher
        self._metrics = metrics
        self._encoders = encoders
        self._one_in_steps = asyncio.Lock()
        self._sent: dict[tuple[str, int | str], CounterMetric] = {}  # of `metrics.images`
        self._rejection = cache(metrics.rejections.labels)
        self._queue_seconds, self._forward_seconds, self._encode_seconds = (
            metrics.stage_seconds.labels(stage) for stage in ("queue", "forward", "encode")
        )

    def order(
        self,
        *,
        labels: Iterable[str | int] = (),
        mix: Sequence[tuple[str, float]] = (),
        n: int = 1,
        seed: int | None = None,
        index: int = 0,
        walk: Interpolation | None = None,
        truncation: float = 1.0,
        model: str | None = None,
    ) -> GenerationRequest:
        """Check a request against the models.

        Images of a class are numbered from `index` over the whole order, so the same class named
        twice gives more images of it and not the same ones again.

        Args:
            labels: class names or indices, `n` images of each.
            mix: classes and their weights, in place of labels.
            n: images, or walks, of each label.
            seed: of all of them; drawn if not given.
            index: number of the first image.
            walk: makes every image a walk of several.
            truncation: in (0, 1].
            model: name of a model, which `@sha256:` and a digest may follow; the default one if
                not given.

        Raises:
            Problem: 404 for an unknown model, 422 for a label that is no class of it, or for more
                than 1024 images in all.
        """
        chosen = self.find(model)
        weights = weigh(chosen, mix) if mix else None
        if weights is None:
            wanted = [_label(chosen, each) for each in labels]
        else:
            wanted = [int(weights.argmax())]
        steps = 1 if walk is None else len(walk.at)
        if n * len(wanted) * steps > MAX_IMAGES:
            raise _too_many(n, len(wanted), steps)
        if seed is None:
            seed = getrandbits(53)  # as many as every JSON reader keeps without loss
        rows, numbers, counts = _number(tuple(wanted), n, index)
        variation = None
        if walk is not None or weights is not None or truncation != 1.0:
            rows, numbers = np.repeat(rows, steps), np.repeat(numbers, steps)
            counts = {label: steps * count for label, count in counts.items()}
            if weights is not None:
                counts = {MIXTURE: steps * n}
            at = None if walk is None else np.tile(np.array(walk.at), len(rows) // steps)
            to_seed = None if walk is None else walk.to_seed
            variation = SamplingOptions(truncation, to_seed, at, weights)
        seeds = np.empty(len(rows), dtype=np.uint64)
        seeds.fill(seed)  # at half the cost of np.full
        return GenerationRequest(chosen, seeds, rows, numbers, counts, variation)

    def rows(
        self,
        model: Model,
        labels: NDArray[np.int64],
        seeds: NDArray[np.uint64] | None = None,
        indices: NDArray[np.int64] | None = None,
        truncation: float = 1.0,
    ) -> GenerationRequest:
        """An order for one image a row.

        Args:
            model: makes them.
            labels: (N,), 1 <= N <= 1024.
            seeds: (N,); one is drawn for all if not given.
            indices: (N,), not negative; if not given, images of a seed and class are numbered.
            truncation: in (0, 1].

        Raises:
            Problem: 422 for a label that is no class of the model.
        """
        classes = len(model.info.class_names)
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            message = f"is not a class; allowed is an index from 0 to {classes - 1}"
            raise wrong_value("LABEL", int(wrong[0]), message)
        if seeds is None:
            seeds = np.full(len(labels), getrandbits(53), dtype=np.uint64)
        if indices is None:
            seen: Counter[tuple[int, int]] = Counter()
            numbers = []
            for key in zip(seeds.tolist(), labels.tolist(), strict=True):
                numbers.append(seen[key])
                seen[key] += 1
            indices = np.array(numbers, dtype=np.int64)
        counts: dict[int | str, int] = dict(Counter(labels.tolist()))
        variation = None if truncation == 1.0 else SamplingOptions(truncation)
        return GenerationRequest(model, seeds, labels, indices, counts, variation)

    async def fulfil(
        self, order: GenerationRequest, client: Client, timeout_s: float | None = None
    ) -> GeneratedImages:
        """Make an order's images, unless the client goes away.

        Args:
            order: what is wanted.
            client: who waits.
            timeout_s: how long, if that is shorter than the service lets a request take.

        Raises:
            Problem: 429 overloaded, 503 draining or failed, 504 past its deadline.
            Disconnected: nobody waits for them any more.
        """
        tally = order.model.tally
        began = time.perf_counter()
        try:
            made = await self._make(order, client, timeout_s)
        except Problem:
            tally.failed += 1
            tally.failed_s += time.perf_counter() - began
            raise
        self._queue_seconds.observe(made.queue_s)
        self._forward_seconds.observe(made.forward_s)
        tally.answered += 1
        tally.images += len(order.labels)
        tally.queue_s += made.queue_s
        tally.forward_s += made.forward_s
        tally.last_at = time.time()
        if stages.get() is not None:
            started = began + made.queue_s
            _note(Stage("queue", began, started))
            _note(Stage("forward", started, started + made.forward_s, made.forwards))
        return GeneratedImages(made.pixels, made.queue_s, made.forward_s)

    async def _make(
        self, order: GenerationRequest, client: Client, timeout_s: float | None
    ) -> GenerationResult:
        """The images of an order, with what the batcher says against it as problems."""
        try:
            ticket = self._batcher.admit(
                order.model.engine,
                order.seeds,
                order.indices,
                order.labels,
                timeout_s,
                order.variation,
            )
            return await self._wait(ticket, client)
        except Overloaded as error:
            raise self._overloaded(error) from None
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

    async def _wait(self, ticket: PendingRequest, client: Client) -> GenerationResult:
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
        if stages.get() is not None:
            _note(Stage("encode", began, began + spent))
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
                small = now - self._batcher.last_small_arrival < 1.0
                until = now + (_STRIDE_S if small else _LONG_STRIDE_S)

    def forwards(self, model: Model) -> int:
        """How many forwards computed a model's images, whoever asked for them."""
        return self._batcher.forwards(model.engine)

    def count(self, order: GenerationRequest, client: Client) -> None:
        """Count the images of an order, as sent unless nobody takes them."""
        if client.gone:
            self._metrics.wasted(len(order.labels))
            return
        for label, count in order.counts.items():
            sent = self._sent.get((order.model.name, label))
            if sent is None:
                sent = self._metrics.images.labels(order.model.name, label)
                self._sent[order.model.name, label] = sent
            sent.inc(count)

    def find(self, name: str | None) -> Model:
        """The model of a name, or of the file that `name@sha256:digest` pins; else the default.

        Raises:
            Problem: 404, there is no such model.
        """
        if name is None:
            return self.registry.default
        plain, pinned, digest = name.partition("@sha256:")
        model = self.registry.find(plain)
        if model is None:
            known = ", ".join(self.registry.names)
            raise wrong_value(
                "model", name, f"is not loaded; allowed is one of: {known}", status=404
            )
        if pinned and digest != model.sha256:
            message = f"is not loaded; {plain} is now {model.identity.decode()}"
            raise wrong_value("model", name, message, status=404)
        return model

    def _overloaded(self, error: Overloaded) -> Problem:
        seconds = max(1, math.ceil(error.retry_after_s))
        detail = f"Too much waits already; try again in {seconds} s."
        return self._rejected(429, "overloaded", detail, seconds)

    def _rejected(
        self, status: int, kind: str, detail: str, retry_after_s: int | None = None
    ) -> Problem:
        self._rejection(kind).inc()
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        return Problem(status, kind, detail, headers=headers)


def _note(stage: Stage) -> None:
    """Keep a stage of the request that is being answered."""
    noted = stages.get()
    if noted is not None and len(noted) < _MOST_STAGES:
        noted.append(stage)


def _label(model: Model, wanted: str | int, field: str = "label") -> int:
    """The class index that a name, an index as a text, or an index stands for."""
    if isinstance(wanted, int):
        classes = len(model.info.class_names)
        if wanted not in range(classes):
            message = f"is not a class; allowed is an index from 0 to {classes - 1}"
            raise wrong_value(field, wanted, message)
        return wanted
    known = model.labels.get(wanted)
    if known is not None:
        return known
    try:
        return model.info.label(wanted)
    except ValueError as error:
        raise wrong_value(field, wanted, str(error)) from error


def weigh(model: Model, mix: Sequence[tuple[str, float]]) -> NDArray[np.float64]:
    """The weight (num_classes,) of each class of a mixture, as it was given.

    Raises:
        Problem: 422 for a name that is no class of the model, or the same class twice, or weights
            that are all 0.
    """
    weights = np.zeros(len(model.info.class_names))
    named = set()
    for name, weight in mix:
        label = _label(model, name, "mix")
        if label in named:
            raise wrong_value("mix", name, "names a class that has a weight already")
        named.add(label)
        weights[label] = weight
    if not weights.any():
        raise wrong_value("mix", 0, "every weight is 0; at least one has to be more")
    return weights


@lru_cache(maxsize=256)
def _number(
    wanted: tuple[int, ...], n: int, index: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[int | str, int]]:
    """Labels (N,) and numbers (N,) of `n` images of each class, and how many that are of each.

    Remembered, since few differ; nobody writes to them.
    """
    if len(wanted) == 1:
        return np.full(n, wanted[0]), np.arange(index, index + n), {wanted[0]: n}
    counts: dict[int | str, int] = {}
    firsts = []  # the number of the first image of each of the wanted labels
    for label in wanted:
        firsts.append(index + counts.get(label, 0))
        counts[label] = counts.get(label, 0) + n
    numbers = np.array(firsts)[:, None] + np.arange(n)
    return np.repeat(wanted, n), numbers.ravel(), counts


def _too_many(n: int, labels: int, steps: int) -> Problem:
    walks = "" if steps == 1 else f" of {steps} steps"
    return wrong_value(
        "n",
        n,
        f"{labels} labels of {n} images{walks} each are {labels * n * steps} images; "
        f"at most {MAX_IMAGES} are allowed in all",
    )


def _add_variation(
    recipe: dict[str, object], order: GenerationRequest, position: int | None = None
) -> None:
    """Say in a recipe, of one image or of all, what a variation makes of it."""
    variation = order.variation
    assert variation is not None
    if variation.mix is not None:
        for plain in ("label", "class", "labels"):
            recipe.pop(plain, None)
        names = order.model.info.class_names
        weights = variation.mix
        recipe["mix"] = {names[label]: float(weights[label]) for label in weights.nonzero()[0]}
    if variation.at is not None:
        recipe["to_seed"] = variation.to_seed
        at = variation.at
        recipe["at"] = at.tolist() if position is None else float(at[position])
    if variation.truncation != 1.0:
        recipe["truncation"] = variation.truncation


def finish(steps: Steps) -> bytes:
    """Take all steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return bytes(end.value)
