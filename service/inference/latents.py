"""Latents from (seed, index), and what may be done to them: where the byte contract starts.

The latent of image `index` of `seed` is a pure function of those two numbers, so an image does not
depend on how many were requested, on its batch, or on its neighbours. The generator is SplitMix64
(Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), used by
counter: output i of a stream is a hash of (seed + (i + 1) * GAMMA), so any entry can be computed
alone, and a batch is a few array operations over (rows, entries).
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_QUARTERS = np.array([[[0]], [[3 << 30]]], dtype=np.uint32)  # no turn, and three quarters of one
_BLOCK = 256  # rows at a time, so that intermediate arrays stay in the processor's cache


def splitmix64(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the outputs at `positions` (from 0) of the streams that `seeds` start, broadcast."""
    return _finalize(seeds + (positions + 1) * GAMMA)  # wraps around, as the algorithm requires


@lru_cache
def _offsets(count: int) -> NDArray[np.uint64]:
    """Return the offsets (count,) from a seed of the first states of its stream."""
    return np.arange(1, count + 1, dtype=np.uint64) * GAMMA


def _finalize(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Replace states by their outputs, in place."""
    z ^= z >> 30
    z *= _MIX_1
    z ^= z >> 27
    z *= _MIX_2
    z ^= z >> 31
    return z


def draw_latents(
    seeds: NDArray[np.uint64], indices: NDArray[np.int64], latent_dim: int
) -> NDArray[np.float32]:
    """Return standard normal latents, one per row.

    Output `index` of the seed's stream starts a stream of the image's own, each word of which gives
    two normals (Box & Muller 1958): the upper half is a radius and the lower half an angle, whose
    sine is the cosine of a quarter turn less. Double precision makes the last digits of a
    processor's cosine and logarithm vanish when the result is rounded to float32. Both functions
    are PyTorch's, which take less time than numpy's without AVX-512.

    Args:
        seeds: (N,) uint64.
        indices: (N,) int64, not negative.
        latent_dim: length of a latent.

    Returns:
        (N, latent_dim) float32.
    """
    keys = splitmix64(seeds, indices.view(np.uint64))  # (N,)
    pairs = (latent_dim + 1) // 2
    latents = np.empty((len(seeds), 2, pairs), dtype=np.float32)
    for first in range(0, len(seeds), _BLOCK):
        block = slice(first, first + _BLOCK)
        words = _finalize(keys[block, None] + _offsets(pairs))  # (B, pairs)
        radius = (words >> 32) + 0.5
        radius *= 2.0**-32  # in (0, 1), so that its logarithm is finite
        torch.from_numpy(radius).log_()
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angles = (words.astype(np.uint32) + _QUARTERS) * (2.0 * np.pi * 2.0**-32)  # (2, B, pairs)
        torch.from_numpy(angles).cos_()
        angles *= radius
        latents[block] = angles.transpose(1, 0, 2)
    return latents.reshape(len(seeds), 2 * pairs)[:, :latent_dim]


@dataclass(frozen=True, eq=False)
class SamplingOptions:
    """Settings by which the images of a request differ from plain draws of a class."""

    truncation: float = 1.0  # factor of every latent, in (0, 1]
    to_seed: int | None = None  # at which an interpolation from the request's own seed ends
    at: NDArray[np.float64] | None = None  # (N,) in [0, 1], each row's place on it
    # (num_classes,) weights of the classes in place of a label, relative to their sum, so that a
    # request can be repeated as it was given.
    mix: NDArray[np.float64] | None = None

    def apply(
        self, latents: NDArray[np.float32], indices: NDArray[np.int64], rows: slice
    ) -> NDArray[np.float32]:
        """Return the latents that some rows of the request have with these options.

        Args:
            latents: (B, latent_dim) float32, the result of `draw_latents` for these rows.
            indices: (B,) int64 of these rows.
            rows: their place in the request.
        """
        if self.to_seed is not None and self.at is not None:
            seeds = np.full(len(indices), self.to_seed, dtype=np.uint64)
            ends = draw_latents(seeds, indices, latents.shape[1])
            latents = slerp(latents, ends, self.at[rows])
        return latents * np.float32(self.truncation)


class RowOptions(NamedTuple):
    """Sampling options of some rows of a batch."""

    rows: slice  # place in the batch
    request_rows: slice  # place in their request
    options: SamplingOptions


def slerp(
    starts: NDArray[np.float32], ends: NDArray[np.float32], at: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Interpolate between latents on the arc, not on the chord (Shoemake, SIGGRAPH 1985).

    Nearly all latents of many dimensions have about the same length. The middle of a chord is
    shorter, and its image as pale as with truncation.

    Args:
        starts: (N, D) float32.
        ends: (N, D) float32.
        at: (N,) float64 in [0, 1]; 0 is exactly the start and 1 exactly the end.

    Returns:
        (N, D) float32.
    """
    first, last = starts.astype(np.float64), ends.astype(np.float64)
    lengths = np.sqrt((first * first).sum(1) * (last * last).sum(1))
    cosine = np.clip((first * last).sum(1) / lengths, -1.0, 1.0)
    angle = np.arccos(cosine)
    sine = np.sin(angle)
    straight = sine < 1e-6  # equal or opposite latents: no single arc joins them
    divisor = np.where(straight, 1.0, sine)
    weights = np.where(straight, 1.0 - at, np.sin((1.0 - at) * angle) / divisor)
    others = np.where(straight, at, np.sin(at * angle) / divisor)
    points: NDArray[np.float64] = weights[:, None] * first + others[:, None] * last
    return points.astype(np.float32)
