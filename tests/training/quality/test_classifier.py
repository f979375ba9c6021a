"""Feature classifiers: the bundled ones, and the ones of other data sets."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import tiny_training as tiny
from training.data.named import load_dataset
from training.quality import classifier as module
from training.quality.classifier import (
    DIGESTS,
    FOLDER,
    ClassifierError,
    ClassifierNetwork,
    FeatureClassifier,
    fit,
    get_classifier,
    load_bundled_classifier,
    plan_epochs,
    random_affine,
    save_classifier,
    to_images,
    train_classifier,
)

DATA = tiny.dataset()


@pytest.fixture(scope="module")
def network(one_thread: None) -> ClassifierNetwork:
    return train_classifier(DATA, epochs=12, seed=0)


# The bundled ones


def test_the_bundled_classifier_knows_real_digits(mnist_dir: Path) -> None:
    test = load_dataset("mnist", "test", mnist_dir, mirrors=())
    classifier = load_bundled_classifier(test)
    assert classifier.accuracy(test) >= 0.994
    assert not any(p.requires_grad for p in classifier.network.parameters())


def test_every_bundled_classifier_is_the_committed_one() -> None:
    assert {path.stem for path in FOLDER.glob("*")} == set(DIGESTS)
    shape = torch.zeros((1, 1, 28, 28), dtype=torch.uint8)
    names = tuple(str(digit) for digit in range(10))
    for name, digest in DIGESTS.items():
        classifier = load_bundled_classifier(
            replace(DATA, name=name, images=shape, class_names=names)
        )
        assert classifier.digest == digest
        assert classifier.network.out.out_features == 10


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist.safetensors"
    shutil.copy(FOLDER / path.name, path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")

    with pytest.raises(ClassifierError, match=r"SHA-256 is [0-9a-f]{64}, but that of") as caught:
        load_bundled_classifier(replace(DATA, name="mnist"), tmp_path)

    assert str(caught.value).startswith(f"{path}: ")
    assert DIGESTS["mnist"] in str(caught.value)


def test_a_data_set_without_a_bundled_classifier_is_named() -> None:
    with pytest.raises(
        ClassifierError, match=r"tiny\.safetensors: no classifier of the data set 'tiny'"
    ):
        load_bundled_classifier(DATA)


def test_a_classifier_that_was_not_committed_is_refused(
    tmp_path: Path, network: ClassifierNetwork
) -> None:
    save_classifier(tmp_path / "tiny.safetensors", network, dataset="tiny", epochs=3, seed=0)
    with pytest.raises(ClassifierError, match="but that of the committed classifier is None"):
        load_bundled_classifier(DATA, tmp_path)


# Training one


def test_a_classifier_learns_what_is_easy_to_tell_apart(network: ClassifierNetwork) -> None:
    assert FeatureClassifier(network, "").accuracy(tiny.dataset(seed=1)) > 0.95


def test_its_accuracy_is_the_share_of_right_answers(network: ClassifierNetwork) -> None:
    classifier = FeatureClassifier(network, "")
    predictions, features = classifier.classify(DATA.images)
    assert classifier.accuracy(replace(DATA, labels=predictions)) == 1.0
    assert classifier.accuracy(replace(DATA, labels=1 - predictions)) == 0.0
    quarter = predictions.clone()
    quarter[:192] = 1 - quarter[:192]
    assert classifier.accuracy(replace(DATA, labels=quarter)) == 0.25
    assert features.shape == (256, 96)


def test_predictions_and_features_do_not_depend_on_the_batches(network: ClassifierNetwork) -> None:
    classifier = FeatureClassifier(network, "")
    predictions, features = classifier.classify(DATA.images)
    for batch_size in (7, 64):
        same, near = classifier.classify(DATA.images, batch_size=batch_size)
        assert torch.equal(predictions, same)
        torch.testing.assert_close(near, features, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("one_thread")
def test_a_seed_decides_the_classifier_and_the_global_random_state_is_left_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "training")
    torch.manual_seed(4)
    before = torch.get_rng_state()
    first, again, other = (
        train_classifier(DATA, epochs=1, seed=seed).out.weight for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    losses = caplog.messages
    assert all(line.startswith("epoch 1 of 1: loss ") for line in losses)
    assert losses[0] == losses[1] != losses[2]


def test_a_classifier_is_read_back_from_its_file(
    tmp_path: Path, network: ClassifierNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = save_classifier(
        tmp_path / "tiny.safetensors", network, dataset="tiny", epochs=3, seed=0
    )
    monkeypatch.setattr(module, "DIGESTS", {"tiny": digest})

    classifier = load_bundled_classifier(DATA, tmp_path)

    assert classifier.digest == digest
    assert classifier.network.out.weight.dtype == torch.float32
    kept, halved = (
        FeatureClassifier(network, "").classify(DATA.images),
        classifier.classify(DATA.images),
    )
    assert torch.equal(kept[0], halved[0])
    torch.testing.assert_close(halved[1], kept[1], rtol=0.02, atol=0.02)  # half-precision weights


def test_pixels_become_images_in_the_value_range() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_images(pixels).tolist() == pytest.approx([-1.0, -0.6, 1.0])


def test_augmentation_moves_images_a_little_and_each_its_own_way() -> None:
    images = to_images(DATA.images[:1]).repeat(8, 1, 1, 1)
    moved = random_affine(images, torch.Generator().manual_seed(0))

    assert moved.shape == images.shape
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 8
    halves = [(image[..., :4].mean() - image[..., 4:].mean()).item() for image in moved]
    original = (images[0, ..., :4].mean() - images[0, ..., 4:].mean()).item()
    assert all(half * original > 0.3 * original**2 for half in halves)


# Classifiers of other data sets


@pytest.fixture(scope="module")
def short() -> Iterator[None]:
    """Little training: 10 passes are enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "EPOCHS", 2)
        patch.setattr(module, "MIN_IMAGES", 256 * 10)
        yield


