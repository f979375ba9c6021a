"""Quantisation: the graph of a generator in float32 to the same graph in int8.

The layers with weights, `Gemm` and `Conv`, compute in integers. All between them stays in float32,
so that neither residual sums nor activation functions lose precision. The result describes this by
pairs of `QuantizeLinear` and `DequantizeLinear`, which ONNX Runtime fuses with the layers.
"""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from training.artifact import QUANTISED
from training.session import start

Array = NDArray[Any]

# The sums of float32 matrix products depend on the number of threads, and so on the rows in a call.
BATCH = 16
STEPS = 255  # of an activation, in uint8
# Weights have 7 bits. Of 8 bits, the sum of two products would overflow on processors with AVX2 and
# without VNNI, and the images would depend on the processor.
MIN_WEIGHT, MAX_WEIGHT = -64, 63
MAX_BIAS = 2**30
_LAYERS = {"Conv", "Gemm"}
_SAMPLES = 16_384  # activations of a channel that its range is chosen by
_CLIPPED = np.linspace(1.0, 0.3, 15)


def quantise(model: ModelProto, inputs: Mapping[str, NDArray[np.float32]]) -> ModelProto:
    """Return a model in int8.

    Args:
        model: self-contained, in float32; weights have their output channels first (`transB`).
        inputs: rows to choose the ranges of activations by.

    Raises:
        ValueError: the graph has no layer to quantise.
    """
    result = copy.deepcopy(model)
    graph = result.graph
    if not any(node.op_type in _LAYERS for node in graph.node):
        found = ", ".join(sorted({node.op_type for node in graph.node})) or "none"
        raise ValueError(f"the graph has the operators {found}; int8 needs a Conv or a Gemm in it")
    values = _run(model, inputs)
    tensors = {each.name: numpy_helper.to_array(each) for each in graph.initializer}
    _merge_shuffles(graph, tensors, values)
    written = _Writer(tensors)
    for node in graph.node:
        if node.op_type == "Conv":
            follower = _find_follower(graph, node.output[0])
            written.add_conv(node, values[node.input[0]], values[node.output[0]], follower)
        elif node.op_type == "Gemm":
            written.add_gemm(node, values[node.input[0]])
        else:
            written.nodes.append(node)
    used = {name for node in written.nodes for name in node.input}
    del graph.node[:], graph.initializer[:]
    graph.node.extend(written.nodes)
    graph.initializer.extend(
        numpy_helper.from_array(each, name) for name, each in tensors.items() if name in used
    )
    return result


