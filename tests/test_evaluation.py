"""The certificate's figures against plain formulas and against sets whose figures are known."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests import tiny
from training.artifact import load_artifact, save_artifact
from training.evaluation import (
    NEIGHBOURS,
    Certificate,
    Quality,
    certificate_of,
    certify,
    frechet_distance,
    generate,
    manifold_figures,
    measure,
    table,
    to_pixels,
    with_certificate,
)
from training.judge import Judge, train_classifier
from training.networks import MLPGenerator, build_generator

pytestmark = pytest.mark.usefixtures("one_thread")

TRAIN, TEST = tiny.dataset(256, 0), tiny.dataset(120, 1)


@pytest.fixture(scope="module")
def judge(one_thread: None) -> Judge:
    return Judge(train_classifier(TRAIN, epochs=3, seed=0, batch_size=32), "f00d")


@pytest.fixture
def generator() -> MLPGenerator:
    return tiny.state().ema.eval()


def cloud(count: int, seed: int, *, centre: float = 0.0, spread: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return centre + spread * torch.randn((count, 6), generator=rng)


# Precision, recall, density, coverage


def brute_force(
    real: npt.NDArray[np.float64], fake: npt.NDArray[np.float64], k: int
) -> tuple[float, float, float, float]:
    """The definitions, point by point."""

    def radius(points: npt.NDArray[np.float64], i: int) -> float:
        return float(sorted(math.dist(points[i], p) for j, p in enumerate(points) if j != i)[k - 1])

    real_radii = [radius(real, i) for i in range(len(real))]
    fake_radii = [radius(fake, i) for i in range(len(fake))]
    near = [[math.dist(r, f) for f in fake] for r in real]
    in_real = [[near[i][j] <= real_radii[i] for i in range(len(real))] for j in range(len(fake))]
    in_fake = [[near[i][j] <= fake_radii[j] for j in range(len(fake))] for i in range(len(real))]
    return (
        sum(any(row) for row in in_real) / len(fake),
        sum(any(row) for row in in_fake) / len(real),
        sum(sum(row) for row in in_real) / (k * len(fake)),
        sum(min(near[i]) <= real_radii[i] for i in range(len(real))) / len(real),
    )


@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(
    "fake",
    [cloud(70, 1), cloud(50, 1, centre=1.5), cloud(60, 1, spread=0.4), cloud(40, 1, spread=2.0)],
)
def test_the_manifold_figures_are_their_definitions(fake: Tensor, k: int) -> None:
    real = cloud(60, 2)
    expected = brute_force(real.double().numpy(), fake.double().numpy(), k)
    assert manifold_figures(real, fake, k) == pytest.approx(expected, abs=1e-6)
    assert len({0.0, 1.0, *expected}) > 3  # the sets are such that the figures say something


def test_the_figures_do_not_depend_on_the_blocks_they_are_computed_in() -> None:
    real, fake = cloud(2300, 1), cloud(1100, 2, centre=0.3)
    order, other = torch.randperm(2300), torch.randperm(1100)
    shuffled = manifold_figures(real[order], fake[other])
    assert shuffled == pytest.approx(manifold_figures(real, fake), abs=2e-3)


def test_identical_sets_lie_among_each_other_entirely() -> None:
    points = cloud(300, 1)
    precision, recall, density, coverage = manifold_figures(points, points.clone())
    assert (precision, recall, coverage) == (1.0, 1.0, 1.0)
    # Each ball holds its own centre besides the k neighbours that it reaches to.
    assert density == pytest.approx(1 + 1 / NEIGHBOURS, abs=0.01)


def test_a_set_like_the_real_one_has_a_density_near_one() -> None:
    figures = manifold_figures(cloud(800, 1), cloud(800, 2))
    assert figures[2] == pytest.approx(1.0, abs=0.15)
    assert min(figures) > 0.8


def test_a_collapsed_set_is_precise_and_covers_nothing() -> None:
    real = cloud(500, 1)
    middle = real.norm(dim=1).argmin()
    collapsed = real[middle] + 0.01 * cloud(500, 2)
    precision, recall, _, coverage = manifold_figures(real, collapsed)
    assert precision == 1.0
    assert recall < 0.05
    assert coverage < 0.25


def test_sets_far_apart_have_nothing_in_common() -> None:
    assert manifold_figures(cloud(200, 1), cloud(200, 2, centre=50.0)) == (0.0, 0.0, 0.0, 0.0)


def test_too_few_points_for_their_neighbours_are_refused() -> None:
    with pytest.raises(ValueError, match="5 images are too few for 5 neighbours"):
        manifold_figures(cloud(5, 1), cloud(100, 2))


# Fréchet distance


def test_the_frechet_distance_is_its_definition() -> None:
    first = cloud(400, 1).numpy().astype(np.float64) @ np.diag([1, 2, 3, 1, 0.5, 1])
    second = cloud(300, 2, centre=0.7).numpy().astype(np.float64)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    values = np.linalg.eigvals(one @ two).astype(complex)  # the root of a product, by its spectrum
    expected = (
        ((first.mean(0) - second.mean(0)) ** 2).sum()
        + np.trace(one)
        + np.trace(two)
        - 2 * np.sqrt(values).sum().real
    )
    found = frechet_distance(torch.from_numpy(first), torch.from_numpy(second))
    assert found == pytest.approx(expected, rel=1e-9)


def test_the_frechet_distance_of_equal_sets_is_nothing_and_of_moved_ones_the_way() -> None:
    points = cloud(500, 1)
    moved = points + torch.tensor([3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    assert frechet_distance(points, points) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(points, moved) == pytest.approx(25.0, rel=1e-5)
    assert frechet_distance(points, 2 * points) == pytest.approx(
        frechet_distance(2 * points, points), rel=1e-9
    )


def test_the_frechet_distance_holds_for_features_that_do_not_vary() -> None:
    flat = cloud(100, 1)
    flat[:, 2:] = 0.0
    assert frechet_distance(flat, flat) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(flat, flat + 1) == pytest.approx(6.0, rel=1e-5)


# Pixels


def test_pixels_are_the_nearest_levels() -> None:
    images = torch.tensor([-1.0, 1.0, 0.0, 0.2, -1.5, 1.5, (37.4 - 127.5) / 127.5])
    assert to_pixels(images).tolist() == [0, 255, 128, 153, 0, 255, 37]
    levels = torch.arange(256)
    assert torch.equal(to_pixels(levels / 127.5 - 1.0).long(), levels)
    assert torch.equal(to_pixels((levels + 0.4).clamp(max=255) / 127.5 - 1.0).long(), levels)


@pytest.mark.parametrize("batch_size", [8, 9, 33, 1000])
def test_the_images_of_a_seed_do_not_depend_on_the_batches(
    generator: MLPGenerator, batch_size: int
) -> None:
    labels = torch.arange(100) % 2
    known = generate(generator, labels, seed=5, batch_size=100).int()
    pixels = generate(generator, labels, seed=5, batch_size=batch_size)

    assert (pixels.shape, pixels.dtype) == ((100, 1, 8, 8), torch.uint8)
    # A matrix product of another height may round otherwise, by one level at the most.
    assert (pixels.int() - known).abs().max() <= 1


def test_a_seed_decides_the_images(generator: MLPGenerator) -> None:
    labels = torch.arange(20) % 2
    torch.manual_seed(1)
    first = generate(generator, labels, seed=5)
    torch.manual_seed(2)
    assert torch.equal(generate(generator, labels, seed=5), first)
    assert not torch.equal(generate(generator, labels, seed=6), first)
    assert not torch.equal(generate(generator, 1 - labels, seed=5), first)


# The certificate


def test_real_images_in_place_of_generated_ones_are_measured_as_perfect(judge: Judge) -> None:
    _, features = judge.look(TEST.images)
    quality = measure(judge, TEST.images, TEST.labels, features)
    assert quality.gan_test == judge.accuracy(TEST)
    assert (quality.precision, quality.recall, quality.coverage) == (1.0, 1.0, 1.0)
    assert quality.frechet_distance == pytest.approx(0.0, abs=1e-6)


def test_gan_test_is_the_judges_accuracy_in_all_and_by_class(judge: Judge) -> None:
    predictions, features = judge.look(TEST.images)
    labels = predictions.clone()
    wrong = (predictions == 1).nonzero().flatten()[:6]
    labels[wrong] = 0  # six images that the judge calls 1 claim to be 0

    quality = measure(judge, TEST.images, labels, features)

    zeros, ones = (int((labels == label).sum()) for label in (0, 1))
    assert quality.gan_test == pytest.approx(1 - 6 / 120)
    assert quality.gan_test_per_class == pytest.approx(((zeros - 6) / zeros, 1.0))
    assert ones > 0


def test_a_certificate_says_what_was_measured_and_against_what(
    judge: Judge, generator: MLPGenerator
) -> None:
    certificate = certify(generator, judge, train=TRAIN, test=TEST, images=100, seed=3)

    labels = torch.arange(100) % 2
    _, features = judge.look(TEST.images)
    fake = generate(generator, labels, seed=3)
    assert certificate.generated == measure(judge, fake, labels, features)
    assert (
        certificate.generated.gan_test_per_class[0] != certificate.generated.gan_test_per_class[1]
    )
    assert certificate.real.gan_test > 0.95
    assert certificate.real.precision > certificate.generated.precision
    assert certificate.judge_accuracy == judge.accuracy(TEST)
    assert (certificate.dataset, certificate.judge_sha256) == ("tiny", "f00d")
    assert (certificate.images, certificate.neighbours, certificate.seed) == (100, 5, 3)


def test_a_certificate_can_be_measured_again(judge: Judge, generator: MLPGenerator) -> None:
    first, again, other = (
        certify(generator, judge, train=TRAIN, test=TEST, images=100, seed=seed)
        for seed in (3, 3, 4)
    )
    assert first == again
    assert first.generated != other.generated
    assert first.real != other.real


QUALITY = Quality(
    gan_test=0.98765,
    gan_test_per_class=(1.0, 0.9753),
    precision=0.1234,
    recall=0.2345,
    density=1.3456,
    coverage=0.4567,
    frechet_distance=12.3456,
)
CERTIFICATE = Certificate(
    dataset="tiny",
    judge_sha256="f00d",
    judge_accuracy=0.99,
    images=100,
    neighbours=5,
    seed=0,
    generated=QUALITY,
    real=replace(QUALITY, gan_test=0.5, gan_test_per_class=(0.25, 0.75), frechet_distance=0.001),
)


def test_a_certificate_survives_its_artifact(tmp_path: Path) -> None:
    path = tiny.artifact_file(tmp_path / "a.safetensors")
    loaded = load_artifact(path)
    assert certificate_of(loaded.info) is None

    save_artifact(path, loaded.generator, with_certificate(loaded.info, CERTIFICATE))

    certified = load_artifact(path)
    assert certificate_of(certified.info) == CERTIFICATE
    assert replace(certified.info, certificate=None) == loaded.info


def test_a_certificate_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tiny.artifact_file(tmp_path / "a.safetensors", certificate={"gan_test": 1.0})
    with pytest.raises(ValidationError, match="judge_sha256"):
        certificate_of(load_artifact(path).info)


def cells(text: str) -> list[list[str]]:
    """The rows of a Markdown table as GitHub's specification reads them."""
    header, rule, *body = (
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)] for line in text.split("\n")
    )
    assert [row[0] for row in (header, rule, *body)] == [""] * (len(body) + 2)
    assert [row[-1] for row in (header, rule, *body)] == [""] * (len(body) + 2)
    assert all(re.fullmatch(":?-+:?", cell) for cell in rule[1:-1])
    assert len(rule) == len(header)
    return [[cell.replace("\\|", "|") for cell in row[1:-1]] for row in (header, *body)]


