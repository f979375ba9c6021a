"""Configurations that a run takes from its budget and its images."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import tiny_training as tiny
from training import choice
from training.choice import (
    MANY_PASSES,
    MIN_STEPS,
    MIN_WIDTH,
    SHORT_BATCH_SIZE,
    SHORT_IMAGES,
    SHORT_LR,
    choose,
    expect,
    measure_speed,
)
from training.config import PRESETS, TrainingConfig
from training.data.named import Dataset
from training.distributed import SINGLE_PROCESS, DistributedContext
from training.settings import TrainSettings

CONV = PRESETS["conv"]
DATA = tiny.dataset()


def many_images() -> Dataset:
    return replace(DATA, labels=torch.zeros(60_000, dtype=torch.int64))


def chosen(config: TrainingConfig = CONV, data: Dataset = DATA, **options: Any) -> TrainingConfig:
    settings = TrainSettings(dataset="mnist", **options)
    return choose(replace(config, **settings.overrides), settings, data).config


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Images per second at width 16, which are twice as many at half the width."""
    speeds = [1000.0]

    def measure(config: TrainingConfig, *_given: Any, **_options: Any) -> float:
        return speeds[0] * 16 / config.generator_width

    monkeypatch.setattr(choice, "measure_speed", measure)
    return speeds


@pytest.mark.parametrize("options", [{}, {"images": SHORT_IMAGES}, {"minutes": 60.0}])
def test_a_long_run_has_the_batches_of_the_preset(
    options: dict[str, Any], speed: list[float]
) -> None:
    config = chosen(data=many_images(), **options)
    assert config == replace(CONV, images=options.get("images", CONV.images))


@pytest.mark.parametrize("options", [{"images": SHORT_IMAGES - 1}, {"minutes": 10.0}])
def test_a_short_run_makes_more_and_smaller_steps_at_a_higher_rate(
    options: dict[str, Any], speed: list[float]
) -> None:
    config = chosen(**options)
    assert (config.batch_size, config.lr) == (SHORT_BATCH_SIZE, SHORT_LR)
    assert config.batch_size < CONV.batch_size
    assert config.lr > CONV.lr
    assert config.generator_width == CONV.generator_width


def test_a_run_of_few_steps_has_networks_of_half_the_width(speed: list[float]) -> None:
    speed[0] = 0.9 * MIN_STEPS * SHORT_BATCH_SIZE / (600 * choice.TRAINING_SHARE)
    config = chosen(minutes=10.0)
    assert config.generator_width == CONV.generator_width // 2
    assert config.discriminator_widths == (
        CONV.discriminator_widths[0] // 2,
        CONV.discriminator_widths[1],
    )


def test_networks_are_narrowed_no_further_than_the_least_width(speed: list[float]) -> None:
    speed[0] = 0.01
    config = chosen(minutes=2.0)
    assert config.generator_width == MIN_WIDTH
    assert config.discriminator_widths[0] >= MIN_WIDTH


@pytest.mark.parametrize(
    "options", [{"preset": "conv"}, {"preset": "mlp"}, {"init_from": Path("run")}]
)
def test_what_was_asked_for_by_name_is_not_adapted(
    options: dict[str, Any], speed: list[float]
) -> None:
    preset = PRESETS[options.get("preset", "conv")]
    config = chosen(replace(preset, generator_width=16), minutes=1.0, **options)
    assert replace(config, augment=False) == replace(preset, generator_width=16)


def test_options_that_were_given_stay(speed: list[float]) -> None:
    config = chosen(minutes=10.0, batch_size=48, mismatch_weight=0.3, precision="float32")
    given = (config.batch_size, config.mismatch_weight, config.precision)
    assert given == (48, 0.3, "float32")


@pytest.mark.parametrize(
    ("data", "images", "distorted"),
    [
        (DATA, MANY_PASSES * len(DATA.labels) + 1, True),
        (DATA, MANY_PASSES * len(DATA.labels), False),
        (many_images(), 100 * 60_000, False),
    ],
    ids=["few, often", "few, seldom", "many"],
)
def test_images_are_distorted_if_few_are_shown_often(
    data: Dataset, images: int, distorted: bool
) -> None:
    assert chosen(data=data, images=images).augment is distorted
    assert chosen(data=data, images=images, augment=not distorted).augment is not distorted


def test_without_a_penalty_nothing_is_distorted() -> None:
    assert not chosen(PRESETS["paper"], preset="paper", images=10**9).augment


def test_every_process_chooses_what_the_first_one_measured(speed: list[float]) -> None:
    class Second(DistributedContext):
        def broadcast(self, *values: float) -> list[float]:
            assert values != (300_000.0,)  # its own measurement is another
            return [300_000.0]

    settings = TrainSettings(dataset="mnist", minutes=10.0)
    found = choose(CONV, settings, DATA, Second(rank=1, size=2))
    assert (found.images, found.config.batch_size) == (300_000.0, SHORT_BATCH_SIZE)


def test_a_speed_is_measured_and_leaves_the_random_numbers_alone() -> None:
    before = torch.get_rng_state()
    assert measure_speed(replace(tiny.CONV, r1_gamma=None), DATA, SINGLE_PROCESS, seconds=0.01) > 0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_line_names_what_was_chosen(speed: list[float]) -> None:
    settings = TrainSettings(dataset="mnist", minutes=10.0)
    assert choose(CONV, settings, DATA).render(DATA) == (
        "About 450,000 images, 1,757.8 passes: batches of 32, learning rate 0.0008, width 16, "
        "distorted images. Such runs reached a coverage of 0.70 on letters and 0.84 on mnist"
    )


@pytest.mark.parametrize(
    ("images", "sentence"),
    [
        (0, "Such runs reached a coverage of 0.19 on letters and 0.39 on mnist"),
        (51_200, "Such runs reached a coverage of 0.42 on letters and 0.73 on mnist"),
        (4_000_000, "Shorter runs reached a coverage of 0.70 on letters and 0.84 on mnist"),
    ],
)
def test_the_line_says_what_runs_of_as_many_images_reached(images: int, sentence: str) -> None:
    assert expect(images) == sentence
