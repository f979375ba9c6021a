"""(seed, index) to latent, and what may be done to it: where the byte contract starts.

The latent of image `index` of `seed` is a pure function of those two numbers, so an image does not
depend on how many were asked for, on its batch, or on its neighbours. The generator is SplitMix64
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
_1, _27, _30, _31, _32 = (np.uint64(number) for number in (1, 27, 30, 31, 32))
_BLOCK = 256  # rows at a time: the arrays in between stay in the processor's cache


def splitmix64(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output number `positions` (from 0) of the streams that start at `seeds`, broadcast."""
    return _mixed(seeds + (positions + _1) * GAMMA)  # wraps, as the algorithm wants


@lru_cache
def _positions(count: int) -> NDArray[np.uint64]:
    """What is added to a seed for each of the first outputs (count,) of its stream."""
    return np.arange(1, count + 1, dtype=np.uint64) * GAMMA


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The outputs for some states, in their place."""
    z ^= z >> _30
    z *= _MIX_1
    z ^= z >> _27
    z *= _MIX_2
    z ^= z >> _31
    return z


def draw_latents(
    seeds: NDArray[np.uint64], indices: NDArray[np.int64], latent_dim: int
) -> NDArray[np.float32]:
    """Standard normal latents, one a row.

    The output `index` of the seed's stream starts a stream of the image's own; each of its words
    gives two normals (Box & Muller 1958): the upper half a radius, and the lower half an angle,
    whose sine is the cosine of a quarter turn less. Computed in double precision, so that the last
    digits of a processor's cosine and logarithm vanish when the result is rounded to float32. They
    are taken from PyTorch, whose take less time than numpy's without AVX-512.

    Args:
        seeds: (N,) uint64.
        indices: (N,) int64, not negative.
        latent_dim: length of a latent.

    Returns:
        (N, latent_dim) float32.
    """
    keys = splitmix64(seeds, indices.view(np.uint64))  # (N,)
    pairs = (latent_dim + 1) // 2
    positions = _positions(pairs)
    latents = np.empty((len(seeds), 2, pairs), dtype=np.float32)
    for first in range(0, len(seeds), _BLOCK):
        block = slice(first, first + _BLOCK)
        words = _mixed(keys[block, None] + positions)  # (B, pairs)
        radius = (words >> _32) + 0.5
        radius *= 2.0**-32  # in (0, 1): its logarithm is finite
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
    """What makes the images of a request other than plain draws of a class.

    Attributes:
        truncation: in (0, 1]; factor of every latent.
        to_seed: where walks lead, each from the image of its own seed to that of this one.
        at: (N,) float64 in [0, 1], how far along its walk each row is; given with `to_seed`.
        mix: (num_classes,) float64, the weight of each class in place of a label: shares of their
            sum, so that what was asked for can be repeated as it stood.
    """

    truncation: float = 1.0
    to_seed: int | None = None
    at: NDArray[np.float64] | None = None
    mix: NDArray[np.float64] | None = None

    def latents(
        self, plain: NDArray[np.float32], indices: NDArray[np.int64], rows: slice
    ) -> NDArray[np.float32]:
        """The latents of some rows of the request.

        Args:
            plain: (B, latent_dim) float32, what `draw_latents` gives for them.
            indices: (B,) int64, theirs.
            rows: which of the request's they are.
        """
        latents = plain
        if self.to_seed is not None and self.at is not None:
            seeds = np.full(len(indices), self.to_seed, dtype=np.uint64)
            ends = draw_latents(seeds, indices, plain.shape[1])
            latents = slerp(plain, ends, self.at[rows])
        return latents * np.float32(self.truncation)


class RowOptions(NamedTuple):
    """Rows of a batch that are not plain draws of a class.

    Attributes:
        rows: which of the batch.
        own: which of their request these are.
        variation: of the request.
    """

    rows: slice
    own: slice
    variation: SamplingOptions


def slerp(
    starts: NDArray[np.float32], ends: NDArray[np.float32], at: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Points between two latents, on the arc and not on the chord (Shoemake, SIGGRAPH 1985).

    Nearly all latents of many dimensions have about the same length; the middle of a chord is
    shorter, and what a generator makes of it is as pale as with truncation.

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
    straight = sine < 1e-6  # the same latent twice, or opposite ones, which no arc joins
    divisor = np.where(straight, 1.0, sine)
    weights = np.where(straight, 1.0 - at, np.sin((1.0 - at) * angle) / divisor)
    others = np.where(straight, at, np.sin(at * angle) / divisor)
    points: NDArray[np.float64] = weights[:, None] * first + others[:, None] * last
    return points.astype(np.float32)
