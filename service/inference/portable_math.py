"""Functions of double-precision arrays whose results are the same bits on every processor.

They are made of additions, subtractions, multiplications, divisions, square roots and scaling by
powers of two, which IEEE 754 defines to the last bit, each as an array operation of its own. The
logarithms and sines of C libraries, products of matrices, and sums along an axis differ in their
last bits between libraries, processors and instruction sets.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]

_LN_2, _PI = 0.6931471805599453, 3.141592653589793
_ARTANH = [1 / (2 * n + 1) for n in range(12)]
_ARCSIN = [math.comb(2 * n, n) / (4**n * (2 * n + 1)) for n in range(13)]
_SIN = [(-1) ** n / math.factorial(2 * n + 1) for n in range(12)]


def polynomial(coefficients: Sequence[float], x: Doubles) -> Doubles:
    """Return the values at `x` of a polynomial, given from its constant term upwards."""
    values = np.full_like(x, coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        values *= x
        values += coefficient
    return values


def log(x: Doubles) -> Doubles:
    """Return the natural logarithms of positive numbers, with a relative error below 5e-16.

    Each is that of a power of two and of a number between the square roots of 1/2 and 2, whose
    logarithm is twice the inverse hyperbolic tangent of at most 0.172 (its series).
    """
    mantissa, exponent = np.frexp(x)  # from 0.5
    low = mantissa < math.sqrt(0.5)
    mantissa = np.where(low, 2 * mantissa, mantissa)
    ratio = (mantissa - 1) / (mantissa + 1)
    of_mantissa: Doubles = 2 * ratio * polynomial(_ARTANH, ratio * ratio)
    return of_mantissa + (exponent - low) * _LN_2


def arccos(x: Doubles) -> Doubles:
    """Return the angles in [0, pi] that have these cosines, within 2e-15 of the true ones.

    The angle is halved four times, to at most pi / 16, and computed from its sine by a series.
    """
    sine, cosine = np.sqrt((1 - x) / 2), np.sqrt((1 + x) / 2)
    for _ in range(3):
        cosine = np.sqrt((1 + cosine) / 2)
        sine = sine / (2 * cosine)
    return 16 * sine * polynomial(_ARCSIN, sine * sine)


def sin(x: Doubles) -> Doubles:
    """Return the sines of angles in [0, pi], with an error below 5e-16 (Taylor's series)."""
    x = np.minimum(x, _PI - x)
    return x * polynomial(_SIN, x * x)


def sum_rows(rows: Doubles) -> Doubles:
    """Return the sum over the first axis, of one element or more; halves are added to halves."""
    while len(rows) > 1:
        half = len(rows) // 2
        sums = rows[:half] + rows[half : 2 * half]
        if len(rows) % 2:
            sums[0] += rows[-1]
        rows = sums
    total: Doubles = rows[0]
    return total
