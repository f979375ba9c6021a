"""Certificates: their contents, and that they can be reproduced."""

import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.support import tiny_training as tiny
from training.artifact import load_artifact, save_artifact
from training.networks import Generator, build_generator
from training.quality import certificate as module
from training.quality.certificate import (
    certify,
    estimate_certification_s,
    generate_dataset,
    measure,
    read_certificate,
    with_certificate,
)
from training.quality.classifier import FeatureClassifier, train_classifier
from training.quality.gan_train import gan_train
from training.quality.memorisation import memorisation
from training.quality.parzen import parzen
from training.sampling import generate, to_pixels

pytestmark = pytest.mark.usefixtures("one_thread", "short")

TRAIN, TEST = tiny.dataset(256, 0), tiny.dataset(120, 1)


@pytest.fixture(scope="module")
def classifier(one_thread: None) -> FeatureClassifier:
    return FeatureClassifier(train_classifier(TRAIN, epochs=12, seed=0), "f00d")


@pytest.fixture(scope="module")
def generator(one_thread: None) -> Generator:
    return tiny.state().ema.eval()


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GAN_TRAIN_IMAGES", 256)
    monkeypatch.setattr("training.quality.gan_train.IMAGES", 128)


certify_tiny = partial(certify, train=TRAIN, test=TEST, images=100)


# Pixels


def test_pixels_are_the_nearest_levels() -> None:
    images = torch.tensor([-1.0, 1.0, 0.0, 0.2, -1.5, 1.5, (37.4 - 127.5) / 127.5])
    assert to_pixels(images).tolist() == [0, 255, 128, 153, 0, 255, 37]
    levels = torch.arange(256)
    assert torch.equal(to_pixels(levels / 127.5 - 1.0).long(), levels)
    assert torch.equal(to_pixels((levels + 0.4).clamp(max=255) / 127.5 - 1.0).long(), levels)


@pytest.mark.parametrize("batch_size", [8, 9, 33, 1000])
def test_the_images_of_a_seed_do_not_depend_on_the_batches(
    generator: Generator, batch_size: int
) -> None:
    labels = torch.arange(100) % 2
    known = generate(generator, labels, seed=5, batch_size=100).int()
    pixels = generate(generator, labels, seed=5, batch_size=batch_size)

    assert (pixels.shape, pixels.dtype) == ((100, 1, 8, 8), torch.uint8)
    # A matrix product of another height may round otherwise, by one level at the most.
    assert (pixels.int() - known).abs().max() <= 1


def test_a_seed_decides_the_images(generator: Generator) -> None:
    labels = torch.arange(20) % 2
    torch.manual_seed(1)
    first = generate(generator, labels, seed=5)
    torch.manual_seed(2)
    assert torch.equal(generate(generator, labels, seed=5), first)
    assert not torch.equal(generate(generator, labels, seed=6), first)
    assert not torch.equal(generate(generator, 1 - labels, seed=5), first)


# The certificate


def test_real_images_in_place_of_generated_ones_are_measured_as_perfect(
    classifier: FeatureClassifier,
) -> None:
    _, features = classifier.classify(TEST.images)
    quality = measure(classifier, TEST, features)
    assert quality.gan_test == classifier.accuracy(TEST)
    assert (quality.precision, quality.recall, quality.coverage) == (1.0, 1.0, 1.0)
    assert quality.frechet_distance == pytest.approx(0.0, abs=1e-6)


def test_gan_test_is_the_accuracy_of_the_classifier_in_all_and_by_class(
    classifier: FeatureClassifier,
) -> None:
    predictions, features = classifier.classify(TEST.images)
    labels = predictions.clone()
    wrong = (predictions == 1).nonzero().flatten()[:6]
    labels[wrong] = 0  # six images classified as 1 claim to be 0

    quality = measure(classifier, replace(TEST, labels=labels), features)

    zeros, ones = (int((labels == label).sum()) for label in (0, 1))
    assert quality.gan_test == pytest.approx(1 - 6 / 120)
    assert quality.gan_test_per_class == pytest.approx(((zeros - 6) / zeros, 1.0))
    assert ones > 0


def test_a_class_without_images_has_no_metric(classifier: FeatureClassifier) -> None:
    _, features = classifier.classify(TEST.images)
    zeros = TEST.labels == 0
    only = replace(TEST, images=TEST.images[zeros], labels=TEST.labels[zeros])
    first, second = measure(classifier, only, features).gan_test_per_class
    assert first is not None
    assert first > 0.9
    assert second is None


