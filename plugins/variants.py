"""What the plugin operators have in common: kernel variants and launches. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

POINTER_TYPES = {
    "float32": "*fp32",
    "float16": "*fp16",
    "bfloat16": "*bf16",
    "int32": "*i32",
}
"""Types of tensors as the Triton language writes them."""

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

MAX_SHARED_BYTES = 48 << 10
"""Dynamic shared memory that a kernel may use without asking the driver for more."""

MAX_REGISTERS = 255
"""Per thread, on every GPU; 256 threads of them fill a multiprocessor's register file."""


@dataclass(frozen=True)
class Variant:
    """A kernel specialised for one data type and one set of compile-time constants.

    Attributes:
        name: Distinct among the variants of one model, and the beginning of a file name.
        op: ``TomeMatch`` or ``TomeMerge``.
        dtype: Type of the keys or of x: float32, float16 or bfloat16.
        constants: Compile-time constants of the kernel by name.
        num_warps: Warps per program, of 32 threads each.
        max_registers: Per thread, of which the assembler may use as many; None leaves it to the
            assembler's own guess of how many programs should share a multiprocessor.
    """

    name: str
    op: str
    dtype: str
    constants: Mapping[str, int | str] = field(hash=False)
    num_warps: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Launch:
    """How a kernel is started. Numbers, or TensorRT's symbolic expressions of the batch.

    Attributes:
        grid: Programs in x, y and z.
        scalars: The kernel's integer arguments, in order, between inputs and outputs.
    """

    grid: tuple[Any, Any, Any]
    scalars: tuple[Any, ...]


def next_power_of_2(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()
