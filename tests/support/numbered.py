"""A service of models whose class names are other numbers than their indices, or accented."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from tests.support.serving import LocalService, serve_here
from tests.support.tiny_training import NETWORK, artifact_file

CLASSES = {
    "ten": tuple(map(str, range(1, 11))),
    "even": ("0", "2", "4"),
    "accented": ("tea", "caf\N{LATIN SMALL LETTER E WITH ACUTE}"),
}


@contextmanager
def serve_numbered_classes() -> Iterator[LocalService]:
    """Serve the models of `CLASSES`."""
    with tempfile.TemporaryDirectory() as folder:
        for name, classes in CLASSES.items():
            network = replace(NETWORK, num_classes=len(classes))
            path = Path(folder, f"{name}.safetensors")
            artifact_file(path, network=network, class_names=classes)
        with serve_here("--models", folder) as service:
            yield service
