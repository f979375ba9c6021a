import json
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from service.inference.latents import (
    SamplingOptions,
    draw_latents,
    mix_embeddings,
    mix_shares,
    slerp,
    splitmix64,
)
from service.inference.normal import DEVIATES_PER_WORD
from tests.support.latent_digests import latent_digests
from tests.support.processes import emulate

# They may never change: every image that a seed ever gave depends on them, on every processor.
DIGESTS = {
    "table": "d2ba43c0fae65b1912a1de3bde7325376ae8b9edc229b1ad4f3abea7dfec955d",
    "latents": "4c729aab6b8c7662f238b22238b1692bf1c20fd89c4bd2e0bd529e9246a3317a",
    "arcs": "180f0b83c7772c274fa8bd5f7875a34bd1889d2e1e70f9bcabda53abfe3086ed",
    "mixtures": "acaaa4a70856343b6037f3fa9a3e8cdfa7067cf280c395b63fc0e64364095669",
}


def u64(*values: int) -> NDArray[np.uint64]:
    return np.array(values, dtype=np.uint64)


def i64(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


def test_splitmix64_gives_the_outputs_of_its_reference_implementation() -> None:
    # https://prng.di.unimi.it/splitmix64.c with the state 1234567
    expected = u64(
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    )
    assert (splitmix64(u64(1234567), np.arange(5, dtype=np.uint64)) == expected).all()


def test_a_latent_depends_on_its_seed_and_index_alone() -> None:
    seeds = u64(5, 9, 5, 2**64 - 1)
    indices = i64(0, 3, 1, 1023)
    together = draw_latents(seeds, indices, 100)
    for row in range(4):
        alone = draw_latents(seeds[row : row + 1], indices[row : row + 1], 100)
        assert (together[row] == alone[0]).all()


def test_a_latent_is_the_same_among_hundreds() -> None:
    seeds, indices = np.arange(200, dtype=np.uint64) * np.uint64(977), np.arange(200)
    together = draw_latents(seeds, indices, 100)
    for first in range(0, 200, 7):
        some = slice(first, first + 3)
        assert (together[some] == draw_latents(seeds[some], indices[some], 100)).all()


def test_other_seeds_and_other_indices_give_other_latents() -> None:
    seeds, indices = np.meshgrid(np.arange(50, dtype=np.uint64), np.arange(50, dtype=np.int64))
    latents = draw_latents(seeds.ravel(), indices.ravel(), 4)
    assert len(np.unique(latents, axis=0)) == 2500


STD_OF_ENTRIES = 1.0000101408  # makes the variance of 65,536 midpoints 1


def plain_latent(seed: int, index: int, latent_dim: int) -> list[float]:
    """The definition, entry by entry in Python's own integers."""

    def output(start: int, position: int) -> int:
        z = (start + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def entry(number: int) -> float:
        return NormalDist(0, STD_OF_ENTRIES).inv_cdf((number + 0.5) / 2**16)

    key = output(seed, index)
    words = [output(key, position) for position in range(-(-latent_dim // DEVIATES_PER_WORD))]
    entries = [entry(word >> shift & 0xFFFF) for word in words for shift in (0, 16, 32, 48)]
    pairs = zip(entries[::2], entries[1::2], strict=True)
    rotated = [(0.8 * a - 0.6 * b, 0.6 * a + 0.8 * b) for a, b in pairs]
    return [deviate for pair in rotated for deviate in pair][:latent_dim]


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (42, 7), (2**64 - 1, 1023)])
@pytest.mark.parametrize("latent_dim", [1, 9, 100])
def test_latents_keep_their_definition(seed: int, index: int, latent_dim: int) -> None:
    """Changing it would change every image that a seed ever gave."""
    latents = draw_latents(u64(seed), i64(index), latent_dim)
    assert latents.dtype == np.float32
    assert latents[0].tolist() == pytest.approx(plain_latent(seed, index, latent_dim), abs=2e-6)


def test_inputs_of_a_network_keep_their_bytes() -> None:
    assert latent_digests() == DIGESTS


@pytest.mark.parametrize("model", ["Haswell", "Westmere"])  # with AVX2, and with SSE 4.2 alone
def test_inputs_of_a_network_are_the_same_bytes_on_another_processor(model: str) -> None:
    ended = emulate(model, "-m", "tests.support.latent_digests")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == DIGESTS


@pytest.fixture(scope="module")
def million() -> NDArray[np.float64]:
    """Latents of 64 entries, from neighbouring seeds and indices."""
    seeds, indices = np.meshgrid(np.arange(125, dtype=np.uint64), np.arange(125))
    return draw_latents(seeds.ravel(), indices.ravel(), 64).astype(np.float64)


def test_latents_are_standard_normal(million: NDArray[np.float64]) -> None:
    assert million.mean() == pytest.approx(0.0, abs=0.003)
    assert million.var() == pytest.approx(1.0, abs=0.004)
    assert (million**3).mean() == pytest.approx(0.0, abs=0.012)
    assert (million**4).mean() == pytest.approx(3.0, abs=0.03)
    # Kolmogorov & Smirnov: a million normal numbers are further off than 0.0016 once in 100 times.
    levels = np.arange(1, 1000) / 1000
    shares = np.searchsorted(np.sort(million.ravel()), [NormalDist().inv_cdf(p) for p in levels])
    assert np.abs(shares / million.size - levels).max() < 0.0016
    assert 40 < (np.abs(million) > 4).sum() < 90  # expected are 63
    assert np.abs(million).max() > 4.5


def test_entries_of_latents_are_independent(million: NDArray[np.float64]) -> None:
    for values in (million, million**2, np.abs(million)):
        correlations = np.corrcoef(values.T) - np.eye(64)
        assert np.abs(correlations).max() < 0.04  # five standard deviations of one correlation
        rotated = np.diag(correlations, 1)[::2]  # with the other one of the same rotation
        assert rotated.mean() == pytest.approx(0.0, abs=0.006)


def test_neighbouring_seeds_and_indices_are_independent(million: NDArray[np.float64]) -> None:
    grid = million.reshape(125, 125, 64)
    for values in (grid, grid**2):
        for first, second in (
            (values[1:], values[:-1]),
            (values[:, 1:], values[:, :-1]),
            (values[1:, 1:], values[:-1, :-1]),
            (values[1:, :-1], values[:-1, 1:]),
            (values[..., 1:], values[..., :-1]),
        ):
            assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.005


def test_an_odd_dimension_is_a_latent_like_any_other() -> None:
    assert draw_latents(u64(1), i64(0), 9).shape == (1, 9)
    assert np.isfinite(draw_latents(u64(1), i64(0), 1)).all()


def ends(count: int = 5, latent_dim: int = 100) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    indices = np.arange(count)
    first, last = (
        draw_latents(np.full(count, seed, np.uint64), indices, latent_dim) for seed in (1, 2)
    )
    return first, last


def test_an_arc_begins_and_ends_at_its_latents() -> None:
    first, last = ends()
    assert (slerp(first, last, np.zeros(5)) == first).all()
    assert (slerp(first, last, np.ones(5)) == last).all()


def test_the_middle_of_an_arc_is_as_long_as_its_ends_and_as_far_from_both() -> None:
    first, last = (each / np.linalg.norm(each, axis=1)[:, None] for each in ends())
    middle = slerp(first, last, np.full(5, 0.5))
    assert np.linalg.norm(middle, axis=1) == pytest.approx(1.0)
    assert (first * middle).sum(1) == pytest.approx((middle * last).sum(1))


def test_a_point_on_an_arc_does_not_depend_on_the_others() -> None:
    first, last = ends(9)
    at = np.linspace(0, 1, 9)
    together = slerp(first, last, at)
    for row in range(9):
        one = slice(row, row + 1)
        assert (slerp(first[one], last[one], at[one]) == together[one]).all()


def test_an_arc_from_a_latent_to_itself_stays_there() -> None:
    first, _ = ends()
    for end in (first, -first):  # no arc joins opposite ones; the chord does
        points = slerp(first, end, np.full(5, 0.25))
        assert points == pytest.approx(first * (1.0 if end is first else 0.5), rel=1e-6)


def test_options_apply_to_rows_by_their_place_in_the_request() -> None:
    at = np.array([0.0, 0.25, 1.0])
    options = SamplingOptions(0.5, to_seed=2, at=at)
    first, last = ends(1)
    for row in range(3):
        latents = options.apply(first, i64(0), slice(row, row + 1))
        expected = slerp(first, last, at[row : row + 1]) * np.float32(0.5)
        assert (latents == expected).all()


def test_a_mixture_of_one_class_is_exactly_that_class() -> None:
    _, embeddings = ends(10)
    for label in range(10):
        for weight in (5e-324, 0.3, 1.0, 1e308):
            weights = np.zeros(10)
            weights[label] = weight
            assert (mix_embeddings(weights, embeddings) == embeddings[label]).all()


def test_a_mixture_is_the_weighted_mean() -> None:
    embeddings, _ = ends(3)
    mixed = mix_embeddings(np.array([3.0, 0.0, 1.0]), embeddings)
    assert mixed == pytest.approx(0.75 * embeddings[0] + 0.25 * embeddings[2], rel=1e-6)


@pytest.mark.parametrize("scale", [2.0**-1000, 1e-6, 3.0, 2.0**100, 1e308])
def test_a_mixture_does_not_depend_on_the_scale_of_its_weights(scale: float) -> None:
    weights = np.arange(1, 11) / 10
    assert mix_shares(scale * weights) == pytest.approx(weights / 5.5, rel=1e-14)
    assert mix_shares(weights).sum() == pytest.approx(1.0, rel=1e-14)