def test_a_table_is_markdown_and_shows_every_figure() -> None:
    assert cells(table(CERTIFICATE, ("left", "right"))) == [
        ["", "generated", "real training images"],
        ["GAN-test", "98.77%", "50.00%"],
        ["GAN-test, left", "100.00%", "25.00%"],
        ["GAN-test, right", "97.53%", "75.00%"],
        ["precision", "0.123", "0.123"],
        ["recall", "0.234", "0.234"],
        ["density", "1.346", "1.346"],
        ["coverage", "0.457", "0.457"],
        ["Fréchet distance", "12.346", "0.001"],
    ]


def test_the_lines_of_a_table_are_aligned_for_whoever_reads_it_in_a_terminal() -> None:
    lines = table(CERTIFICATE, ("left", "right")).splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}
    assert all(line.startswith("|") and line.endswith("|") for line in lines)


def test_a_class_name_cannot_break_the_table() -> None:
    rows = cells(table(CERTIFICATE, ("a|b", "new\nline")))
    assert [len(row) for row in rows] == [3] * 9
    assert [row[0] for row in rows[2:4]] == ["GAN-test, a|b", "GAN-test, new line"]


def test_an_untrained_generator_is_no_good(judge: Judge) -> None:
    """The figures tell it from real images by a wide margin."""
    generator = build_generator(tiny.NETWORK).eval()
    certificate = certify(generator, judge, train=TRAIN, test=TEST, images=100)
    assert certificate.generated.coverage < 0.2
    assert certificate.real.coverage > 0.8
    assert certificate.generated.frechet_distance > 10 * certificate.real.frechet_distance
