"""Data-parallel training in several processes that `torchrun` started.

All processes hold the same weights and train on disjoint shards of every batch. Only the first one
(rank 0) writes files.
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
    """The processes of a run."""

    rank: int = 0  # this process, in [0, size)
    size: int = 1  # the number of processes

    @property
    def is_main_process(self) -> bool:
        """True in the one process that writes files and prints."""
        return self.rank == 0

    def shard(self, batch: Tensor) -> Tensor:
        """Return this process's rows of a batch that every process has drawn identically."""
        return batch[self.rank :: self.size]

    def parallel(self, network: nn.Module) -> nn.Module:
        """Return the network with its gradients averaged over all processes."""
        if self.size == 1:
            return network
        devices = [p.device for p in network.parameters()]
        ids = [devices[0]] if devices[0].type == "cuda" else None
        # Batch norm normalises each shard separately; evaluation measures its statistics again.
        return DistributedDataParallel(network, device_ids=ids)

    def broadcast(self, *values: float) -> list[float]:
        """Return the main process's values in every process."""
        if self.size == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.broadcast(shared, src=0)
        return shared.tolist()

    def any(self, flag: bool) -> bool:
        """Return True if the flag is set in any process."""
        if self.size == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags)
        return bool(flags)

    def mean(self, values: Tensor) -> Tensor:
        """Return the mean over all processes."""
        if self.size > 1:
            dist.all_reduce(values)
        return values / self.size


SINGLE_PROCESS = DistributedContext()


@contextmanager
def init_distributed() -> Iterator[DistributedContext]:
    """Join the process group of `torchrun`; without `torchrun`, yield `SINGLE_PROCESS`.

    Raises:
        RuntimeError: the other processes cannot be reached.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield SINGLE_PROCESS
        return
    # Gradients travel by NCCL; flags and times stay on the CPU and travel by Gloo.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield DistributedContext(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """Replace plain `cuda` by this process's own GPU on its machine."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return device
