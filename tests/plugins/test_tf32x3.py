"""How exact the scores are that TomeMatch takes from tensor cores, by a model of their arithmetic.

``tl.dot(..., input_precision="tf32x3")`` splits each fp32 number into ``hi``, rounded to the
nearest TF32 number (10 explicit bits of mantissa, ties away from zero: ``cvt.rna``), and ``lo = x -
hi``, of which the tensor core reads the leading 11 bits. Every block of ``BLOCK_D`` columns is one
chain, ``lo*hi``, then ``hi*lo``, then ``hi*hi``, added to the sum by an ordinary fp32 addition.

Tensor cores multiply exactly, align a group of products and the running sum to the largest of them,
cut off what lies below its last bit, add, and cut the sum to fp32 (Fasi, Higham, Mikaitis, Pranesh:
Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7:e330, 2021). How many products
make a group and how many spare bits there are depends on the GPU; this model takes groups of 4 and
of 8 without spare bits, which is the pessimistic end.
"""

from __future__ import annotations

import numpy as np
import pytest

from tome_export.parity.compare import fp32_score_bound
from tome_export.plugins.match.contract import BLOCK_D

F32 = np.float32


def tf32_nearest(x):
    """The nearest TF32 number, ties away from zero."""
    bits = x.astype(F32).view(np.uint32)
    return ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(F32)


def tf32_cut(x):
    """The bits of a number that a tensor core reads."""
    return (x.astype(F32).view(np.uint32) & np.uint32(0xFFFFE000)).view(F32)


def chopped_sum(terms):
    """Terms ``[..., T]`` as a tensor core adds them: ``[...]``, fp32 numbers in float64."""
    largest = np.abs(terms).max(-1, keepdims=True)
    unit = np.ldexp(1.0, np.frexp(np.where(largest > 0, largest, 1.0))[1] - 24)
    total = (np.trunc(terms / unit) * unit).sum(-1)
    unit = np.ldexp(1.0, np.frexp(np.where(total != 0, total, 1.0))[1] - 24)
    return np.trunc(total / unit) * unit


def chain(a, b, start, group):
    """``start + a b`` over the last axis of ``a [M, 1, K]`` and ``b [1, N, K]``: ``[M, N]``."""
    products = a.astype(np.float64) * b.astype(np.float64)
    for first in range(0, products.shape[-1], group):
        terms = [products[..., first : first + group], start[..., None]]
        start = chopped_sum(np.concatenate(terms, -1))
    return start


def product(a, b, group, split=True):
    """``a [M, D]`` times ``b [N, D]`` transposed: ``[M, N]`` float32."""
    a, b = a[:, None, :].astype(F32), b[None, :, :].astype(F32)
    total = np.zeros((a.shape[0], b.shape[1]), F32)
    for first in range(0, a.shape[-1], BLOCK_D):
        columns = slice(first, first + BLOCK_D)
        a_hi, b_hi = tf32_nearest(a[..., columns]), tf32_nearest(b[..., columns])
        partial = np.zeros(total.shape)
        if split:
            a_lo, b_lo = tf32_cut(a[..., columns] - a_hi), tf32_cut(b[..., columns] - b_hi)
            partial = chain(a_lo, b_hi, partial, group)
            partial = chain(a_hi, b_lo, partial, group)
        total = total + chain(a_hi, b_hi, partial, group).astype(F32)
    return total


def cosines(a, b, group, split=True):
    """Scores as the kernel takes them: the product, times the reciprocals of the two norms."""
    factors = [
        F32(1) / np.sqrt((rows * rows).sum(1, dtype=F32)) for rows in (a.astype(F32), b.astype(F32))
    ]
    return product(a, b, group, split) * factors[0][:, None] * factors[1][None, :]


def exact_cosines(a, b):
    a, b = a.astype(np.longdouble), b.astype(np.longdouble)
    norms = [np.sqrt((rows * rows).sum(1)) for rows in (a, b)]
    return (a @ b.T) / (norms[0][:, None] * norms[1][None, :])


def ratio(a, b, group, split=True):
    """The largest error as a part of what a plan may hang on."""
    error = np.abs(cosines(a, b, group, split) - exact_cosines(a, b)).max()
    return float(error / fp32_score_bound(a.shape[1]))