def test_few_test_images_are_compared_by_fewer_neighbours(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    few = replace(TEST, images=TEST.images[:4], labels=TEST.labels[:4])
    certificate = certify_tiny(generator, classifier, test=few)
    assert certificate.neighbours == 3
    assert certify_tiny(generator, classifier).neighbours == 5


def test_generated_images_have_the_classes_in_turn(generator: Generator) -> None:
    made = generate_dataset(generator, TEST, images=7, seed=3)
    assert made.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert torch.equal(made.images, generate(generator, made.labels, seed=3))
    assert (made.name, made.class_names) == ("generated", TEST.class_names)


def test_a_certificate_says_what_was_measured_and_against_what(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    certificate = certify_tiny(generator, classifier, seed=3)

    _, features = classifier.classify(TEST.images)
    fake = generate_dataset(generator, TEST, images=100, seed=3)
    assert certificate.generated == measure(classifier, fake, features)
    left, right = certificate.generated.gan_test_per_class
    assert left != right
    assert certificate.memorisation == memorisation(fake.images, TRAIN.images, TEST.images)
    # A classifier learns from other images than those that are measured.
    gan_train_set = generate_dataset(generator, TEST, images=256, seed=4)
    assert certificate.gan_train == gan_train(gan_train_set, TRAIN, TEST)
    assert certificate.reference.gan_test > 0.95
    assert certificate.reference.precision > certificate.generated.precision
    assert certificate.classifier_accuracy == classifier.accuracy(TEST)
    assert (certificate.dataset, certificate.dataset_sha256) == ("tiny", TRAIN.digest)
    assert certificate.classifier_sha256 == "f00d"
    assert (certificate.images, certificate.neighbours, certificate.seed) == (100, 5, 3)


def test_a_certificate_can_be_measured_again(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    first, again, other = (certify_tiny(generator, classifier, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first.generated != other.generated
    assert first.reference != other.reference


def test_progress_is_logged(
    classifier: FeatureClassifier, generator: Generator, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "training")
    certify_tiny(generator, classifier)
    assert caplog.messages[0] == "Generating 100 images and 256 for GAN-train …"
    assert any(line.startswith("GAN-train") for line in caplog.messages)
    assert all("\n" not in line for line in caplog.messages)


def test_only_mnist_has_the_log_likelihood_of_its_papers(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    without = certify_tiny(generator, classifier)
    assert (without.parzen, without.parzen_reference) == (None, None)

    train, test = (replace(each, name="mnist") for each in (TRAIN, TEST))
    certificate = certify_tiny(generator, classifier, train=train, test=test)

    made = generate_dataset(generator, TEST, images=100, seed=0)
    samples, images, held = (each.images.flatten(1).float() / 255.0 for each in (made, TRAIN, TEST))
    assert certificate.parzen == parzen(samples, images, held)
    assert certificate.parzen_reference is not None
    assert certificate.parzen is not None
    assert certificate.parzen_reference.mean > certificate.parzen.mean


def test_the_estimated_time_is_that_of_all_images(
    classifier: FeatureClassifier, generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "estimate_gan_train_s", lambda _train: 1000.0)
    ticks = itertools.count()
    monkeypatch.setattr("time.perf_counter", lambda: float(next(ticks)))
    found = estimate_certification_s(generator, classifier, train=TRAIN, test=TEST)
    # By this clock every share takes a second: 200 images.
    looks, distances, copies = (2 * 10_000 + 2 * 120) / 200, 6 * 10_000 / 200, 2 * 2000 / 200
    assert found == pytest.approx(1000 + (10_000 + 256) / 200 + looks + distances + copies)


def test_a_certificate_survives_its_artifact(
    classifier: FeatureClassifier, generator: Generator, tmp_path: Path
) -> None:
    certificate = certify_tiny(generator, classifier)
    path = tiny.artifact_file(tmp_path / "a.safetensors")
    loaded = load_artifact(path)
    assert read_certificate(loaded.info) is None

    save_artifact(path, loaded.generator, with_certificate(loaded.info, certificate))

    certified = load_artifact(path)
    assert read_certificate(certified.info) == certificate
    assert replace(certified.info, certificate=None) == loaded.info


def test_a_certificate_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tiny.artifact_file(tmp_path / "a.safetensors", certificate={"gan_test": 1.0})
    with pytest.raises(ValidationError, match="judge_sha256"):
        read_certificate(load_artifact(path).info)


def test_an_untrained_generator_is_no_good(classifier: FeatureClassifier) -> None:
    """The metrics tell it from real images by a wide margin."""
    generator = build_generator(tiny.NETWORK).eval()
    certificate = certify_tiny(generator, classifier)
    assert certificate.generated.coverage < 0.2
    assert certificate.reference.coverage > 0.8
    assert certificate.generated.frechet_distance > 10 * certificate.reference.frechet_distance
