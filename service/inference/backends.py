"""Chains of dense layers, by whatever computes them fastest where they are."""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
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


class TorchMLP:
    """Layers one after the other, by PyTorch: on a GPU, and wherever nothing below is better.

    Attributes:
        few_rows: none: a product of few rows may round otherwise than one of many.
    """

    few_rows: Sequence[int] = ()

    def __init__(self, layers: Sequence[Layer], device: torch.device, dtype: torch.dtype) -> None:
        self._layers = [
            Layer(weight.to(device, dtype), bias.to(device, dtype), activation)
            for weight, bias, activation in layers
        ]
        self._dtype = dtype

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """(N, fan_in) float32 to (N, fan_out)."""
        x = x.to(self._dtype)
        for weight, bias, activation in self._layers:
            x = _activate(F.linear(x, weight, bias), activation)
        return x


class OnnxRuntimeMLP:
    """Layers one after the other, by ONNX Runtime, on the CPU in float32.

    Without AVX-512 that takes less time than PyTorch's products and activations, from two fifths
    for 16 rows to a sixth for 256; with it a third less than oneDNN's for 16 rows, and as much for
    128 or more. What it makes of a row depends neither on the rows beside it nor on threads; so a
    lone row can be drawn for itself, where PyTorch's would round in its own way.

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


class OpenVINOMLP:
    """Layers one after the other, by OpenVINO, on a CPU that multiplies bfloat16.

    It takes half of the time of PyTorch's products with packed weights for a lone row, and an
    eighth less for 256: PyTorch takes some 25 us for any layer, however small. What is made of a
    row does not depend on the rows beside it: of those that take another kernel than many do, there
    are as many as needed.

    Attributes:
        few_rows: numbers of rows that are worth drawing for themselves.
    """

    few_rows: Sequence[int] = FEW_ROWS

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._draw = _compile(layers)
        least = max(_least_rows(*layer.weight.shape) for layer in layers)
        self._filling = np.zeros((least, layers[0].weight.shape[1]), dtype=np.float32)

    def __call__(self, x: Tensor) -> Tensor:
        """(N, fan_in) float32 to (N, fan_out) float32, which the next call writes again.

        Raises:
            MemoryError: so many rows do not fit.
            RuntimeError: anything else failed.
        """
        rows, given = len(x), x.numpy()
        if rows < len(self._filling):
            given = np.concatenate((given, self._filling[rows:]))
        return torch.from_numpy(self._draw(given)[:rows])


def _compile(layers: Sequence[Layer]) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Layers as a function in bfloat16, each of whose results the next call writes again."""
    # It would tell its makers that it is imported; where this package is missing, it cannot.
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino  # noqa: PLC0415  (what computes on a GPU needs none)

    threads = torch.get_num_threads()
    options = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": int(threads > 1),  # or else on the thread that calls
        "ENABLE_CPU_PINNING": False,  # other workers may compute here as well
    }
    core = openvino.Core()

    def prepare() -> Any:
        return core.compile_model(model, "CPU", options).create_infer_request()

    with _failures():
        model = core.read_model(_as_onnx(layers))
        request = prepare()

    def draw(x: NDArray[np.float32]) -> NDArray[np.float32]:
        nonlocal request
        with _failures():
            # What has failed is of no use any more: it takes what comes next for what it was given
            # then, and its next result may have as many rows.
            request, current = None, request or prepare()
            current.set_input_tensor(openvino.Tensor(x, shared_memory=True))
            # `infer` keeps what is raised to itself where a stream has only one thread.
            current.start_async()
            current.wait()
            request = current
            made: NDArray[np.float32] = request.get_output_tensor().data
        return made

    return draw


@lru_cache
def _least_rows(fan_out: int, fan_in: int) -> int:
    """From how many rows on a layer of these shapes takes kernels that sum as that of many does.

    Seen in sums that are zero but for what is rounded on the way: a third of their values, or more,
    tell one order from another, where of a trained layer's in bfloat16 one in 20,000 does.
    """
    random = np.random.default_rng(0)
    order = random.permutation(fan_in)

    def pairs(rows: int, sign: int) -> NDArray[np.float32]:
        half = random.standard_normal((rows, fan_in // 2), dtype=np.float32)
        half.view(np.uint32)[:] &= 0xFFFF0000  # what bfloat16 has of it
        odd = np.zeros((rows, fan_in % 2), dtype=np.float32)
        return np.concatenate((half, sign * half, odd), 1).take(order, 1)

    x, weight = pairs(REFERENCE_ROWS, 1), torch.from_numpy(pairs(fan_out, -1))
    draw = _compile([Layer(weight, torch.zeros(fan_out), "none")])
    many = draw(x).copy()
    least = REFERENCE_ROWS
    for rows in (*reversed(range(ROW_MULTIPLE, least, ROW_MULTIPLE)), *reversed(FEW_ROWS)):
        if not np.array_equal(draw(x[:rows]), many[:rows]):
            break
        least = rows
    return least


@contextmanager
def _failures() -> Iterator[None]:
    """What the runtimes raise, whose exceptions are of no common kind, as PyTorch would."""
    try:
        yield
    except Exception as error:
        words = str(error)
        short = "bad_alloc" in words or "Failed to allocate" in words
        raise (MemoryError if short else RuntimeError)(words) from error


def chain(
    layers: Sequence[Layer], *, device: torch.device, dtype: torch.dtype
) -> TorchMLP | OnnxRuntimeMLP | OpenVINOMLP:
    """Layers as one function.

    Args:
        layers: in float32, each of which takes what the one before it makes.
        device: where they are to be computed.
        dtype: what in.
    """
    if device.type == "cpu" and dtype is torch.float32:
        return OnnxRuntimeMLP(layers)
    if device.type == "cpu" and dtype is torch.bfloat16 and has_native_bfloat16(device):
        return OpenVINOMLP(layers)
    return TorchMLP(layers, device, dtype)


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
