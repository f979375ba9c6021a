"""A service of models whose class names are numbers other than the indices of the classes."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.support.serving import LocalService, serve_here
from tests.support.tiny_training import NETWORK, artifact_file

CLASSES = {"ten": tuple(map(str, range(1, 11))), "even": ("0", "2", "4")}


@contextmanager
def serve_numbered_classes() -> Iterator[LocalService]:
    """Serve the models `ten`, of the classes 1 to 10, and `even`, of the classes 0, 2 and 4."""
    with tempfile.TemporaryDirectory() as folder:
        for name, classes in CLASSES.items():
            network = replace(NETWORK, num_classes=len(classes))
            path = Path(folder, f"{name}.safetensors")
            artifact_file(path, network=network, class_names=classes)
        with serve_here("--models", folder) as service:
            yield service
