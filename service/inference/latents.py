"""Latents from (seed, index), and what may be done to them: where the byte contract starts.

The latent of image `index` of `seed` is a pure function of those two numbers, so an image does not
depend on how many were requested, on its batch, or on its neighbours. The generator is SplitMix64
(Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), used by
counter: output i of a stream is a hash of (seed + (i + 1) * GAMMA), so any entry can be computed
alone, and a batch is a few array operations over (rows, entries). No operation here depends on the
processor, its libraries or its instruction set: the same request has the same inputs everywhere.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from service.inference.normal import DEVIATES_PER_WORD, normal_deviates
from service.inference.portable_math import arccos, sin, sum_rows

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
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
    four normal deviates.

    Args:
        seeds: (N,) uint64.
        indices: (N,) int64, not negative.
        latent_dim: length of a latent.

    Returns:
        (N, latent_dim) float32.
    """
    keys = splitmix64(seeds, indices.view(np.uint64))  # (N,)
    words = -(-latent_dim // DEVIATES_PER_WORD)  # of a latent
    latents = np.empty((len(seeds), words * DEVIATES_PER_WORD), dtype=np.float32)
    for first in range(0, len(seeds), _BLOCK):
        block = slice(first, first + _BLOCK)
        latents[block] = normal_deviates(_finalize(keys[block, None] + _offsets(words)))
    return latents[:, :latent_dim]


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
    first, last = starts.T.astype(np.float64), ends.T.astype(np.float64)  # (D, N)
    sums = sum_rows(np.stack((first * first, last * last, first * last), axis=1))  # (3, N)
    angle = arccos(np.clip(sums[2] / np.sqrt(sums[0] * sums[1]), -1.0, 1.0))
    shares = np.stack((1.0 - at, at))
    sine, *sines = sin(angle * np.stack((np.ones_like(at), *shares)))
    straight = sine < 1e-6  # equal or opposite latents: no single arc joins them
    weights = np.where(straight, shares, sines / np.where(straight, 1.0, sine))
    points: NDArray[np.float64] = weights[0] * first + weights[1] * last
    return points.T.astype(np.float32)


def mix_shares(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of each class in a mixture: its weight divided by the sum of all.

    Args:
        weights: (num_classes,) finite, not negative, not all 0. They are first scaled by a power of
            two, which changes no digit of the shares, so that no sum of them is infinite.
    """
    _, exponent = np.frexp(weights.max())
    scaled = np.ldexp(weights, -exponent)
    shares: NDArray[np.float64] = scaled / sum_rows(scaled)
    return shares


def mix_embeddings(
    weights: NDArray[np.float64], embeddings: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the mean (embedding_dim,) of class embeddings, weighted as `mix_shares` describes.

    It is computed in double precision: a mixture of one class only is exactly that class.

    Args:
        weights: (num_classes,).
        embeddings: (num_classes, embedding_dim).
    """
    shares = mix_shares(weights)
    present = shares.nonzero()[0]
    return sum_rows(shares[present, None] * embeddings[present]).astype(np.float32)
