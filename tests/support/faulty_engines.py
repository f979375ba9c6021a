"""The service with a device that fails where a request's label tells it to.

    python -m tests.support.faulty_engines [OPTION]...

takes the options of `python -m service`. Of the ten classes, label 6 takes half a second, 7 makes
images that are not finite, 8 runs out of memory if a batch has more than four of its images, and 9
loses the device. On a GPU the last two are real: a tensor larger than any memory, and an index out
of bounds in a kernel, after which the process cannot use the device any more.
"""

import sys
import time
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from numpy.typing import NDArray

from service.inference.engine import Engine
from service.inference.errors import DeviceLost, OutOfMemory
from service.inference.repository import ModelRepository
from service.server import process as server
from service.settings import Settings, parse_settings

SLOW, NAN, MEMORY, LOST = 6, 7, 8, 9
FITS = 4


def exhaust(device: str) -> None:
    if device != "cpu":
        import torch  # noqa: PLC0415

        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    raise OutOfMemory("out of memory")


def lose(device: str) -> None:
    if device != "cpu":
        import torch  # noqa: PLC0415

        torch.zeros(1, device=device)[torch.ones(1, dtype=torch.int64, device=device)].cpu()
    raise DeviceLost("unspecified launch failure")


class FaultyNetwork:
    """A network on a device that fails for some labels."""

    def __init__(self, engine: Engine) -> None:
        self.network, self.device = engine._network, engine.device
        self.embedding = engine._embedding  # (classes, embedding_dim)

    def __call__(
        self, latents: NDArray[np.float32], embedded: NDArray[np.float32]
    ) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        labels = np.square(embedded[:, None] - self.embedding).sum(2).argmin(1)
        if (labels == SLOW).any():
            time.sleep(0.5)
        with self.translated_errors():
            if (labels == LOST).any():
                lose(self.device)
            if (labels == MEMORY).sum() > FITS:
                exhaust(self.device)
        pixels, finite = self.network(latents, embedded)
        return pixels, finite & (labels != NAN)

    def translated_errors(self) -> AbstractContextManager[None]:
        if self.device == "cpu":
            return nullcontext()
        from service.inference.cuda import translated_errors  # noqa: PLC0415

        return translated_errors()


def load(settings: Settings) -> ModelRepository:
    repository = original_load(settings)
    for model in repository:
        model.engine._network = FaultyNetwork(model.engine)
    return repository


original_load = server.load

if __name__ == "__main__":
    server.load = load
    settings = parse_settings(sys.argv[1:])
    sound = server.create_server(settings, lambda line: print(line, flush=True))
    sys.exit(sound.run_until_stopped())
