"""Garbage collection of a process that serves."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

# Net allocations that start a collection of the youngest generation. Python's default of 700 would
# look several times through thousands of requests that are admitted together, and hardly any
# garbage of this service is in cycles.
GC_THRESHOLD = 50_000


@contextmanager
def loading() -> Iterator[None]:
    """Pause garbage collection while modules and models are loaded, and exempt them from it later.

    Loading makes hardly any garbage and many objects, which every full collection would visit
    while requests wait.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD, *gc.get_threshold()[1:])
        gc.enable()
