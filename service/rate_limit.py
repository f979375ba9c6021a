"""Rate limits in images a second, one for each API key."""

import math
import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from prometheus_client import Counter
from starlette.types import Scope

from service.errors import Problem, invalid_value

with suppress(ModuleNotFoundError):  # on Windows, where one process serves alone
    import fcntl


class TokenBucket:
    """A token bucket of images, by the generic cell rate algorithm (GCRA; ITU-T I.371, annex A).

    Its state is one number, the theoretical arrival time: the time at which the bucket is full
    again. The workers share it as eight bytes of a file, so the limit holds for the key and not for
    each worker, and no request waits for a database.

    Args:
        rate: images a second.
        burst: images that a full bucket holds.
        rejected: counts the requests over the limit.
        path: a file that the workers share; None for a single process.
        clock: seconds of a monotonic clock that all processes of the machine share.

    Attributes:
        burst: images that a full bucket holds.
    """

    def __init__(
        self,
        rate: float,
        burst: int,
        rejected: Counter,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rate, self.burst, self._rejected, self._clock = rate, burst, rejected, clock
        self._file = None if path is None else os.open(path, os.O_RDWR | os.O_CREAT)
        if self._file is not None:
            os.truncate(self._file, 8)
        self._tat = memoryview(mmap.mmap(-1 if self._file is None else self._file, 8)).cast("d")

    def consume(self, images: int) -> None:
        """Take images out of the bucket.

        Raises:
            Problem: 429 if they are not available yet; 422 if they exceed the burst.
        """
        if images > self.burst:
            message = f"{images} images in all; the limit of this key allows {self.burst} at once"
            raise invalid_value("n", images, message)
        if self._file is None:
            wait_s = self._update(images)
        else:
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                wait_s = self._update(images)
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)
        if wait_s > 0:
            self._rejected.inc()
            seconds = max(1, math.ceil(wait_s))
            raise Problem(
                429,
                "rate-limited",
                f"The limit of this key is {self._rate:g} images a second; retry in {seconds} s.",
                headers={"Retry-After": str(seconds)},
            )

    def _update(self, images: int) -> float:
        """Take images out if they are available; return the seconds until they are."""
        now = self._clock()
        # Not as `max(tat, now) + images / rate - now`, whose rounding would reject a full burst.
        refill_s = max(0.0, self._tat[0] - now) + images / self._rate
        wait_s = refill_s - self.burst / self._rate
        if wait_s <= 0:
            self._tat[0] = now + refill_s
        return wait_s


def consume(scope: Scope, images: int) -> None:
    """Take the images of a request out of the bucket of its key, if it has one.

    Raises:
        Problem: 429 over the limit; 422 for more than the key may have at once.
    """
    bucket = scope["state"].get("token_bucket")
    if bucket is not None:
        bucket.consume(images)


def burst_limit(scope: Scope) -> float:
    """Return how many images the key of a request may have at once."""
    bucket = scope["state"].get("token_bucket")
    return math.inf if bucket is None else bucket.burst
