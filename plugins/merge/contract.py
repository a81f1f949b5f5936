"""What TomeMerge takes, how its kernel is specialised and started. Imports nothing heavy.

The kernel's arguments are ``INPUTS``, ``SCALARS``, ``OUTPUTS`` in this order, which is the order in
which TensorRT hands them over.
"""

from __future__ import annotations

from typing import Any

from tome_export.merge import spec
from tome_export.plugins.variants import POINTER_TYPES, Launch, Variant, next_power_of_2

OP = spec.MERGE
INPUTS = spec.MERGE_INPUTS
SCALARS = ("tokens", "r")
OUTPUTS = ("x_out", "size_out")
DTYPES = ("float32", "float16", "bfloat16")

MAX_WIDTH = 8192
BLOCK_R = 128
# Numbers of one token per warp: eight per thread, 16 bytes of float16.
_PER_WARP = 256


def refusal(width: int, dtype: str) -> str | None:
    """Why the kernel cannot take tokens of C numbers of that type, or None."""
    if dtype not in DTYPES:
        return f"tokens are {dtype}; the TomeMerge kernel takes {', '.join(DTYPES)}"
    if width > MAX_WIDTH:
        return f"tokens are {width} wide; the TomeMerge kernel takes at most {MAX_WIDTH}"
    return None


def variant(width: int, dtype: str) -> Variant:
    """The kernel for tokens of C numbers."""
    block = next_power_of_2(width)
    warps = min(8, max(1, block // _PER_WARP))
    constants: dict[str, int | str] = {"WIDTH": width, "BLOCK_C": block, "BLOCK_R": BLOCK_R}
    return Variant(f"{OP}_{dtype}_c{width}", OP, dtype, constants, warps)


def launch(batch: Any, tokens: int, r: int) -> Launch:
    """One program per output token; B is a number or a symbolic expression."""
    return Launch((batch * (tokens - r), 1, 1), (tokens, r))


def signature(dtype: str) -> dict[str, str]:
    """Types of the kernel's arguments as the Triton language writes them."""
    value, index, size = (POINTER_TYPES[t] for t in (dtype, "int32", "float32"))
    return {
        "x": value,
        "size": size,
        **dict.fromkeys(INPUTS[2:], index),
        **dict.fromkeys(SCALARS, "i32"),
        "x_out": value,
        "size_out": size,
    }
