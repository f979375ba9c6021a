"""Transposition: convolutions of a graph as transposed ones, which ONNX Runtime computes faster.

Its `Conv` copies the neighbours of every position and multiplies then. Its `ConvTranspose`
multiplies first and adds the products of neighbours then, which takes less time for maps of few
channels. A faster layout for `Conv` exists, but its sums follow the width of the processor's
vectors, so the images would have other bytes on other processors.
"""

import copy
from collections.abc import Iterator

import numpy as np
from onnx import ModelProto, NodeProto, helper, numpy_helper

_LAST = np.iinfo(np.int64).min  # the end of a slice that runs backwards to the first element


def transpose_convolutions(model: ModelProto) -> ModelProto:
    """Return a model with a `ConvTranspose` for each `Conv` that keeps the size of its map.

    The initialisers stay as they are. Nodes turn and transpose the weights, which the runtime does
    once, when it starts.
    """
    result = copy.deepcopy(model)
    graph = result.graph
    convolutions = [node for node in graph.node if _keeps_size(node)]
    if not convolutions:
        return result
    constants = {"turn.starts": [-1, -1], "turn.ends": [_LAST] * 2}
    constants |= {"turn.axes": [2, 3], "turn.steps": [-1, -1]}
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(values)))
        for name, values in constants.items()
    ]
    for node in graph.node:
        nodes.extend(_transpose(node, list(constants)) if node in convolutions else [node])
    del graph.node[:]
    graph.node.extend(nodes)
    return result


def _keeps_size(node: NodeProto) -> bool:
    """Return if a node is a `Conv` of neighbours with a step of one position."""
    if node.op_type != "Conv":
        return False
    given = {each.name: helper.get_attribute_value(each) for each in node.attribute}
    kernel, pads = list(given.get("kernel_shape", [1])), list(given.get("pads", []))
    return (
        max(kernel) > 1
        and pads == [size // 2 for size in kernel] * 2
        and all(size % 2 == 1 for size in kernel)
        and given.get("group", 1) == 1
        and set(given.get("strides", [1])) | set(given.get("dilations", [1])) == {1}
    )


def _transpose(node: NodeProto, turn: list[str]) -> Iterator[NodeProto]:
    """Yield the nodes that take the place of a `Conv`."""
    source, weight, *bias = node.input
    turned, transposed = f"{weight}.turned", f"{weight}.transposed"
    yield helper.make_node("Slice", [weight, *turn], [turned])
    yield helper.make_node("Transpose", [turned], [transposed], perm=[1, 0, 2, 3])
    (pads,) = (list(each.ints) for each in node.attribute if each.name == "pads")
    yield helper.make_node(
        "ConvTranspose", [source, transposed, *bias], list(node.output), pads=pads
    )
