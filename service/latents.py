"""(seed, index) to latent: where the byte contract starts.

The latent of image `index` of `seed` is a pure function of those two numbers, so an image does not
depend on how many were asked for, on its batch, or on its neighbours. The generator is SplitMix64
(Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), used by
counter: output i of a stream is a hash of (seed + (i + 1) * GAMMA), so any entry can be computed
alone, and a batch is a few array operations over (rows, entries).
"""

import numpy as np
from numpy.typing import NDArray

GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_LOW_32 = np.uint64(0xFFFFFFFF)
_BLOCK = 64  # rows at a time: the arrays in between stay in the processor's cache


def splitmix64(seeds: NDArray[np.uint64], positions: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Output number `positions` (from 0) of the streams that start at `seeds`, broadcast."""
    z: NDArray[np.uint64] = (
        seeds + (positions + np.uint64(1)) * GAMMA
    )  # wraps, as the algorithm wants
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    z = z ^ (z >> np.uint64(31))
    return z


def draw_latents(
    seeds: NDArray[np.uint64], indices: NDArray[np.int64], latent_dim: int
) -> NDArray[np.float32]:
    """Standard normal latents, one a row.

    The output `index` of the seed's stream starts a stream of the image's own; each of its words
    gives two normals (Box & Muller 1958). Computed in double precision, so that the last digits of
    a processor's sine and logarithm vanish when the result is rounded to float32.

    Args:
        seeds: (N,) uint64.
        indices: (N,) int64, not negative.
        latent_dim: length of a latent.

    Returns:
        (N, latent_dim) float32.
    """
    keys = splitmix64(seeds, indices.astype(np.uint64))  # (N,)
    pairs = (latent_dim + 1) // 2
    latents = np.empty((len(seeds), 2 * pairs), dtype=np.float32)
    for first in range(0, len(seeds), _BLOCK):
        block = slice(first, first + _BLOCK)
        words = splitmix64(keys[block, None], np.arange(pairs, dtype=np.uint64))  # (B, pairs)
        uniform = ((words >> np.uint64(32)) + 0.5) * 2.0**-32  # in (0, 1): its logarithm is finite
        radius = np.sqrt(-2.0 * np.log(uniform))
        angle = (words & _LOW_32) * (2.0 * np.pi * 2.0**-32)
        latents[block, :pairs] = radius * np.cos(angle)
        latents[block, pairs:] = radius * np.sin(angle)
    return latents[:, :latent_dim]
