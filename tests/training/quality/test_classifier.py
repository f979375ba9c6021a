"""The judge: the committed one is good, and no other one is taken for it."""

import hashlib
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.support import tiny_training as tiny
from training.data.named import Dataset, load_dataset
from training.quality import classifier as judge_module
from training.quality.classifier import (
    DIGESTS,
    FOLDER,
    Classifier,
    FeatureClassifier,
    JudgeError,
    augment,
    estimate_pass_s,
    judge_for,
    load_judge,
    save_judge,
    to_images,
    train_classifier,
)

DATA = tiny.dataset()


@pytest.fixture(scope="module")
def classifier(one_thread: None) -> Classifier:
    return train_classifier(DATA, epochs=3, seed=0, batch_size=32)


# The committed one


def test_the_committed_judge_knows_real_digits(mnist_dir: Path) -> None:
    test = load_dataset("mnist", "test", mnist_dir, mirrors=())
    judge = load_judge(test)
    assert judge.accuracy(test) >= 0.994
    assert not any(p.requires_grad for p in judge.classifier.parameters())


def test_every_committed_judge_is_there_and_is_the_one_that_is_named() -> None:
    assert {path.stem for path in FOLDER.glob("*")} == set(DIGESTS)
    shape = torch.zeros((1, 1, 28, 28), dtype=torch.uint8)
    names = tuple(str(digit) for digit in range(10))
    for name, digest in DIGESTS.items():
        judge = load_judge(replace(DATA, name=name, images=shape, class_names=names))
        assert judge.digest == digest
        assert judge.classifier.out.out_features == 10


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mnist.safetensors"
    shutil.copy(FOLDER / path.name, path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")

    with pytest.raises(JudgeError, match=r"SHA-256 is [0-9a-f]{64}, the committed") as caught:
        load_judge(replace(DATA, name="mnist"), tmp_path)

    assert str(caught.value).startswith(f"{path}: ")
    assert DIGESTS["mnist"] in str(caught.value)


def test_a_data_set_without_a_judge_is_named() -> None:
    with pytest.raises(JudgeError, match=r"tiny\.safetensors: no judge for the data set 'tiny'"):
        load_judge(DATA)


def test_a_judge_that_nobody_committed_is_refused(tmp_path: Path, classifier: Classifier) -> None:
    save_judge(tmp_path / "tiny.safetensors", classifier, dataset="tiny", epochs=3, seed=0)
    with pytest.raises(JudgeError, match="the committed judge has None"):
        load_judge(DATA, tmp_path)


# Training one


def test_a_classifier_learns_what_is_easy_to_tell_apart(classifier: Classifier) -> None:
    assert FeatureClassifier(classifier, "").accuracy(tiny.dataset(seed=1)) > 0.95


def test_its_accuracy_is_the_share_of_right_answers(classifier: Classifier) -> None:
    judge = FeatureClassifier(classifier, "")
    predictions, features = judge.look(DATA.images)
    assert judge.accuracy(replace(DATA, labels=predictions)) == 1.0
    assert judge.accuracy(replace(DATA, labels=1 - predictions)) == 0.0
    quarter = predictions.clone()
    quarter[:192] = 1 - quarter[:192]
    assert judge.accuracy(replace(DATA, labels=quarter)) == 0.25
    assert features.shape == (256, 96)


def test_what_it_sees_does_not_depend_on_the_batches(classifier: Classifier) -> None:
    judge = FeatureClassifier(classifier, "")
    predictions, features = judge.look(DATA.images)
    for batch_size in (7, 64):
        same, near = judge.look(DATA.images, batch_size=batch_size)
        assert torch.equal(predictions, same)
        torch.testing.assert_close(near, features, rtol=1e-4, atol=1e-5)


def test_a_seed_decides_the_classifier_and_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(4)
    before = torch.get_rng_state()
    losses: list[tuple[int, float]] = []
    first, again, other = (
        train_classifier(
            DATA, epochs=1, seed=seed, batch_size=64, report=lambda *told: losses.append(told)
        ).out.weight
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert [epoch for epoch, _ in losses] == [0, 0, 0]
    assert losses[0] == losses[1] != losses[2]


def test_a_judge_comes_back_from_its_file(
    tmp_path: Path, classifier: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = save_judge(tmp_path / "tiny.safetensors", classifier, dataset="tiny", epochs=3, seed=0)
    monkeypatch.setattr(judge_module, "DIGESTS", {"tiny": digest})

    judge = load_judge(DATA, tmp_path)

    assert judge.digest == digest
    assert judge.classifier.out.weight.dtype == torch.float32
    kept, halved = FeatureClassifier(classifier, "").look(DATA.images), judge.look(DATA.images)
    assert torch.equal(kept[0], halved[0])
    torch.testing.assert_close(halved[1], kept[1], rtol=0.02, atol=0.02)  # half-precision weights


def test_pixels_become_images_in_the_value_range() -> None:
    pixels = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert to_images(pixels).tolist() == pytest.approx([-1.0, -0.6, 1.0])


def test_augmentation_moves_images_a_little_and_each_its_own_way() -> None:
    images = to_images(DATA.images[:1]).repeat(8, 1, 1, 1)
    moved = augment(images, torch.Generator().manual_seed(0))

    assert moved.shape == images.shape
    assert moved.min() >= -1
    assert moved.max() <= 1
    assert len({tuple(image.flatten().tolist()) for image in moved}) == 8
    halves = [(image[..., :4].mean() - image[..., 4:].mean()).item() for image in moved]
    original = (images[0, ..., :4].mean() - images[0, ..., 4:].mean()).item()
    assert all(half * original > 0.3 * original**2 for half in halves)


# The judge of a person's own data set


def make_hasty(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(judge_module, "EPOCHS", 2)
    patch.setattr(judge_module, "MIN_IMAGES", 256 * 10)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    make_hasty(monkeypatch)


TEST = tiny.dataset(120, 1)
START = "Training a judge of tiny: "


@pytest.mark.usefixtures("hasty", "one_thread")
def test_an_unknown_data_set_gets_a_judge_once(tmp_path: Path) -> None:
    lines: list[str] = []
    first = judge_for(DATA, TEST, cache=tmp_path, report=lines.append)
    assert len(lines) == 1
    assert lines[0].startswith(f"{START}10 passes over its training images, about ")
    assert first.accuracy(TEST) > 0.9

    again = judge_for(DATA, TEST, cache=tmp_path, report=lines.append)
    assert len(lines) == 1
    assert again.digest == first.digest
    assert torch.equal(again.look(TEST.images)[1], first.look(TEST.images)[1])


@pytest.mark.usefixtures("hasty", "one_thread")
def test_other_images_get_another_judge(tmp_path: Path) -> None:
    lines: list[str] = []
    for seed in (0, 1):
        judge_for(tiny.dataset(256, seed), TEST, cache=tmp_path, report=lines.append)
    assert len(lines) == len(list((tmp_path / "judges").iterdir())) == 2


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The file of a judge that was trained in haste."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        make_hasty(patch)
        judge_for(DATA, TEST, cache=cache, report=lambda _text: None)
    (path,) = (cache / "judges").iterdir()
    return path


@pytest.mark.usefixtures("hasty", "one_thread")
@pytest.mark.parametrize("keep", [0, 100, -100])
def test_a_damaged_judge_is_trained_again(tmp_path: Path, found: Path, keep: int) -> None:
    path = tmp_path / "judges" / found.name
    path.parent.mkdir()
    path.write_bytes(found.read_bytes()[:keep])
    lines: list[str] = []

    again = judge_for(DATA, TEST, cache=tmp_path, report=lines.append)

    assert lines[0].startswith(f"{path}: is damaged (")
    # Training is the same every time.
    assert again.digest == hashlib.sha256(found.read_bytes()).hexdigest()
    assert path.read_bytes() == found.read_bytes()


@pytest.mark.usefixtures("hasty", "one_thread")
def test_a_judge_learns_no_longer_than_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    find = partial(judge_for, DATA, TEST, cache=tmp_path, report=lines.append)
    monkeypatch.setattr(judge_module, "estimate_pass_s", lambda *_given, **_how: 2.0)

    hasty = find(seconds=5.0)
    assert lines == [
        f"{START}for want of time 2.5 instead of 10 passes over its training images, about "
        "0.1 minutes"
    ]
    assert find(seconds=9.0).digest == hasty.digest  # near enough to what there is time for
    assert len(lines) == 1
    find(seconds=11.0)
    assert lines[1].startswith(f"{START}for want of time 5.5 instead of 10 passes")
    full = find()
    assert lines[2].startswith(f"{START}10 passes")
    assert find(seconds=1.0).digest == find().digest == full.digest != hasty.digest
    assert len(lines) == 3


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("epochs", "steps"), [(2, 8), (2.5, 10), (0.3, 1), (0.0, 1), (1.25, 5)])
def test_a_pass_may_be_a_part_of_one(epochs: float, steps: int) -> None:
    told: list[int] = []
    counted = 0

    def count(images: torch.Tensor, _rng: torch.Generator) -> torch.Tensor:
        nonlocal counted
        counted += 1
        return images

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge_module, "augment", count)
        classifier = train_classifier(
            DATA, epochs=epochs, seed=0, batch_size=64, report=lambda epoch, _: told.append(epoch)
        )
    assert counted == steps
    assert told == list(range(-(-steps // 4)))
    assert not classifier.training


def test_the_estimated_time_of_a_pass_is_that_of_its_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = 0.0

    def take_time(_classifier: Classifier, few: Dataset, *, epochs: float, **_how: object) -> None:
        nonlocal now_s
        now_s += 3.0 * epochs * len(few.labels) / 64

    monkeypatch.setattr("time.perf_counter", lambda: now_s)
    monkeypatch.setattr(judge_module, "fit", take_time)
    new = Classifier(num_classes=2, channels=1)
    assert estimate_pass_s(new, DATA, batch_size=64) == pytest.approx(4 * 3.0)


def test_the_images_that_a_committed_judge_learnt_are_judged_by_it(
    mnist_dir: Path, tmp_path: Path
) -> None:
    train = load_dataset("mnist", "train", mnist_dir, mirrors=())
    test = load_dataset("mnist", "test", mnist_dir, mirrors=())
    judge = judge_for(train, test, cache=tmp_path, report=lambda _text: None)
    assert judge.digest == DIGESTS["mnist"]
    assert not list(tmp_path.iterdir())
