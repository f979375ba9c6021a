"""The engine: an artifact on a device, as one function from seeds, indices and labels to pixels.

The generator is rewritten for inference: batch norm, where there is any, is folded into the layer
before it, and what a row is drawn from, its latent and its label's embedding, is put together
before the network, so that a mixture of classes is a row like any other. Warm-up compares the
rewritten network with the artifact's own and proves that an image does not depend on its batch; an
engine that fails either does not serve.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from service.inference.backends import REFERENCE_ROWS, ROW_MULTIPLE, Layer, chain
from service.inference.errors import CorruptRows, DeviceLost, EngineError, OutOfMemory
from service.inference.latents import RowOptions, draw_latents
from training.artifact import Artifact
from training.devices import has_native_bfloat16
from training.networks import ConvGenerator, Generator, MLPGenerator

DtypeName = Literal["auto", "float32", "bfloat16"]

# Shapes of batches on the CPU are compared by values, since few that differ do so in a pixel; those
# of so many rows or fewer by twice as many images.
_SMALL_ROWS = 64
# By how many levels of 255 the served pixels may differ, on average, from the artifact's own
# float32 forward, which is not rounded to levels. A network folded wrongly is off by tens of them.
_TOLERANCE = {torch.float32: 0.5, torch.bfloat16: 1.5}
_KNOWN_SEED, _KNOWN = 0, 8  # seed and number of the images that prove a device

T = TypeVar("T", bound=np.generic)

ForwardFn = Callable[[Tensor], tuple[Tensor, Tensor]]


class ReferenceImages(NamedTuple):
    """Rows, and the pixels (N, H, W, C) that they have to give."""

    seeds: NDArray[np.uint64]
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixels: NDArray[np.uint8]


@contextmanager
def _faults() -> Iterator[None]:
    """PyTorch's exceptions as ours."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except torch.AcceleratorError as error:
        raise DeviceLost(str(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):  # the CPU's allocator has no type for it
            raise OutOfMemory(str(error)) from error
        raise


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """The dtype that an option names; `auto` is bfloat16 where the device computes in it."""
    if name == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


class FusedMLP:
    """An `MLPGenerator` in evaluation mode, as linear layers alone.

    Batch norm y = (x - mean) / sqrt(var + eps) * gamma + beta follows a linear layer, so both are
    one linear layer with scaled weights.

    Attributes:
        few_rows: numbers of rows that it can draw for themselves.
        few_inputs: whether the inputs of so few rows are enough for them.
    """

    few_inputs = True

    def __init__(
        self, generator: MLPGenerator, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for layer in generator.main:
            if isinstance(layer, nn.Linear):
                weights.append(layer.weight.double())
                biases.append(layer.bias.double())
            elif isinstance(layer, nn.BatchNorm1d):
                mean, var = layer.running_mean, layer.running_var
                if mean is None or var is None:
                    raise EngineError("batch norm without running statistics cannot be folded")
                scale = layer.weight.double() / (var.double() + layer.eps).sqrt()
                weights[-1] = weights[-1] * scale[:, None]
                biases[-1] = (biases[-1] - mean.double()) * scale + layer.bias.double()
        layers = [
            Layer(weight.float(), added.float(), "leaky_relu")
            for weight, added in zip(weights, biases, strict=True)
        ]
        layers[-1] = layers[-1]._replace(activation="tanh")
        self._chain = chain(layers, device=device, dtype=dtype)
        self.few_rows = self._chain.few_rows

    def __call__(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Latents and embeddings (N, F) float32 to (N, C * H * W) in [-1, 1], or the first rows.

        On the CPU the next call may write it again.
        """
        return self._chain(x if rows is None or rows == len(x) else x[:rows])


class FusedConv:
    """A `ConvGenerator` in evaluation mode, in channels-last order; there is nothing to fold.

    Attributes:
        few_rows: numbers of rows that convolutions alone may draw: these take less time then, and
            may round as those of many rows do where dense layers do not.
        few_inputs: no, the dense layers need those of a batch.
    """

    few_rows: Sequence[int] = (2, 4)
    few_inputs = False

    def __init__(
        self, generator: ConvGenerator, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        copy = deepcopy(generator)
        self.synthesis = copy.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dtype = dtype

    @torch.inference_mode()
    def __call__(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Latents and embeddings (N, F) float32 to (N, C * H * W) in [-1, 1], or the first rows."""
        style = self.synthesis.trunk(x.to(self._dtype))  # (N, style_dim)
        images: Tensor = self.synthesis.synthesise(style, rows)
        return images.flatten(1)


def fuse(generator: Generator, *, device: torch.device, dtype: torch.dtype) -> FusedMLP | FusedConv:
    """A generator rewritten for inference on a device."""
    if isinstance(generator, ConvGenerator):
        return FusedConv(generator, device=device, dtype=dtype)
    return FusedMLP(generator, device=device, dtype=dtype)


class Engine:
    """A generator on a device; calling it makes pixels. One thread at a time.

    Attributes:
        artifact: what is served.
        device: where it runs.
        dtype: what it computes in.
        max_batch: most rows a call takes; fewer than were asked for, where more give other results.
        image_shape: (H, W, C).
        known: a few images that are not to change, by which the device can be proved later.
    """

    def __init__(
        self, artifact: Artifact, *, device: torch.device, dtype: torch.dtype, max_batch: int
    ) -> None:
        """Load, rewrite, warm up and check.

        Raises:
            EngineError: the rewritten network differs from the artifact's own, or an image depends
                on its batch.
        """
        network = artifact.info.network
        self.artifact = artifact
        self.device = device
        self.dtype = dtype
        self.max_batch = max_batch
        self.image_shape = (network.image_size, network.image_size, network.channels)
        self._latent_dim = network.latent_dim
        embedding = artifact.generator.label_embedding.weight.detach()
        self._embedding: NDArray[np.float32] = embedding.numpy()  # (classes, embedding_dim)
        self._network = fuse(artifact.generator, device=device, dtype=dtype)
        # Not `self._eager` otherwise: what refers to itself is only freed by a collection, and what
        # was there at the start, which is frozen, never.
        self._captured: _Captured | None = None
        self._least_rows = ROW_MULTIPLE  # of a batch on the CPU
        self._few_rows: tuple[int, ...] = ()  # that need not be drawn as one batch of the least
        if device.type == "cuda":
            width = network.latent_dim + self._embedding.shape[1]
            self._captured = _Captured(self._on_device, max_batch, width, device)
        else:
            self._choose_shapes()
        self.known = self._check()

    def __call__(
        self,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        row_options: Sequence[RowOptions] = (),
    ) -> NDArray[np.uint8]:
        """Make one image a row.

        Args:
            seeds: (B,) uint64, with 1 <= B <= max_batch.
            indices: (B,) int64, not negative.
            labels: (B,) int64 in [0, num_classes).
            row_options: the rows that are not plain draws of their class.

        Returns:
            (B, H, W, C) uint8, owned by the caller.

        Raises:
            OutOfMemory: so many rows do not fit.
            CorruptRows: some rows are not numbers.
            DeviceLost: the device failed, and this process cannot use it any more.
        """
        forward = self._captured or self._eager
        with _faults():
            pixels, finite = forward(self._inputs(seeds, indices, labels, row_options))
        if not finite.all():
            raise CorruptRows(pixels, ~finite)
        return pixels

    def _inputs(
        self,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        row_options: Sequence[RowOptions] = (),
    ) -> NDArray[np.float32]:
        """Latents, and the embeddings of labels, (B, latent_dim + embedding_dim)."""
        latents = draw_latents(seeds, indices, self._latent_dim)
        embedded = self._embedding.take(labels, 0)
        for rows, own, variation in row_options:
            latents[rows] = variation.latents(latents[rows], indices[rows], own)
            if variation.mix is not None:
                # In double precision: what is mixed of one class alone is that class.
                embedded[rows] = variation.mix / variation.mix.sum() @ self._embedding.astype(float)
        return np.concatenate((latents, embedded), 1)

    def _eager(self, inputs: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """As `_on_device`, but in numpy, whose operations take less time to begin."""
        rows = len(inputs)
        few = next((few for few in self._few_rows if few >= rows), None)
        missing = max(self._least_rows - rows, -rows % ROW_MULTIPLE)
        if few is not None and self._network.few_inputs:
            missing = few - rows
        drawn = self._network(torch.from_numpy(_pad(inputs, missing) if missing else inputs), few)
        x = (drawn if drawn.dtype is torch.float32 else drawn.float()).numpy()[:rows]
        finite = np.isfinite(np.maximum.reduce(x, 1))
        x = x * 127.5  # and not in place: it may be the network's own
        x += 128.0
        if not finite.all():
            x[~finite] = 0.0  # no pixel is what is no number
        height, width, channels = self.image_shape
        pixels = x.astype(np.uint8).reshape(-1, channels, height, width).transpose(0, 2, 3, 1)
        return np.ascontiguousarray(pixels), finite

    def _on_device(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (N, H, W, C), and whether each row is of numbers (N,)."""
        x = self._network(inputs).float()  # (N, C * H * W)
        finite = x.sum(1).isfinite()  # (N,): between -1 and 1 only what is no number spoils a sum
        # To the nearest level: the conversion cuts off what follows the point.
        pixels = x.mul_(127.5).add_(128.0).to(torch.uint8)
        height, width, channels = self.image_shape
        return pixels.view(-1, channels, height, width).permute(0, 2, 3, 1).contiguous(), finite

    def _choose_shapes(self) -> None:
        """Find the batches that give what those of `REFERENCE_ROWS` do, and prepare their kernels.

        They are all multiples of `ROW_MULTIPLE` from a least to a largest one, and few rows of a
        batch of the least where the network can draw these for themselves.
        """
        most = self.max_batch + -self.max_batch % ROW_MULTIPLE
        count = max(2 * REFERENCE_ROWS, most)
        inputs = torch.from_numpy(self._inputs(*self._order(count)))

        def made(rows: int, among: int) -> Tensor:
            """As many images as fill whole batches of so many rows."""
            starts = range(0, among - rows + 1, rows)
            parts = [slice(start, start + rows) for start in starts]
            return torch.cat([self._network(inputs[part]).clone() for part in parts])

        def agrees(rows: int) -> bool:
            among = count if rows <= _SMALL_ROWS else max(rows, REFERENCE_ROWS)
            found = made(rows, among)
            return torch.equal(found[: len(reference)], reference[: len(found)])

        def drawn_alike(few: int) -> bool:
            """Whether the first rows of a batch of the least are what they are among many."""
            starts = range(0, REFERENCE_ROWS, few)
            parts = [slice(start, start + least) for start in starts]
            found = [self._network(inputs[part], few).clone() for part in parts]
            return torch.equal(torch.cat(found), reference[:REFERENCE_ROWS])

        with torch.inference_mode():
            # Now and then half of the rows that a process computes first are off by 0.00005.
            made(REFERENCE_ROWS, REFERENCE_ROWS)
            reference = made(REFERENCE_ROWS, count)
            while most > REFERENCE_ROWS and not agrees(most):
                most -= ROW_MULTIPLE
            least = most
            while least < REFERENCE_ROWS and not agrees(least):
                least += ROW_MULTIPLE
            while least <= most and least > ROW_MULTIPLE and agrees(least - ROW_MULTIPLE):
                least -= ROW_MULTIPLE
            self._few_rows = tuple(filter(drawn_alike, self._network.few_rows))
        self.max_batch, self._least_rows = min(self.max_batch, most), least

    def _order(self, count: int) -> tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]:
        indices = np.arange(count, dtype=np.int64)
        labels = indices % self.artifact.info.network.num_classes
        return np.full(count, _KNOWN_SEED, dtype=np.uint64), indices, labels

    def _check(self) -> ReferenceImages:
        """Prove the two things that an answer relies on."""
        seeds, indices, labels = self._order(self.max_batch)
        known = self(seeds, indices, labels)
        for rows in {1, max(1, self.max_batch // 2)}:
            some = self(seeds[-rows:], indices[-rows:], labels[-rows:])
            if not np.array_equal(some, known[-rows:]):
                raise EngineError(
                    f"an image in a batch of {rows} differs from the same in a larger"
                )
        with torch.inference_mode():
            latents = torch.from_numpy(draw_latents(seeds, indices, self._latent_dim))
            images = self.artifact.generator(latents, torch.from_numpy(labels))
        reference = images.mul(127.5).add(127.5).permute(0, 2, 3, 1).numpy()
        difference = float(np.abs(known - reference).mean())
        if not difference <= _TOLERANCE[self.dtype]:
            raise EngineError(
                f"the known images differ from the artifact's by {difference:.2f} levels on average"
            )
        return ReferenceImages(
            seeds[:_KNOWN], indices[:_KNOWN], labels[:_KNOWN], known[:_KNOWN].copy()
        )


def _pad(rows: NDArray[T], more: int) -> NDArray[T]:
    """Some rows, and so many of zeros; PyTorch's function takes five times as long, or longer."""
    padded = np.zeros((len(rows) + more, *rows.shape[1:]), dtype=rows.dtype)
    padded[: len(rows)] = rows
    return padded


class _Captured:
    """A CUDA graph of one fixed batch shape, replayed for every batch.

    A fixed shape takes the same kernels every time, which is what makes a row independent of how
    many others ride with it; rows that nobody asked for are computed and left behind.
    """

    def __init__(
        self,
        function: ForwardFn,
        rows: int,
        width: int,
        device: torch.device,
    ) -> None:
        self._inputs = torch.zeros((rows, width), device=device)
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for _ in range(3):  # libraries choose kernels and take workspaces before the capture
                function(self._inputs)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads go on: another engine may be serving while this one is made.
            with torch.cuda.graph(
                self._graph, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._results = function(self._inputs)
        self._host = [torch.empty_like(each, device="cpu").pin_memory() for each in self._results]

    def __call__(self, inputs: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        rows = len(inputs)
        with torch.cuda.stream(self._stream):
            self._inputs[:rows].copy_(torch.from_numpy(inputs))
            self._graph.replay()
            for host, result in zip(self._host, self._results, strict=True):
                host[:rows].copy_(result[:rows], non_blocking=True)
        self._stream.synchronize()
        # The pinned buffers are written again by the next batch.
        pixels, finite = (host[:rows].numpy().copy() for host in self._host)
        return pixels, finite
