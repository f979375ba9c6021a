import math

import numpy as np
import pytest

from service.inference.portable_math import arccos, log, polynomial, sin, sum_rows


def test_a_polynomial_is_given_from_its_constant_term_upwards() -> None:
    assert polynomial([2.0, 0.0, 3.0], np.array([0.0, 1.0, -2.0])).tolist() == [2.0, 5.0, 14.0]


def test_logarithms_are_accurate_over_the_whole_range() -> None:
    x = np.concatenate((np.geomspace(1e-300, 1e300, 4000), np.linspace(0.4, 2.1, 4000)))
    assert log(x).tolist() == pytest.approx([math.log(each) for each in x], rel=1e-15, abs=1e-16)
    assert log(np.array([1.0, 2.0, 0.5])).tolist() == [0.0, math.log(2), -math.log(2)]


def test_arc_cosines_are_accurate_between_0_and_pi() -> None:
    x = np.cos(np.linspace(0, math.pi, 4001))
    assert arccos(x).tolist() == pytest.approx([math.acos(each) for each in x], rel=0, abs=2e-15)
    assert arccos(np.array([1.0]))[0] == 0.0


def test_sines_are_accurate_between_0_and_pi() -> None:
    x = np.linspace(0, math.pi, 4001)
    assert sin(x).tolist() == pytest.approx([math.sin(each) for each in x], rel=0, abs=5e-16)
    assert sin(np.array([0.0]))[0] == 0.0


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 100])
def test_rows_are_summed_whatever_their_number(count: int) -> None:
    rows = np.arange(3.0 * count).reshape(count, 3) ** 2
    assert sum_rows(rows).tolist() == rows.sum(0).tolist()  # integers, so exact
    assert sum_rows(rows[:, 0]) == rows[:, 0].sum()
