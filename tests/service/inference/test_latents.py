import math

import numpy as np
import pytest
from numpy.typing import NDArray

from service.inference.latents import SamplingOptions, draw_latents, slerp, splitmix64


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
    assert len(np.unique(latents[:, 0])) == 2500


def plain_latent(seed: int, index: int, latent_dim: int) -> list[float]:
    """The definition, entry by entry in Python's own integers."""

    def output(start: int, position: int) -> int:
        z = (start + (position + 1) * 0x9E3779B97F4A7C15) % 2**64
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    key = output(seed, index)
    words = [output(key, position) for position in range((latent_dim + 1) // 2)]
    radii = [math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32)) for word in words]
    angles = [2 * math.pi * (word % 2**32) / 2**32 for word in words]
    cosines = [r * math.cos(a) for r, a in zip(radii, angles, strict=True)]
    sines = [r * math.sin(a) for r, a in zip(radii, angles, strict=True)]
    return (cosines + sines)[:latent_dim]


@pytest.mark.parametrize(("seed", "index"), [(0, 0), (42, 7), (2**64 - 1, 1023)])
@pytest.mark.parametrize("latent_dim", [1, 9, 100])
def test_latents_keep_their_definition(seed: int, index: int, latent_dim: int) -> None:
    """Changing it would change every image that a seed ever gave."""
    latents = draw_latents(u64(seed), i64(index), latent_dim)
    assert latents.dtype == np.float32
    assert latents[0].tolist() == pytest.approx(plain_latent(seed, index, latent_dim), rel=1e-6)


def test_latents_are_standard_normal() -> None:
    count = 20_000
    latents = draw_latents(np.full(count, 3, np.uint64), np.arange(count), 7).astype(np.float64)
    assert latents.mean(axis=0) == pytest.approx(0.0, abs=0.03)
    assert latents.std(axis=0) == pytest.approx(1.0, abs=0.02)
    assert (latents**4).mean(axis=0) == pytest.approx(3.0, abs=0.2)
    correlations = np.corrcoef(latents.T) - np.eye(7)
    assert np.abs(correlations).max() < 0.03
    # The share beyond two standard deviations, 4.55 %, would be off for a wrong tail.
    assert (np.abs(latents) > 2).mean() == pytest.approx(0.0455, abs=0.003)


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
