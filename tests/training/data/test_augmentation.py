"""Distortions: what they do to an image, and that each image draws its own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.augmentation import _cut_out, _recolour, _translate, diff_augment, flip

pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 64, channels: int = 3, size: int = 16) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.rand((count, channels, size, size), generator=rng) * 2 - 1


def rng(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_about_half_of_the_images_are_mirrored_and_the_others_untouched() -> None:
    before = images(400)
    after = flip(before, rng())
    mirrored = (after == before.flip(3)).all(dim=(1, 2, 3))
    untouched = (after == before).all(dim=(1, 2, 3))
    assert bool((mirrored ^ untouched).all())
    assert 150 < int(mirrored.sum()) < 250


def test_the_random_state_decides_the_distortions() -> None:
    before = images()
    torch.manual_seed(1)
    first = diff_augment(before, rng(3))
    torch.manual_seed(2)
    assert torch.equal(diff_augment(before, rng(3)), first)
    assert not torch.equal(diff_augment(before, rng(4)), first)


def test_each_image_draws_its_own_distortion() -> None:
    same = images(1).expand(8, -1, -1, -1)
    distorted = diff_augment(same, rng())
    assert len({image.numpy().tobytes() for image in distorted}) == 8


def test_the_distortions_are_colour_then_translation_then_cutout() -> None:
    before, source = images(), rng()
    expected = _cut_out(_translate(_recolour(before, source), source), source)
    assert torch.equal(diff_augment(before, rng()), expected)


def test_the_shape_stays_and_the_input_is_not_changed() -> None:
    before = images(5, 1, 28)
    copy = before.clone()
    after = diff_augment(before, rng())
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert torch.equal(before, copy)


def test_gradients_reach_every_image() -> None:
    before = images(32).requires_grad_()
    diff_augment(before, rng()).square().sum().backward()
    assert before.grad is not None
    assert bool(before.grad.isfinite().all())
    assert bool((before.grad.abs().sum(dim=(1, 2, 3)) > 0).all())


def test_a_moved_image_is_the_image_moved_with_zeros_coming_in() -> None:
    before = images(200, 2, 16)
    after = _translate(before, rng())
    seen = set()
    for old, new in zip(before, after, strict=True):
        matches = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(new, moved(old, down, right))
        ]
        assert len(matches) == 1
        seen |= set(matches)
    assert len(seen) == 25  # up to an eighth of the size, every way


def moved(image: Tensor, down: int, right: int) -> Tensor:
    _, height, width = image.shape
    wide = F.pad(image, (2, 2, 2, 2))
    return wide[:, 2 + down : 2 + down + height, 2 + right : 2 + right + width]


def test_a_square_of_half_the_size_at_most_is_cut_out() -> None:
    before = images(300) + 10  # nothing is zero of itself
    gone = _cut_out(before, rng()) == 0
    assert torch.equal(gone.all(dim=1), gone.any(dim=1))  # in all channels or in none
    rows, columns = gone[:, 0].any(dim=2).sum(1), gone[:, 0].any(dim=1).sum(1)
    assert torch.equal(gone[:, 0].sum(dim=(1, 2)), rows * columns)  # a rectangle
    assert int(rows.max()) == int(columns.max()) == 8
    assert 4 <= int(rows.min()) < 8  # one that lies partly outside


def test_what_is_not_cut_out_stays() -> None:
    before = images(50) + 10
    after = _cut_out(before, rng())
    assert bool(((after == before) | (after == 0)).all())


def test_a_grey_image_keeps_to_one_grey() -> None:
    grey = images(20, 1).expand(-1, 3, -1, -1)
    after = _recolour(grey, rng())
    assert torch.allclose(after[:, 0], after[:, 1], atol=1e-6)
    assert not torch.allclose(after, grey)


def test_colours_change_by_a_scale_and_a_shift_for_each_image() -> None:
    """Of a grey image only brightness and contrast are left: a straight line."""
    before = images(20, 1)
    after = _recolour(before, rng())
    for old, new in zip(before.flatten(1), after.flatten(1), strict=True):
        (low, high) = (int(old.argmin()), int(old.argmax()))
        slope = (new[high] - new[low]) / (old[high] - old[low])
        assert 0.5 <= slope.item() <= 1.5
        assert torch.allclose(new, new[low] + slope * (old - old[low]), atol=1e-5)
        assert abs((new.mean() - old.mean()).item()) <= 0.5


def test_colours_lie_between_grey_and_twice_as_strong() -> None:
    before = images(200)
    after = _recolour(before, rng())
    seen = []
    for old, new in zip(before, after, strict=True):
        colour, changed = old - old.mean(0), new - new.mean(0)
        strength = (changed * colour).sum() / colour.square().sum()
        assert torch.allclose(changed, strength * colour, atol=1e-5)
        seen.append(strength.item())
    assert min(seen) >= 0
    assert min(seen) < 0.2
    assert 2 < max(seen) <= 3  # up to twice by saturation, and half as much again by contrast


def test_images_that_are_mirrored_are_chosen_by_the_random_state() -> None:
    before = images()
    assert torch.equal(flip(before, rng(3)), flip(before, rng(3)))
    assert not torch.equal(flip(before, rng(3)), flip(before, rng(4)))
