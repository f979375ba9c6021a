"""Sessions of ONNX Runtime on the CPU: a graph as a function."""

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.artifact import Graph, Tensors

# Without this variable, which is read at import, it reports every process and model to its makers
# and leaves files behind.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime


def start(model: bytes, initialisers: Tensors) -> Any:
    """Return a session of ONNX Runtime; see `Session` for what all of them have in common.

    Args:
        model: serialised.
        initialisers: the values of those that have none in the model.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False  # it would keep the memory of the largest batch
    options.log_severity_level = 4  # its errors are raised as well
    # Without it an initialiser that is not supplied would be a file of the current folder.
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", os.devnull
    )
    values = map(onnxruntime.OrtValue.ortvalue_from_numpy, initialisers.values())
    options.add_external_initializers(list(initialisers), list(values))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


class Session:
    """A graph on the CPU. A row of the result depends on no other row.

    A row has the same bytes on every x86-64 processor with AVX2, because nothing here lets the
    processor choose an order of summation: there is one thread, and no layout that follows the
    width of its vectors (level ALL has one). Several threads also round a lone row in another way.
    """

    def __init__(self, graph: Graph) -> None:
        """Compile a graph.

        Raises:
            Exception: the graph is invalid, or its initialisers have other names, types or shapes;
                the errors of the runtime have no common class.
        """
        self._session = start(graph.model, graph.initialisers)

    def __call__(
        self, latents: NDArray[np.float32], embedded: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """Map latents (N, latent_dim) and embedded labels (N, embedding_dim) to (N, C, H, W)."""
        (images,) = self._session.run(["images"], {"latents": latents, "embedded": embedded})
        found: NDArray[np.float32] = images
        return found