class _Writer:
    """Nodes and initialisers of a graph in int8."""

    def __init__(self, tensors: dict[str, Array]) -> None:
        self.nodes: list[NodeProto] = []
        self.tensors = tensors
        self._scales: dict[str, float] = {}  # of the inputs of `Gemm`, which layers share
        self._steps: dict[str, Array] = {}  # scales of channels of values that count in these

    def add_gemm(self, node: NodeProto, x: Array) -> None:
        """Add a `Gemm` of an input in uint8, with an output in float32."""
        source, weight, bias = node.input
        name = QUANTISED + source
        if source not in self._scales:
            scales, zero = _scale_input(x.reshape(1, -1), np.ones(1))
            self._scales[source] = scale = float(np.float32(scales[0]))
            self._add("QuantizeLinear", source, f"{name}.quantised", scale, zero)
            self._add("DequantizeLinear", f"{name}.quantised", name, scale, zero)
        layer = self._scales[source], self.tensors[weight], self.tensors[bias]
        self._add_layer(node, name, node.output[0], *layer)

    def add_conv(
        self, node: NodeProto, x: Array, y: Array, follower: tuple[str, str] | None
    ) -> None:
        """Add a `Conv` from uint8 to uint8, between conversions from float32 and back.

        Every channel has a scale of its own. The runtime knows one for all of them, so the weights
        multiply by the scales of their input and divide by those of their output.
        """
        source, weight, bias = node.input
        values, name = self.tensors[weight].astype(float), QUANTISED + weight
        if source in self._steps:
            channels = self._steps[source]
            by_channel = _by_channel(x) / channels[:, None]
            scales, zero = _scale_input(by_channel.reshape(1, -1), np.ones(1))
            step = float(scales[0])
            taken: Any = step
        else:
            channels, zero = _scale_input(_by_channel(x), _square(values))
            taken, step = channels, 1.0
        self._add("QuantizeLinear", source, f"{name}.input.quantised", taken, zero)
        self._add("DequantizeLinear", f"{name}.input.quantised", f"{name}.input", step, zero)
        given: Any = 1.0
        y_zero: Any
        if follower is None:
            y_scale, y_zero = _scale_output(_by_channel(y))
            given = y_scale
        else:
            activated, following = follower
            y_scale, y_zero = _scale_input(_by_channel(y), _square(self.tensors[following]))
            self._steps[activated] = y_scale
        values *= (channels / y_scale[:, None])[:, :, None, None]
        steps = self.tensors[bias] / y_scale + y_zero
        self._add_layer(node, f"{name}.input", f"{name}.output", step, values, steps)
        self._add("QuantizeLinear", f"{name}.output", f"{name}.output.quantised", 1.0, 0)
        self._add("DequantizeLinear", f"{name}.output.quantised", node.output[0], given, y_zero)

    def _add_layer(
        self, node: NodeProto, x: str, y: str, x_scale: float, weight: Array, bias: Array
    ) -> None:
        """Add a node from `x` to `y` with weights in int8 and a bias in int32."""
        scale = _scale_weights(weight.reshape(len(weight), -1))
        # Weights near zero would have a scale that is too small for the bias.
        scale = np.maximum(scale, np.abs(bias) / (x_scale * MAX_BIAS)).astype(np.float32)
        by_channel = scale.astype(float).reshape(-1, *[1] * (weight.ndim - 1))
        steps = np.rint(weight / by_channel).clip(MIN_WEIGHT, MAX_WEIGHT).astype(np.int8)
        bias_scale = (scale * np.float32(x_scale)).astype(np.float32)
        bias_steps = np.rint(bias / bias_scale.astype(float)).astype(np.int32)
        names = [QUANTISED + name for name in node.input[1:]]
        for name, values, scales in zip(
            names, (steps, bias_steps), (scale, bias_scale), strict=True
        ):
            self.tensors[f"{name}.quantised"] = values
            zeros = np.zeros(len(values), values.dtype)
            self._add("DequantizeLinear", f"{name}.quantised", name, scales, zeros, axis=0)
        layer = copy.deepcopy(node)
        layer.input[:], layer.output[:] = [x, *names], [y]
        self.nodes.append(layer)

    def _add(
        self, kind: str, source: str, target: str, scale: Any, zero: Any, axis: int = 1
    ) -> None:
        """Add a conversion; a scale for each channel makes it one by channels."""
        if not isinstance(zero, np.ndarray):
            zero = np.full(np.shape(scale), zero, np.uint8)
        name = QUANTISED + target.removeprefix(QUANTISED)
        names = [source, f"{name}.scale", f"{name}.zero"]
        self.tensors.update(zip(names[1:], (np.asarray(scale, np.float32), zero), strict=True))
        self.nodes.append(
            helper.make_node(kind, names, [target], axis=axis if np.ndim(scale) else None)
        )


def _run(model: ModelProto, inputs: Mapping[str, NDArray[np.float32]]) -> dict[str, Array]:
    """Return the inputs and outputs of all layers, and the outputs of `DepthToSpace`."""
    names = set()
    for node in model.graph.node:
        if node.op_type in _LAYERS:
            names |= {node.input[0], node.output[0]}
        elif node.op_type == "DepthToSpace":
            names.add(node.output[0])
    inner = sorted(names - set(inputs))
    extended = copy.deepcopy(model)
    del extended.graph.output[:]
    extended.graph.output.extend(
        helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inner
    )
    session = start(extended.SerializeToString(), {})
    rows = len(next(iter(inputs.values())))
    parts = [
        session.run(inner, {name: each[start : start + BATCH] for name, each in inputs.items()})
        for start in range(0, rows, BATCH)
    ]
    found = zip(inner, map(np.concatenate, zip(*parts, strict=True)), strict=True)
    return dict(inputs) | dict(found)


def _find_follower(graph: GraphProto, name: str) -> tuple[str, str] | None:
    """Return the output of the `LeakyRelu` after a tensor and the weight of the `Conv` after that.

    None if the tensor or the output enters anything else.
    """
    names = [name]
    for kind in ("LeakyRelu", "Conv"):
        users = [node for node in graph.node if names[-1] in node.input]
        if [node.op_type for node in users] != [kind]:
            return None
        names.append(users[0].output[0])
    return names[1], users[0].input[1]


