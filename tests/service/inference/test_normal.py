from statistics import NormalDist

import numpy as np
import pytest

from service.inference.normal import normal_deviates, normal_table, upper_quantiles


def test_quantiles_are_those_of_the_normal_distribution() -> None:
    tails = np.concatenate((np.geomspace(2e-11, 0.07, 2000), np.linspace(0.07, 0.5, 2000)))
    expected = [-NormalDist().inv_cdf(tail) for tail in tails]
    assert upper_quantiles(tails).tolist() == pytest.approx(expected, rel=4e-15, abs=1e-15)


def test_the_table_has_the_middles_of_equal_probabilities() -> None:
    scaled = NormalDist(0, 0.8 * 1.0000101408)  # 0.8, and a factor that makes their variance 1
    every = slice(0, None, 37)
    expected = [scaled.inv_cdf((each + 0.5) / 65_536) for each in range(65_536)[every]]
    assert normal_table()[every].tolist() == pytest.approx(expected, rel=0, abs=2.0**-20 + 1e-9)


def test_the_table_is_symmetric_and_has_unit_variance() -> None:
    table = normal_table().astype(float)
    assert (table == -table[::-1]).all()
    assert (np.diff(table) > 0).all()
    assert np.square(table / 0.8).mean() == pytest.approx(1.0, abs=2e-8)
    assert ((table / 0.8) ** 4).mean() == pytest.approx(3.0, abs=0.001)


def test_the_quarters_of_a_word_choose_entries() -> None:
    table = normal_table()
    word = 1 << 0 | 20_000 << 16 | 40_000 << 32 | 65_535 << 48
    first, second, third, fourth = (float(table[each]) for each in (1, 20_000, 40_000, 65_535))
    assert normal_deviates(np.array([[word]], dtype=np.uint64))[0].tolist() == [
        first - 0.75 * second,
        0.75 * first + second,
        third - 0.75 * fourth,
        0.75 * third + fourth,
    ]


def test_deviates_are_exact() -> None:
    """So that no processor can round them otherwise."""
    rng = np.random.default_rng(1)
    words = rng.integers(0, 2**64, (1000, 16), dtype=np.uint64, endpoint=False)
    words[0, :4] = [0, 2**64 - 1, 0xFFFF0000FFFF0000, 0x0000FFFF0000FFFF]
    first, second = normal_table().astype(float)[words.view(np.uint16).reshape(-1, 2)].T
    exact = np.stack((first - 0.75 * second, 0.75 * first + second), 1)
    assert (normal_deviates(words).reshape(-1, 2) == exact).all()
    assert (exact * 2.0**21 % 1 == 0).all()


def test_the_largest_deviates_are_those_of_two_extreme_entries() -> None:
    extremes = np.array([[0, 2**64 - 1]], dtype=np.uint64)
    assert np.abs(normal_deviates(extremes)).max() == pytest.approx(6.05, abs=0.01)
