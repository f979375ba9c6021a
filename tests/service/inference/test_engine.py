import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from service.inference.engine import (
    Engine,
    FusedConv,
    FusedMLP,
    fuse,
    resolve_dtype,
)
from service.inference.errors import EngineError
from service.inference.latents import RowOptions, SamplingOptions, draw_latents
from tests.conftest import make_artifact
from tests.support.processes import REPOSITORY
from training.artifact import Artifact, load_artifact
from training.devices import has_native_bfloat16

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]
BUNDLED = sorted((REPOSITORY / "weights").glob("*.safetensors"))


Rows = tuple[NDArray[np.uint64], NDArray[np.int64], NDArray[np.int64]]


def rows(count: int, classes: int = 10) -> Rows:
    rng = np.random.default_rng(count)
    seeds = rng.integers(0, 2**64, count, dtype=np.uint64)
    return seeds, rng.integers(0, 1024, count), rng.integers(0, classes, count)


# PyTorch takes minutes to emulate the convolutions of a bundled model in bfloat16.
ENGINES = [
    (path, dtype)
    for path, dtype in itertools.product(BUNDLED, DTYPES)
    if dtype is torch.float32 or path.stem == "mnist-mlp" or has_native_bfloat16(CPU)
]


@pytest.fixture(
    scope="module", params=ENGINES, ids=lambda each: f"{each[0].stem}-{str(each[1])[6:]}"
)
def engine(request: pytest.FixtureRequest) -> Engine:
    path, dtype = request.param
    return Engine(load_artifact(path), device=CPU, dtype=dtype, max_batch=256)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_the_fused_network_is_the_artifacts_network(
    tmp_path: Path, kind: str, channels: int
) -> None:
    path = make_artifact(tmp_path / "a.safetensors", kind=kind, channels=channels)
    artifact = load_artifact(path)
    fused = fuse(artifact.generator, device=CPU, dtype=torch.float32)
    latents, labels = torch.randn(32, 9), torch.arange(32) % 3
    with torch.inference_mode():
        expected = artifact.generator(latents, labels).flatten(1)
        inputs = torch.cat([latents, artifact.generator.label_embedding(labels)], 1)
        assert torch.allclose(fused(inputs), expected, atol=1e-5)


def test_pixels_are_the_rounded_image_in_rows_of_height_width_channels(tmp_path: Path) -> None:
    artifact = load_artifact(make_artifact(tmp_path / "a.safetensors", channels=3))
    engine = Engine(artifact, device=CPU, dtype=torch.float32, max_batch=8)
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


def test_an_image_is_the_same_with_one_thread_and_with_two(engine: Engine) -> None:
    order = rows(64)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = engine(*order)
        torch.set_num_threads(2)
        assert (engine(*order) == alone).all()
    finally:
        torch.set_num_threads(before)


def test_the_answer_is_the_callers_to_keep(engine: Engine) -> None:
    first = engine(*rows(8))
    kept = first.copy()
    engine(*rows(9))
    assert (first == kept).all()


