"""Chains of dense layers, by whatever computes them fastest where they are."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.devices import has_native_bfloat16

Activation = Literal["none", "leaky_relu", "tanh"]

# On the CPU a batch is filled up to a multiple of this, since few shapes are few kernels, or,
# where that gives the same images, to one of a few smaller numbers.
ROW_MULTIPLE, FEW_ROWS = 8, (1, 2, 4)
REFERENCE_ROWS = 256  # of the batch on the CPU whose results count

_SLOPE = 0.2  # of leaky ReLU
# Versions of ONNX that every runtime we allow reads; `onnx` would write the newest that it knows.
_OPSET, _IR = 17, 8
_ONNX: Mapping[str, tuple[str, dict[str, Any]]] = {
    "leaky_relu": ("LeakyRelu", {"alpha": _SLOPE}),
    "tanh": ("Tanh", {}),
}


class Layer(NamedTuple):
    """A linear layer, and the activation after it.

    Attributes:
        weight: (fan_out, fan_in).
        bias: (fan_out,).
        activation: of the sum.
    """

    weight: Tensor
    bias: Tensor
    activation: Activation


class Dense:
    """One layer, as one operation where the device has one.

    oneDNN keeps the weights in the order in which its kernels read them and applies the activation
    before the sum is rounded; in bfloat16, where the processor multiplies it, that takes about
    three quarters of the time of the plain operations. What it makes of a row does not depend on
    the rows beside it: of those that take another kernel than many do, there are as many as needed.

    Attributes:
        packed: whether oneDNN computes it.
    """

    def __init__(self, layer: Layer) -> None:
        weight = layer.weight.contiguous()
        self._layer = layer._replace(weight=weight)
        self.packed = _packs(weight)
        if self.packed:
            self._product = _onednn(layer)
            self._filling = weight.new_zeros(_least_rows(layer), weight.shape[1])

    def __call__(self, x: Tensor) -> Tensor:
        """(N, fan_in) to (N, fan_out), of the weights' type."""
        if not self.packed:
            weight, bias, activation = self._layer
            return _activate(F.linear(x, weight, bias), activation)
        rows = len(x)
        if rows >= len(self._filling):
            return self._product(x)
        return self._product(torch.cat([x, self._filling[rows:]]))[:rows]


