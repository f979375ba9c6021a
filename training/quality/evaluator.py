"""What a run asks of the judge: a look every so often, and the certificate at the end."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pooch  # type: ignore[import-untyped]

from training.data.named import Dataset
from training.networks import Generator
from training.quality.certificate import (
    Certificate,
    certify,
    estimate_certification_s,
)
from training.quality.classifier import FeatureClassifier, judge_for
from training.quality.quick_metrics import QuickMetrics, Reference, glance, make_reference

# Time for the export and a picture, and for what an estimate may be wrong by.
RESERVED_SHARE = 0.02
CERTIFICATION_MARGIN = 1.25
# Of a run's minutes, for a judge where there is none yet.
JUDGE_SHARE = 0.2
# What is left for training must be worth the name.
MIN_TRAINING_SHARE = 0.1


def default_cache() -> Path:
    """Where the judges of people's own data sets are kept."""
    return Path(pooch.os_cache("cgan-service"))


@dataclass(frozen=True)
class Evaluator:
    """A judge, with the images that it compares with; they lie on one device.

    Attributes:
        judge: trained on the real training images.
        train: the training images.
        test: the images that a run never sees.
        reference: the training images that looks compare with.
    """

    judge: FeatureClassifier
    train: Dataset
    test: Dataset
    reference: Reference

    @classmethod
    def prepare(
        cls,
        train: Dataset,
        test: Dataset,
        report: Callable[[str], None],
        *,
        minutes: float | None = None,
    ) -> "Evaluator":
        """Find the judge of a data set, or train one.

        Args:
            train: the training images.
            test: the images that a run never sees.
            report: told what takes time.
            minutes: the budget of a run, of which training a judge takes a small share.
        """
        seconds = None if minutes is None else 60.0 * minutes * JUDGE_SHARE
        judge = judge_for(train, test, cache=default_cache(), report=report, seconds=seconds)
        return cls(judge, train, test, make_reference(judge, train))

    def look(self, generator: Generator) -> QuickMetrics:
        """Measure a generator lightly."""
        return glance(generator, self.judge, self.reference)

    def certify(self, generator: Generator, report: Callable[[str], None]) -> Certificate:
        """Measure a generator in full; `report` is told how far it is."""
        return certify(generator, self.judge, train=self.train, test=self.test, report=report)

    def seconds_for_training(
        self, minutes: float, generator: Generator, *, certified: bool
    ) -> float:
        """What a budget of minutes leaves for training.

        Raises:
            ValueError: certification alone takes nearly as long, or longer.
        """
        began = time.perf_counter()
        self.look(generator)  # as a run does once more when its time is over
        look_s = time.perf_counter() - began
        seconds = 60.0 * minutes * (1.0 - RESERVED_SHARE) - look_s
        if not certified:
            return seconds
        reserved = CERTIFICATION_MARGIN * estimate_certification_s(
            generator, self.judge, train=self.train, test=self.test
        )
        if seconds - reserved < MIN_TRAINING_SHARE * seconds:
            enough = (reserved / (1.0 - MIN_TRAINING_SHARE) + look_s) / (1.0 - RESERVED_SHARE) / 60
            raise ValueError(
                f"minutes: {minutes:g} are too few, because measuring the generator takes about "
                f"{reserved / 60:.1f} of them here; allowed with --certify is "
                f"{math.ceil(10 * enough) / 10:.1f} or more"
            )
        return seconds - reserved
