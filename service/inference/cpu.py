"""A generator on the CPU, by ONNX Runtime."""

from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil

import numpy as np
from numpy.typing import NDArray

from service.inference.errors import OutOfMemory
from training.artifact import Graph
from training.generator_config import GeneratorConfig, MLPGeneratorConfig
from training.session import Session

Result = tuple[NDArray[np.uint8], NDArray[np.bool_]]

_MAX_RUN_ROWS = 256
_CACHED_BYTES = 1 << 20  # of the largest feature map
# Parts of messages of allocators, for whose errors there are no types.
_OUT_OF_MEMORY = ("bad_alloc", "Failed to allocate")


class OnnxNetwork:
    """A graph as a function to pixels; see `service.inference.engine.Network`.

    Args:
        graph: to compute.
        run_rows: maximum rows of one run; more are computed in several.
    """

    def __init__(self, graph: Graph, run_rows: int) -> None:
        self._session = Session(graph)
        self._run_rows = run_rows

    def __call__(self, latents: NDArray[np.float32], embedded: NDArray[np.float32]) -> Result:
        """Return pixels (N, H, W, C), and which rows are finite (N,).

        Raises:
            OutOfMemory: the rows do not fit the memory.
        """
        parts = [slice(at, at + self._run_rows) for at in range(0, len(latents), self._run_rows)]
        with translated_errors():
            runs = [_to_pixels(self._session(latents[part], embedded[part])) for part in parts]
            if len(runs) == 1:
                return runs[0]
            pixels, finite = (np.concatenate(values) for values in zip(*runs, strict=True))
            return pixels, finite


def choose_run_rows(network: GeneratorConfig) -> int:
    """Return the rows of one run; their feature maps stay in the processor's cache.

    An image of 28x28 pixels by convolutions took 1.5 times as long in runs of 256 rows as of 96.
    """
    if isinstance(network, MLPGeneratorConfig):
        return _MAX_RUN_ROWS
    map_bytes = 4 * network.widths[-1] * ceil(network.image_size / 2) ** 2
    return max(1, min(_MAX_RUN_ROWS, _CACHED_BYTES // map_bytes))


def _to_pixels(images: NDArray[np.float32]) -> Result:
    """Return pixels (N, H, W, C) of images (N, C, H, W) in [-1, 1], and which are finite (N,)."""
    finite = np.isfinite(images.reshape(len(images), -1).sum(1))  # such values overflow no sum
    images *= 127.5
    images += 128.0  # to the nearest level: the conversion truncates
    with np.errstate(invalid="ignore"):  # values that are not finite
        pixels = np.ascontiguousarray(images.transpose(0, 2, 3, 1).astype(np.uint8))
    return pixels, finite


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise `OutOfMemory` for the errors that mean it."""
    try:
        yield
    except Exception as error:  # those of ONNX Runtime share no base class
        if isinstance(error, MemoryError) or any(text in str(error) for text in _OUT_OF_MEMORY):
            raise OutOfMemory(str(error)) from error
        raise
