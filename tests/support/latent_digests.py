"""Digests of what a network's inputs are made of, printed as JSON.

A program of its own, which imports nothing that is slow under an emulated processor.
"""

import hashlib
import json

import numpy as np
from numpy.typing import NDArray

from service.inference.latents import SamplingOptions, draw_latents, mix_embeddings
from service.inference.normal import normal_table


def _digest(*arrays: NDArray[np.float32]) -> str:
    """Return the SHA-256 of arrays of one dtype, in little-endian order."""
    sha256 = hashlib.sha256()
    for array in arrays:
        assert array.dtype == np.float32
        sha256.update(array.astype("<f4").tobytes())
    return sha256.hexdigest()


def latent_digests() -> dict[str, str]:
    """Return the digest of the table, of latents, of points on arcs and of mixtures."""
    count = 600  # more than a block
    seeds, indices = np.arange(count, dtype=np.uint64) * np.uint64(977), np.arange(count)
    latents = [draw_latents(seeds, indices, latent_dim) for latent_dim in (1, 9, 64, 100)]
    arc = SamplingOptions(0.7, to_seed=5, at=np.linspace(0, 1, count))
    points = [arc.apply(each, indices, slice(count)) for each in latents]
    weights = np.arange(1, 11) / 7.0
    embeddings = latents[3][:10]
    mixtures = [mix_embeddings(weights[:classes], embeddings[:classes]) for classes in range(1, 11)]
    return {
        "table": _digest(normal_table()),
        "latents": _digest(*latents),
        "arcs": _digest(*points),
        "mixtures": _digest(*mixtures),
    }


if __name__ == "__main__":
    print(json.dumps(latent_digests()))  # noqa: T201
