"""The network of PyTorch, here on the CPU, where it is not captured."""

from pathlib import Path

import numpy as np
import pytest
import torch

from service.inference.cpu import OnnxNetwork
from service.inference.cuda import TorchNetwork, translated_errors
from service.inference.errors import DeviceLost, OutOfMemory
from tests.conftest import make_artifact
from training.artifact import read_artifact


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_pytorch_makes_the_images_of_the_graph(tmp_path: Path, kind: str, channels: int) -> None:
    path = make_artifact(tmp_path / "a.safetensors", kind=kind, channels=channels)
    artifact = read_artifact(path)
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((32, 9)).astype(np.float32)
    embedded = artifact.tensors["label_embedding.weight"][np.arange(32) % 3]
    expected, _ = OnnxNetwork(artifact.graphs["float32"], 256)(latents, embedded)
    for dtype, allowed in (("float32", 0.01), ("bfloat16", 2.0)):
        pixels, finite = TorchNetwork(artifact, "cpu", dtype, 32)(latents, embedded)
        assert pixels.shape == (32, 12, 12, channels)
        assert pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - expected).mean() <= allowed
        assert finite.all()


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), DeviceLost),
        (ValueError("another"), ValueError),
    ],
)
def test_memory_and_lost_devices_have_errors_of_their_own(
    error: Exception, expected: type[Exception]
) -> None:
    with pytest.raises(expected, match=str(error)), translated_errors():
        raise error
