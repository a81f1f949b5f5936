"""What TomeMatch takes, how its kernel is specialised and started. Imports nothing heavy.

The kernel's arguments are ``INPUTS``, ``SCALARS``, ``OUTPUTS`` in this order, which is the order in
which TensorRT hands them over.
"""

from __future__ import annotations

import math
from typing import Any

from tome_export.merge import spec
from tome_export.plugins.variants import (
    MAX_REGISTERS,
    POINTER_TYPES,
    Launch,
    Variant,
    next_power_of_2,
)

OP = spec.MATCH
INPUTS = ("keys",)
SCALARS = (
    "heads",
    "tokens",
    "r",
    "prefix",
    "class_token",
    "image_stride",
    "head_stride",
    "token_stride",
    "offset",
)
OUTPUTS = spec.MATCH_OUTPUTS
DTYPES = ("float32", "float16", "bfloat16")

MAX_TOKENS = 4096
MAX_WIDTH = 1024
NUM_WARPS = 8
DOT = "tf32x3"
"""Precision of the product, ``input_precision`` of the Triton language's ``dot``."""

MAX_ELEMENTS = (1 << 31) - 1
"""From the first to the last key of an image, whose places the kernel counts in 32 bits."""

BLOCK_A, BLOCK_B, BLOCK_D = 128, 64, 32
UNROLL = 4
"""Heads whose keys are loaded at a time."""
# Comparisons that a program makes at a time while ranking.
_RANK_COMPARISONS = 4096


def refusal(
    tokens: int,
    width: int,
    dtype: str,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,  # noqa: ARG001 - a pointer's, which has 64 bits
) -> str | None:
    """Why the kernel cannot take such keys, or None; arguments as for ``variant``."""
    if dtype not in DTYPES:
        return f"keys are {dtype}; the TomeMatch kernel takes {', '.join(DTYPES)}"
    if tokens > MAX_TOKENS:
        return f"a layer has {tokens} tokens; the TomeMatch kernel takes at most {MAX_TOKENS}"
    if width > MAX_WIDTH:
        return f"heads are {width} wide; the TomeMatch kernel takes at most {MAX_WIDTH}"
    reach = max(tokens * (strides or (width,))[-1], (strides or (0,))[0])
    if reach > MAX_ELEMENTS:
        return (
            f"the keys of an image reach over {reach} elements; the TomeMatch kernel counts to "
            f"{MAX_ELEMENTS}"
        )
    return None


def variant(
    tokens: int,
    width: int,
    dtype: str,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
    dot: str = DOT,
) -> Variant:
    """The kernel for keys of N tokens, prefix tokens included, and D numbers per head.

    ``strides`` are of image, head and token in elements, None if the keys are contiguous;
    ``offset`` is the elements before the first key.
    """
    unit = _stride_unit(strides or (width,), offset)
    tiles = next_power_of_2(-(-((tokens + 1) // 2) // BLOCK_A))
    return Variant(
        f"{OP}_{dtype}_d{width}_u{unit}_n{2 * tiles * BLOCK_A}",
        OP,
        dtype,
        {
            "WIDTH": width,
            "STRIDE_UNIT": unit,
            "BLOCK_A": BLOCK_A,
            "BLOCK_B": BLOCK_B,
            "BLOCK_D": BLOCK_D,
            "TILES": tiles,
            "RANK_CHUNK": max(2, _RANK_COMPARISONS // (tiles * BLOCK_A)),
            "UNROLL": UNROLL,
            "DOT": dot,
        },
        NUM_WARPS,
        # One program is all that a multiprocessor gets, unless the batch is large. Left to itself
        # the assembler saves registers for a second one: some spill, and the keys of four heads
        # are waited for in two or three turns (plugins/README.md).
        MAX_REGISTERS,
    )


def launch(
    batch: Any,
    heads: int,
    tokens: int,
    width: int,
    r: int,
    prefix: int,
    class_token: bool,
    strides: tuple[int, ...] | None = None,
    offset: int = 0,
) -> Launch:
    """One program per image; ``batch`` is a number or a symbolic expression.

    ``heads`` is 1 for a metric that is averaged already; ``0 <= r <= (N - prefix) // 2``; strides
    and offset are as for ``variant``.
    """
    image, head, token = strides or (heads * tokens * width, tokens * width, width)
    unit = _stride_unit(strides or (width,), offset)
    scalars = (
        heads,
        tokens,
        r,
        prefix,
        int(class_token),
        image // unit,
        head // unit,
        token // unit,
        offset // unit,
    )
    return Launch((batch, 1, 1), scalars)


def signature(dtype: str) -> dict[str, str]:
    """Types of the kernel's arguments as the Triton language writes them."""
    return {
        "keys": POINTER_TYPES[dtype],
        **dict.fromkeys(SCALARS, "i32"),
        **dict.fromkeys(OUTPUTS, POINTER_TYPES["int32"]),
    }


def _stride_unit(strides: tuple[int, ...], offset: int) -> int:
    """The largest power of two up to 16 that divides all strides and the offset."""
    return math.gcd(16, offset, *strides)