TEST = tiny.dataset(120, 1)
START = "Training a classifier of tiny to measure with: "


def trainings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [line for line in caplog.messages if line.startswith("Training a classifier")]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, one_thread: None, short: None) -> Path:
    """A cache with the classifier of `DATA`."""
    cache = tmp_path_factory.mktemp("cache")
    get_classifier(DATA, cache=cache)
    return cache


@pytest.mark.usefixtures("short", "one_thread")
def test_a_classifier_is_trained_once_for_a_data_set(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "training")
    first = get_classifier(DATA, cache=tmp_path)
    assert caplog.messages[0] == f"{START}10 passes over its training images"
    assert first.accuracy(TEST) > 0.9
    again = get_classifier(DATA, cache=tmp_path)
    assert again.digest == first.digest
    assert torch.equal(again.classify(TEST.images)[1], first.classify(TEST.images)[1])
    assert len(trainings(caplog)) == 1

    get_classifier(tiny.dataset(256, 1), cache=tmp_path)  # other images: another one
    assert len(trainings(caplog)) == len(list((tmp_path / "classifiers").iterdir())) == 2


@pytest.mark.usefixtures("short", "one_thread")
@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_damaged_file_in_the_cache_is_trained_again(
    tmp_path: Path, cached: Path, keep: int, caplog: pytest.LogCaptureFixture
) -> None:
    (found,) = (cached / "classifiers").iterdir()
    path = tmp_path / "classifiers" / found.name
    path.parent.mkdir()
    path.write_bytes(found.read_bytes()[:keep])

    again = get_classifier(DATA, cache=tmp_path)

    assert caplog.messages[0].startswith(f"{path}: is damaged (")
    # Training is reproducible.
    assert again.digest == hashlib.sha256(found.read_bytes()).hexdigest()
    assert path.read_bytes() == found.read_bytes()


@pytest.mark.usefixtures("short", "one_thread")
def test_training_makes_no_more_passes_than_there_is_time_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "training")
    find = partial(get_classifier, DATA, cache=tmp_path)
    limited = find(epochs=2.5, seconds=60.0)
    assert trainings(caplog) == [
        f"{START}2.5 instead of 10 (time limit) passes over its training images, "
        "at most 1.0 minutes"
    ]
    assert find(epochs=4.5).digest == limited.digest  # less than twice 2.5
    assert len(trainings(caplog)) == 1
    find(epochs=5.5)
    assert trainings(caplog)[1].startswith(f"{START}5.5 instead of 10 (time limit) passes")
    full = find()
    assert trainings(caplog)[2].startswith(f"{START}10 passes")
    assert find(epochs=1.0).digest == find().digest == full.digest != limited.digest
    assert len(trainings(caplog)) == 3


