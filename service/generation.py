"""From a request to images: the part of the path that knows models, batches and metrics."""

import asyncio
import logging
import math
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from random import getrandbits
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.disconnect import Client, Disconnected
from service.errors import Problem, invalid_value
from service.inference import errors
from service.inference.batcher import Batcher
from service.inference.latents import SamplingOptions
from service.inference.repository import Model, ModelRepository
from service.inference.scheduling import BatchRecord, GenerationResult
from service.settings import MAX_IMAGES
from service.telemetry.metrics import Metrics

MIXTURE = "mix"  # in the metrics, in place of a class index
_SEED_BITS = 53  # of a drawn seed: every JSON reader keeps these without loss

log = logging.getLogger("service")


class Stage(NamedTuple):
    """A part of the time of a request, by `perf_counter`; kept in `scope["state"]["stages"]`."""

    name: str  # queue, forward or encode
    began: float
    ended: float
    forwards: Sequence[BatchRecord] = ()  # of a forward, the batches with rows of the request


@dataclass(frozen=True)
class Interpolation:
    """A path from the images of one seed to those of another, along the arc of their latents."""

    to_seed: int
    at: Sequence[float]  # the position of each image on the path, in [0, 1]


@dataclass(frozen=True)
class GenerationRequest:
    """A request for images, not yet checked against the models."""

    labels: Sequence[str] = ()  # each a class name or, if no class has that name, an index
    mix: Sequence[tuple[str, float]] = ()  # in place of labels, labels and their weights
    n: int = 1  # images, or interpolations, of each label
    seed: int | None = None  # of all images; drawn if None
    index: int = 0  # number of the first image
    interpolation: Interpolation | None = None  # replaces every image by several
    truncation: float = 1.0  # in (0, 1]
    model: str | None = None  # NAME or NAME@sha256:DIGEST; the default model if None


@dataclass(frozen=True)
class ResolvedRequest:
    """A request for images of a loaded model, one row an image."""

    model: Model
    seeds: NDArray[np.uint64]  # (N,)
    labels: NDArray[np.int64]  # (N,) class indices; of a mixture, the class that weighs most
    indices: NDArray[np.int64]  # (N,) the number of each image among those of its seed and class
    options: SamplingOptions | None = None  # None for plain draws of a class
    counted: bool = True  # in the metrics; false for images that are not sent

    @property
    def seed(self) -> int:
        """Return the seed of the first image, which is that of all unless each has its own."""
        return int(self.seeds[0])

    @property
    def pixels(self) -> int:
        """Return the number of pixels of all images."""
        height, width, _ = self.model.engine.image_shape
        return len(self.labels) * height * width

    def recipe(self, position: int | None = None) -> dict[str, object]:
        """Return everything that determines the image at a position.

        Without a position, return that of all images, which share their seed.
        """
        names, options = self.model.info.class_names, self.options or SamplingOptions()
        recipe: dict[str, object] = {"model": self.model.name, "sha256": self.model.sha256}
        if position is None:
            recipe["labels"] = self.labels.tolist()
            recipe |= {"seed": self.seed, "indices": self.indices.tolist()}
        else:
            label = int(self.labels[position])
            recipe |= {"label": label, "class": names[label]}
            recipe |= {"seed": int(self.seeds[position]), "index": int(self.indices[position])}
        if options.mix is not None:
            for plain in ("label", "class", "labels"):
                recipe.pop(plain, None)
            weights = enumerate(options.mix.tolist())
            recipe["mix"] = {names[label]: weight for label, weight in weights if weight}
        if options.at is not None:
            at = options.at
            recipe["to_seed"] = options.to_seed
            recipe["at"] = at.tolist() if position is None else float(at[position])
        if options.truncation != 1.0:
            recipe["truncation"] = options.truncation
        return recipe