class TorchChain:
    """Layers one after the other, by PyTorch.

    Attributes:
        few_rows: numbers of rows that are worth drawing for themselves: none where a product of few
            rows may round otherwise than one of many.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = [Dense(layer) for layer in layers]
        self._dtype = layers[0].weight.dtype
        self.few_rows: Sequence[int] = FEW_ROWS if self._layers[0].packed else ()

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """(N, fan_in) float32 to (N, fan_out)."""
        x = x.to(self._dtype)
        for layer in self._layers:
            x = layer(x)
        return x


class OnnxChain:
    """Layers one after the other, by ONNX Runtime, on the CPU in float32.

    Without AVX-512 that takes less time than PyTorch's products and activations, from two fifths
    for 16 rows to a sixth for 256. With AVX-512 it takes a third less than oneDNN for 16 rows, and
    as much for 128 or more. What it makes of a row depends neither on the rows beside it nor
    on threads; so a lone row can be drawn for itself, where PyTorch's would round in its own way.

    Attributes:
        few_rows: numbers of rows that are worth drawing for themselves.
    """

    few_rows: Sequence[int] = FEW_ROWS

    def __init__(self, layers: Sequence[Layer]) -> None:
        # It would tell its makers of every process and model, and leave files in folders of others;
        # it reads this when it is imported.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime  # noqa: PLC0415  (what computes on a GPU needs none)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_cpu_mem_arena = False  # it would keep what the largest batch has taken
        options.log_severity_level = 4  # its errors are raised as well
        # A thread that turns in circles for want of work takes its core from the event loop.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        with _failures():
            self._session = onnxruntime.InferenceSession(
                _as_onnx(layers), options, providers=["CPUExecutionProvider"]
            )

    def __call__(self, x: Tensor) -> Tensor:
        """(N, fan_in) float32 to (N, fan_out).

        Raises:
            MemoryError: so many rows do not fit.
            RuntimeError: anything else failed.
        """
        with _failures():
            (made,) = self._session.run(None, {"x": x.numpy()})
        return torch.from_numpy(made)


@contextmanager
def _failures() -> Iterator[None]:
    """What ONNX Runtime raises, whose exceptions are of no common kind, as PyTorch would."""
    try:
        yield
    except Exception as error:
        kind = MemoryError if "bad_alloc" in str(error) else RuntimeError
        raise kind(str(error)) from error


def chain(layers: Sequence[Layer]) -> TorchChain | OnnxChain:
    """Layers as one function.

    Args:
        layers: each takes what the one before it makes; all of one device and dtype.
    """
    weight = layers[0].weight
    if weight.device.type == "cpu" and weight.dtype is torch.float32:
        return OnnxChain(layers)
    return TorchChain(layers)


def _packs(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype is not torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and has_native_bfloat16(weight.device)


def _onednn(layer: Layer) -> Callable[[Tensor], Tensor]:
    weight, bias, activation = layer
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 64)
    slope = [_SLOPE] if activation == "leaky_relu" else []
    multiply = torch.ops.mkldnn._linear_pointwise.default

    def product(x: Tensor) -> Tensor:
        made: Tensor = multiply(x, packed, bias, activation, slope, "")
        return made

    return product


def _least_rows(layer: Layer) -> int:
    """From how many rows on a layer of these shapes takes kernels that sum as that of many does.

    Seen in sums that are zero but for what is rounded on the way: two in three of their values, or
    more, tell one order from another, where of a trained layer's in bfloat16 one in 20,000 does.
    """
    weight, bias, activation = layer
    fan_out, fan_in = weight.shape
    generator = torch.Generator().manual_seed(0)

    def pairs(rows: int, sign: int) -> Tensor:
        half = torch.randn(rows, fan_in // 2, generator=generator)
        return torch.cat([half, sign * half, torch.zeros(rows, fan_in % 2)], 1)[:, order]

    order = torch.randperm(fan_in, generator=generator)
    x, weight = (made.to(weight.dtype) for made in (pairs(REFERENCE_ROWS, 1), pairs(fan_out, -1)))
    product = _onednn(Layer(weight, torch.zeros_like(bias), activation))
    many = product(x)
    least = REFERENCE_ROWS
    for rows in (*reversed(range(ROW_MULTIPLE, least, ROW_MULTIPLE)), *reversed(FEW_ROWS)):
        if not torch.equal(product(x[:rows]), many[:rows]):
            break
        least = rows
    return least


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu_(x, _SLOPE)
    return x.tanh_() if activation == "tanh" else x


def _as_onnx(layers: Sequence[Layer]) -> bytes:
    """The layers as a model of ONNX that takes "x", of float32."""
    from onnx import TensorProto, ValueInfoProto, helper, numpy_helper  # noqa: PLC0415  (as above)

    constants, nodes = [], []
    x = "x"
    for number, (weight, bias, activation) in enumerate(layers):
        constants.append(numpy_helper.from_array(bias.numpy(), f"bias{number}"))
        constants.append(numpy_helper.from_array(weight.numpy(), f"weight{number}"))
        inputs = [x, f"weight{number}", f"bias{number}"]
        x = f"sum{number}"
        nodes.append(helper.make_node("Gemm", inputs, [x], transB=1))
        if activation != "none":
            kind, how = _ONNX[activation]
            nodes.append(helper.make_node(kind, [x], [f"x{number}"], **how))
            x = f"x{number}"

    def rows(name: str, width: int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])

    given, made = rows("x", layers[0].weight.shape[1]), rows(x, len(layers[-1].weight))
    graph = helper.make_graph(nodes, "chain", [given], [made], constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR
    )
    written: bytes = model.SerializeToString()
    return written
