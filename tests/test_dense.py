import itertools
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from service.dense import Activation, Dense, Layer, OnnxChain, TorchChain, chain
from tests.processes import run

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


@pytest.mark.parametrize("activation", ["none", "leaky_relu", "tanh"])
def test_a_dense_layer_is_a_linear_one_and_its_activation(
    activation: Activation, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, bias = torch.randn(16, 24), torch.randn(32, 24), torch.randn(32)
    expected = activated(functional.linear(x, weight, bias), activation)
    for packs in (True, False):  # where oneDNN is missing, or the device is another one
        monkeypatch.setattr("service.dense._packs", lambda _, packs=packs: packs)
        with torch.inference_mode():
            made = Dense(Layer(weight, bias, activation))(x)
        assert torch.allclose(made, expected, atol=1e-5)


@pytest.mark.parametrize(("fan_in", "fan_out"), [(110, 128), (301, 70), (512, 1024)])
def test_onednn_draws_a_row_alike_among_any_others(fan_in: int, fan_out: int) -> None:
    """A product of 512 x 1024 in bfloat16 sums fewer than 40 rows in another order on AMX."""
    weight, bias = torch.randn(fan_out, fan_in).bfloat16(), torch.randn(fan_out).bfloat16()
    dense = Dense(Layer(weight, bias, "leaky_relu"))
    if not dense.packed:
        pytest.skip("this processor has no instructions for which weights are packed")
    x = torch.randn(256, fan_in).bfloat16()
    many = dense(x)
    for count in (1, 2, 4, 8, 16, 24, 32, 40, 64, 128):
        assert torch.equal(torch.cat([dense(part) for part in x.split(count)]), many), count


@pytest.mark.parametrize("kind", [TorchChain, OnnxChain])
def test_a_chain_is_its_layers_one_after_the_other(
    kind: type[TorchChain | OnnxChain], layers: list[Layer]
) -> None:
    x = inputs(33)
    with torch.inference_mode():
        assert torch.allclose(kind(layers)(x), one_by_one(layers, x), atol=1e-5)


def test_onnx_runtime_draws_a_row_alike_among_any_others_and_with_any_threads(
    layers: list[Layer],
) -> None:
    x = inputs(256)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = OnnxChain(layers)
        torch.set_num_threads(2)
        two = OnnxChain(layers)
    finally:
        torch.set_num_threads(before)
    known = one(x)
    assert torch.equal(two(x), known)
    for count in (1, 2, 3, 4, 5, 8, 31, 64):
        for drawing in (one, two):
            assert torch.equal(torch.cat([drawing(part) for part in x.split(count)]), known), count


def test_onnx_runtime_computes_what_is_not_rounded_to_bfloat16(layers: list[Layer]) -> None:
    assert type(chain(layers)) is OnnxChain
    halves = [
        Layer(weight.bfloat16(), bias.bfloat16(), activation) for weight, bias, activation in layers
    ]
    assert type(chain(halves)) is TorchChain


def test_what_onnx_runtime_cannot_do_is_a_runtime_error(layers: list[Layer]) -> None:
    with pytest.raises(RuntimeError, match="dimensions for input: x"):
        OnnxChain(layers)(inputs(2)[:, 1:].contiguous())


def test_too_little_memory_for_onnx_runtime_is_a_memory_error() -> None:
    code = """if True:
        import resource
        import torch
        from pathlib import Path
        from service.dense import Layer, OnnxChain

        chain = OnnxChain([Layer(torch.ones(100_000, 1), torch.ones(100_000), "tanh")])
        chain(torch.ones(1, 1))
        x = torch.ones(1_000, 1)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (100 << 20)  # of 400 MB that are needed
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        try:
            chain(x)
        except MemoryError:
            print("MemoryError")
    """
    ended = run("-c", code)
    assert (ended.stdout, ended.returncode) == ("MemoryError\n", 0), ended.stderr
    assert "[E:" not in ended.stderr  # errors in a log of its own, which nobody reads


def test_onnx_runtime_keeps_to_itself_what_it_is_used_for(tmp_path: Path) -> None:
    """Its telemetry, which it leaves out by itself where `CI` is set, leaves a file behind."""
    code = """
import torch
from service.dense import Layer, OnnxChain
OnnxChain([Layer(torch.zeros(2, 2), torch.zeros(2), "tanh")])
    """
    mine = {
        name: value for name, value in os.environ.items() if not name.startswith(("CI", "ORT_"))
    }
    ended = run("-c", code, environment={**mine, "TMPDIR": str(tmp_path)})
    assert ended.returncode == 0, ended.stderr
    assert list(tmp_path.iterdir()) == []
