"""The plan of a training run, which `train --dry-run` prints."""

import dataclasses
import json
import time

from training.cuda_graph import make_step
from training.gamma_search import DEFAULT_GAMMA, GAMMAS, SHARE, is_worthwhile
from training.loop import train
from training.networks import count_parameters
from training.quality.evaluator import Overhead, render_durations
from training.run import EVALUATIONS, Run

TIMED_S = 5.0  # of training, to estimate its speed


def render_plan(run: Run, overhead: Overhead) -> str:
    """Return the configuration, and the time that a few seconds of training predict."""
    metadata, state = run.metadata, run.state
    shown = {
        **dataclasses.asdict(metadata),
        "out": str(run.folder.path),
        "network": dataclasses.asdict(state.ema.config),
        "generator_parameters": count_parameters(state.generator),
        "discriminator_parameters": count_parameters(state.discriminator),
    }
    return f"{json.dumps(shown, indent=2)}\nEstimated time: {_estimate(run, overhead)}."


def _estimate(run: Run, overhead: Overhead) -> str:
    minutes, state = run.metadata.minutes, run.state
    if minutes is not None:
        durations_s = overhead.durations_s(minutes)
        rest_s = 60.0 * minutes - sum(durations_s.values())
        shown = render_durations({**durations_s, "the training of the generator": rest_s})
        return f"{minutes:g} minutes, as given: {shown}"
    left = state.config.images - state.images_seen
    if left <= 0:
        return "0 minutes; the run is complete"
    speed = _speed(run)
    if state.config.r1_gamma is None and is_worthwhile(state.config, None):
        left += round(SHARE * (len(GAMMAS) - 1) * state.config.images)
    durations_s = overhead.durations_s(None, EVALUATIONS)
    durations_s[f"the training of the generator at {speed:,.0f} images/s"] = left / speed
    return f"{sum(durations_s.values()) / 60:.1f} minutes: {render_durations(durations_s)}"


def _speed(run: Run) -> float:
    """Train for a few seconds; return the images shown per second."""
    config = run.state.config
    if config.r1_gamma is None:  # the value does not change the time of a step
        run.state.config = dataclasses.replace(config, r1_gamma=DEFAULT_GAMMA)
    until = time.monotonic() + TIMED_S
    step = make_step(run.state, run.dataset)
    points = train(run.state, step, log_every=2**62, stop=lambda: time.monotonic() > until)
    speed = next(points).images_per_s
    run.state.config = config
    return speed