def random_rows(width, rng):
    rows = rng.standard_normal((96, width))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def near_duplicates(width, rng):
    return rng.standard_normal(width) + 1e-3 * rng.standard_normal((96, width))


def one_sign(width, rng):
    """Nothing cancels, so everything that is cut off adds up."""
    return rng.uniform(0.5, 1.0, (96, width))


def constant_rows(width, rng):
    """Every product is the same, and none is a TF32 number."""
    return np.repeat(rng.uniform(1, 2, (96, 1)), width, 1)


def wide_range(width, rng):
    return rng.standard_normal((96, width)) * 2.0 ** rng.integers(-30, 31, (96, width))


def falling(width, rng):
    """The largest product first: all that follow are aligned to it and lose their last bits."""
    return one_sign(width, rng) * np.geomspace(1.0, 1e-3, width)


def rising(width, rng):
    return falling(width, rng)[:, ::-1]


def cancelling(width, rng):
    """Large products that cancel in pairs over a small rest."""
    rows = rng.uniform(0.5, 1.0, (96, width))
    rows[:48, 1::2] *= -1
    return rows


ROWS = [
    random_rows,
    near_duplicates,
    one_sign,
    constant_rows,
    wide_range,
    falling,
    rising,
    cancelling,
]
WIDTHS = (16, 64, 128, 1024)


def halves(rows):
    rows = rows.astype(F32)
    return rows[::2], rows[1::2]


@pytest.mark.parametrize("group", [4, 8])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("make", ROWS, ids=lambda make: make.__name__)
def test_three_products_are_within_the_fp32_bound(make, width, group):
    a, b = halves(make(width, np.random.default_rng(width)))
    assert ratio(a, b, group) < 1


@pytest.mark.parametrize(
    "make", [random_rows, near_duplicates, wide_range], ids=lambda m: m.__name__
)
@pytest.mark.parametrize("width", [16, 64, 128])
def test_one_product_is_not(make, width):
    """So the bound tells the two apart; over very many columns the errors of TF32 average out."""
    a, b = halves(make(width, np.random.default_rng(width)))
    assert ratio(a, b, 4, split=False) > 1


@pytest.fixture(scope="module")
def digit_metrics():
    """Mean keys ``[N, D]`` of four images in every merging layer of the trained digits model."""
    from tome_export.data.samples import digits_test
    from tome_export.models import RECIPES
    from tome_export.parity.reference import run_reference
    from tome_export.patch import patch

    loaded = RECIPES["vit_digits"].load()
    layers = run_reference(patch(loaded.module, 8), digits_test()[0][:4]).layers
    assert len(layers) > 1
    return [metric for record in layers.values() for metric in record.signals[0]]


@pytest.mark.parametrize("group", [4, 8])
def test_real_keys(digit_metrics, group):
    ratios = [ratio(metric[::2], metric[1::2], group) for metric in digit_metrics]
    assert max(ratios) < 1
    plain = [ratio(metric[::2], metric[1::2], group, split=False) for metric in digit_metrics]
    assert min(plain) > 1


def test_model_of_the_rounding():
    one = F32(1)
    ulp = F32(2.0**-10)
    assert tf32_nearest(np.array([one + ulp / 2, -one - ulp / 2])).tolist() == [1 + ulp, -1 - ulp]
    assert tf32_nearest(np.array([one + ulp * F32(0.499)])).tolist() == [1]
    assert tf32_cut(np.array([one + ulp * F32(0.999), -one - ulp * F32(0.999)])).tolist() == [1, -1]
    # 2^-24 is cut off beside 1, each time; the sum of both is cut to 24 bits.
    assert chopped_sum(np.array([1.0, 2.0**-24, 2.0**-24])) == 1.0
    assert chopped_sum(np.array([1.0, 2.0**-23])) == 1.0 + 2.0**-23
    assert chopped_sum(np.array([1.0, 1.0 + 2.0**-23])) == 2.0
    assert chopped_sum(np.array([-1.0, -(2.0**-24)])) == -1.0
