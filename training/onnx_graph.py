"""Graphs in ONNX: exported from a generator, checked against it, and written as files of their own.

A graph is exported by PyTorch once per configuration. It then gets the weights of a generator.
"""

import copy
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn

from training.artifact import EMBEDDING, QUANTISED, Graph, Precision, Reference, Tensors
from training.generator_config import GeneratorConfig
from training.loading import LoadedArtifact
from training.networks import Generator, Uninitialised, build_generator
from training.quantisation import quantise
from training.session import Session, start
from training.transposition import transpose_convolutions

OPSET = 20
REFERENCE_IMAGES = 4
CALIBRATION_IMAGES = 256
_PREFIX = "generator."
# Smaller initialisers stay inside the graph: the runtime accepts no values for them.
_MIN_EXTERNAL_BYTES = 128
_SEED = 0
# Allowed mean difference from PyTorch's images, in levels of 255. A wrong graph is off by tens.
_TOLERANCE: dict[Precision, float] = {"float32": 0.1, "int8": 10.0}


class GraphError(Exception):
    """A graph that computes other images than its generator."""


class _Synthesis(nn.Module):
    """A generator from embedded labels on."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.generator = generator

    def forward(self, latents: Tensor, embedded: Tensor) -> Tensor:
        return self.generator.synthesise(latents, embedded)


class GraphGenerator:
    """A graph that takes labels, on the CPU, in the place of its generator."""

    def __init__(self, graph: Graph, generator: Generator) -> None:
        self.config: GeneratorConfig = generator.config
        self._session = Session(graph)
        self._embedding = generator.label_embedding.weight.detach().cpu().numpy()

    def __call__(self, latents: Tensor, labels: Tensor) -> Tensor:
        """Map latents and labels to images on their device."""
        images = self._session(latents.cpu().numpy(), self._embedding[labels.cpu().numpy()])
        return torch.from_numpy(images).to(labels.device)


def make_graphs(
    generator: Generator, reference: Reference, *, int8: bool
) -> dict[Precision, Graph]:
    """Return the graphs of a generator, compared with its images.

    Args:
        generator: in evaluation mode, on the CPU, with finite weights.
        reference: images of it.
        int8: also return the graph in int8.

    Raises:
        GraphError: a graph computes other images.
    """
    tensors: Tensors = {name: each.numpy() for name, each in generator.state_dict().items()}
    model = _fill(_export(generator.config), tensors)
    graphs: dict[Precision, Graph] = {
        "float32": _without_weights(transpose_convolutions(model)),
    }
    if int8:
        graphs["int8"] = _without_weights(_rename_changed(_quantise(model, generator), tensors))
    latents, labels = torch.from_numpy(reference.latents), torch.from_numpy(reference.labels)
    for precision, graph in graphs.items():
        made = GraphGenerator(graph, generator)(latents, labels)
        _check(made.numpy(), reference, precision)
    return graphs


def quantised(generator: Generator) -> GraphGenerator:
    """Return a generator in int8; it is in evaluation mode, on any device, with finite weights."""
    on_cpu = copy.deepcopy(generator).cpu()
    graphs = make_graphs(on_cpu, make_reference(on_cpu), int8=True)
    return GraphGenerator(graphs["int8"], on_cpu)


@torch.inference_mode()
def make_reference(generator: Generator) -> Reference:
    """Return a few images of a generator, which is in evaluation mode and on the CPU."""
    latents, labels = draw_inputs(generator.config, REFERENCE_IMAGES)
    return Reference(latents.numpy(), labels.numpy(), generator(latents, labels).numpy())


def draw_inputs(config: GeneratorConfig, count: int) -> tuple[Tensor, Tensor]:
    """Return latents (count, latent_dim) and labels (count,): the classes in turn."""
    rng = torch.Generator().manual_seed(_SEED)
    latents = torch.randn((count, config.latent_dim), generator=rng)
    return latents, torch.arange(count) % config.num_classes


def to_onnx(artifact: LoadedArtifact, precision: Precision) -> bytes:
    """Return a self-contained model of ONNX, from `latents` and `labels` (N,) int64 to `images`.

    In float32 it is the network as PyTorch exports it, without what makes it faster here. Its
    metadata hold the artifact's description as JSON, and its SHA-256.

    Raises:
        GraphError: it computes other images than the generator.
    """
    if precision == "float32":
        model = _fill(_export(artifact.info.network), artifact.tensors)
    else:
        model = _with_weights(artifact.graphs[precision])
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(artifact.tensors[EMBEDDING], EMBEDDING))
    graph.node.insert(0, helper.make_node("Gather", [EMBEDDING, "labels"], ["embedded"]))
    inputs = {each.name: each for each in graph.input}
    rows = inputs["latents"].type.tensor_type.shape.dim[0].dim_param
    labels = helper.make_tensor_value_info("labels", TensorProto.INT64, [rows])
    inputs["embedded"].CopyFrom(labels)
    description = json.dumps(asdict(artifact.info), sort_keys=True)
    helper.set_model_props(model, {"artifact": description, "sha256": artifact.sha256})
    onnx.checker.check_model(model, full_check=True)
    serialised: bytes = model.SerializeToString(deterministic=True)
    if artifact.reference is not None:
        rows = artifact.reference
        (images,) = start(serialised, {}).run(
            ["images"], {"latents": rows.latents, "labels": rows.labels}
        )
        _check(images, artifact.reference, precision)
    return serialised


def _check(images: NDArray[np.float32], reference: Reference, precision: Precision) -> None:
    """Raise GraphError unless a graph made the images of its generator."""
    difference = 127.5 * float(np.abs(images - reference.images).mean())
    if not difference <= _TOLERANCE[precision]:
        raise GraphError(
            f"the graph in {precision} computes images that differ from PyTorch's by "
            f"{difference:.2f} levels on average; allowed are {_TOLERANCE[precision]}"
        )


def _with_weights(graph: Graph) -> ModelProto:
    """Return the model of a graph with the values of all initialisers in it."""
    model = onnx.load_model_from_string(graph.model)
    for tensor in model.graph.initializer:
        if tensor.name in graph.initialisers:
            tensor.CopyFrom(numpy_helper.from_array(graph.initialisers[tensor.name], tensor.name))
    return model


@cache
def _export(config: GeneratorConfig) -> ModelProto:
    """Return the network of a configuration as a model with initialisers of undefined values."""
    with Uninitialised():  # no draw: the random state belongs to the training
        network = _Synthesis(build_generator(config)).eval()
    rows = 2  # any number but 1, which the exporter takes for a constant
    inputs = torch.zeros(rows, config.latent_dim), torch.zeros(rows, config.embedding_dim)
    dynamic = {0: torch.export.Dim("N")}
    with _quiet():
        program = torch.onnx.export(
            network,
            inputs,
            input_names=["latents", "embedded"],
            output_names=["images"],
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=(dynamic, dynamic),
            optimize=False,  # it changes the values of initialisers and keeps their names
            verbose=False,
        )
    assert program is not None
    model: ModelProto = program.model_proto
    return _tidy(model)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, which reports absent packages and its own deprecated calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _tidy(model: ModelProto) -> ModelProto:
    """Remove everything but the graph: the exporter adds paths, source lines and types."""
    graph = model.graph
    del model.metadata_props[:], graph.metadata_props[:], graph.value_info[:]
    for part in (*graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ""
    for tensor in graph.initializer:
        tensor.name = tensor.name.removeprefix(_PREFIX)
    for node in graph.node:
        node.input[:] = [name.removeprefix(_PREFIX) for name in node.input]
    return model


def _fill(model: ModelProto, tensors: Tensors) -> ModelProto:
    """Return a copy of a model with these values as its initialisers."""
    filled = copy.deepcopy(model)
    for tensor in filled.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(tensors[tensor.name], tensor.name))
    return filled


def _without_weights(model: ModelProto) -> Graph:
    """Separate a model from its large initialisers."""
    rest, taken = copy.deepcopy(model), dict[str, NDArray[Any]]()
    for tensor in rest.graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.nbytes < _MIN_EXTERNAL_BYTES:
            continue
        taken[tensor.name] = values
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in {"location": "weights", "offset": 0, "length": values.nbytes}.items():
            tensor.external_data.add(key=key, value=str(value))
    return Graph(rest.SerializeToString(deterministic=True), taken)


def _quantise(model: ModelProto, generator: Generator) -> ModelProto:
    """Return a model in int8, with its scales from images that the generator makes."""
    latents, labels = draw_inputs(generator.config, CALIBRATION_IMAGES)
    embedded = generator.label_embedding.weight.detach()[labels]
    inputs = {"latents": latents.numpy(), "embedded": embedded.numpy()}
    return quantise(_fold_batch_norm(model), inputs)


def _rename_changed(model: ModelProto, tensors: Tensors) -> ModelProto:
    """Mark the initialisers that are not tensors of the generator, folded or in int8."""
    graph = model.graph

    def is_own(tensor: TensorProto) -> bool:
        own = tensors.get(tensor.name)
        return own is not None and np.array_equal(numpy_helper.to_array(tensor), own)

    changed = {
        each.name: each.name if each.name.startswith(QUANTISED) else QUANTISED + each.name
        for each in graph.initializer
        if not is_own(each)
    }
    for tensor in graph.initializer:
        tensor.name = changed.get(tensor.name, tensor.name)
    for node in graph.node:
        node.input[:] = [changed.get(name, name) for name in node.input]
    return model


def _fold_batch_norm(model: ModelProto) -> ModelProto:
    """Fold each batch norm into the `Gemm` before it, in double precision."""
    folded = copy.deepcopy(model)
    graph = folded.graph
    values = {each.name: numpy_helper.to_array(each).astype(float) for each in graph.initializer}
    layers = {node.output[0]: node for node in graph.node if node.op_type == "Gemm"}
    for norm in [node for node in graph.node if node.op_type == "BatchNormalization"]:
        layer = layers[norm.input[0]]
        gain, shift, mean, variance = (values.pop(name) for name in norm.input[1:])
        epsilon = next(each.f for each in norm.attribute if each.name == "epsilon")
        factor = gain / np.sqrt(variance + epsilon)  # (fan_out,)
        _, weight, bias = layer.input
        values[weight] *= factor[:, None]  # (fan_out, fan_in)
        values[bias] = (values[bias] - mean) * factor + shift
        layer.output[0] = norm.output[0]
        graph.node.remove(norm)
    del graph.initializer[:]
    graph.initializer.extend(
        numpy_helper.from_array(each.astype(np.float32), name) for name, each in values.items()
    )
    return folded
