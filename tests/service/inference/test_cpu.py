from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from service.inference.cpu import OnnxNetwork, choose_run_rows, translated_errors
from service.inference.errors import OutOfMemory
from tests.conftest import make_artifact
from tests.support.processes import run
from training.artifact import Artifact, read_artifact
from training.generator_config import ConvGeneratorConfig, MLPGeneratorConfig


def test_pixels_are_owned_by_the_caller_and_in_rows_of_height_width_channels(
    tmp_path: Path,
) -> None:
    artifact = read_artifact(make_artifact(tmp_path / "a.safetensors", channels=3))
    network = OnnxNetwork(artifact.graphs["float32"], 256)
    latents, embedded = np.zeros((2, 9), np.float32), np.zeros((2, 4), np.float32)
    pixels, finite = network(latents, embedded)
    kept = pixels.copy()
    network(latents + 1, embedded)
    assert pixels.shape == (2, 12, 12, 3)
    assert pixels.flags.c_contiguous
    assert (pixels == kept).all()
    assert finite.tolist() == [True, True]


def test_rows_that_are_not_finite_are_named_and_the_others_are_whole(
    small_artifact: Artifact,
) -> None:
    network = OnnxNetwork(small_artifact.graphs["float32"], 256)
    latents, embedded = np.ones((3, 9), np.float32), np.zeros((3, 4), np.float32)
    expected, _ = network(latents, embedded)
    latents[1, 0] = np.nan
    pixels, finite = network(latents, embedded)
    assert finite.tolist() == [True, False, True]
    assert (pixels[[0, 2]] == expected[[0, 2]]).all()


def test_many_rows_are_computed_in_several_runs(small_artifact: Artifact) -> None:
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((10, 9)).astype(np.float32)
    latents[7] = np.nan
    embedded = np.zeros((10, 4), np.float32)
    expected = OnnxNetwork(small_artifact.graphs["float32"], 256)(latents, embedded)
    for rows in (1, 3, 5, 9, 10):
        found = OnnxNetwork(small_artifact.graphs["float32"], rows)(latents, embedded)
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), rows


@pytest.mark.parametrize(
    ("size", "widths", "rows"),
    [
        (28, (32, 16), 83),
        (32, (64, 32, 16), 64),
        (64, (64, 32), 8),
        (512, (64,), 1),
        (8, (2,), 256),
    ],
)
def test_feature_maps_of_one_run_fit_a_cache(size: int, widths: tuple[int, ...], rows: int) -> None:
    network = ConvGeneratorConfig(num_classes=2, channels=1, image_size=size, widths=widths)
    assert choose_run_rows(network) == rows
    assert choose_run_rows(MLPGeneratorConfig(num_classes=2, channels=1, image_size=size)) == 256


def test_an_initialiser_of_another_shape_is_refused(small_artifact: Artifact) -> None:
    graph = small_artifact.graphs["float32"]
    name = next(iter(graph.initialisers))
    wrong = replace(graph, initialisers={**graph.initialisers, name: np.zeros(3, np.float32)})
    with pytest.raises(Exception, match="dimensions do not match"):
        OnnxNetwork(wrong, 256)


@pytest.mark.parametrize(
    "error",
    [MemoryError("numpy"), RuntimeError("std::bad_alloc"), RuntimeError("Failed to allocate")],
)
def test_errors_of_allocators_are_out_of_memory(error: Exception) -> None:
    with pytest.raises(OutOfMemory, match=str(error)), translated_errors():
        raise error


def test_other_errors_of_the_runtime_are_raised_as_they_are(small_artifact: Artifact) -> None:
    network = OnnxNetwork(small_artifact.graphs["float32"], 256)
    with pytest.raises(Exception, match="invalid dimensions for input: latents"):
        network(np.zeros((1, 8), np.float32), np.zeros((1, 4), np.float32))


TOO_LITTLE = """
import resource, sys
import numpy as np
from pathlib import Path
from service.inference.cpu import OnnxNetwork
from service.inference.errors import OutOfMemory
from training.artifact import read_artifact

artifact = read_artifact(Path(sys.argv[1]))
network = OnnxNetwork(artifact.graphs["float32"], 256)
def make(rows):
    return network(np.ones((rows, 9), np.float32), np.zeros((rows, 4), np.float32))[0]
expected = make(1)
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (100 << 20)  # of 2 GB that are needed
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    make(1_000_000)
except OutOfMemory:
    print("OutOfMemory")
for rows in (1, 2, 1):
    assert (make(rows) == expected).all()
"""


def test_too_little_memory_is_out_of_memory_and_spoils_nothing(tmp_path: Path) -> None:
    ended = run("-c", TOO_LITTLE, str(make_artifact(tmp_path / "a.safetensors")))
    assert (ended.stdout, ended.returncode) == ("OutOfMemory\n", 0), ended.stderr
    assert "[E:" not in ended.stderr  # a second log of errors


def test_an_initialiser_that_is_not_supplied_is_no_file_of_the_current_folder(
    small_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = small_artifact.graphs["float32"]
    name, values = next(iter(graph.initialisers.items()))
    (tmp_path / "weights").write_bytes(values.tobytes())
    monkeypatch.chdir(tmp_path)
    others = {key: each for key, each in graph.initialisers.items() if key != name}
    with pytest.raises(Exception, match="xternal"):
        OnnxNetwork(replace(graph, initialisers=others), 256)
