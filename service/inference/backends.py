"""Backends for linear layers in sequence: PyTorch, and ONNX Runtime for float32 on the CPU.

A leaky ReLU follows each layer, and tanh the last one.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from service.inference.errors import DeviceLost, OutOfMemory

_SLOPE = 0.2  # of leaky ReLU
# Versions of ONNX that every allowed runtime reads; `onnx` would write the newest that it knows.
_OPSET, _IR = 17, 8
# Parts of messages of the CPU's allocators, for whose errors there are no types.
_OUT_OF_MEMORY = ("can't allocate memory", "bad_alloc", "Failed to allocate")


@contextmanager
def translated_errors() -> Iterator[None]:
    """Raise `OutOfMemory` and `DeviceLost` for the errors of the runtimes that mean them."""
    try:
        yield
    except torch.AcceleratorError as error:
        raise DeviceLost(str(error)) from error
    except Exception as error:  # those of ONNX Runtime share no base class
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
            text in str(error) for text in _OUT_OF_MEMORY
        ):
            raise OutOfMemory(str(error)) from error
        raise


class TorchMLP:
    """An MLP in PyTorch: on a GPU, and in bfloat16 on the CPU.

    Attributes:
        small_batches: empty: a product of few rows may round differently from one of many.
    """

    small_batches: Sequence[int] = ()

    def __init__(self, layers: Sequence[nn.Linear], device: torch.device, dtype: torch.dtype):
        self._layers = [
            (layer.weight.detach().to(device, dtype), layer.bias.detach().to(device, dtype))
            for layer in layers
        ]
        self._dtype = dtype

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, fan_in) float32 to (N, fan_out) of the dtype."""
        x = x.to(self._dtype)
        for weight, bias in self._layers[:-1]:
            x = F.leaky_relu_(F.linear(x, weight, bias), _SLOPE)
        return F.linear(x, *self._layers[-1]).tanh_()


class OnnxRuntimeMLP:
    """An MLP in ONNX Runtime, on the CPU in float32.

    Without AVX-512 it takes less time than PyTorch, from two fifths for 16 rows to a sixth for
    256; with AVX-512 a third less for 16 rows, and as much for 128 or more. The result of a row
    depends neither on the rows beside it nor on the number of threads, so a lone row can be
    computed alone, where PyTorch would round it differently.

    Attributes:
        small_batches: numbers of rows that are worth computing by themselves.
    """

    small_batches: Sequence[int] = (1, 2, 4)

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        # Without this variable, which is read at import, it reports every process and model to its
        # makers and leaves files behind.
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime  # noqa: PLC0415  (a GPU needs none)

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_cpu_mem_arena = False  # it would keep the memory of the largest batch
        options.log_severity_level = 4  # its errors are raised as well
        # A thread that spins for want of work takes its core from the event loop.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            _as_onnx(layers), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Map (N, fan_in) float32 to (N, fan_out) float32."""
        (result,) = self._session.run(None, {"x": x.numpy()})
        return torch.from_numpy(result)


def compile_mlp(
    layers: Sequence[nn.Linear], *, device: torch.device, dtype: torch.dtype
) -> TorchMLP | OnnxRuntimeMLP:
    """Return float32 layers as one function that computes on a device and in a dtype."""
    if device.type == "cpu" and dtype is torch.float32:
        return OnnxRuntimeMLP(layers)
    return TorchMLP(layers, device, dtype)


def _as_onnx(layers: Sequence[nn.Linear]) -> bytes:
    """Return the layers as an ONNX model with the input "x", of float32."""
    from onnx import TensorProto, ValueInfoProto, helper, numpy_helper  # noqa: PLC0415  (as above)

    constants, nodes = [], []
    x = "x"
    for number, layer in enumerate(layers):
        names = [f"weight{number}", f"bias{number}"]
        for name, tensor in zip(names, (layer.weight, layer.bias), strict=True):
            constants.append(numpy_helper.from_array(tensor.detach().numpy(), name))
        nodes.append(helper.make_node("Gemm", [x, *names], [f"sum{number}"], transB=1))
        x = f"x{number}"
        if layer is layers[-1]:
            nodes.append(helper.make_node("Tanh", [f"sum{number}"], [x]))
        else:
            nodes.append(helper.make_node("LeakyRelu", [f"sum{number}"], [x], alpha=_SLOPE))

    def rows(name: str, width: int) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", width])

    given, result = rows("x", layers[0].in_features), rows(x, layers[-1].out_features)
    graph = helper.make_graph(nodes, "mlp", [given], [result], constants)
    opset = helper.make_opsetid("", _OPSET)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=_IR)
    serialized: bytes = model.SerializeToString()
    return serialized
