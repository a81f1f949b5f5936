"""What TomeMatch takes, how its kernel is specialised and started. Imports nothing heavy.

The kernel's arguments are ``INPUTS``, ``SCALARS``, ``OUTPUTS`` in this order, which is the order in
which TensorRT hands them over.
"""

from __future__ import annotations

import math
from typing import Any

from tome_export.merge import spec
from tome_export.plugins.variants import POINTER_TYPES, Launch, Variant, next_power_of_2

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
)
OUTPUTS = spec.MATCH_OUTPUTS
DTYPES = ("float32", "float16", "bfloat16")

MAX_TOKENS = 4096
MAX_WIDTH = 1024
NUM_WARPS = 8
DOT = "tf32x3"
"""Precision of the product, ``input_precision`` of the Triton language's ``dot``."""

BLOCK_A, BLOCK_B, BLOCK_D = 128, 64, 32
# Comparisons that a program makes at a time while ranking.
_RANK_COMPARISONS = 4096


def refusal(tokens: int, width: int, dtype: str) -> str | None:
    """Why the kernel cannot take such keys, or None.

    Args:
        tokens: N, prefix tokens included.
        width: D, numbers per head.
        dtype: Of the keys.
    """
    if dtype not in DTYPES:
        return f"keys are {dtype}; the TomeMatch kernel takes {', '.join(DTYPES)}"
    if tokens > MAX_TOKENS:
        return f"a layer has {tokens} tokens; the TomeMatch kernel takes at most {MAX_TOKENS}"
    if width > MAX_WIDTH:
        return f"heads are {width} wide; the TomeMatch kernel takes at most {MAX_WIDTH}"
    return None


def variant(
    tokens: int,
    width: int,
    dtype: str,
    strides: tuple[int, ...] | None = None,
    dot: str = DOT,
) -> Variant:
    """The kernel for keys of N tokens and D numbers per head.

    Args:
        tokens: N.
        width: D.
        dtype: Of the keys.
        strides: Of image, head and token in elements; None if the keys are contiguous.
        dot: Precision of the product.
    """
    tiles = next_power_of_2(-(-((tokens + 1) // 2) // BLOCK_A))
    return Variant(
        f"{OP}_{dtype}_d{width}_n{2 * tiles * BLOCK_A}",
        OP,
        dtype,
        {
            "WIDTH": width,
            "STRIDE_UNIT": _stride_unit(strides or (width,)),
            "BLOCK_A": BLOCK_A,
            "BLOCK_B": BLOCK_B,
            "BLOCK_D": BLOCK_D,
            "TILES": tiles,
            "RANK_CHUNK": max(2, _RANK_COMPARISONS // (tiles * BLOCK_A)),
            "UNROLL": 4,
            "DOT": dot,
        },
        NUM_WARPS,
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
) -> Launch:
    """One program per image.

    Args:
        batch: B, a number or a symbolic expression.
        heads: H; 1 for a metric that is averaged already.
        tokens: N.
        width: D.
        r: Tokens to merge, ``0 <= r <= (N - prefix) // 2``.
        prefix: Protected tokens.
        class_token: Whether the output order is by position.
        strides: Of image, head and token in elements; None if the keys are contiguous.
    """
    image, head, token = strides or (heads * tokens * width, tokens * width, width)
    unit = _stride_unit(strides or (width,))
    scalars = (
        heads,
        tokens,
        r,
        prefix,
        int(class_token),
        image // unit,
        head // unit,
        token // unit,
    )
    return Launch((batch, 1, 1), scalars)


def signature(dtype: str) -> dict[str, str]:
    """Types of the kernel's arguments as the Triton language writes them."""
    return {
        "keys": POINTER_TYPES[dtype],
        **dict.fromkeys(SCALARS, "i32"),
        **dict.fromkeys(OUTPUTS, POINTER_TYPES["int32"]),
    }


def _stride_unit(strides: tuple[int, ...]) -> int:
    """The largest power of two up to 16 that divides all strides."""
    return math.gcd(16, *strides)