def _merge_shuffles(
    graph: GraphProto, tensors: dict[str, Array], values: Mapping[str, Array]
) -> None:
    """Replace each `Conv` before a `DepthToSpace`, and both, by one `ConvTranspose` in float32.

    It multiplies first and adds the products into pixels then: for few output channels that takes
    less time than to copy the neighbours of each position, even in float32.
    """
    producers = {node.output[0]: node for node in graph.node}
    for shuffle in [node for node in graph.node if node.op_type == "DepthToSpace"]:
        conv = producers[shuffle.input[0]]
        (block,) = (each.i for each in shuffle.attribute if each.name == "blocksize")
        channels, height, width = values[shuffle.output[0]].shape[1:]
        weight, bias = (tensors[name] for name in conv.input[1:])
        inputs, size = weight.shape[1:3]
        split = weight[..., ::-1, ::-1].reshape(channels, block, block, inputs, size, size)
        merged = split.transpose(3, 0, 4, 1, 5, 2).reshape(inputs, channels, size * block, -1)
        pattern = bias.reshape(channels, block, block)
        names = [QUANTISED + name for name in conv.input[1:]]
        tiled = np.tile(pattern, (1, height // block, width // block))
        tensors.update(zip(names, (merged, tiled), strict=True))
        pads = [(size - 1) * block // 2] * 4
        products = f"{names[0]}.output"
        conv.CopyFrom(
            helper.make_node(
                "ConvTranspose",
                [conv.input[0], names[0]],
                [products],
                pads=pads,
                strides=[block] * 2,
            )
        )
        shuffle.CopyFrom(helper.make_node("Add", [products, names[1]], [shuffle.output[0]]))


def _square(weights: Array) -> Array:
    """Return the sum of squares of the weights (O, C, H, W) of each input channel."""
    squares: Array = np.square(weights).sum(axis=(0, 2, 3))
    return squares


def _by_channel(values: Array) -> Array:
    """Return some of the values (N, C, H, W) of each channel as (C, M)."""
    by_channel = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
    count = by_channel.shape[1]
    if count <= _SAMPLES:
        return by_channel
    # Chosen at random: of every tenth value, for example, many could be of the same position.
    return by_channel[:, np.random.default_rng(0).choice(count, _SAMPLES, replace=False)]


def _choose_ranges(values: Array) -> tuple[Array, Array]:
    """Return the lower and upper limit (C,) of least squared error of values (C, M).

    Rare large values are clipped where this makes the steps of all others smaller.
    """
    values = values.astype(float)
    low, high = np.minimum(values.min(1), 0.0), np.maximum(values.max(1), 1e-6)
    least = np.full(len(values), np.inf)
    for side in (1, 0, 1, 0):
        limits = low, high
        for share in _CLIPPED:
            tried = [each * share if k == side else each for k, each in enumerate(limits)]
            scale = ((tried[1] - tried[0]) / STEPS)[:, None]
            zero = np.rint(-tried[0][:, None] / scale)
            steps = (np.rint(values / scale) + zero).clip(0, STEPS) - zero
            error = np.square(steps * scale - values).mean(1)
            better = error < least
            low, high = np.where(better, tried[0], low), np.where(better, tried[1], high)
            least = np.minimum(error, least)
    return low, high


def _scale_output(values: Array) -> tuple[Array, NDArray[np.uint8]]:
    """Return the scales (C,) and zero points (C,) of values (C, M)."""
    low, high = _choose_ranges(values)
    scale = ((high - low) / STEPS).astype(np.float32)
    return scale.astype(float), np.rint(-low / scale).astype(np.uint8)


def _scale_input(values: Array, weights: Array) -> tuple[Array, int]:
    """Return the scales (C,) and the common zero point of values (C, M).

    The zero point has the least error of the layer, to which the channels contribute by the squares
    of their weights (C,).
    """
    low, high = _choose_ranges(values)
    zeros = np.arange(1, STEPS)[:, None]  # (Z, 1)
    scales = np.maximum(-low / zeros, high / (STEPS - zeros))  # (Z, C)
    best = int((np.square(scales) * weights).sum(1).argmin())
    return scales[best].astype(np.float32).astype(float), int(zeros[best, 0])


def _scale_weights(weights: Array) -> Array:
    """Return the scales of least squared error (C,) of weights (C, M)."""
    weights = weights.astype(float)
    largest = np.maximum(np.abs(weights).max(1), 1e-12) / MAX_WEIGHT
    tried = np.linspace(1.0, 0.6, 41)[:, None] * largest  # (T, C)
    errors = [
        np.square(
            np.rint(weights / each[:, None]).clip(MIN_WEIGHT, MAX_WEIGHT) * each[:, None] - weights
        ).sum(1)
        for each in tried
    ]
    best: Array = np.take_along_axis(tried, np.argmin(errors, axis=0)[None], axis=0)[0]
    return best
