"""The engine: an artifact on a device, as one function from seeds, indices and labels to pixels.

At start-up the engine compares its images with those that the artifact holds, and proves that an
image does not depend on its batch; an engine that fails either does not serve.
"""

import shlex
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from service.inference.cpu import OnnxNetwork, choose_run_rows
from service.inference.devices import has_native_bfloat16
from service.inference.errors import CorruptRows, EngineError
from service.inference.latents import RowOptions, draw_latents, mix_embeddings
from training.artifact import EMBEDDING, Artifact

DtypeName = Literal["auto", "float32", "bfloat16", "int8"]

# Allowed mean difference from the images in the artifact, which are not rounded to levels, in
# levels of 255. A wrong network is off by tens of levels.
_TOLERANCE = {"float32": 0.5, "bfloat16": 1.5, "int8": 10.0}
_REFERENCE_SEED, _REFERENCE_IMAGES = 0, 8

Rows = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]  # seeds, indices, labels


class Network(Protocol):
    """A generator on a device."""

    def __call__(
        self, latents: NDArray[np.float32], embedded: NDArray[np.float32]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return pixels (N, H, W, C), owned by the caller, and which rows are finite (N,).

        Args:
            latents: (N, latent_dim).
            embedded: (N, embedding_dim), a label's embedding or a mixture of several.

        Raises:
            OutOfMemory: the rows do not fit the memory.
            DeviceLost: the device failed, and this process cannot use it any more.
        """
        ...


class ReferenceImages(NamedTuple):
    """Rows, and the pixels (N, H, W, C) that they must give."""

    seeds: NDArray[np.uint64]
    indices: NDArray[np.int64]
    labels: NDArray[np.int64]
    pixels: NDArray[np.uint8]


def choose_dtype(name: DtypeName, device: str, artifact: Artifact) -> str:
    """Return the precision of an artifact's network on a device.

    `auto` is the fastest that loses nothing: on a CPU int8, if the artifact's certificate says so,
    else float32; on a GPU bfloat16, if it is fast in it.

    Raises:
        EngineError: the device or the artifact does not have this precision.
    """
    if device != "cpu":
        if name == "int8":
            raise EngineError("int8 is for CPUs; use --dtype auto, bfloat16 or float32")
        if name != "auto":
            return name
        return "bfloat16" if has_native_bfloat16(device) else "float32"
    if name == "bfloat16":
        raise EngineError("bfloat16 is for GPUs; on a CPU use --dtype auto, int8 or float32")
    if name == "auto":
        return "int8" if "int8" in artifact.graphs and artifact.info.int8_is_lossless else "float32"
    if name not in artifact.graphs:
        raise EngineError(f"it has no graph in {name}; add it with: {_upgrade(artifact)}")
    return name


def _upgrade(artifact: Artifact) -> str:
    command = shlex.join(["python", "-m", "training", "upgrade", str(artifact.path)])
    return f"{command} (it needs: pip install -e '.[train]')"


class Engine:
    """A generator on a device; calling it makes pixels. Not safe for several threads at a time.

    Attributes:
        artifact: the loaded file.
        device: `cpu`, or `cuda:N`.
        dtype: precision of the computation.
        max_batch: maximum rows of a call.
        image_shape: (H, W, C).
        reference: a few images that must never change, to test the device with later.
    """

    def __init__(
        self, artifact: Artifact, *, device: str, dtype: DtypeName, max_batch: int
    ) -> None:
        """Compile the network, warm it up and test it.

        Raises:
            EngineError: the artifact has no graph, or not in this precision; its images differ from
                those in it, or depend on their batch.
        """
        if artifact.reference is None or "float32" not in artifact.graphs:
            raise EngineError(
                "it is of an earlier release, without a compute graph; add that with: "
                f"{_upgrade(artifact)}"
            )
        network = artifact.info.network
        self.artifact = artifact
        self.device = device
        self.dtype = choose_dtype(dtype, device, artifact)
        self.max_batch = max_batch
        self.image_shape = (network.image_size, network.image_size, network.channels)
        self._latent_dim = network.latent_dim
        self._embedding: NDArray[np.float32] = artifact.tensors[EMBEDDING]
        self._network = self._create_network()
        self.reference = self._self_test()

    def _create_network(self) -> Network:
        if self.device == "cpu":
            graph = self.artifact.graphs["int8" if self.dtype == "int8" else "float32"]
            return OnnxNetwork(graph, choose_run_rows(self.artifact.info.network))
        # PyTorch, which takes seconds to import.
        from service.inference.cuda import TorchNetwork  # noqa: PLC0415

        return TorchNetwork(self.artifact, self.device, self.dtype, self.max_batch)

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
        pixels, finite = self._network(*self._inputs(seeds, indices, labels, row_options))
        if not finite.all():
            raise CorruptRows(pixels, ~finite)
        return pixels

    def _inputs(
        self,
        seeds: NDArray[np.uint64],
        indices: NDArray[np.int64],
        labels: NDArray[np.int64],
        row_options: Sequence[RowOptions] = (),
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Return latents (B, latent_dim) and class embeddings (B, embedding_dim)."""
        latents = draw_latents(seeds, indices, self._latent_dim)
        embedded = self._embedding.take(labels, 0)
        for rows, request_rows, options in row_options:
            latents[rows] = options.apply(latents[rows], indices[rows], request_rows)
            if options.mix is not None:
                embedded[rows] = mix_embeddings(options.mix, self._embedding)
        return latents, embedded

    def _self_test(self) -> ReferenceImages:
        """Test the two properties that every answer relies on; return a few images."""
        indices = np.arange(self.max_batch, dtype=np.int64)
        labels = indices % len(self._embedding)
        seeds = np.full(self.max_batch, _REFERENCE_SEED, dtype=np.uint64)
        pixels = self(seeds, indices, labels)
        for rows in {1, max(1, self.max_batch // 2)}:
            some = self(seeds[-rows:], indices[-rows:], labels[-rows:])
            if not np.array_equal(some, pixels[-rows:]):
                raise EngineError(
                    f"an image in a batch of {rows} differs from the same image in a batch of "
                    f"{self.max_batch}"
                )
        self._compare()
        few = slice(min(_REFERENCE_IMAGES, self.max_batch))
        return ReferenceImages(seeds[few], indices[few], labels[few], pixels[few].copy())

    def _compare(self) -> None:
        """Raise EngineError unless the network makes the images that the artifact holds."""
        assert self.artifact.reference is not None
        latents, labels, images = self.artifact.reference
        rows = slice(min(len(labels), self.max_batch))
        pixels, _ = self._network(latents[rows], self._embedding[labels[rows]])
        expected = images[rows].transpose(0, 2, 3, 1) * 127.5 + 127.5
        difference = float(np.abs(pixels - expected).mean())
        if not difference <= _TOLERANCE[self.dtype]:
            raise EngineError(
                f"images differ from those of the artifact's own network by {difference:.2f} "
                f"levels on average; allowed are {_TOLERANCE[self.dtype]}"
            )
