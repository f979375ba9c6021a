"""A run that goes on from a checkpoint is the run that was never stopped."""

import hashlib
import pickle
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import tiny_training as tiny
from tests.support.malicious_files import Payload, torch_saved
from tests.support.processes import run
from training.checkpoint import (
    CheckpointError,
    RunMetadata,
    read_checkpoint,
    save_checkpoint,
)
from training.config import TrainingConfig
from training.loop import recompute_batch_norm
from training.state import TrainState, create_state

pytestmark = pytest.mark.usefixtures("one_thread")

METADATA = RunMetadata(
    dataset="tiny", dataset_digest="ab12", preset="mlp", seed=3, config=tiny.CONFIG, minutes=None
)

BEST = {"metrics": {"coverage": 0.25}, "contents": {"ema": {"weight": torch.arange(3.0)}}}


def everything(state: TrainState) -> dict[str, Any]:
    """All that a state holds, flat: a name for every tensor and number."""
    flat: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, each in value.items():
                add(f"{name}.{key}", each)
        elif isinstance(value, list):
            add(name, dict(enumerate(value)))
        else:
            flat[name] = value

    for part in (
        *("generator", "discriminator", "ema"),
        *("generator_optimizer", "discriminator_optimizer"),
    ):
        add(part, getattr(state, part).state_dict())
    return {
        **flat,
        "rng": state.rng.get_state(),
        "images_seen": state.images_seen,
        "lr_scale": state.lr_scale,
    }


def differing(one: TrainState, two: TrainState) -> list[str]:
    first, second = everything(one), everything(two)
    assert first.keys() == second.keys()
    return [
        name
        for name, value in first.items()
        if not (
            torch.equal(value, second[name]) if isinstance(value, Tensor) else value == second[name]
        )
    ]


def saved(path: Path, count: int = 3, config: TrainingConfig = tiny.CONFIG) -> TrainState:
    """A state after some steps, and its checkpoint."""
    state = tiny.state(config, seed=3)
    tiny.steps(state, count)
    save_checkpoint(path, state, replace(METADATA, config=config), BEST)
    return state


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value).removeprefix(f"{path}: ")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# Going on


@pytest.mark.parametrize(
    "config",
    [
        tiny.CONFIG,
        tiny.PAPER,
        tiny.CONV,
        replace(tiny.CONFIG, flip=True, augment=True),
        replace(tiny.CONV, flip=True, augment=True),
    ],
    ids=["mlp", "paper", "conv", "mlp distorted", "conv distorted"],
)
def test_a_resumed_run_is_bit_for_bit_the_uninterrupted_one(
    tmp_path: Path, config: TrainingConfig
) -> None:
    whole = tiny.state(config, seed=3)
    tiny.steps(whole, 12)

    saved(tmp_path / "c.pt", 5, config)
    checkpoint = read_checkpoint(tmp_path / "c.pt")
    resumed = tiny.state(config, seed=77)  # all that it has of its own must be replaced
    checkpoint.restore(resumed)
    tiny.steps(resumed, 7)

    assert resumed.images_seen == 12 * config.batch_size
    assert differing(resumed, whole) == []


def test_a_run_that_forgot_its_random_state_would_be_another_one(tmp_path: Path) -> None:
    """The comparison above sees it."""
    state = saved(tmp_path / "c.pt")
    checkpoint = read_checkpoint(tmp_path / "c.pt")
    forgetful = tiny.state()
    checkpoint.restore(forgetful)
    assert differing(forgetful, state) == []
    forgetful.rng.manual_seed(3)
    assert differing(forgetful, state) == ["rng"]
    tiny.steps(forgetful, 1)
    tiny.steps(state, 1)
    assert "generator.main.0.weight" in differing(forgetful, state)


def test_pictures_of_the_average_between_steps_change_nothing_that_is_trained(
    tmp_path: Path,
) -> None:
    whole = tiny.state()
    tiny.steps(whole, 8)
    sampled = tiny.state()
    tiny.steps(sampled, 4)
    recompute_batch_norm(sampled.ema, batches=2)
    tiny.steps(sampled, 4)
    assert all(
        name.startswith("ema.") and ("running" in name or "num_batches" in name)
        for name in differing(sampled, whole)
    )


