from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.inference.cpu import OnnxNetwork
from service.inference.engine import DtypeName, Engine, choose_dtype
from service.inference.errors import EngineError
from service.inference.latents import RowOptions, SamplingOptions, draw_latents
from tests.conftest import make_artifact
from tests.support.processes import REPOSITORY
from training.artifact import Artifact, Graph, Precision, read_artifact
from training.loading import load_artifact

BUNDLED = sorted((REPOSITORY / "weights").glob("*.safetensors"))

Pixels = tuple[NDArray[np.uint8], NDArray[np.bool_]]
Floats = NDArray[np.float32]
Rows = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]


def rows(count: int, classes: int = 10) -> Rows:
    rng = np.random.default_rng(count)
    seeds = rng.integers(0, 2**64, count, dtype=np.uint64)
    return seeds, rng.integers(0, 1024, count), rng.integers(0, classes, count)


@pytest.fixture(
    scope="module",
    params=[(path, dtype) for path in BUNDLED for dtype in ("float32", "int8")],
    ids=lambda each: f"{each[0].stem}-{each[1]}",
)
def engine(request: pytest.FixtureRequest) -> Engine:
    path, dtype = request.param
    return Engine(read_artifact(path), device="cpu", dtype=dtype, max_batch=256)


def test_pixels_are_the_rounded_image_in_rows_of_height_width_channels(tmp_path: Path) -> None:
    artifact = load_artifact(make_artifact(tmp_path / "a.safetensors", channels=3))
    engine = Engine(artifact, device="cpu", dtype="float32", max_batch=8)
    seeds, indices, labels = rows(5, classes=3)
    made = engine(seeds, indices, labels)
    latents = torch.from_numpy(draw_latents(seeds, indices, 9))
    with torch.inference_mode():
        images = artifact.generator(latents, torch.from_numpy(labels)).permute(0, 2, 3, 1)
    assert made.shape == (5, 12, 12, 3)
    assert np.abs(made - (images.numpy() * 127.5 + 127.5)).max() <= 0.5 + 1e-2


def test_an_image_is_the_same_in_every_batch(engine: Engine) -> None:
    seeds, indices, labels = rows(256)
    together = engine(seeds, indices, labels)
    rng = np.random.default_rng(1)
    for size in 2 * (1, 2, 3, 4, 5, 7, 8, 9, 15, 31, 33, 63, 64, 129, 255):
        chosen = rng.permutation(256)[:size]
        some = engine(seeds[chosen], indices[chosen], labels[chosen])
        assert (some == together[chosen]).all(), f"in a batch of {size}"


def test_an_image_with_options_is_the_same_in_every_batch(engine: Engine) -> None:
    seeds, indices, labels = rows(64)
    plain = engine(seeds, indices, labels)
    weights = np.zeros(10)
    weights[[3, 8]] = 0.25, 0.5
    options = SamplingOptions(0.7, to_seed=4, at=np.linspace(0.1, 0.9, 6), mix=weights)
    alone = [
        engine(
            seeds[row : row + 1],
            indices[row : row + 1],
            labels[row : row + 1],
            [RowOptions(slice(0, 1), slice(row, row + 1), options)],
        )[0]
        for row in range(6)
    ]
    other = SamplingOptions(mix=np.eye(10)[2])
    row_options = [
        RowOptions(slice(3, 7), slice(0, 4), options),
        RowOptions(slice(20, 24), slice(0, 4), other),
        RowOptions(slice(40, 42), slice(4, 6), options),
    ]
    chosen = np.arange(64)
    chosen[3:7], chosen[40:42] = np.arange(4), np.arange(4, 6)
    made = engine(seeds[chosen], indices[chosen], labels[chosen], row_options)
    assert (made[[3, 4, 5, 6, 40, 41]] == np.stack(alone)).all()
    twos = np.full(4, 2)
    assert (made[20:24] == engine(seeds[20:24], indices[20:24], twos)).all()
    untouched = np.setdiff1d(np.arange(64), [*range(3, 7), *range(20, 24), 40, 41])
    assert (made[untouched] == plain[untouched]).all()
    assert (labels == rows(64)[2]).all()