class Generation:
    """Resolves requests against the models and generates their images."""

    def __init__(self, repository: ModelRepository, batcher: Batcher, metrics: Metrics) -> None:
        self.repository = repository
        self._batcher = batcher
        self._metrics = metrics
        self._images = cache(metrics.images.labels)  # a lookup takes longer than counting
        self._queue_seconds, self._forward_seconds = (
            metrics.stage_seconds.labels(stage) for stage in ("queue", "forward")
        )

    def get_or_404(self, name: str | None) -> Model:
        """Return the model of a name, of `name@sha256:digest`, or the default one for None.

        Raises:
            Problem: 404, no such model is loaded.
        """
        if name is None:
            return self.repository.default
        plain, pinned, digest = name.partition("@sha256:")
        model = self.repository.get(plain)
        if model is None:
            message = f"is not loaded; allowed: {', '.join(self.repository.names)}"
            raise invalid_value("model", name, message, status=404)
        if pinned and digest != model.sha256:
            message = f"is not loaded; {plain} is now {model.versioned_name}"
            raise invalid_value("model", name, message, status=404)
        return model

    def resolve(self, request: GenerationRequest) -> ResolvedRequest:
        """Check a request against the models.

        Images of a class are numbered from `index` over the whole request, so naming a class twice
        gives more images of it, not the same ones again.

        Raises:
            Problem: 404 for an unknown model; 422 for a label that is not a class of it, or for
                more than 1024 images in all.
        """
        model = self.get_or_404(request.model)
        weights = mix_weights(model, request.mix) if request.mix else None
        if weights is None:
            classes = [_label(model, each) for each in request.labels]
        else:
            classes = [int(weights.argmax())]
        path = request.interpolation
        steps = 1 if path is None else len(path.at)
        if request.n * len(classes) * steps > MAX_IMAGES:
            raise _too_many(request.n, len(classes), steps)
        labels = np.repeat(np.array(classes), request.n)
        seed = getrandbits(_SEED_BITS) if request.seed is None else request.seed
        seeds = np.full(len(labels), seed, dtype=np.uint64)
        indices = _number(seeds, labels, request.index)
        to_seed, at = None, None
        if path is not None:
            to_seed, at = path.to_seed, np.tile(path.at, len(labels))
            seeds, labels, indices = (np.repeat(each, steps) for each in (seeds, labels, indices))
        plain = path is None and weights is None and request.truncation == 1.0
        options = None if plain else SamplingOptions(request.truncation, to_seed, at, weights)
        return ResolvedRequest(model, seeds, labels, indices, options)

    def resolve_rows(
        self,
        model: Model,
        labels: NDArray[np.int64],
        seeds: NDArray[np.uint64] | None = None,
        indices: NDArray[np.int64] | None = None,
        truncation: float = 1.0,
    ) -> ResolvedRequest:
        """Check a request that names the label, and optionally seed and index, of every image.

        Args:
            model: generates them.
            labels: (N,) integers, 1 <= N <= 1024; each is read as its decimal text.
            seeds: (N,); if None, one is drawn for all.
            indices: (N,), not negative; if None, images of the same seed and class are numbered.
            truncation: in (0, 1].

        Raises:
            Problem: 422 for a label that is not a class of the model.
        """
        texts, rows = np.unique(labels, return_inverse=True)
        labels = np.array([_label(model, str(each), "LABEL") for each in texts.tolist()])[rows]
        if seeds is None:
            seeds = np.full(len(labels), getrandbits(_SEED_BITS), dtype=np.uint64)
        if indices is None:
            indices = _number(seeds, labels)
        options = None if truncation == 1.0 else SamplingOptions(truncation)
        return ResolvedRequest(model, seeds, labels, indices, options)

    async def generate(
        self, request: ResolvedRequest, client: Client, timeout_s: float | None = None
    ) -> GenerationResult:
        """Generate the images of a request, which is withdrawn when its client disconnects.

        The deadline is `timeout_s` if that is shorter than the service's own.

        Raises:
            Problem: 429 overloaded, 503 draining or failed, 504 past the deadline.
            Disconnected: the client disconnected first.
        """
        stats = request.model.stats
        began = time.perf_counter()
        try:
            result = await self._run(request, client, timeout_s)
        except Problem:
            stats.failed += 1
            stats.failed_s += time.perf_counter() - began
            raise
        self._queue_seconds.observe(result.queue_s)
        self._forward_seconds.observe(result.forward_s)
        stats.answered += 1
        stats.images += len(request.labels)
        stats.queue_s += result.queue_s
        stats.forward_s += result.forward_s
        stats.last_at = time.time()
        return result

    async def _run(
        self, request: ResolvedRequest, client: Client, timeout_s: float | None
    ) -> GenerationResult:
        """Generate the images of a request, with the batcher's errors as problems."""
        try:
            pending = self._batcher.admit(
                request.model.engine,
                request.seeds,
                request.indices,
                request.labels,
                timeout_s,
                request.options,
            )
            client.on_disconnect = pending.future.cancel
            if client.disconnected:
                pending.future.cancel()
            return await self._batcher.wait(pending)
        except asyncio.CancelledError:
            if client.disconnected:
                raise Disconnected from None
            raise
        except errors.Overloaded as error:
            seconds = max(1, math.ceil(error.retry_after_s))
            detail = f"The queue is full; retry in {seconds} s."
            raise self._rejected(429, "overloaded", detail, seconds) from None
        except errors.Draining:
            raise self._rejected(503, "draining", "The service is shutting down.", 1) from None
        except errors.DeadlineExceeded as error:
            raise self._rejected(504, "deadline-exceeded", f"The images were {error}.") from None
        except errors.DeviceLost as error:
            detail = "The device failed; the service is restarting."
            raise self._rejected(503, "device-lost", detail, 1) from error
        except errors.ForwardFailed as error:
            log.exception("a forward failed")
            detail = "The device failed; retry the request."
            raise self._rejected(503, "forward-failed", detail, 1) from error
        finally:
            client.on_disconnect = None

    def record_sent(self, request: ResolvedRequest, client: Client) -> None:
        """Count the images of a request: as sent, or as wasted if the client has disconnected."""
        count = len(request.labels)
        if client.disconnected:
            self._metrics.wasted(count)
        elif request.counted:
            mixed = request.options is not None and request.options.mix is not None
            labels = [MIXTURE] * count if mixed else request.labels.tolist()
            for label, images in Counter(labels).items():
                self._images(request.model.name, label).inc(images)

    def forwards(self, model: Model) -> int:
        """Return the number of forwards that computed images of a model."""
        return self._batcher.forwards(model.engine)

    def _rejected(
        self, status: int, kind: str, detail: str, retry_after_s: int | None = None
    ) -> Problem:
        self._metrics.rejections.labels(kind).inc()
        headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        return Problem(status, kind, detail, headers=headers)


