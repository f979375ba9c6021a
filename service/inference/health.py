"""Readiness, and the scheduled self-test of the devices."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from prometheus_client import Counter

from service.errors import Problem
from service.inference import errors
from service.inference.batcher import Batcher
from service.inference.repository import Model, ModelRepository
from service.telemetry.metrics import Metrics

log = logging.getLogger("service")


@dataclass(eq=False)
class Readiness:
    """State that decides if the service takes new work."""

    metrics: Metrics
    draining: bool = False  # while the service shuts down
    fault: str | None = None  # description of a device's fault
    lost: bool = False  # the fault is permanent
    # Called when a device is lost; only a new process can help then.
    on_device_lost: Callable[[], object] | None = None

    @property
    def problem(self) -> Problem | None:
        """The reason why the service takes no new work; None while it does."""
        if self.draining:
            return Problem(503, "draining", "The service is shutting down.")
        if self.fault is not None:
            return Problem(503, "device-failed", f"The device failed: {self.fault}.")
        return None

    def check(self) -> None:
        """Answer the readiness probe.

        Raises:
            Problem: 503, the service takes no new work.
        """
        if self.problem is not None:
            raise self.problem

    def drain(self) -> None:
        """Turn readiness off permanently."""
        self.draining = True

    def set_fault(self, fault: str | None) -> None:
        """Turn readiness off while there is a fault, and on again with None."""
        if not self.lost:
            self.fault = fault

    def lose(self, error: errors.DeviceLost) -> None:
        """Turn readiness off permanently, and let the server end the process."""
        log.critical("the device is lost", extra={"fields": {"cause": str(error)}})
        self.metrics.devices_lost.inc()
        self.set_fault("it is lost")
        self.lost = True
        if self.on_device_lost is not None:
            self.on_device_lost()


async def run_self_tests(
    repository: ModelRepository,
    batcher: Batcher,
    readiness: Readiness,
    metrics: Metrics,
    interval_s: float,
) -> None:
    """Test every model repeatedly, until cancelled: generate its reference images and compare them.

    The images take the path of every request, so this tests the queue and the engine as well. The
    service is not ready while they cannot be generated. Wrong images fail all requests.
    """
    while True:
        await asyncio.sleep(interval_s)
        faults = [await _test(model, batcher, metrics.device_checks) for model in list(repository)]
        readiness.set_fault(next(filter(None, faults), None))


async def _test(model: Model, batcher: Batcher, outcomes: Counter) -> str | None:
    """Test one model; return a description of its device's fault."""
    reference = model.engine.reference
    try:
        rows = reference.seeds, reference.indices, reference.labels
        result = await batcher.wait(batcher.admit(model.engine, *rows))
    except (errors.Draining, errors.Overloaded, errors.DeviceLost):
        # The device works, or its end is known.
        outcomes.labels("skipped").inc()
        return None
    except (errors.DeadlineExceeded, errors.ForwardFailed):
        outcomes.labels("failed").inc()
        log.exception("the self-test failed", extra={"fields": {"model": model.name}})
        return f"the reference images of {model.name} cannot be generated"
    if np.array_equal(result.pixels, reference.pixels):
        outcomes.labels("passed").inc()
        return None
    outcomes.labels("wrong").inc()
    batcher.fail_all(errors.DeviceLost(f"the reference images of {model.name} are wrong"))
    return None
