"""Graphs of small generators, run by ONNX Runtime alone."""

import json
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.conftest import make_artifact
from tests.support import tiny_training as tiny
from training import onnx_graph
from training.artifact import QUANTISED, Precision
from training.loading import LoadedArtifact, load_artifact
from training.networks import Generator, build_generator
from training.onnx_graph import GraphError, GraphGenerator, make_graphs, make_reference, to_onnx
from training.saving import save_artifact

KINDS = ["mlp", "conv"]
ODD = tiny.CONV_NETWORK.__class__(
    num_classes=3, channels=3, image_size=13, latent_dim=5, embedding_dim=4, widths=(6, 4)
)


@pytest.fixture(params=KINDS)
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> LoadedArtifact:
    path = make_artifact(tmp_path / "a.safetensors", kind=request.param)
    loaded = load_artifact(path)
    save_artifact(path, loaded.generator, loaded.info, int8=True)
    return load_artifact(path)


def draw(generator: Generator, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(count)
    latents = torch.randn((count, generator.config.latent_dim), generator=rng)
    return latents, torch.arange(count) % generator.config.num_classes


@torch.inference_mode()
def test_a_graph_makes_the_images_of_its_generator(artifact: LoadedArtifact) -> None:
    inputs = draw(artifact.generator, 33)
    expected = artifact.generator(*inputs)
    made = GraphGenerator(artifact.graphs["float32"], artifact.generator)(*inputs)
    assert made.shape == expected.shape
    assert torch.allclose(made, expected, atol=1e-5)
    in_int8 = GraphGenerator(artifact.graphs["int8"], artifact.generator)(*inputs)
    assert 0.0 < (in_int8 - expected).abs().mean() * 127.5 < 5.0


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_a_row_depends_on_no_other_row(artifact: LoadedArtifact, precision: Precision) -> None:
    generator = GraphGenerator(artifact.graphs[precision], artifact.generator)
    latents, labels = draw(artifact.generator, 512)
    together = generator(latents, labels)
    for size in (1, 2, 3, 7, 16, 40, 255):
        parts = zip(latents.split(size), labels.split(size), strict=True)
        assert torch.equal(torch.cat([generator(*part) for part in parts]), together), size


@torch.inference_mode()
def test_an_image_whose_size_is_no_power_of_two_is_cropped_as_by_the_generator() -> None:
    with torch.random.fork_rng(devices=[]):
        generator = build_generator(ODD).eval()
    graphs = make_graphs(generator, make_reference(generator), int8=False)
    inputs = draw(generator, 3)
    made = GraphGenerator(graphs["float32"], generator)(*inputs)
    assert made.shape == (3, 3, 13, 13)
    assert torch.allclose(made, generator(*inputs), atol=1e-5)


def test_a_graph_holds_no_weights_no_paths_and_no_source_lines(artifact: LoadedArtifact) -> None:
    for precision, graph in artifact.graphs.items():
        model = onnx.load_model_from_string(graph.model)
        large = {each.name for each in model.graph.initializer if not each.raw_data}
        assert large == graph.initialisers.keys()
        own = {name for name in large if not name.startswith(QUANTISED)}
        assert own <= artifact.tensors.keys()
        assert (own == large) == (precision == "float32")
        assert not [part for part in (b".py", b"pkg.torch", b"stack_trace") if part in graph.model]


def test_equal_generators_have_equal_graphs(artifact: LoadedArtifact) -> None:
    reference = make_reference(artifact.generator)
    again = make_graphs(artifact.generator, reference, int8=True)
    for precision, graph in artifact.graphs.items():
        assert again[precision].model == graph.model
        assert again[precision].initialisers.keys() == graph.initialisers.keys()
        for name, values in graph.initialisers.items():
            assert np.array_equal(again[precision].initialisers[name], values)


def test_an_export_draws_nothing_and_warns_of_nothing() -> None:
    onnx_graph._export.cache_clear()
    before = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        onnx_graph._export(tiny.NETWORK)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_graph_with_other_images_than_its_generator_is_an_error(
    artifact: LoadedArtifact,
) -> None:
    reference = make_reference(artifact.generator)
    other = reference._replace(images=-reference.images)
    with pytest.raises(GraphError, match=r"float32 computes images that differ .* by \d+\.\d+"):
        make_graphs(artifact.generator, other, int8=False)


# Files of their own -------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_an_exported_file_needs_nothing_but_a_runtime(
    artifact: LoadedArtifact, precision: Precision
) -> None:
    model = to_onnx(artifact, precision)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    assert [(each.name, each.type) for each in session.get_inputs()] == [
        ("latents", "tensor(float)"),
        ("labels", "tensor(int64)"),
    ]
    latents, labels = draw(artifact.generator, 5)
    (images,) = session.run(None, {"latents": latents.numpy(), "labels": labels.numpy()})
    made = GraphGenerator(artifact.graphs[precision], artifact.generator)(latents, labels)
    assert np.abs(images - made.numpy()).max() <= (1e-5 if precision == "float32" else 0.0)
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata["sha256"] == artifact.sha256
    assert json.loads(metadata["artifact"])["class_names"] == list(artifact.info.class_names)


def test_a_graph_of_other_weights_follows_them(tmp_path: Path) -> None:
    """The export is kept for a configuration; the values of small tensors are inside the graph."""
    first, second = (
        load_artifact(make_artifact(tmp_path / f"{seed}.safetensors", kind="conv", seed=seed))
        for seed in (0, 1)
    )
    assert first.graphs["float32"].model != second.graphs["float32"].model
    inputs = draw(first.generator, 2)
    for each in (first, second):
        made = GraphGenerator(each.graphs["float32"], each.generator)(*inputs)
        assert torch.allclose(made, each.generator(*inputs), atol=1e-5)