@pytest.mark.usefixtures("short", "one_thread")
def test_the_planned_passes_are_those_that_are_trained(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "training")
    plan = partial(plan_epochs, DATA, cache=tmp_path)
    find = partial(get_classifier, DATA, cache=tmp_path)
    assert plan(affordable=100.0) == plan() == 10
    assert plan(affordable=1.5) == 1.5
    find(epochs=1.5)
    assert plan(affordable=2.0) == 0.0  # the cached one is good enough
    assert plan(affordable=4.0) == 4.0
    find(epochs=0.0)
    assert len(trainings(caplog)) == 1


@pytest.mark.usefixtures("one_thread")
def test_a_time_limit_shortens_training_and_still_ends_it_at_the_lowest_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By this clock a step takes 1 s."""
    clock = tiny.FakeClock(monkeypatch)
    clock.spend("training.quality.classifier.random_affine", 1.0)
    fit_quarters = partial(fit, dataset=DATA, seed=0, seconds=15.0, batch_size=64)
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def note(optimizer: torch.optim.AdamW, *given: object) -> object:
        rates.append(optimizer.param_groups[0]["lr"])
        return step(optimizer, *given)

    monkeypatch.setattr(torch.optim.AdamW, "step", note)
    network = module.build(ClassifierNetwork, DATA, seed=0)
    assert fit_quarters(network, epochs=12) == 15 / 4
    assert len(rates) == 15
    assert clock.now_s == pytest.approx(15)
    assert max(rates) == pytest.approx(3e-3, rel=0.1)
    assert rates[-1] == min(rates[3:]) < 0.1 * max(rates)
    assert not network.training
    assert fit_quarters(module.build(ClassifierNetwork, DATA, seed=0), epochs=3) == 3


def test_no_time_at_all_is_enough_for_a_step() -> None:
    network = module.build(ClassifierNetwork, DATA, seed=0)
    assert fit(network, DATA, epochs=12, seed=0, seconds=-1.0, batch_size=128) == 0.5


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("epochs", "batch_size"), [(0.5, 16), (12, 16), (20, 25), (50, 64), (100, 128), (900, 128)]
)
def test_little_training_has_smaller_batches_to_make_more_steps(
    monkeypatch: pytest.MonkeyPatch, epochs: float, batch_size: int
) -> None:
    sizes: list[int] = []

    def note(images: torch.Tensor, _rng: torch.Generator) -> torch.Tensor:
        sizes.append(len(images))
        return images

    monkeypatch.setattr(module, "random_affine", note)
    network = module.build(ClassifierNetwork, DATA, seed=0)
    fit(network, DATA, epochs=epochs, seed=0, seconds=0.0)
    assert sizes == [batch_size]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("epochs", "steps"), [(2, 8), (2.5, 10), (0.3, 1), (0.0, 1), (1.25, 5)])
def test_the_last_pass_may_be_partial(
    epochs: float, steps: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "training")
    counted = 0

    def count(images: torch.Tensor, _rng: torch.Generator) -> torch.Tensor:
        nonlocal counted
        counted += 1
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "random_affine", count)
        patch.setattr(module, "BATCH", 64)
        patch.setattr(module, "MIN_STEPS", 1)
        network = train_classifier(DATA, epochs=epochs, seed=0)
    assert counted == steps
    assert len(caplog.messages) == -(-steps // 4)
    assert not network.training


def test_the_images_of_a_bundled_classifier_get_it(mnist_dir: Path, tmp_path: Path) -> None:
    train = load_dataset("mnist", "train", mnist_dir, mirrors=())
    classifier = get_classifier(train, cache=tmp_path)
    assert classifier.digest == DIGESTS["mnist"]
    assert not list(tmp_path.iterdir())