def test_a_network_folded_wrongly_is_not_served(
    small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_the_label(fused: FusedMLP, x: torch.Tensor, rows: int | None = None) -> torch.Tensor:
        return original(fused, torch.cat([x[:, :-4], torch.zeros(len(x), 4)], 1), rows)

    original = FusedMLP.__call__
    monkeypatch.setattr(FusedMLP, "__call__", forget_the_label)
    with pytest.raises(EngineError, match=r"artifact's own network by \d+"):
        Engine(small_artifact, device=CPU, dtype=torch.float32, max_batch=8)


@pytest.mark.parametrize(
    ("asked", "other", "taken", "filled"),
    [
        (64, range(17), 64, 24),  # a product of few rows takes another kernel
        (16, range(33), 16, 40),  # so do all requested sizes
        (64, range(250), 64, 256),
        (300, range(273, 400), 272, 8),  # so do some sizes of many rows
    ],
)
def test_only_batch_sizes_that_round_alike_are_computed(
    asked: int,
    other: range,
    taken: int,
    filled: int,
    small_artifact: Artifact,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = FusedMLP.__call__
    shapes: set[int] = set()

    def round_otherwise(
        fused: FusedMLP, inputs: torch.Tensor, _rows: int | None = None
    ) -> torch.Tensor:
        shapes.add(len(inputs))
        x = original(fused, inputs)
        return x * (1 + 1e-6) if len(inputs) in other else x

    monkeypatch.setattr(FusedMLP, "__call__", round_otherwise)
    engine = Engine(small_artifact, device=CPU, dtype=torch.float32, max_batch=asked)
    assert engine.max_batch == taken
    shapes.clear()
    for size in (1, 9, taken):
        engine(*rows(size, classes=3))
    assert min(shapes) == filled
    assert not shapes & set(other)


@pytest.mark.parametrize(
    ("other", "expected"), [((), [2, 2, 4, None]), ((2,), [4, 4, 4, None]), ((2, 4), 4 * [None])]
)
def test_small_batches_are_those_that_round_alike(
    other: tuple[int, ...],
    expected: list[int | None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = FusedConv.__call__
    drawn: list[int | None] = []
    images: dict[bytes, torch.Tensor] = {}

    def round_otherwise(
        fused: FusedConv, inputs: torch.Tensor, rows: int | None = None
    ) -> torch.Tensor:
        drawn.append(rows)
        # Each row alone and once, as on a processor on which all batches round alike.
        needed = {row.numpy().tobytes(): row for row in inputs[:rows].split(1)}
        images.update({key: original(fused, needed[key]) for key in needed.keys() - images.keys()})
        x = torch.cat([images[key] for key in needed])
        return x * (1 + 1e-6) if rows in other else x

    monkeypatch.setattr(FusedConv, "__call__", round_otherwise)
    artifact = load_artifact(make_artifact(tmp_path / "a.safetensors", kind="conv"))
    engine = Engine(artifact, device=CPU, dtype=torch.float32, max_batch=8)
    drawn.clear()
    for size in (1, 2, 3, 5):
        engine(*rows(size, classes=3))
    assert drawn == expected


def test_an_image_that_depends_on_its_batch_is_not_served(
    small_artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = FusedMLP.__call__

    def mix_rows(fused: FusedMLP, inputs: torch.Tensor, _rows: int | None = None) -> torch.Tensor:
        return original(fused, inputs + 0.1 * inputs.mean(0))

    monkeypatch.setattr(FusedMLP, "__call__", mix_rows)
    with pytest.raises(EngineError, match="an image in a batch of"):
        Engine(small_artifact, device=CPU, dtype=torch.float32, max_batch=32)


def test_a_dtype_is_chosen_by_name() -> None:
    assert resolve_dtype("float32", CPU) is torch.float32
    assert resolve_dtype("bfloat16", CPU) is torch.bfloat16
    assert resolve_dtype("auto", CPU) in DTYPES


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["mnist", "mnist-mlp"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_captured_forward_agrees_with_the_cpu_and_with_itself(
    bundled: Path, name: str, dtype: torch.dtype
) -> None:
    artifact = load_artifact(bundled.with_stem(name))
    gpu = Engine(artifact, device=torch.device("cuda"), dtype=dtype, max_batch=64)
    cpu = Engine(artifact, device=CPU, dtype=torch.float32, max_batch=64)
    order = rows(64)
    pixels = gpu(*order)
    difference = np.abs(pixels.astype(int) - cpu(*order))
    assert difference.mean() < (0.05 if dtype is torch.float32 else 2.0)
    for size in (1, 5, 63):
        seeds, indices, labels = order
        assert (gpu(seeds[:size], indices[:size], labels[:size]) == pixels[:size]).all()
