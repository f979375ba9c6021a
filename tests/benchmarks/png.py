"""`python -m tests.benchmarks.png`: our PNG encoder against Pillow's, on generated digits.

Prints medians of interleaved rounds; only the ratio means anything on another machine.
"""

import io
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from service.encoding.png import contact_sheet, encode_png
from service.inference.engine import Engine
from service.settings import Settings
from training.loading import load_artifact

ROUNDS, CALLS = 15, 200


def pillow(pixels: NDArray[np.uint8], **options: int) -> bytes:
    """Encode as a service without an encoder of its own would."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0]).save(buffer, format="PNG", **options)
    return buffer.getvalue()


def microseconds(function: Callable[[], bytes]) -> float:
    """Time of one call."""
    began = time.perf_counter()
    for _ in range(CALLS):
        function()
    return (time.perf_counter() - began) / CALLS * 1e6


def main() -> None:
    """Compare on one image and on a sheet of sixteen."""
    artifact = load_artifact(Settings().models / "mnist.safetensors")
    engine = Engine(artifact, device="cpu", dtype="float32", max_batch=16)
    rows = np.arange(16)
    images = engine(np.zeros(16, np.uint64), rows, np.full(16, 7))
    recipe = {"model": "mnist", "sha256": artifact.sha256, "label": 7, "seed": 0, "index": 0}
    for name, pixels in (("28x28", images[0]), ("112x112", contact_sheet(images))):
        encoders: dict[str, Callable[[], bytes]] = {
            "service.encoding.png": lambda p=pixels: encode_png(p, recipe),  # type: ignore[misc]
            "Pillow, default level": lambda p=pixels: pillow(p),  # type: ignore[misc]
            "Pillow, level 1": lambda p=pixels: pillow(p, compress_level=1),  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {each: [] for each in encoders}
        for _ in range(ROUNDS):
            for each, function in encoders.items():
                times[each].append(microseconds(function))
        ours = statistics.median(times["service.encoding.png"])
        for each, function in encoders.items():
            median = statistics.median(times[each])
            size = len(function())
            print(f"{name} {each}: {median:.0f} us, {median / ours:.2f} of ours, {size} bytes")


if __name__ == "__main__":
    main()
