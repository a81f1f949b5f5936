"""The merge kernel's PTX, as it is shipped, executed and held to the reference."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from merge_cases import DTYPES, assert_as_good_as_eager, exact, normal, random_plan, sizes
from ptx_interpreter import PtxError, fma, launch

from tome_export.plugins.merge import contract
from tome_export.plugins.store import DEFAULT_CAPABILITIES

WIDTH = 768


def array(tensor):
    """The tensor's memory; NumPy has no bfloat16."""
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def execute(binary, x, size, keep, src, dst):
    """What the kernel writes: x' and size', NaN where it writes nothing."""
    (batch, tokens, width), r = x.shape, src.shape[1]
    start = contract.launch(batch, tokens, r)
    outputs = (
        torch.full((batch, tokens - r, width), float("nan"), dtype=x.dtype),
        torch.full((batch, tokens - r), float("nan")),
    )
    arguments = [
        *(array(tensor.contiguous()) for tensor in (x, size, keep, src, dst)),
        *start.scalars,
        *(array(tensor) for tensor in outputs),
    ]
    assert start.grid[1:] == (1, 1)
    launch(
        binary.ptx,
        binary.entry,
        start.grid[0],
        binary.threads,
        binary.shared_bytes,
        arguments,
    )
    return outputs


@pytest.fixture
def run(compiled):
    """``run(x, size, plan, capability)`` with the kernel for x's width and type."""

    def run(x, size, plan, capability="9.0"):
        name = str(x.dtype).removeprefix("torch.")
        return execute(compiled(contract.variant(x.shape[-1], name), capability), x, size, *plan)

    return run


@pytest.mark.parametrize(
    ("dtype", "capability"),
    [
        *(("fp16", capability) for capability in DEFAULT_CAPABILITIES),
        # Both forms of arithmetic: of single numbers, and from 10.0 on of pairs.
        *((dtype, capability) for dtype in ("fp32", "bf16") for capability in ("9.0", "10.0")),
    ],
)
def test_every_architectures_code_merges(run, dtype, capability):
    x, size, plan = normal(2, 9, WIDTH).to(DTYPES[dtype]), sizes(2, 9), random_plan(2, 9, 5)
    assert_as_good_as_eager(run(x, size, plan, capability), x, size, plan)


@pytest.mark.parametrize("width", [192, 384, 1024, 1152])
def test_widths(run, width):
    x, size, plan = normal(1, 9, width).half(), sizes(1, 9), random_plan(1, 9, 4)
    assert_as_good_as_eager(run(x, size, plan), x, size, plan)


@pytest.mark.parametrize(("tokens", "r"), [(2, 1), (4, 0), (9, 6)])
def test_tokens(run, tokens, r):
    x, size, plan = normal(3, tokens, WIDTH), sizes(3, tokens), random_plan(3, tokens, r)
    assert_as_good_as_eager(run(x, size, plan), x, size, plan)


def test_all_fold_into_one_from_more_than_one_block(run):
    keep, src, dst = random_plan(1, contract.BLOCK_R + 12, contract.BLOCK_R + 8)
    plan = keep, src, torch.full_like(dst, 2)
    x, size = normal(1, contract.BLOCK_R + 12, WIDTH).half(), sizes(1, contract.BLOCK_R + 12)
    assert_as_good_as_eager(run(x, size, plan), x, size, plan)


@pytest.mark.parametrize("index", [-1, -(2**31), 12, 2**31 - 1])
def test_a_token_outside_reads_as_nothing(run, index):
    """Reading it would be an address outside x, at which the interpreter stops."""
    x, size, (keep, src, dst) = normal(1, 12, WIDTH), sizes(1, 12), random_plan(1, 12, 5)
    src[0, 2] = index
    others = [0, 1, 3, 4]
    merged, total = run(x, size, (keep, src, dst))
    expected, expected_total = exact(x, size, (keep, src[:, others], dst[:, others]))
    assert torch.equal(total.double(), expected_total)
    assert (merged - expected).abs().max() < 1e-6


def test_a_token_without_destination_is_dropped(run):
    x, size, (keep, src, dst) = normal(1, 12, WIDTH), sizes(1, 12), random_plan(1, 12, 5)
    dst[0, 2] = -1
    others = [0, 1, 3, 4]
    merged, total = run(x, size, (keep, src, dst))
    expected, expected_total = exact(x, size, (keep, src[:, others], dst[:, others]))
    assert torch.equal(total.double(), expected_total)
    assert (merged - expected).abs().max() < 1e-6


# What is changed in the text, and the error, or None if another result is enough.
MUTATIONS = {
    "first_instead_of_lowest": ("redux.sync.min.s32", "redux.sync.add.s32", "of 28 bytes"),
    "product_instead_of_mean": ("div.rn.f32", "mul.f32", None),
    "a_number_not_added": ("%r43, %r61, %r85;", "%r43, %r61, %r43;", None),
    "another_width": (", 1536, ", ", 1534, ", "not a multiple"),
    "parameters_swapped": ("merge_kernel_param_6];", "merge_kernel_param_5];", "division by zero"),
    "no_barrier": ("bar.sync", "// bar.sync", "a race in shared memory"),
    "not_known": ("setp.lt.s32 \t%p7", "setp.ge.s32 \t%p7", "unknown instruction setp.ge.s32"),
}


@pytest.mark.parametrize("case", MUTATIONS)
def test_other_code_is_told_apart(compiled, case):
    old, new, error = MUTATIONS[case]
    binary = compiled(contract.variant(WIDTH, "float16"), "9.0")
    assert old in binary.ptx
    inputs = normal(1, 12, WIDTH).half(), sizes(1, 12), *random_plan(1, 12, 7)
    changed = replace(binary, ptx=binary.ptx.replace(old, new))
    if error:
        with pytest.raises(PtxError, match=error):
            execute(changed, *inputs)
        return
    right, wrong = execute(binary, *inputs), execute(changed, *inputs)
    assert not all(torch.equal(a, b) for a, b in zip(right, wrong, strict=True))
    with pytest.raises(AssertionError):
        assert_as_good_as_eager(wrong, *inputs[:2], inputs[2:])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([np.zeros(1, np.float32), 1], "parameters are .* the arguments are"),
        ([np.zeros((2, 2)).T] * 5 + [2, 1] + [np.zeros(4)] * 2, "not contiguous"),
    ],
)
def test_other_arguments_are_refused(compiled, arguments, error):
    binary = compiled(contract.variant(WIDTH, "float16"), "9.0")
    with pytest.raises(PtxError, match=error):
        launch(binary.ptx, binary.entry, 1, binary.threads, binary.shared_bytes, arguments)


def nearest(exact_value):
    """The float32 number nearest to a fraction."""
    near = np.float32(float(exact_value))
    around = (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf)))
    return min(around, key=lambda value: abs(Fraction(float(value)) - exact_value))


def test_fma_rounds_once():
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((3, 500)).astype(np.float32)
    c *= np.float32(2) ** rng.integers(-40, 8, 500)
    # The square lies in the middle of two numbers; in float64 what is added would vanish.
    middle, little = np.float32(1 + 2**-12), np.float32(2**-60)
    a, b = (np.append(values, [middle, middle]) for values in (a, b))
    c = np.append(c, [little, -little])
    fractions = ([Fraction(float(v)) for v in values] for values in zip(a, b, c, strict=True))
    expected = [nearest(x * y + z) for x, y, z in fractions]
    np.testing.assert_array_equal(fma(a, b, c), np.array(expected, np.float32))
    assert fma(a, b, c)[-2] > fma(a, b, c)[-1]
