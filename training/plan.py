"""The plan of a training run, which `train --dry-run` prints."""

import dataclasses
import json
import time

from training.cuda_graph import make_step
from training.gamma_search import DEFAULT_GAMMA
from training.loop import train
from training.networks import count_parameters
from training.run import Run

TIMED_S = 5.0  # of training, to estimate its speed


def render_plan(run: Run) -> str:
    """Return the configuration, and the time that a few seconds of training predict."""
    metadata, state = run.metadata, run.state
    shown = {
        **dataclasses.asdict(metadata),
        "out": str(run.folder.path),
        "network": dataclasses.asdict(state.ema.config),
        "generator_parameters": count_parameters(state.generator),
        "discriminator_parameters": count_parameters(state.discriminator),
    }
    return f"{json.dumps(shown, indent=2)}\n{_estimate(run)}"


def _estimate(run: Run) -> str:
    metadata, state = run.metadata, run.state
    if metadata.minutes is not None:
        return f"Estimated time: {metadata.minutes:g} minutes, as given."
    left = state.config.images - state.images_seen
    if left <= 0:
        return "Estimated time: 0 minutes; the run is complete."
    if state.config.r1_gamma is None:  # the value does not change the time of a step
        state.config = dataclasses.replace(state.config, r1_gamma=DEFAULT_GAMMA)
    until = time.monotonic() + TIMED_S
    step = make_step(state, run.dataset)
    points = train(state, step, log_every=2**62, stop=lambda: time.monotonic() > until)
    speed = next(points).images_per_s
    return f"Estimated time: {left / speed / 60:.1f} minutes at {speed:,.0f} images/s."
