import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from service.inference.backends import OnnxRuntimeMLP, TorchMLP, compile_mlp, translated_errors
from service.inference.errors import DeviceLost, OutOfMemory
from tests.support.processes import run

CPU = torch.device("cpu")
WIDTHS = (20, 48, 300, 96)  # more than a kernel computes at once


@pytest.fixture(scope="module")
def layers() -> list[nn.Linear]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return [nn.Linear(*widths) for widths in itertools.pairwise(WIDTHS)]


def inputs(count: int) -> Tensor:
    return torch.randn(count, WIDTHS[0], generator=torch.Generator().manual_seed(count))


@torch.inference_mode()
def one_by_one(layers: Sequence[nn.Linear], x: Tensor) -> Tensor:
    for layer in layers[:-1]:
        x = functional.leaky_relu(layer(x), 0.2)
    return layers[-1](x).tanh()  # type: ignore[no-any-return]


def test_an_mlp_is_its_layers_one_after_the_other(layers: list[nn.Linear]) -> None:
    x = inputs(33)
    for kind in (TorchMLP(layers, CPU, torch.float32), OnnxRuntimeMLP(layers)):
        kind(x)  # now and then half of the rows that a process computes first are off by 0.00005
        assert torch.allclose(kind(x), one_by_one(layers, x), atol=1e-5)


def test_onnx_runtime_rounds_a_row_alike_in_every_batch_and_with_any_threads(
    layers: list[nn.Linear],
) -> None:
    x = inputs(256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = OnnxRuntimeMLP(layers)
        torch.set_num_threads(2)
        two = OnnxRuntimeMLP(layers)
    finally:
        torch.set_num_threads(before)
    expected = one(x)
    assert torch.equal(two(x), expected)
    for count in (1, 2, 3, 4, 5, 8, 31, 64):
        for mlp in (one, two):
            assert torch.equal(torch.cat([mlp(part) for part in x.split(count)]), expected), count


def test_onnx_runtime_computes_float32_on_the_cpu_and_pytorch_the_rest(
    layers: list[nn.Linear],
) -> None:
    assert type(compile_mlp(layers, device=CPU, dtype=torch.float32)) is OnnxRuntimeMLP
    mlp = compile_mlp(layers, device=CPU, dtype=torch.bfloat16)
    assert type(mlp) is TorchMLP
    x = inputs(33)
    result = mlp(x)
    assert result.dtype is torch.bfloat16
    assert torch.allclose(result.float(), one_by_one(layers, x), atol=0.05)


def test_other_errors_of_a_runtime_are_raised_as_they_are(layers: list[nn.Linear]) -> None:
    with pytest.raises(Exception, match="dimensions for input: x"), translated_errors():
        OnnxRuntimeMLP(layers)(inputs(2)[:, 1:].contiguous())


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), OutOfMemory),
        (MemoryError("numpy"), OutOfMemory),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: unspecified launch failure"), DeviceLost),
    ],
)
def test_memory_and_lost_devices_have_errors_of_their_own(
    error: Exception, expected: type[Exception]
) -> None:
    with pytest.raises(expected, match=str(error)), translated_errors():
        raise error


TOO_LITTLE = """
import resource
import torch
from pathlib import Path
from service.inference.backends import OnnxRuntimeMLP, translated_errors
from service.inference.errors import OutOfMemory

mlp = OnnxRuntimeMLP([torch.nn.Linear(1, 100_000)])
expected = mlp(torch.ones(1, 1)).clone()
x = torch.ones(10_000, 1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (100 << 20)  # of 4 GB that are needed
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    with translated_errors():
        mlp(x)
except OutOfMemory:
    print("OutOfMemory")
for rows in (1, 2, 1):
    assert torch.equal(mlp(torch.ones(rows, 1)), expected.expand(rows, -1))
"""


def test_too_little_memory_for_onnx_runtime_is_out_of_memory() -> None:
    ended = run("-c", TOO_LITTLE)
    assert (ended.stdout, ended.returncode) == ("OutOfMemory\n", 0), ended.stderr
    assert "[E:" not in ended.stderr  # a second log of errors


SILENT = """
import torch
from service.inference.backends import OnnxRuntimeMLP
OnnxRuntimeMLP([torch.nn.Linear(2, 2)])
"""


def test_onnx_runtime_sends_no_telemetry(tmp_path: Path) -> None:
    """Its telemetry, which it disables by itself in a CI, leaves files behind."""
    signs = ("CI", "ORT_", "GITHUB_", "JENKINS_", "TF_BUILD", "TEAMCITY_")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(signs)}
    places = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    ended = run("-c", SILENT, environment={**mine, **places})
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == []
