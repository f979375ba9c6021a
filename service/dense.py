"""Chains of dense layers, by whatever computes them fastest where they are."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from training.devices import has_native_bfloat16

Activation = Literal["none", "leaky_relu", "tanh"]

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
        bias: (fan_out,); None if every row of an input comes with its own.
        activation: of the sum.
    """

    weight: Tensor
    bias: Tensor | None
    activation: Activation


class Dense:
    """One layer, as one operation where the device has one.

    oneDNN keeps the weights in the order in which its kernels read them and applies the activation
    before the sum is rounded; that takes about three quarters of the time of the plain operations,
    but where there is no AVX-512, a quarter more.
    """

    def __init__(self, layer: Layer) -> None:
        weight, self._bias, self._activation = layer
        self._weight = weight.contiguous()
        self._packed: Tensor | None = None
        if weight.device.type == "cpu" and _packs(weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(self._weight, 64)
        self._slope = [_SLOPE] if self._activation == "leaky_relu" else []

    def __call__(self, x: Tensor) -> Tensor:
        """(N, fan_in) to (N, fan_out), of the weights' type."""
        if self._packed is not None:
            fused: Tensor = torch.ops.mkldnn._linear_pointwise(
                x, self._packed, self._bias, self._activation, self._slope, ""
            )
            return fused
        return _activate(F.linear(x, self._weight, self._bias), self._activation)


class TorchChain:
    """Layers one after the other, by PyTorch.

    Attributes:
        few_rows: numbers of rows that are worth drawing for themselves: none, since a product of
            few rows may round otherwise than one of many.
    """

    few_rows: Sequence[int] = ()

    def __init__(self, layers: Sequence[Layer]) -> None:
        first, *rest = layers
        self._first = Dense(Layer(first.weight, None, "none"))
        self._activation, self._dtype = first.activation, first.weight.dtype
        self._rest = [Dense(layer) for layer in rest]

    @torch.inference_mode()
    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """(N, fan_in), and the first layer's bias (N, fan_out) of each row, to (N, fan_out)."""
        x = _activate(self._first(x.to(self._dtype)).add_(bias), self._activation)
        for layer in self._rest:
            x = layer(x)
        return x


class OnnxChain:
    """Layers one after the other, by ONNX Runtime, on the CPU in float32.

    Without AVX-512 that takes less time than PyTorch's products and activations, from two fifths
    for 16 rows to a sixth for 256. What it makes of a row depends neither on the rows beside it nor
    on threads; so a lone row can be drawn for itself, where PyTorch's would round in its own way.

    Attributes:
        few_rows: numbers of rows that are worth drawing for themselves.
    """

    few_rows: Sequence[int] = (1, 2, 4)

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

    def __call__(self, x: Tensor, bias: Tensor) -> Tensor:
        """(N, fan_in), and the first layer's bias (N, fan_out) of each row, to (N, fan_out).

        Raises:
            MemoryError: so many rows do not fit.
            RuntimeError: anything else failed.
        """
        with _failures():
            (made,) = self._session.run(None, {"x": x.numpy(), "bias": bias.numpy()})
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
    """Layers, the first of which has no bias of its own, as one function.

    Args:
        layers: each takes what the one before it makes; all of one device and dtype.
    """
    weight = layers[0].weight
    plain = weight.device.type == "cpu" and weight.dtype is torch.float32
    if plain and not _packs(weight.dtype):
        return OnnxChain(layers)
    return TorchChain(layers)


def _packs(dtype: torch.dtype) -> bool:
    if dtype is torch.float32:
        native = torch.backends.cpu.get_cpu_capability() == "AVX512"
    else:
        native = has_native_bfloat16(torch.device("cpu"))
    return torch.backends.mkldnn.is_available() and native


def _activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu_(x, _SLOPE)
    return x.tanh_() if activation == "tanh" else x


def _as_onnx(layers: Sequence[Layer]) -> bytes:
    """The layers as a model of ONNX that takes "x" and "bias", both of float32."""
    from onnx import TensorProto, ValueInfoProto, helper, numpy_helper  # noqa: PLC0415  (as above)

    constants, nodes = [], []
    x = "x"
    for number, (weight, bias, activation) in enumerate(layers):
        added = "bias" if bias is None else f"bias{number}"
        if bias is not None:
            constants.append(numpy_helper.from_array(bias.numpy(), added))
        constants.append(numpy_helper.from_array(weight.numpy(), f"weight{number}"))
        inputs = [x, f"weight{number}", added]
        x = f"sum{number}"
        nodes.append(helper.make_node("Gemm", inputs, [x], transB=1))
        if activation != "none":
            kind, how = _ONNX[activation]
            nodes.append(helper.make_node(kind, [x], [f"x{number}"], **how))
            x = f"x{number}"

    def rows(name: str, width: int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])

    width, fan_in = layers[0].weight.shape
    given = [rows("x", fan_in), rows("bias", width)]
    graph = helper.make_graph(nodes, "chain", given, [rows(x, len(layers[-1].weight))], constants)
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR
    )
    written: bytes = model.SerializeToString()
    return written