def test_the_answer_is_the_callers_to_keep(engine: Engine) -> None:
    first = engine(*rows(8))
    kept = first.copy()
    engine(*rows(9))
    assert (first == kept).all()


def test_a_network_with_other_images_than_the_artifacts_is_not_served(
    small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_the_label(network: OnnxNetwork, latents: Floats, embedded: Floats) -> Pixels:
        return original(network, latents, np.zeros_like(embedded))

    original = OnnxNetwork.__call__
    monkeypatch.setattr(OnnxNetwork, "__call__", forget_the_label)
    with pytest.raises(EngineError, match=r"artifact's own network by \d+"):
        Engine(small_artifact, device="cpu", dtype="float32", max_batch=8)


def test_an_image_that_depends_on_its_batch_is_not_served(
    small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mix_rows(network: OnnxNetwork, latents: Floats, embedded: Floats) -> Pixels:
        return original(network, latents + 0.1 * latents.mean(0), embedded)

    original = OnnxNetwork.__call__
    monkeypatch.setattr(OnnxNetwork, "__call__", mix_rows)
    with pytest.raises(EngineError, match="an image in a batch of"):
        Engine(small_artifact, device="cpu", dtype="float32", max_batch=32)


def test_an_artifact_of_an_earlier_release_names_the_command_that_upgrades_it(
    small_artifact: Artifact,
) -> None:
    old = replace(small_artifact, graphs={}, reference=None)
    with pytest.raises(EngineError, match="python -m training upgrade "):
        Engine(old, device="cpu", dtype="auto", max_batch=8)


def test_auto_is_int8_on_the_cpu_if_the_certificate_shows_no_loss(
    small_artifact: Artifact,
) -> None:
    def certified(*, lossless: bool) -> Artifact:
        info = replace(small_artifact.info, certificate={"int8": {"lossless": lossless}})
        return replace(small_artifact, info=info, graphs=both)

    graph = small_artifact.graphs["float32"]
    both: dict[Precision, Graph] = {"float32": graph, "int8": graph}
    assert choose_dtype("auto", "cpu", certified(lossless=True)) == "int8"
    assert choose_dtype("auto", "cpu", certified(lossless=False)) == "float32"
    assert choose_dtype("float32", "cpu", certified(lossless=True)) == "float32"
    assert choose_dtype("int8", "cpu", certified(lossless=False)) == "int8"
    assert choose_dtype("auto", "cpu", small_artifact) == "float32"


@pytest.mark.parametrize(
    ("name", "device", "expected"),
    [
        ("bfloat16", "cpu", "bfloat16 is for GPUs; on a CPU use --dtype auto, int8 or float32"),
        ("int8", "cuda:0", "int8 is for CPUs; use --dtype auto, bfloat16 or float32"),
        ("int8", "cpu", "no graph in int8; add it with: python -m training upgrade "),
    ],
)
def test_a_precision_that_the_device_or_the_artifact_lacks_is_an_error(
    name: DtypeName, device: str, expected: str, small_artifact: Artifact
) -> None:
    with pytest.raises(EngineError, match=expected):
        choose_dtype(name, device, small_artifact)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mnist", "mnist-mlp"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_captured_forward_agrees_with_the_cpu_and_with_itself(
    bundled: Path, name: str, dtype: DtypeName
) -> None:
    artifact = read_artifact(bundled.with_stem(name))
    gpu = Engine(artifact, device="cuda:0", dtype=dtype, max_batch=64)
    cpu = Engine(artifact, device="cpu", dtype="float32", max_batch=64)
    order = rows(64)
    pixels = gpu(*order)
    difference = np.abs(pixels.astype(int) - cpu(*order))
    assert difference.mean() < (0.05 if dtype == "float32" else 2.0)
    for size in (1, 5, 63):
        seeds, indices, labels = order
        assert (gpu(seeds[:size], indices[:size], labels[:size]) == pixels[:size]).all()
