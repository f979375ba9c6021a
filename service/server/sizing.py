"""The number of processes that serve."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from service.inference.devices import is_gpu
from service.settings import Settings
from training.machine import available_cores

# Of `auto`. More processes cost more than a newcomer expects of a command without options: each has
# its own models, reads every new file, and adds to each scrape of the metrics.
MAX_AUTO_WORKERS = 16
WORKER_MEMORY_BYTES = 512 << 20  # a process with the bundled models and a full queue needs less
# Of the container's control group (v2, v1), as a process inside sees it.
_MEMORY_LIMITS = ("sys/fs/cgroup/memory.max", "sys/fs/cgroup/memory/memory.limit_in_bytes")


def choose_workers(settings: Settings) -> int:
    """Return the number of processes that an option names or, for `auto`, that suits the machine.

    A process computes on one core, so `auto` is one process for each core that this one may use,
    as far as the memory suffices. It is 1 on a GPU, whose memory each process would take a part of,
    and where several processes cannot share a port.
    """
    if settings.workers != "auto":
        return settings.workers
    if sys.platform != "linux" or settings.unix_socket is not None or is_gpu(settings.device):
        return 1
    return max(
        1, min(available_cores(), available_memory() // WORKER_MEMORY_BYTES, MAX_AUTO_WORKERS)
    )


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory that this machine has, or its container may use.

    `root` holds the folder `sys`.
    """
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _MEMORY_LIMITS:
        with suppress(OSError, ValueError):  # missing, or "max"
            limits.append(int((root / name).read_text()))
    return min(limits)
