"""Small networks in int8: their images are nearly the same, and their bytes depend on nothing."""

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from training import quantisation
from training.artifact import QUANTISED
from training.quantisation import MAX_WEIGHT, MIN_WEIGHT, quantise

Array = NDArray[Any]

HEADER = """<ir_version: 10, opset_import: ["" : 20]>
g (float[N, 8] latents, float[N, 4] embedded) => (float[N, 1, 8, 8] images) {
    rows = Concat<axis = 1>(latents, embedded)
    hidden = Gemm<transB = 1>(rows, first_weight, first_bias)
    style = LeakyRelu<alpha = 0.2>(hidden)
"""
MLP = """
    pixels = Gemm<transB = 1>(style, last_weight, last_bias)
    bounded = Tanh(pixels)
    shape = Constant<value_ints = [-1, 1, 8, 8]>()
    images = Reshape(bounded, shape)
}"""
CONV = """
    start = Gemm<transB = 1>(style, start_weight, start_bias)
    shape = Constant<value_ints = [-1, 16, 4, 4]>()
    map = Reshape(start, shape)
    active = LeakyRelu<alpha = 0.2>(map)
    a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(active, a_weight, a_bias)
    inner = LeakyRelu<alpha = 0.2>(a)
    b = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(inner, b_weight, b_bias)
    sum = Add(map, b)
    fine = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(sum, out_weight, out_bias)
    shuffled = DepthToSpace<blocksize = 2, mode = "CRD">(fine)
    images = Tanh(shuffled)
}"""
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "mlp": {"first": (32, 12), "last": (64, 32)},
    "conv": {
        "first": (32, 12),
        "start": (256, 32),
        "a": (16, 16, 3, 3),
        "b": (16, 16, 3, 3),
        "out": (4, 16, 3, 3),
    },
}


@cache
def make_model(kind: str) -> ModelProto:
    model = onnx.parser.parse_model(HEADER + {"mlp": MLP, "conv": CONV}[kind])
    rng = np.random.default_rng(0)
    for name, shape in SHAPES[kind].items():
        scale = np.sqrt(2.0 / np.prod(shape[1:]))
        # Channels of different sizes, as trained networks have them.
        sizes = rng.uniform(0.2, 2.0, (shape[0], *[1] * (len(shape) - 1)))
        weight = rng.standard_normal(shape) * scale * sizes
        for part, values in {"weight": weight, "bias": rng.normal(0, 0.3, shape[0])}.items():
            tensor = numpy_helper.from_array(values.astype(np.float32), f"{name}_{part}")
            model.graph.initializer.append(tensor)
    return model


