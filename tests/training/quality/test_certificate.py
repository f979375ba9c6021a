"""Certificates: their contents, and that they can be reproduced."""

import statistics
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from tests.support import tiny_training as tiny
from tests.support.serving import MODEL
from training.loading import load_artifact
from training.networks import Generator, build_generator
from training.quality import certificate as module
from training.quality.certificate import (
    FULL,
    CertificateSize,
    certify,
    generate_dataset,
    measure,
    measure_int8,
    read_certificate,
    with_certificate,
)
from training.quality.classifier import FeatureClassifier, train_classifier
from training.quality.gan_train import gan_train
from training.quality.memorisation import memorisation
from training.quality.parzen import parzen
from training.sampling import generate, to_pixels
from training.saving import save_artifact

pytestmark = pytest.mark.usefixtures("one_thread", "short")

TRAIN, TEST = tiny.dataset(256, 0), tiny.dataset(120, 1)


@pytest.fixture(scope="module")
def classifier(one_thread: None) -> FeatureClassifier:
    return FeatureClassifier(train_classifier(TRAIN, epochs=12, seed=0), "f00d")


@pytest.fixture(scope="module")
def generator(one_thread: None) -> Generator:
    return tiny.state().ema.eval()


SIZE = CertificateSize(images=100, gan_train_images=64)
BRIEF = CertificateSize(images=50, gan_train_images=32, gan_train_seeds=1, memorisation_images=20)


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A full certificate of few images."""
    monkeypatch.setattr(module, "FULL", SIZE)


certify_tiny = partial(certify, train=TRAIN, test=TEST, size=SIZE)


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
    gan_train_set = generate_dataset(generator, TEST, images=64, seed=4)
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
    assert caplog.messages[0] == "Generating 100 images and 64 for GAN-train …"
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


# Brief certificates


def test_a_brief_certificate_measures_less_and_says_so(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    brief = certify_tiny(generator, classifier, size=BRIEF)
    assert brief.brief == (
        "50 images; GAN-train with 1 seed of 32 images; 20 images compared with the training "
        "images; `training evaluate FILE` completes it"
    )
    assert (brief.images, brief.test_images) == (50, 60)  # of 120 for 100
    assert (brief.gan_train.images, len(brief.gan_train.accuracies)) == (32, 1)
    for quality in (brief.generated, brief.reference):
        assert quality.spread is not None
        assert 0.0 < quality.spread.gan_test < 0.1
        assert quality.kid_std > 0.0
        assert all(error is not None for error in quality.spread.gan_test_per_class)
    assert brief.memorisation.spread is not None
    assert brief.memorisation.spread.images == 20
    assert brief.gan_train.spread is not None


def test_the_images_of_a_brief_certificate_are_the_first_of_a_full_one(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    """A figure moves towards that of the full one as the number grows."""
    brief, full = (certify_tiny(generator, classifier, size=size) for size in (BRIEF, SIZE))
    for name in ("gan_test", "precision", "recall"):
        for few, many in ((brief.generated, full.generated), (brief.reference, full.reference)):
            assert few.spread is not None
            error = getattr(few.spread, name)
            assert getattr(few, name) == pytest.approx(getattr(many, name), abs=4 * error)


def test_a_brief_certificate_has_no_likelihood(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    train, test = (replace(each, name="mnist") for each in (TRAIN, TEST))
    brief = certify_tiny(generator, classifier, train=train, test=test, size=BRIEF)
    assert (brief.parzen, brief.parzen_reference) == (None, None)


def test_generated_and_real_images_have_the_ratio_of_a_full_certificate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "FULL", FULL)
    few = replace(FULL, images=500)
    assert [FULL.test_images(count) for count in (70, 10_000, 30_000)] == [70, 10_000, 30_000]
    assert [few.test_images(count) for count in (70, 10_000, 30_000)] == [70, 500, 1500]


def test_a_full_certificate_has_the_fields_that_it_always_had(
    classifier: FeatureClassifier, generator: Generator, tmp_path: Path
) -> None:
    info = load_artifact(tiny.artifact_file(tmp_path / "a.safetensors")).info
    full, brief = (
        with_certificate(info, certify_tiny(generator, classifier, size=size)).certificate or {}
        for size in (SIZE, BRIEF)
    )
    bundled = dict(load_artifact(MODEL).info.certificate or {})
    bundled.pop("int8", None)
    assert full.keys() == bundled.keys()
    for part in ("generated", "real", "gan_train", "memorisation"):
        assert full[part].keys() == bundled[part].keys()
        assert brief[part].keys() == bundled[part].keys() | {"spread"}
    assert brief.keys() == bundled.keys() | {"brief", "test_images"}


@pytest.mark.parametrize("size", [SIZE, BRIEF], ids=["full", "brief"])
def test_a_certificate_survives_its_artifact(
    classifier: FeatureClassifier, generator: Generator, tmp_path: Path, size: CertificateSize
) -> None:
    certificate = certify_tiny(generator, classifier, size=size)
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


# Int8


class Blurred:
    """A generator whose images are less distinct by a factor."""

    def __init__(self, generator: Generator, factor: float) -> None:
        self.config, self.generator, self.factor = generator.config, generator, factor

    def __call__(self, latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = self.factor * self.generator(latents, labels)
        return images


def test_a_generator_that_makes_the_same_images_in_int8_loses_nothing(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    certificate = certify_tiny(generator, classifier)
    found = measure_int8(generator, generator, certificate, classifier, TEST)
    assert found is not None
    assert found.lossless
    assert found.generated == certificate.generated
    assert found.seeds == 5
    assert found.std.keys() == {
        *("gan_test", "precision", "recall", "density", "coverage", "frechet_distance")
    }
    others = [
        measure(
            classifier,
            generate_dataset(generator, TEST, images=SIZE.images, seed=seed),
            classifier.classify(TEST.images)[1],
        ).frechet_distance
        for seed in (0, 2, 3, 4, 5)
    ]
    assert found.std["frechet_distance"] == pytest.approx(statistics.stdev(others))


def test_what_int8_loses_is_found(classifier: FeatureClassifier, generator: Generator) -> None:
    certificate = certify_tiny(generator, classifier)
    worse = Blurred(generator, 0.05)
    found = measure_int8(worse, generator, certificate, classifier, TEST)
    assert found is not None
    assert found.generated.frechet_distance > certificate.generated.frechet_distance
    assert not found.lossless
    better = replace(certificate, generated=replace(found.generated, frechet_distance=1e9))
    again = measure_int8(worse, worse, better, classifier, TEST)
    assert again is not None
    assert again.lossless


def test_int8_is_left_out_if_the_time_does_not_suffice(
    classifier: FeatureClassifier, generator: Generator
) -> None:
    certificate = certify_tiny(generator, classifier)
    found = measure_int8(generator, generator, certificate, classifier, TEST, seconds=0.0)
    assert found is None


def test_an_untrained_generator_is_no_good(classifier: FeatureClassifier) -> None:
    """The metrics tell it from real images by a wide margin."""
    generator = build_generator(tiny.NETWORK).eval()
    certificate = certify_tiny(generator, classifier)
    assert certificate.generated.coverage < 0.2
    assert certificate.reference.coverage > 0.8
    assert certificate.generated.frechet_distance > 10 * certificate.reference.frechet_distance