def test_a_checkpoint_says_whose_it_is_and_how_far_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metadata = replace(METADATA, minutes=2.5, gamma_scores={"0.2": 0.5, "1": 0.75})
    state = tiny.state()
    tiny.steps(state, 2)
    monkeypatch.setattr(time, "perf_counter", lambda: state.started_at + 12.5)
    save_checkpoint(tmp_path / "c.pt", state, metadata, BEST)
    monkeypatch.setattr(time, "perf_counter", lambda: 7000.0)  # of a later process

    checkpoint = read_checkpoint(tmp_path / "c.pt")
    fresh = tiny.state()
    checkpoint.restore(fresh)

    assert checkpoint.metadata == metadata
    assert fresh.images_seen == 32
    assert fresh.elapsed_s == pytest.approx(12.5)
    assert checkpoint.best is not None
    assert checkpoint.best["metrics"] == BEST["metrics"]
    assert torch.equal(checkpoint.best["contents"]["ema"]["weight"], torch.arange(3.0))


def test_a_rate_that_was_scaled_down_survives(tmp_path: Path) -> None:
    state = tiny.state()
    state.lr_scale = 0.25
    save_checkpoint(tmp_path / "c.pt", state, METADATA, None)
    checkpoint, fresh = read_checkpoint(tmp_path / "c.pt"), tiny.state()
    checkpoint.restore(fresh)
    assert checkpoint.best is None
    assert fresh.lr_scale == 0.25
    tiny.steps(fresh, 1)
    assert fresh.generator_optimizer.param_groups[0]["lr"] == 0.25 * tiny.CONFIG.lr


def test_a_checkpoint_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    state = saved(tmp_path / "c.pt")
    metadata = asdict(METADATA)
    config = metadata.pop("config")
    for old, new in (
        ("penalty", "r1_gamma"),
        ("mismatch", "mismatch_weight"),
        ("discriminator_hidden", "discriminator_widths"),
    ):
        config[old] = config.pop(new)
    metadata |= {"config": config, "probe": {"1": 0.5}, "began_with": {"seed": 4}}
    del metadata["gamma_scores"], metadata["initialised_from"]
    best = {"glance": {"coverage": 0.25}, "contents": {}, "last_look": 3}
    contents = {"identity": metadata, "state": state.state_dict(), "best": best}
    (tmp_path / "c.pt").write_bytes(with_header(torch_saved(contents)))

    checkpoint = read_checkpoint(tmp_path / "c.pt")

    assert checkpoint.metadata == replace(
        METADATA, gamma_scores={"1": 0.5}, initialised_from={"seed": 4}
    )
    assert checkpoint.best == {
        "metrics": {"coverage": 0.25},
        "contents": {},
        "last_evaluation": 3,
    }
    fresh = tiny.state()
    checkpoint.restore(fresh)
    assert differing(fresh, state) == []


@pytest.mark.gpu
@pytest.mark.parametrize("config", [tiny.CONFIG, tiny.CONV], ids=["mlp", "conv"])
def test_a_resumed_state_lies_on_the_gpu_entirely(tmp_path: Path, config: TrainingConfig) -> None:
    """A learning rate left on the host could not be read by a captured step."""
    device = torch.device("cuda")
    network = tiny.CONV_NETWORK if config.generator == "conv" else tiny.NETWORK
    state, fresh = (create_state(config, network, device, seed) for seed in (0, 1))
    tiny.steps(state, 3, tiny.dataset().to(device))
    save_checkpoint(tmp_path / "c.pt", state, replace(METADATA, config=config), None)
    read_checkpoint(tmp_path / "c.pt").restore(fresh)
    assert differing(fresh, state) == []
    places = {
        name: value.device.type
        for name, value in everything(fresh).items()
        if isinstance(value, Tensor) and name != "rng"
    }
    assert "generator_optimizer.param_groups.0.lr" in places
    assert set(places.values()) == {"cuda"}


def test_the_next_checkpoint_replaces_the_one_before(tmp_path: Path) -> None:
    state = saved(tmp_path / "c.pt")
    tiny.steps(state, 1)
    save_checkpoint(tmp_path / "c.pt", state, METADATA, None)

    checkpoint = read_checkpoint(tmp_path / "c.pt")
    assert checkpoint.state["images_seen"] == 64
    assert names_in(tmp_path) == ["c.pt"]


# Refusals


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "c.pt") == "does not exist; give the folder of an earlier run"


def test_a_folder_in_its_place_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path) == "cannot be read: Is a directory"


