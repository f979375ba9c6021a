"""Saving: a generator of PyTorch as an artifact, with its compute graphs."""

import copy
from pathlib import Path

from training.artifact import ArtifactError, ArtifactInfo, check_values, write_artifact
from training.networks import Generator
from training.onnx_graph import GraphError, make_graphs, make_reference


def save_artifact(
    path: Path, generator: Generator, info: ArtifactInfo, *, int8: bool = False
) -> None:
    """Write an artifact with the graphs of its generator; see `write_artifact`.

    Args:
        path: of the file.
        generator: in evaluation mode, on any device.
        info: the description.
        int8: add a graph in int8, which takes a second or two.

    Raises:
        ArtifactError: the weights are not finite, the description could not be read again, or a
            graph computes other images than the generator.
        OSError: the file cannot be written; a previous file is untouched.
    """
    on_cpu = copy.deepcopy(generator).cpu().eval()
    tensors = {name: each.detach().numpy() for name, each in on_cpu.state_dict().items()}
    for name, tensor in tensors.items():
        check_values(path, name, tensor)
    reference = make_reference(on_cpu)
    try:
        graphs = make_graphs(on_cpu, reference, int8=int8)
    except GraphError as error:
        raise ArtifactError(path, f"was not written: {error}") from error
    write_artifact(path, info, tensors, graphs, reference)
