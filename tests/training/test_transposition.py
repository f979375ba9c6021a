"""Convolutions as transposed ones: the same images, whatever the runtime computes them by."""

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from training.transposition import transpose_convolutions

HEADER = (
    '<ir_version: 10, opset_import: ["" : 20]> g (float[N, 5, H, W] x) => (float[N, 3, H, W] y)'
)
CONV = "y = Conv<kernel_shape = {}, pads = {}{}>(x, weight, bias)"


def make_model(body: str, kernel: tuple[int, int]) -> ModelProto:
    model = onnx.parser.parse_model(f"{HEADER} {{ {body} }}")
    rng = np.random.default_rng(0)
    for name, shape in {"weight": (3, 5, *kernel), "bias": (3,)}.items():
        values = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    return model


def run(model: ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = 1
    (y,) = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})
    return np.asarray(y)


def kinds(model: ModelProto) -> set[str]:
    return {node.op_type for node in model.graph.node}


@pytest.mark.parametrize(("kernel", "pads"), [((3, 3), [1, 1, 1, 1]), ((3, 5), [1, 2, 1, 2])])
def test_maps_are_the_same_and_rows_depend_on_no_others(
    kernel: tuple[int, int], pads: list[int]
) -> None:
    model = make_model(CONV.format(list(kernel), pads, ""), kernel)
    transposed = transpose_convolutions(model)
    onnx.checker.check_model(transposed, full_check=True)
    assert "Conv" in kinds(model)
    assert "Conv" not in kinds(transposed)
    assert list(transposed.graph.initializer) == list(model.graph.initializer)
    x = np.random.default_rng(1).standard_normal((40, 5, 7, 6)).astype(np.float32)
    found = run(transposed, x)
    assert np.allclose(found, run(model, x), atol=1e-4)
    assert np.array_equal(np.concatenate([run(transposed, x[k : k + 1]) for k in range(40)]), found)


@pytest.mark.parametrize(
    ("kernel", "pads", "rest"),
    [
        ((1, 1), [0, 0, 0, 0], ""),
        ((3, 3), [1, 1, 1, 1], ", strides = [2, 2]"),
        ((3, 3), [2, 2, 2, 2], ", dilations = [2, 2]"),
        ((4, 4), [2, 2, 2, 2], ""),
        ((3, 3), [0, 0, 0, 0], ""),
    ],
)
def test_all_other_convolutions_stay(kernel: tuple[int, int], pads: list[int], rest: str) -> None:
    model = make_model(CONV.format(list(kernel), pads, rest), kernel)
    assert transpose_convolutions(model) == model
