"""The time of each part of a training run. A run follows it; `train --dry-run` prints it."""

import dataclasses
import json
from dataclasses import dataclass, field

from training.choice import measure_speed
from training.data.named import Dataset
from training.gamma_search import GAMMAS, SHARE, is_worthwhile
from training.generator_config import GeneratorConfig
from training.loop import measure_progress
from training.networks import build_generator, count_parameters
from training.quality.budget import (
    EVALUATIONS_SHARE,
    MeasuringPlan,
    measure_costs,
    plan_measuring,
)
from training.run import EVALUATIONS, Run

TIMED_S = 5.0  # of training, to estimate its speed

RESERVED_SHARE = 0.02  # of a budget of minutes, for the export and the grids of samples
START_S = 2.0  # of the interpreter and the imports, before the clock of a run starts
# Share of a budget of minutes that trains the generator, even if everything else took too long.
MIN_TRAINING_SHARE = 0.1
MIN_TRAINING_S = 1.0
SHORT_MINUTES = 2.0  # less leaves little time for measurements

# A generator with batch norm generates about this many images for its statistics at the end.
_BATCH_NORM_IMAGES = 50_000


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The time that the parts of a run may take; for a run without a budget, without limits."""

    minutes: float | None = None
    measuring: MeasuringPlan = field(default_factory=MeasuringPlan)
    closing_s: float = 0.0  # of the last evaluation and the export

    def training_s(self, spent_s: float) -> float | None:
        """Return the time for training and the evaluations in it, after a preparation.

        There is always some: a run that is late exceeds its budget instead of failing.
        """
        if self.minutes is None:
            return None
        total_s = 60.0 * self.minutes
        left_s = (1.0 - RESERVED_SHARE) * total_s - self.closing_s - self.measuring.certificate_s
        return max(left_s - spent_s - START_S, MIN_TRAINING_SHARE * total_s, MIN_TRAINING_S)

    def render_excess(self, prepared_s: float, elapsed_s: float) -> str | None:
        """Return a line that says how much longer than its budget a run took, if it did."""
        if self.minutes is None or (excess_s := elapsed_s + prepared_s - 60.0 * self.minutes) < 1:
            return None
        return (
            f"The run took {excess_s / 60:.1f} minutes more than --minutes {self.minutes:g}; "
            f"{prepared_s / 60:.1f} minutes were spent before training"
        )

    def durations_s(self) -> dict[str, float]:
        """Return part -> seconds of a run with a budget."""
        assert self.minutes is not None
        total_s, measuring = 60.0 * self.minutes, self.measuring
        most_s = (EVALUATIONS + 2) * measuring.quick_s
        evaluation_s = min(max(EVALUATIONS_SHARE * total_s, 2 * measuring.quick_s), most_s)
        measured_s = measuring.classifier_s + evaluation_s + measuring.certificate_s
        training_s = max(total_s - measured_s, MIN_TRAINING_SHARE * total_s)
        return _durations_s(measuring, training_s, evaluation_s)

    def render(self, durations_s: dict[str, float]) -> str:
        """Return the durations of the parts and the size of the certificate as lines of text."""
        notes = {"certificate": f": {self.measuring.size}" if self.measuring.size else ""}
        lines = [
            f"  {part:<12} {seconds / 60:7.1f} minutes{notes.get(part, '')}"
            for part, seconds in durations_s.items()
        ]
        total = sum(durations_s.values()) / 60
        given = "" if self.minutes is None else f" of the {self.minutes:g} given"
        if self.minutes is not None and self.minutes < SHORT_MINUTES:
            lines.append(f"  Measurements are rough in less than {SHORT_MINUTES:g} minutes.")
        return "\n".join([f"Estimated time: {total:.1f} minutes{given}", *lines])


def plan_run(
    network: GeneratorConfig,
    train_set: Dataset,
    test_set: Dataset,
    *,
    minutes: float | None,
    certified: bool,
) -> RunPlan:
    """Plan a run of minutes, or estimate the measurements of a run of images; takes seconds."""
    generator = build_generator(network).to(train_set.labels.device).eval()
    costs = measure_costs(train_set, test_set, generator, certified=certified)
    measuring = plan_measuring(costs, train_set, test_set, minutes=minutes, certified=certified)
    normalised = network.kind == "mlp"  # the only generator with batch norm
    closing_s = measuring.quick_s + (_BATCH_NORM_IMAGES * costs.generate_s if normalised else 0.0)
    return RunPlan(minutes=minutes, measuring=measuring, closing_s=closing_s)


def render_plan(run: Run, plan: RunPlan) -> str:
    """Return the configuration of a dry run and its plan.

    Without a budget of minutes, a few seconds of training predict the time.
    """
    metadata, state = run.metadata, run.state
    shown = {
        **dataclasses.asdict(metadata),
        "out": str(run.folder.path),
        "network": dataclasses.asdict(state.ema.config),
        "generator_parameters": count_parameters(state.generator),
        "discriminator_parameters": count_parameters(state.discriminator),
    }
    return f"{json.dumps(shown, indent=2)}\n{_render_time(run, plan)}"


def _render_time(run: Run, plan: RunPlan) -> str:
    config = run.state.config
    if measure_progress(run.state) >= 1.0:
        return "Estimated time: 0 minutes; the run is complete"
    if plan.minutes is not None:
        return plan.render(plan.durations_s())
    left = config.images - run.state.images_seen
    speed = measure_speed(config, run.dataset, run.state.world, seconds=TIMED_S)
    if config.r1_gamma is None and is_worthwhile(config, None):
        left += round(SHARE * (len(GAMMAS) - 1) * config.images)
    evaluation_s = EVALUATIONS * plan.measuring.quick_s
    text = plan.render(_durations_s(plan.measuring, left / speed, evaluation_s))
    return f"{text}\n  The generator trains on {speed:,.0f} images/s."


def _durations_s(
    measuring: MeasuringPlan, training_s: float, evaluation_s: float
) -> dict[str, float]:
    return {
        "classifier": measuring.classifier_s,
        "training": training_s,
        "evaluation": evaluation_s,
        "certificate": measuring.certificate_s,
    }
