"""The choice of a training configuration by the budget of a run and its images."""

import dataclasses
import time
from dataclasses import dataclass

import numpy as np

from training.config import TrainingConfig
from training.cuda_graph import make_step
from training.data.named import Dataset
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.gamma_search import DEFAULT_GAMMA
from training.loop import train
from training.settings import TrainSettings
from training.state import create_state, generator_config

# A run of fewer images learns more from many small steps at a high learning rate.
SHORT_IMAGES = 1_500_000
SHORT_BATCH_SIZE, SHORT_LR = 32, 8e-4
# A run of fewer steps gets narrower networks, whose steps are faster.
MIN_STEPS = 2_500
MIN_WIDTH = 8
# Share of a budget of minutes that trains the generator, about.
TRAINING_SHARE = 0.75
# Distortion keeps a discriminator from memorising few images, but short runs with it repeat
# themselves, so it waits for many passes. Without it 37 passes over 5,373 letters did no harm;
# the number below is a guess beyond that.
SMALL_DATASET = 20_000
MANY_PASSES = 150
TIMED_S = 2.0
# Images seen and the coverage of quick evaluations, in runs of 10 and 5 minutes on two CPU cores.
MEASURED = {
    "letters": (
        (12_800, 51_200, 128_000, 243_200, 464_160),
        (0.19, 0.42, 0.57, 0.67, 0.70),
    ),
    "mnist": (
        (12_800, 38_400, 115_200, 192_000, 261_888),
        (0.39, 0.72, 0.77, 0.82, 0.84),
    ),
}


@dataclass(frozen=True)
class Choice:
    """A configuration, and the number of images that a run with it will show, about."""

    config: TrainingConfig
    images: float

    def render(self, dataset: Dataset) -> str:
        """Return one line that says what was chosen, for what, and the quality to expect."""
        config, passes = self.config, self.images / len(dataset.labels)
        width = f", width {config.generator_width}" if config.generator_width else ""
        return (
            f"About {_rounded(self.images)} images, {passes:,.1f} passes: batches of "
            f"{config.batch_size}, learning rate {config.lr:g}{width}"
            f"{', distorted images' if config.augment else ''}. {expect(self.images)}"
        )


def choose(
    config: TrainingConfig,
    settings: TrainSettings,
    dataset: Dataset,
    world: DistributedContext = SINGLE_PROCESS,
) -> Choice:
    """Adapt a configuration to the budget and the images; takes seconds for a budget in minutes.

    Without a preset, a long run is that of the default preset. A short one makes smaller steps, at
    a higher learning rate, and one that would make few of them has narrower networks. Options that
    were given stay.
    """

    def choice(config: TrainingConfig) -> Choice:
        if settings.minutes is None:
            return Choice(config, config.images)
        speed = measure_speed(config, dataset, world, seconds=TIMED_S)
        images = speed * 60.0 * settings.minutes * TRAINING_SHARE
        return Choice(config, world.broadcast(images)[0])  # every process chooses the same

    chosen = choice(config)
    if settings.preset is None and settings.init_from is None:
        if chosen.images < SHORT_IMAGES and SHORT_BATCH_SIZE % world.size == 0:
            short = {"batch_size": SHORT_BATCH_SIZE, "lr": SHORT_LR, **settings.overrides}
            chosen = choice(dataclasses.replace(config, **short))
        while settings.minutes is not None and _makes_few_steps(chosen):
            chosen = choice(_narrowed(chosen.config))
    if settings.augment is None and config.r1_gamma != 0.0:
        augment = _is_memorised(dataset, chosen.images)
        return Choice(dataclasses.replace(chosen.config, augment=augment), chosen.images)
    return chosen


def _is_memorised(dataset: Dataset, images: float) -> bool:
    """Return True if a discriminator would memorise the training images in such a run."""
    count = len(dataset.labels)
    return count < SMALL_DATASET and images > MANY_PASSES * count


def expect(images: float) -> str:
    """Return a sentence with the coverage that runs of a number of images reached."""
    reached = [
        f"{np.interp(images, seen, coverage):.2f} on {name}"
        for name, (seen, coverage) in MEASURED.items()
    ]
    runs = "Such" if images <= max(seen[-1] for seen, _ in MEASURED.values()) else "Shorter"
    return f"{runs} runs reached a coverage of {' and '.join(reached)}"


def measure_speed(
    config: TrainingConfig, dataset: Dataset, world: DistributedContext, *, seconds: float
) -> float:
    """Train a fresh state for some seconds, in every process; return images shown per second."""
    if config.r1_gamma is None:  # the value does not change the time of a step
        config = dataclasses.replace(config, r1_gamma=DEFAULT_GAMMA)
    network = generator_config(config, dataset)
    state = create_state(config, network, dataset.labels.device, 0, world)
    step = make_step(state, dataset)
    for _ in range(config.penalty_interval):  # the first steps are slower
        step(0.0)
    until = time.perf_counter() + seconds
    points = train(state, step, log_every=2**62, stop=lambda: time.perf_counter() > until)
    return next(points).images_per_s


def _makes_few_steps(choice: Choice) -> bool:
    config = choice.config
    return choice.images < MIN_STEPS * config.batch_size and config.generator_width > MIN_WIDTH


def _narrowed(config: TrainingConfig) -> TrainingConfig:
    finest, features = config.discriminator_widths
    return dataclasses.replace(
        config,
        generator_width=max(MIN_WIDTH, config.generator_width // 2),
        discriminator_widths=(max(MIN_WIDTH, finest // 2), features),
    )


def _rounded(images: float) -> str:
    digits = max(0, len(str(int(images))) - 2)
    return f"{round(images / 10**digits) * 10**digits:,}"
