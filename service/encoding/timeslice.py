"""Runs encoders without blocking the event loop."""

import asyncio
import time
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor

IncrementalEncoder = Generator[None, None, bytes]  # may be interrupted wherever it yields
Encoder = Callable[[], bytes] | IncrementalEncoder

TIME_SLICE_S = 0.0002  # of an incremental encoder, before other work of the event loop has its turn
# Encoding this many blocks the loop for about 0.1 ms (a sheet of 64 images of 28x28 pixels), which
# is less than the way through another thread and back costs.
_INLINE_PIXELS = 1 << 16


class TimeSlicedEncoder:
    """Runs small encoders at once, large ones in time slices or on a thread.

    A large incremental encoder runs on the event loop, one time slice after the other and one
    encoder at a time: on a thread it would hold the interpreter for longer than a slice. Only the
    compression of a large sheet, which is not incremental, releases the interpreter's lock and runs
    on a thread.

    Args:
        threads: for large encoders that are not incremental.
    """

    def __init__(self, threads: int) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="encoder")
        self._encode_lock = asyncio.Lock()

    async def run(self, encoder: Encoder, pixels: int) -> bytes:
        """Return the bytes that an encoder of this many pixels makes."""
        if isinstance(encoder, Generator):
            if pixels <= _INLINE_PIXELS:
                return finish(encoder)
            async with self._encode_lock:
                return await _run_in_slices(encoder)
        if pixels <= _INLINE_PIXELS:
            return encoder()
        return await asyncio.get_running_loop().run_in_executor(self._executor, encoder)

    def close(self) -> None:
        """Wait for the threads to end."""
        self._executor.shutdown()


async def _run_in_slices(encoder: IncrementalEncoder) -> bytes:
    slice_end = 0.0
    while True:
        try:
            next(encoder)
        except StopIteration as end:
            return bytes(end.value)
        if time.perf_counter() >= slice_end:
            await asyncio.sleep(0)
            slice_end = time.perf_counter() + TIME_SLICE_S


def finish(encoder: IncrementalEncoder) -> bytes:
    """Run an incremental encoder to its end."""
    while True:
        try:
            next(encoder)
        except StopIteration as end:
            return bytes(end.value)
