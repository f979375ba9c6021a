"""Several processes that train one generator: who they are, and what they agree on.

`torchrun` starts the processes and tells each its rank. They hold the same weights, take disjoint
shares of every batch, and leave all files to the first of them.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True)
class DistributedContext:
    """The processes of a run.

    Attributes:
        rank: this process, in [0, size).
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def writes(self) -> bool:
        """Whether this process writes files and prints; exactly one does."""
        return self.rank == 0

    def share(self, whole: Tensor) -> Tensor:
        """This process's rows of a batch that all processes have drawn alike."""
        return whole[self.rank :: self.size]

    def parallel(self, network: nn.Module) -> nn.Module:
        """The network, with gradients averaged over all processes as they are computed."""
        if self.size == 1:
            return network
        devices = [p.device for p in network.parameters()]
        ids = [devices[0]] if devices[0].type == "cuda" else None
        # Batch norm normalises each share by itself; its statistics are measured again for looks.
        return DistributedDataParallel(network, device_ids=ids)

    def agree(self, *values: float) -> list[float]:
        """The first process's values, in every process."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return shared.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


SINGLE_PROCESS = DistributedContext()


@contextmanager
def join() -> Iterator[DistributedContext]:
    """Join the processes that `torchrun` started, or be alone where it did not.

    Raises:
        RuntimeError: the others cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    # Tensors of each kind of device travel their own way: what is agreed on lies on the CPU.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield DistributedContext(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """This process's own GPU, where all processes of a machine were given plain `cuda`."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
