"""Whether new work is taken, and the proof that the devices still compute what they did."""

import asyncio
import logging
from collections.abc import Callable

import numpy as np

from service.errors import Problem
from service.inference.batcher import Batcher
from service.inference.errors import (
    DeadlineExceeded,
    DeviceLost,
    Draining,
    ForwardFailed,
    Overloaded,
)
from service.inference.repository import Model, ModelRepository
from service.telemetry.metrics import Metrics

log = logging.getLogger("service")


class Readiness:
    """Why new work is not taken, if it is not.

    Attributes:
        draining: whether the service is shutting down.
        fault: what is wrong with a device, in words.
        lost: whether it will stay so.
        on_lost: called when a device is lost, after which only another process may help.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.draining = False
        self.fault: str | None = None
        self.lost = False
        self.on_lost: Callable[[], object] | None = None
        metrics.ready.set(0)

    @property
    def problem(self) -> Problem | None:
        """What a load balancer is told; nothing while new work is taken."""
        if self.draining:
            return Problem(503, "draining", "The service is shutting down.")
        if self.fault is not None:
            return Problem(503, "device-failed", f"The device failed: {self.fault}.")
        return None

    def drain(self) -> None:
        """Turn readiness off, for good."""
        self.draining = True
        self.refresh()

    def find(self, fault: str | None) -> None:
        """Turn readiness off while there is a fault, and on again."""
        if not self.lost:
            self.fault = fault
        self.refresh()

    def lose(self, error: DeviceLost) -> None:
        """Turn readiness off, and let the server end the process."""
        log.critical("the device is lost", extra={"fields": {"cause": str(error)}})
        self._metrics.devices_lost.inc()
        self.find("it is lost")
        self.lost = True
        if self.on_lost is not None:
            self.on_lost()

    def refresh(self) -> None:
        """Write the gauge."""
        self._metrics.ready.set(self.problem is None)


class SelfTest:
    """Makes known images of every model again, on a schedule, and compares them.

    They take the way of every request, so what they prove is the queue and the engine as well.

    Args:
        registry: the models.
        batcher: makes the images, and is told when they are wrong.
        readiness: is off while they cannot be made.
        metrics: count the outcomes.
        every_s: seconds between two proofs.
    """

    def __init__(
        self,
        registry: ModelRepository,
        batcher: Batcher,
        readiness: Readiness,
        metrics: Metrics,
        every_s: float,
    ) -> None:
        self._registry, self._batcher, self._readiness = registry, batcher, readiness
        self._checks, self._every_s = metrics.device_checks, every_s

    async def run(self) -> None:
        """Prove every model again and again, until cancelled."""
        while True:
            await asyncio.sleep(self._every_s)
            faults = [await self.prove(model) for model in list(self._registry)]
            self._readiness.find(next(filter(None, faults), None))

    async def prove(self, model: Model) -> str | None:
        """What is wrong with a model's device, in words."""
        known = model.engine.known
        try:
            made = await self._batcher.submit(
                model.engine, known.seeds, known.indices, known.labels
            )
        except (Draining, Overloaded, DeviceLost):  # it is at work, or known to be at its end
            self._checks.labels("skipped").inc()
            return None
        except (DeadlineExceeded, ForwardFailed):
            self._checks.labels("failed").inc()
            log.exception("known images failed", extra={"fields": {"model": model.name}})
            return f"images of {model.name} that were made before cannot be made now"
        if np.array_equal(made.pixels, known.pixels):
            self._checks.labels("passed").inc()
            return None
        self._checks.labels("wrong").inc()
        self._batcher.fail_all(DeviceLost(f"known images of {model.name} are not what they were"))
        return None
