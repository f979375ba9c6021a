import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.inference.backends import (
    Activation,
    Layer,
    OnnxRuntimeMLP,
    OpenVINOMLP,
    TorchMLP,
    chain,
)
from tests.support.processes import run
from training.devices import has_native_bfloat16

CPU = torch.device("cpu")
WIDTHS = (20, 48, 300, 96)  # more than a product takes in one go


@pytest.fixture(scope="module")
def layers() -> list[Layer]:
    generator = torch.Generator().manual_seed(1)
    made: list[Layer] = []
    for fan_in, fan_out in itertools.pairwise(WIDTHS):
        weight = torch.randn(fan_out, fan_in, generator=generator) / fan_in**0.5
        made.append(Layer(weight, torch.randn(fan_out, generator=generator), "leaky_relu"))
    return [*made[:-1], made[-1]._replace(activation="tanh")]


def inputs(count: int) -> Tensor:
    return torch.randn(count, WIDTHS[0], generator=torch.Generator().manual_seed(count))


def activated(x: Tensor, activation: Activation) -> Tensor:
    if activation == "leaky_relu":
        return functional.leaky_relu(x, 0.2)
    return x.tanh() if activation == "tanh" else x


def one_by_one(layers: Sequence[Layer], x: Tensor) -> Tensor:
    for weight, bias, activation in layers:
        x = activated(functional.linear(x, weight, bias), activation)
    return x


needs_native_bfloat16 = pytest.mark.skipif(
    not has_native_bfloat16(CPU), reason="needs a processor that multiplies bfloat16"
)


@needs_native_bfloat16
@pytest.mark.parametrize(("fan_in", "fan_out"), [(110, 128), (301, 70), (512, 1024)])
def test_openvino_draws_a_row_alike_among_any_others(fan_in: int, fan_out: int) -> None:
    """On AMX a single row is summed in another order than two, where 110 numbers make it."""
    dense = OpenVINOMLP(
        [
            Layer(torch.randn(fan_out, fan_in), torch.randn(fan_out), "leaky_relu"),
            Layer(torch.randn(96, fan_out), torch.randn(96), "none"),
        ]
    )
    x = torch.randn(4096, fan_in)
    many = torch.cat([dense(part).clone() for part in x.split(256)])
    for count in (1, 2, 3, 4, 8, 16, 24, 32, 40, 64, 128):
        found = torch.cat([dense(part).clone() for part in x.split(count)])
        assert torch.equal(found, many), count


def test_a_chain_is_its_layers_one_after_the_other(layers: list[Layer]) -> None:
    x = inputs(33)
    for kind in (TorchMLP(layers, CPU, torch.float32), OnnxRuntimeMLP(layers)):
        kind(x)  # now and then half of the rows that a process computes first are off by 0.00005
        assert torch.allclose(kind(x), one_by_one(layers, x), atol=1e-5)


@needs_native_bfloat16
def test_openvino_rounds_to_bfloat16_as_pytorch_does(layers: list[Layer]) -> None:
    x = inputs(33)
    expected = one_by_one(layers, x)
    plain = TorchMLP(layers, CPU, torch.bfloat16)
    error = (plain(x).float() - expected).abs().mean()
    assert 0 < (OpenVINOMLP(layers)(x) - expected).abs().mean() < 1.1 * error


def test_onnx_runtime_draws_a_row_alike_among_any_others_and_with_any_threads(
    layers: list[Layer],
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
    known = one(x)
    assert torch.equal(two(x), known)
    for count in (1, 2, 3, 4, 5, 8, 31, 64):
        for drawing in (one, two):
            assert torch.equal(torch.cat([drawing(part) for part in x.split(count)]), known), count


def test_what_computes_is_what_the_processor_is_good_at(layers: list[Layer]) -> None:
    assert type(chain(layers, device=CPU, dtype=torch.float32)) is OnnxRuntimeMLP
    halves = OpenVINOMLP if has_native_bfloat16(CPU) else TorchMLP
    assert type(chain(layers, device=CPU, dtype=torch.bfloat16)) is halves


def test_without_a_processors_help_pytorch_computes_in_bfloat16(
    layers: list[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.inference.backends.has_native_bfloat16", lambda _: False)
    drawing = chain(layers, device=CPU, dtype=torch.bfloat16)
    assert type(drawing) is TorchMLP
    x = inputs(33)
    assert torch.allclose(drawing(x).float(), one_by_one(layers, x), atol=0.05)


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        (OnnxRuntimeMLP, "dimensions for input: x"),
        pytest.param(OpenVINOMLP, "incompatible", marks=needs_native_bfloat16),
    ],
)
def test_what_a_runtime_cannot_do_is_a_runtime_error(
    kind: type[OnnxRuntimeMLP | OpenVINOMLP], cause: str, layers: list[Layer]
) -> None:
    with pytest.raises(RuntimeError, match=cause):
        kind(layers)(inputs(2)[:, 1:].contiguous())


TOO_LITTLE = """
import resource
import torch
from pathlib import Path
from service.inference.backends import Layer, OnnxRuntimeMLP, OpenVINOMLP

chain = {kind}([Layer(torch.ones(100_000, 1), torch.ones(100_000), "tanh")])
known = chain(torch.ones(1, 1)).clone()
x = torch.ones(10_000, 1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (100 << 20)  # of 4 GB that are needed
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    chain(x)
except MemoryError:
    print("MemoryError")
for rows in (1, 2, 1):
    assert torch.equal(chain(torch.ones(rows, 1)), known.expand(rows, -1))
"""


@pytest.mark.parametrize(
    "kind", ["OnnxRuntimeMLP", pytest.param("OpenVINOMLP", marks=needs_native_bfloat16)]
)
def test_too_little_memory_for_a_runtime_is_a_memory_error(kind: str) -> None:
    ended = run("-c", TOO_LITTLE.format(kind=kind))
    assert (ended.stdout, ended.returncode) == ("MemoryError\n", 0), ended.stderr
    assert "[E:" not in ended.stderr  # errors in a log of its own, which nobody reads


KEPT = """
import sys
import torch
from service.inference.backends import Layer, {kind}
{kind}([Layer(torch.zeros(2, 2), torch.zeros(2), "tanh")])
assert not sys.modules.get("openvino_telemetry")
"""


@pytest.mark.parametrize(
    "kind", ["OnnxRuntimeMLP", pytest.param("OpenVINOMLP", marks=needs_native_bfloat16)]
)
def test_a_runtime_keeps_to_itself_what_it_is_used_for(kind: str, tmp_path: Path) -> None:
    """Their telemetry, which they leave out by themselves in a CI, leaves files behind."""
    signs = ("CI", "ORT_", "GITHUB_", "JENKINS_", "TF_BUILD", "TEAMCITY_")
    mine = {name: value for name, value in os.environ.items() if not name.startswith(signs)}
    places = {"TMPDIR": str(tmp_path), "HOME": str(tmp_path)}
    ended = run("-c", KEPT.format(kind=kind), environment={**mine, **places})
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == []
