"""The engine: an artifact on a device, as one function from seeds, indices and labels to pixels.

The generator is rewritten for inference: batch norm is folded into the layer before it, and the
network takes a latent and a class embedding side by side, so that a mixture of classes is a row
like any other. At start-up the engine compares the rewritten network with the artifact's own and
proves that an image does not depend on its batch; an engine that fails either does not serve.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import fuse_linear_bn_eval

from service.inference.backends import compile_mlp, translated_errors
from service.inference.errors import CorruptRows, EngineError
from service.inference.latents import RowOptions, draw_latents, mix_embeddings
from training.artifact import Artifact
from training.devices import has_native_bfloat16
from training.networks import ConvGenerator, Generator, MLPGenerator

DtypeName = Literal["auto", "float32", "bfloat16"]

# On the CPU a batch is padded to a multiple of this, because few shapes are few kernels, or to one
# of a few smaller sizes if these give the same images.
ROW_MULTIPLE = 8
REFERENCE_ROWS = 256  # size of the batch on the CPU whose images every other size must reproduce
# Sizes up to this are compared on twice as many images, because those that differ do so in few.
_CLOSELY_COMPARED_ROWS = 64
# Allowed mean difference, in levels of 255, from the artifact's own float32 forward, which is not
# rounded to levels. A network that is folded wrongly is off by tens of levels.
_TOLERANCE = {torch.float32: 0.5, torch.bfloat16: 1.5}
_REFERENCE_SEED, _REFERENCE_IMAGES = 0, 8

ForwardFn = Callable[[Tensor], tuple[Tensor, Tensor]]
Rows = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]  # seeds, indices, labels


class ReferenceImages(NamedTuple):
    """Rows, and the pixels (N, H, W, C) that they must give."""

    seeds: NDArray[np.uint64]
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixels: NDArray[np.uint8]


def resolve_dtype(name: DtypeName, device: torch.device) -> torch.dtype:
    """Return the dtype that an option names; `auto` is bfloat16 if the device is fast in it."""
    if name == "auto":
        return torch.bfloat16 if has_native_bfloat16(device) else torch.float32
    return torch.float32 if name == "float32" else torch.bfloat16


class FusedMLP:
    """An `MLPGenerator` in evaluation mode, as linear layers only: batch norm is folded into them.

    Attributes:
        small_batches: numbers of rows that it can compute by themselves.
        pads_inputs: False: a small batch needs the inputs of its own rows only.
    """

    pads_inputs = False

    def __init__(
        self, generator: MLPGenerator, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        layers: list[nn.Linear] = []
        # In double precision, so that folding rounds each weight once.
        for layer in deepcopy(generator.main).double():
            if isinstance(layer, nn.Linear):
                layers.append(layer)
            elif isinstance(layer, nn.BatchNorm1d):
                layers[-1] = fuse_linear_bn_eval(layers[-1], layer)
        layers = [layer.float() for layer in layers]
        self._mlp = compile_mlp(layers, device=device, dtype=dtype)
        self.small_batches = self._mlp.small_batches

    def __call__(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Map latents and embeddings (N, F) float32 to (N, C * H * W) in [-1, 1], or the first."""
        return self._mlp(x if rows is None or rows == len(x) else x[:rows])