def _label(model: Model, label: str, field: str = "label") -> int:
    """Return the class index of a name or, if no class has that name, of an index as text."""
    known = model.labels.get(label)
    if known is not None:
        return known
    try:
        return model.info.label(label)
    except ValueError as error:
        raise invalid_value(field, label, str(error)) from error


def mix_weights(model: Model, mix: Sequence[tuple[str, float]]) -> NDArray[np.float64]:
    """Return the weight (num_classes,) of each class of a mixture, as given.

    Raises:
        Problem: 422 for a name that is not a class of the model, a class named twice, or weights
            that are all 0.
    """
    weights = np.zeros(len(model.info.class_names))
    named = set()
    for name, weight in mix:
        label = _label(model, name, "mix")
        if label in named:
            raise invalid_value("mix", name, "names a class twice; give each class one weight")
        named.add(label)
        weights[label] = weight
    if not weights.any():
        raise invalid_value("mix", 0, "all weights are 0; at least one must be positive")
    return weights


def _number(
    seeds: NDArray[np.uint64], labels: NDArray[np.int64], first: int = 0
) -> NDArray[np.int64]:
    """Return the index (N,) of each image among those of its seed and class, from `first` on."""
    seen: defaultdict[tuple[int, int], int] = defaultdict(int)
    indices = []
    for key in zip(seeds.tolist(), labels.tolist(), strict=True):
        indices.append(first + seen[key])
        seen[key] += 1
    return np.array(indices)


def _too_many(n: int, labels: int, steps: int) -> Problem:
    each = f"{n} images" if steps == 1 else f"{n} interpolations of {steps} steps"
    message = (
        f"{labels} labels with {each} each are {labels * n * steps} images; "
        f"at most {MAX_IMAGES} are allowed in all"
    )
    return invalid_value("n", n, message)