@pytest.mark.parametrize("kept", [0, 1, 20, 27, 40, 59, 60, 1000, -1])
def test_a_checkpoint_cut_short_is_refused(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "c.pt"
    saved(path)
    path.write_bytes(path.read_bytes()[:kept])
    message = refusal(path)
    assert ("damaged" in message) if kept >= 27 or kept < 0 else ("not a checkpoint" in message)


def test_one_wrong_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "c.pt"
    saved(path)
    whole = path.read_bytes()
    for position in range(0, len(whole), len(whole) // 60):
        wrong = bytearray(whole)
        wrong[position] ^= 1 << position % 8
        path.write_bytes(wrong)
        assert refusal(path).startswith(("damaged", "not a checkpoint"))


def with_header(payload: bytes) -> bytes:
    """Sign a payload as the code does; the author of a hostile file can do so too."""
    start = b"cgan checkpoint, version 3\n"
    return start + hashlib.sha256(payload).digest() + payload


@pytest.mark.parametrize("save", [lambda it: pickle.dumps(it, protocol=2), torch_saved])
@pytest.mark.parametrize("wrap", [bytes, with_header], ids=["bare", "signed"])
def test_a_file_with_a_payload_is_refused_and_nothing_in_it_is_executed(
    tmp_path: Path, save: Any, wrap: Any
) -> None:
    path, trace = tmp_path / "c.pt", tmp_path / "trace"
    saved(tmp_path / "good.pt")
    hostile = save({"identity": Payload(trace)})
    pickle.loads(pickle.dumps(Payload(trace)))  # the payload works
    trace.rmdir()
    path.write_bytes(wrap(hostile))

    assert "not a checkpoint" in refusal(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "contents",
    [[1, 2], {}, {"identity": 5}, {"identity": {}}, {"identity": {"config": {"lr": 1.0}}}],
    ids=str,
)
def test_a_file_of_another_version_is_refused(tmp_path: Path, contents: object) -> None:
    path = tmp_path / "c.pt"
    path.write_bytes(with_header(torch_saved(contents)))
    assert refusal(path) == "incompatible version; start a new run"


@pytest.mark.parametrize(
    "other",
    [
        replace(tiny.CONFIG, discriminator_widths=(32, 17)),
        replace(tiny.CONFIG, discriminator_widths=(32, 16, 8)),
        replace(tiny.CONFIG, discriminator="conv", discriminator_widths=(4, 8)),
    ],
)
def test_a_state_of_another_configuration_is_refused(tmp_path: Path, other: TrainingConfig) -> None:
    saved(tmp_path / "c.pt")
    checkpoint = read_checkpoint(tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt: incompatible configuration: .") as caught:
        checkpoint.restore(tiny.state(other))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["ema", "generator_optimizer", "rng", "elapsed_s", "lr_scale"])
def test_contents_that_miss_a_part_are_refused(tmp_path: Path, part: str) -> None:
    saved(tmp_path / "c.pt")
    checkpoint = read_checkpoint(tmp_path / "c.pt")
    del checkpoint.state[part]
    with pytest.raises(CheckpointError, match=part):
        checkpoint.restore(tiny.state())


# A full disk

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from dataclasses import replace
from tests.support import tiny_training as tiny
from tests.training.test_checkpoint import METADATA
from training.checkpoint import CheckpointError, save_checkpoint

path = Path(sys.argv[1])
state = tiny.state()
if sys.argv[2] == "again":
    save_checkpoint(path, state, METADATA, None)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
state.images_seen = 16
try:
    save_checkpoint(path, state, METADATA, None)
except CheckpointError as error:
    print(error)
"""


@pytest.mark.parametrize("occasion", ["first", "again"])
def test_where_a_checkpoint_cannot_be_written_the_one_before_survives(
    tmp_path: Path, occasion: str
) -> None:
    path = tmp_path / "run" / "c.pt"
    ended = run("-c", FULL_DISK, str(path), occasion)
    assert ended.returncode == 0, ended.stderr

    message = f"{path}: cannot be written: File too large"
    if occasion == "first":
        assert ended.stdout.strip() == message
        assert names_in(path.parent) == []
    else:
        assert ended.stdout.strip() == f"{message}; the previous checkpoint is intact"
        assert names_in(path.parent) == ["c.pt"]
        checkpoint = read_checkpoint(path)
        assert checkpoint.state["images_seen"] == 0