def draw(rows: int, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    sizes = {"latents": 8, "embedded": 4}
    return {k: rng.standard_normal((rows, n)).astype(np.float32) for k, n in sizes.items()}


@cache
def make_int8(kind: str) -> ModelProto:
    return quantise(make_model(kind), draw(64))


def start(model: ModelProto, path: str = "") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = 1
    options.optimized_model_filepath = path
    if path:
        options.log_severity_level = 3  # it warns that the file depends on the processor
    return onnxruntime.InferenceSession(model.SerializeToString(), options)


def run(session: onnxruntime.InferenceSession, inputs: dict[str, Any]) -> Array:
    (images,) = session.run(None, inputs)
    return np.asarray(images)


def batches(inputs: dict[str, Any], size: int) -> Iterator[dict[str, Any]]:
    for first in range(0, len(inputs["latents"]), size):
        yield {name: values[first : first + size] for name, values in inputs.items()}


@pytest.fixture(params=SHAPES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_images_differ_by_few_levels(kind: str) -> None:
    inputs = draw(200, seed=1)
    exact, found = (run(start(f(kind)), inputs) for f in (make_model, make_int8))
    assert found.shape == exact.shape == (200, 1, 8, 8)
    assert exact.std() > 0.3
    assert 0.0 < np.abs(found - exact).mean() * 127.5 < 4.0


def test_ranges_come_from_all_positions_of_a_map(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many samples as rows: evenly spaced ones would all be of one position."""
    inputs = draw(200, seed=1)
    exact = run(start(make_model("conv")), inputs)
    monkeypatch.setattr(quantisation, "_SAMPLES", 512)
    found = run(start(quantise(make_model("conv"), draw(512))), inputs)
    assert np.abs(found - exact).mean() * 127.5 < 4.0


def test_a_row_depends_on_no_other_row(kind: str) -> None:
    inputs, session = draw(512, seed=2), start(make_int8(kind))
    together = run(session, inputs)
    for size in (1, 2, 3, 7, 16, 40, 255):
        parts = [run(session, each) for each in batches(inputs, size)]
        assert np.array_equal(np.concatenate(parts), together), size


def test_equal_inputs_give_equal_bytes(kind: str) -> None:
    again = quantise(make_model(kind), draw(64))
    assert again.SerializeToString() == make_int8(kind).SerializeToString()
    others = quantise(make_model(kind), draw(64, seed=3))
    assert others.SerializeToString() != make_int8(kind).SerializeToString()


def test_the_model_is_valid_and_has_names_for_all_that_changed(kind: str) -> None:
    model = make_int8(kind)
    onnx.checker.check_model(model, full_check=True)
    own = {each.name: each for each in make_model(kind).graph.initializer}
    for tensor in model.graph.initializer:
        if not tensor.name.startswith(QUANTISED):
            assert tensor == own[tensor.name]
    names = [each.name for each in model.graph.initializer]
    assert len(set(names)) == len(names)
    assert not model.metadata_props
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)


def test_weights_have_seven_bits(kind: str) -> None:
    tensors = {t.name: numpy_helper.to_array(t) for t in make_int8(kind).graph.initializer}
    weights = [t for name, t in tensors.items() if t.dtype == np.int8 and t.ndim > 1]
    assert len(weights) == {"mlp": 2, "conv": 4}[kind]
    for weight in weights:
        assert weight.min() >= MIN_WEIGHT
        assert weight.max() <= MAX_WEIGHT
        assert np.abs(weight).max() > 50


def test_the_layers_run_in_integers(kind: str, tmp_path: Any) -> None:
    path = str(tmp_path / "optimised.onnx")
    start(make_int8(kind), path)
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "Gemm" not in kinds
    assert "Conv" not in kinds
    assert kinds.count("QGemm") == 2
    if kind == "conv":
        assert kinds.count("QLinearConv") == 2
        assert kinds.count("QLinearLeakyRelu") == 1  # a table between them
        assert kinds.count("ConvTranspose") == 1  # the last layer and its shuffle, in float32


def test_an_untrained_layer_of_zeros_keeps_its_bias() -> None:
    model = ModelProto()
    model.CopyFrom(make_model("conv"))
    for tensor in model.graph.initializer:
        if tensor.name == "b_weight":
            tensor.CopyFrom(
                numpy_helper.from_array(np.zeros((16, 16, 3, 3), np.float32), "b_weight")
            )
    inputs = draw(64)
    exact, found = (run(start(each), inputs) for each in (model, quantise(model, inputs)))
    assert np.abs(found - exact).mean() * 127.5 < 2.5


def test_the_given_model_stays_as_it_is(kind: str) -> None:
    model = make_model(kind)
    before = model.SerializeToString()
    quantise(model, draw(16))
    assert model.SerializeToString() == before


def test_a_graph_without_layers_is_refused() -> None:
    text = '<ir_version: 10, opset_import: ["" : 20]> g (float[N, 8] x) => (float[N, 8] y)'
    model = onnx.parser.parse_model(text + " { y = Tanh(x) }")
    with pytest.raises(ValueError, match=r"operators Tanh; int8 needs a Conv or a Gemm"):
        quantise(model, {"x": np.zeros((16, 8), np.float32)})
