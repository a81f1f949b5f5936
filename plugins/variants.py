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

REGISTER_FILE = 1 << 16
"""32-bit registers of a multiprocessor."""


@dataclass(frozen=True)
class Variant:
    """A kernel specialised for one data type and one set of compile-time constants.

    Attributes:
        name: Distinct among the variants of one model, and the beginning of a file name.
        op: ``TomeMatch`` or ``TomeMerge``.
        dtype: Of the keys or of x: float32, float16 or bfloat16.
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


@dataclass(frozen=True)
class TensorCore:
    """The instruction by which an architecture multiplies matrices of TF32 numbers.

    Attributes:
        instruction: As the disassembler writes it.
        products: Multiplications and additions that one makes.
        warps: That execute one together; 0 if it stands for the whole program.
    """

    instruction: str
    products: int
    warps: int


@dataclass(frozen=True)
class Architecture:
    """What the limits of a kernel hang on, by compute capability.

    Attributes:
        threads: That a multiprocessor holds at a time (CUDA programming guide, technical
            specifications per compute capability).
        tensor_core: Its TF32 instruction.
    """

    threads: int
    tensor_core: TensorCore


_HMMA = TensorCore("HMMA.1688.F32.TF32", 16 * 8 * 8, 1)

ARCHITECTURES = {
    "8.0": Architecture(2048, _HMMA),
    "8.6": Architecture(1536, _HMMA),
    "8.9": Architecture(1536, _HMMA),
    "9.0": Architecture(2048, TensorCore("HGMMA.64x64x8.F32.TF32", 64 * 64 * 8, 4)),
    "10.0": Architecture(2048, TensorCore("UTCHMMA", 128 * 64 * 8, 0)),
    "12.0": Architecture(1536, _HMMA),
}
"""Of the compute capabilities that are compiled for by default."""


@dataclass(frozen=True)
class Limits:
    """What the machine code of a variant is held to on one architecture.

    ``scripts/kernel_figures.py`` takes the figures, tests compare them.

    Attributes:
        registers: Per thread, at most.
        spill_bytes: Of registers kept in memory, stored and loaded together per thread, at most.
        loads_in_flight: From global memory in the loop that makes most of them, at least: as many
            follow each other before an instruction needs what one of them brings.
        tensor_core: The instruction of the product; None if there is no product.
        tensor_core_count: How many of it there are in the code.
    """

    registers: int
    spill_bytes: int
    loads_in_flight: int
    tensor_core: str | None = None
    tensor_core_count: int = 0


def next_power_of_2(value: int) -> int:
    """The least power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()
