"""A generator on a GPU, by PyTorch.

The generator is rewritten for inference: batch norm is folded into the layer before it, and the
forward is a captured graph.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import fuse_linear_bn_eval

from service.inference.errors import DeviceLost, OutOfMemory
from training.artifact import Artifact
from training.loading import build_from
from training.networks import Generator, MLPGenerator

Forward = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class TorchNetwork:
    """A generator as a function to pixels; see `service.inference.engine.Network`.

    On a GPU it is captured, on a CPU, for tests, it is not.
    """

    def __init__(self, artifact: Artifact, device: str, dtype: str, max_batch: int) -> None:
        generator = build_from(artifact)
        if isinstance(generator, MLPGenerator):
            fold_batch_norm(generator)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._device = torch.device(device)
        self._generator: Generator = generator.to(
            self._device, self._dtype, memory_format=torch.channels_last
        )  # type: ignore[call-overload]
        self._captured: _CUDAGraph | None = None
        if self._device.type == "cuda":
            network = artifact.info.network
            widths = network.latent_dim, network.embedding_dim
            self._captured = _CUDAGraph(self._forward, max_batch, widths, self._device)

    def __call__(
        self, latents: NDArray[np.float32], embedded: NDArray[np.float32]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return pixels (N, H, W, C), and which rows are finite (N,).

        Raises:
            OutOfMemory: the rows do not fit the memory.
            DeviceLost: the device failed, and this process cannot use it any more.
        """
        inputs = torch.from_numpy(latents), torch.from_numpy(embedded)
        with translated_errors(), torch.inference_mode():
            if self._captured is not None:
                return self._captured(*inputs)
            pixels, finite = self._forward(*inputs)
            return pixels.numpy(), finite.numpy()

    def _forward(self, latents: Tensor, embedded: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels (N, H, W, C), and which rows are finite (N,)."""
        inputs = latents.to(self._dtype), embedded.to(self._dtype)
        x = self._generator.synthesise(*inputs).float()
        finite = x.flatten(1).sum(1).isfinite()  # values in [-1, 1] cannot overflow a sum
        # To the nearest level: the conversion truncates.
        pixels = x.mul_(127.5).add_(128.0).to(torch.uint8)
        return pixels.permute(0, 2, 3, 1).contiguous(), finite


def fold_batch_norm(generator: MLPGenerator) -> None:
    """Fold the batch norms of a generator in evaluation mode into the layers before them.

    In double precision, so that folding rounds each weight once.
    """
    layers = generator.main.double()
    for index, layer in enumerate(layers):
        if isinstance(layer, nn.BatchNorm1d):
            before = layers[index - 1]
            assert isinstance(before, nn.Linear)
            layers[index - 1] = fuse_linear_bn_eval(before, layer)
            layers[index] = nn.Identity()
    layers.float()


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise `OutOfMemory` and `DeviceLost` for the errors of PyTorch that mean them."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise DeviceLost(str(error)) from error
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(str(error)) from error


class _CUDAGraph:
    """A CUDA graph of one fixed batch shape, replayed for every batch.

    A fixed shape always takes the same kernels, so a row does not depend on the number of rows
    beside it; unused rows are computed and dropped.
    """

    def __init__(
        self, function: Forward, rows: int, widths: tuple[int, int], device: torch.device
    ) -> None:
        self._inputs = [torch.zeros((rows, width), device=device) for width in widths]
        self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for _ in range(3):  # libraries choose kernels and workspaces before the capture
                function(*self._inputs)
            self._graph = torch.cuda.CUDAGraph()
            # Other threads may use the device: an engine may serve while this one is built.
            with torch.cuda.graph(
                self._graph, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._results = function(*self._inputs)
        self._host = [torch.empty_like(each, device="cpu").pin_memory() for each in self._results]

    def __call__(self, *inputs: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        rows = len(inputs[0])
        with torch.cuda.stream(self._stream):
            for own, given in zip(self._inputs, inputs, strict=True):
                own[:rows].copy_(given)
            self._graph.replay()
            for host, result in zip(self._host, self._results, strict=True):
                host[:rows].copy_(result[:rows], non_blocking=True)
        self._stream.synchronize()
        # The next batch overwrites the pinned buffers.
        pixels, finite = (host[:rows].numpy().copy() for host in self._host)
        return pixels, finite
