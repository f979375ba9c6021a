"""Tests of the bytes on other processors, which QEMU emulates.

    pytest tests/processors.py

`pytest` alone does not run them: they take a minute and need QEMU's user mode (the package
`qemu-user` of Debian) on an x86-64 machine with AVX2.
"""

from tests.support.processes import emulate, run

# Images of every bundled model in both precisions: plain, truncated, mixed and interpolated ones.
DIGESTS = """
import hashlib
import numpy as np
from pathlib import Path
from service.inference.engine import Engine
from service.inference.latents import RowOptions, SamplingOptions
from training.artifact import read_artifact

seeds = np.full(6, 2**63 + 5, np.uint64)
indices, labels = np.arange(6), np.arange(6) % 10
options = SamplingOptions(0.7, to_seed=3, at=np.linspace(0.1, 0.9, 6), mix=np.linspace(0, 1, 10))
for path in sorted(Path("weights").glob("*.safetensors")):
    artifact = read_artifact(path)
    for dtype in artifact.graphs:
        engine = Engine(artifact, device="cpu", dtype=dtype, max_batch=6)
        for rows in ((), [RowOptions(slice(3, 6), slice(0, 3), options)]):
            pixels = engine(seeds, indices, labels, rows)
            print(path.stem, dtype, len(rows), hashlib.sha256(pixels.tobytes()).hexdigest())
"""


def test_images_are_the_same_bytes_on_a_processor_with_avx2_alone() -> None:
    emulated, native = emulate("Haswell", "-c", DIGESTS), run("-c", DIGESTS)
    assert (emulated.returncode, native.returncode) == (0, 0), emulated.stderr + native.stderr
    assert len(native.stdout.splitlines()) == 12
    assert emulated.stdout == native.stdout
