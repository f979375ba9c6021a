"""The service with a device that fails where a request's label tells it to.

    python -m tests.broken [OPTION]...

takes the options of `python -m service`. Of the ten classes, label 6 takes half a second, 7 makes
images of what is no number, 8 runs out of memory where more than four images are made at once, and
9 loses the device.
"""

import sys
import time

import torch
from torch import Tensor

from service import server
from service.engine import FusedConv, FusedMLP
from service.registry import Registry
from service.settings import Settings, parse_settings

SLOW, NAN, MEMORY, LOST = 6, 7, 8, 9
FITS = 4


class Broken:
    """A network on a device that fails."""

    def __init__(self, network: FusedMLP | FusedConv) -> None:
        self.network = network

    def __call__(self, latents: Tensor, labels: Tensor) -> Tensor:
        if (labels == SLOW).any():
            time.sleep(0.5)
        if (labels == LOST).any():
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        if (labels == MEMORY).sum() > FITS:
            raise torch.OutOfMemoryError("CUDA out of memory")
        x = self.network(latents, labels)
        return x.masked_fill((labels == NAN)[:, None], torch.nan)


def load(settings: Settings) -> Registry:
    registry = sound_load(settings)
    for model in registry:
        model.engine._network = Broken(model.engine._network)  # type: ignore[assignment]
    return registry


sound_load = server.load

if __name__ == "__main__":
    server.load = load
    sys.exit(server.serve(parse_settings(sys.argv[1:]), lambda line: print(line, flush=True)))
