"""The service with a device that fails where a request's label tells it to.

    python -m tests.support.faulty_engines [OPTION]...

takes the options of `python -m service`. Of the ten classes, label 6 takes half a second, 7 makes
images that are not finite, 8 runs out of memory if a batch has more than four of its images, and 9
loses the device. On a GPU the last two are real: a tensor larger than any memory, and an index out
of bounds in a kernel, after which the process cannot use the device any more.
"""

import sys
import time

import torch
from torch import Tensor

from service.inference.engine import Engine
from service.inference.repository import ModelRepository
from service.server import process as server
from service.settings import Settings, parse_settings

SLOW, NAN, MEMORY, LOST = 6, 7, 8, 9
FITS = 4


def exhaust(device: torch.device) -> None:
    if device.type == "cuda":
        torch.empty(1 << 50, dtype=torch.uint8, device=device)
    raise torch.OutOfMemoryError("CUDA out of memory")


def lose(device: torch.device) -> None:
    if device.type == "cuda":
        torch.zeros(1, device=device)[torch.ones(1, dtype=torch.int64, device=device)].cpu()
    raise torch.AcceleratorError("CUDA error: unspecified launch failure")


class FaultyNetwork:
    """A network on a device that fails for some labels."""

    def __init__(self, engine: Engine) -> None:
        self.network, self.device = engine._network, engine.device
        self.pads_inputs = engine._network.pads_inputs
        self.embedding = torch.from_numpy(engine._embedding)  # (classes, embedding_dim)

    def __call__(self, x: Tensor, rows: int | None = None) -> Tensor:
        embedded = x[:, -self.embedding.shape[1] :]
        labels = torch.cdist(embedded, self.embedding).argmin(1)
        labels[~embedded.any(1)] = 0  # rows that only fill a batch
        if (labels == SLOW).any():
            time.sleep(0.5)
        if (labels == LOST).any():
            lose(self.device)
        if (labels == MEMORY).sum() > FITS:
            exhaust(self.device)
        images = self.network(x.to(self.device), rows).cpu()
        return images.masked_fill((labels == NAN)[:rows, None], torch.nan)


def load(settings: Settings) -> ModelRepository:
    repository = original_load(settings)
    for model in repository:
        model.engine._network = FaultyNetwork(model.engine)  # type: ignore[assignment]
        model.engine._graph = None  # a captured forward would not call the network
    return repository


original_load = server.load

if __name__ == "__main__":
    server.load = load
    settings = parse_settings(sys.argv[1:])
    sound = server.create_server(settings, lambda line: print(line, flush=True))
    sys.exit(sound.run_until_stopped())
