"""Standard normal deviates from random words, the same bits on every processor.

A table takes the place of the logarithm and the cosine of Box & Muller, whose last bits differ
between processors: T holds 2^16 quantiles of the standard normal distribution, scaled to unit
variance. Two entries a and b, drawn at random, give two deviates by a rotation:

    0.8 a - 0.6 b  and  0.6 a + 0.8 b

A rotation keeps two independent normal numbers independent and normal, and the sums are much finer
than the table and reach 6.05 in place of 4.32.
"""

from functools import cache

import numpy as np
from numpy.typing import NDArray

from service.inference.portable_math import Doubles, log, polynomial, sum_rows

_ENTRIES = 1 << 16
_STEP = 2.0**-19
_ROTATION = np.complex64(1 + 0.75j)  # of numbers that are 0.8 times as long
DEVIATES_PER_WORD = 4

# Wichura, "Algorithm AS 241: The percentage points of the normal distribution", Applied Statistics
# 37(3), 1988, PPND16: ratios of polynomials, each given from its constant term upwards.
_MIDDLE = (
    (
        *(3.3871328727963666080, 133.14166789178437745, 1971.5909503065514427),
        *(13731.693765509461125, 45921.953931549871457, 67265.770927008700853),
        *(33430.575583588128105, 2509.0809287301226727),
    ),
    (
        *(1.0, 42.313330701600911252, 687.18700749205790830, 5394.1960214247511077),
        *(21213.794301586595867, 39307.895800092710610, 28729.085735721942674),
        *(5226.4952788528545610,),
    ),
)
_TAIL = (
    (
        *(1.42343711074968357734, 4.63033784615654529590, 5.76949722146069140550),
        *(3.64784832476320460504, 1.27045825245236838258, 0.241780725177450611770),
        *(0.0227238449892691845833, 7.74545014278341407640e-4),
    ),
    (
        *(1.0, 2.05319162663775882187, 1.67638483018380384940, 0.689767334985100004550),
        *(0.148103976427480074590, 0.0151986665636164571966, 5.47593808499534494600e-4),
        *(1.05075007164441684324e-9,),
    ),
)


def upper_quantiles(tails: Doubles) -> Doubles:
    """Return the numbers that a standard normal variable exceeds with these probabilities.

    Args:
        tails: probabilities from 1.4e-11 to 0.5. The relative error is below 2e-15.
    """
    from_middle = 0.5 - tails
    squares = 0.180625 - from_middle * from_middle
    middle = from_middle * polynomial(_MIDDLE[0], squares) / polynomial(_MIDDLE[1], squares)
    distances = np.sqrt(-log(tails)) - 1.6
    tail = polynomial(_TAIL[0], distances) / polynomial(_TAIL[1], distances)
    return np.where(from_middle <= 0.425, middle, tail)


@cache
def normal_table() -> NDArray[np.float32]:
    """Return 0.8 T, in ascending order, as multiples of 2^-19.

    T has the quantiles in the middle of 65,536 intervals of equal probability. The entries have at
    most 21 binary digits, so that three quarters of one and the sums of both have at most 24: no
    operation on them is rounded, in single precision, with fused multiplications or without. Their
    distance is 20 of these steps or more. The table takes 256 KiB, so that a processor's
    second-level cache holds it.
    """
    half = _ENTRIES // 2
    upper = upper_quantiles((2 * np.arange(half) + 1) / (2 * _ENTRIES))  # in descending order
    upper *= 0.8 / np.sqrt(sum_rows(upper * upper) / half)
    upper = np.rint(upper / _STEP) * _STEP
    table = np.concatenate((-upper, upper[::-1])).astype(np.float32)
    table.flags.writeable = False
    return table


def normal_deviates(words: NDArray[np.uint64]) -> NDArray[np.float32]:
    """Return four standard normal deviates for each word: (N, W) to (N, 4 * W).

    The quarters of a word choose entries, from its lowest; each two of them are rotated.
    """
    quarters = words.astype("<u8", copy=False).view("<u2")  # (N, 4 * W)
    deviates = normal_table().take(quarters)
    pairs = deviates.view(np.complex64)
    pairs *= _ROTATION
    return deviates