class FusedConv:
    """A `ConvGenerator` in evaluation mode, in channels-last order; there is nothing to fold.

    Attributes:
        small_batches: numbers of rows that the convolutions can compute by themselves; these take
            less time, and may round as those of many rows do where dense layers do not.
        pads_inputs: True: the dense layers need a whole batch.
    """

    small_batches: Sequence[int] = (2, 4)
    pads_inputs = True

    def __init__(
        self, generator: ConvGenerator, *, device: torch.device, dtype: torch.dtype
    ) -> None:
        copy = deepcopy(generator)
        self.synthesis = copy.to(device, dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._dtype = dtype

    @torch.inference_mode()
    def __call__(self, x: Tensor, rows: int | None = None) -> Tensor:
        """Map latents and embeddings (N, F) float32 to (N, C * H * W) in [-1, 1], or the first."""
        style = self.synthesis.trunk(x.to(self._dtype))  # (N, style_dim)
        images: Tensor = self.synthesis.synthesise(style, rows)
        return images.flatten(1)


def fuse(generator: Generator, *, device: torch.device, dtype: torch.dtype) -> FusedMLP | FusedConv:
    """Return a generator rewritten for inference on a device."""
    if isinstance(generator, ConvGenerator):
        return FusedConv(generator, device=device, dtype=dtype)
    return FusedMLP(generator, device=device, dtype=dtype)


class Engine:
    """A generator on a device; calling it makes pixels. Not safe for several threads at a time.

    Attributes:
        artifact: the loaded file.
        device: computes the images.
        dtype: of the computation.
        max_batch: maximum rows of a call; less than requested if larger batches round differently.
        image_shape: (H, W, C).
        reference: a few images that must never change, to test the device with later.
    """

    def __init__(
        self, artifact: Artifact, *, device: torch.device, dtype: torch.dtype, max_batch: int
    ) -> None:
        """Rewrite the generator, warm it up and test it.

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
        # None instead of `self._eager`: an object that refers to itself is only freed by the
        # garbage collector, and one from before start-up, which is frozen, never.
        self._graph: _CUDAGraph | None = None
        self._min_rows = ROW_MULTIPLE  # of a batch on the CPU
        self._small_batches: tuple[int, ...] = ()  # smaller ones that need no padding to it
        if device.type == "cuda":
            width = network.latent_dim + self._embedding.shape[1]
            self._graph = _CUDAGraph(self._forward, max_batch, width, device)
        else:
            self._find_reproducible_batch_sizes()
        self.reference = self._self_test()

    def __call__(
        self,
        seeds: NDArray[np.uint64],  # (B,), with 1 <= B <= max_batch
        indices: NDArray[np.int64],  # (B,), not negative
        labels: NDArray[np.int64],  # (B,) in [0, num_classes)
        row_options: Sequence[RowOptions] = (),  # of rows that are not plain draws of their class
    ) -> NDArray[np.uint8]:
        """Generate one image per row: (B, H, W, C), owned by the caller.

        The arguments are not written to and not kept.

        Raises:
            OutOfMemory: the rows do not fit the memory.
            CorruptRows: some rows are not finite.
            DeviceLost: the device failed, and this process cannot use it any more.
        """
        forward = self._graph or self._eager
        with translated_errors():
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
        """Return latents and class embeddings, (B, latent_dim + embedding_dim)."""
        latents = draw_latents(seeds, indices, self._latent_dim)
        embedded = self._embedding.take(labels, 0)
        for rows, request_rows, options in row_options:
            latents[rows] = options.apply(latents[rows], indices[rows], request_rows)
            if options.mix is not None:
                embedded[rows] = mix_embeddings(options.mix, self._embedding)
        return np.concatenate((latents, embedded), 1)

    @torch.inference_mode()
    def _eager(self, inputs: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Compute a batch on the CPU, padded to a size that rounds alike."""
        rows = len(inputs)
        small = next((size for size in self._small_batches if size >= rows), None)
        padding = max(self._min_rows - rows, -rows % ROW_MULTIPLE)
        if small is not None and not self._network.pads_inputs:
            padding = small - rows
        if padding:
            blank = np.zeros((padding, inputs.shape[1]), dtype=np.float32)
            inputs = np.concatenate((inputs, blank))
        pixels, finite = self._forward(torch.from_numpy(inputs), small)
        return pixels[:rows].numpy(), finite[:rows].numpy()

    def _forward(self, inputs: Tensor, rows: int | None = None) -> tuple[Tensor, Tensor]:
        """Return pixels (N, H, W, C), and which rows are finite (N,), of all or the first rows."""
        x = self._network(inputs, rows).float()  # (N, C * H * W)
        finite = x.sum(1).isfinite()  # values between -1 and 1 cannot overflow a sum
        # To the nearest level: the conversion truncates.
        pixels = x.mul_(127.5).add_(128.0).to(torch.uint8)
        height, width, channels = self.image_shape
        return pixels.view(-1, channels, height, width).permute(0, 2, 3, 1).contiguous(), finite

    def _find_reproducible_batch_sizes(self) -> None:
        """Find the batch sizes that give the same images as `REFERENCE_ROWS`, and warm them up.

        These are all multiples of `ROW_MULTIPLE` from a smallest to a largest one, and small
        batches that the network can compute by themselves.
        """
        largest = self.max_batch + -self.max_batch % ROW_MULTIPLE
        count = max(2 * REFERENCE_ROWS, largest)
        inputs = torch.from_numpy(self._inputs(*self._reference_rows(count)))

        def compute(rows: int, count: int, step: int | None = None) -> Tensor:
            """Compute as many images as fill whole batches, all or the first `step` of each."""
            starts = range(0, count - (step or rows) + 1, step or rows)
            return torch.cat(
                [self._network(inputs[start : start + rows], step).clone() for start in starts]
            )

        def reproduces(images: Tensor) -> bool:
            common = min(len(images), len(reference))
            return torch.equal(images[:common], reference[:common])

        def is_reproducible(rows: int) -> bool:
            few = max(rows, REFERENCE_ROWS)
            return reproduces(compute(rows, count if rows <= _CLOSELY_COMPARED_ROWS else few))

        with torch.inference_mode():
            # Now and then half of the rows that a process computes first are off by 0.00005.
            compute(REFERENCE_ROWS, REFERENCE_ROWS)
            reference = compute(REFERENCE_ROWS, count)
            while largest > REFERENCE_ROWS and not is_reproducible(largest):
                largest -= ROW_MULTIPLE
            smallest = largest
            while smallest < REFERENCE_ROWS and not is_reproducible(smallest):
                smallest += ROW_MULTIPLE
            while ROW_MULTIPLE < smallest <= largest and is_reproducible(smallest - ROW_MULTIPLE):
                smallest -= ROW_MULTIPLE
            self._small_batches = tuple(
                small
                for small in self._network.small_batches
                if reproduces(compute(smallest, REFERENCE_ROWS, small))
            )
        self.max_batch, self._min_rows = min(self.max_batch, largest), smallest

    def _reference_rows(self, count: int) -> Rows:
        indices = np.arange(count, dtype=np.int64)
        labels = indices % self.artifact.info.network.num_classes
        return np.full(count, _REFERENCE_SEED, dtype=np.uint64), indices, labels

    def _self_test(self) -> ReferenceImages:
        """Test the two properties that every answer relies on; return a few images."""
        seeds, indices, labels = self._reference_rows(self.max_batch)
        pixels = self(seeds, indices, labels)
        for rows in {1, max(1, self.max_batch // 2)}:
            some = self(seeds[-rows:], indices[-rows:], labels[-rows:])
            if not np.array_equal(some, pixels[-rows:]):
                raise EngineError(
                    f"an image in a batch of {rows} differs from the same image in a batch of "
                    f"{self.max_batch}"
                )
        with torch.inference_mode():
            latents = torch.from_numpy(draw_latents(seeds, indices, self._latent_dim))
            images = self.artifact.generator(latents, torch.from_numpy(labels))
        expected = images.mul(127.5).add(127.5).permute(0, 2, 3, 1).numpy()
        difference = float(np.abs(pixels - expected).mean())
        tolerance = _TOLERANCE[self.dtype]
        if not difference <= tolerance:
            raise EngineError(
                f"images differ from those of the artifact's own network by {difference:.2f} "
                f"levels on average; allowed are {tolerance}"
            )
        few = slice(_REFERENCE_IMAGES)
        return ReferenceImages(seeds[few], indices[few], labels[few], pixels[few].copy())


class _CUDAGraph:
    """A CUDA graph of one fixed batch shape, replayed for every batch.

    A fixed shape always takes the same kernels, so a row does not depend on the number of rows
    beside it; unused rows are computed and dropped.
    """

    def __init__(self, function: ForwardFn, rows: int, width: int, device: torch.device) -> None:
        self._inputs = torch.zeros((rows, width), device=device)
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for _ in range(3):  # libraries choose kernels and workspaces before the capture
                function(self._inputs)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the device: an engine may serve while this one is built.
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
        # The next batch overwrites the pinned buffers.
        pixels, finite = (host[:rows].numpy().copy() for host in self._host)
        return pixels, finite
