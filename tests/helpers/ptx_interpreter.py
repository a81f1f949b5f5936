"""Executes PTX as the compiler writes it, on the CPU: one program after another, thread by thread.

All threads of a program take each instruction together, as arrays of raw bits, which holds for code
whose branches are taken by all of them or none. What an instruction means follows the PTX ISA; one
that is not known here raises, and so does what goes wrong on a GPU without being seen there: an
address outside the buffers or not aligned, and shared memory that threads of another warp read or
write without a barrier between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

WARP = 32
TYPES = {
    "s32": np.int32,
    "u32": np.uint32,
    "b32": np.uint32,
    "f32": np.float32,
    "s64": np.int64,
    "u64": np.uint64,
    "b64": np.uint64,
    "b16": np.uint16,
    "f16": np.float16,
}
WIDTHS = {"rs": np.uint16, "r": np.uint32, "rd": np.uint64, "p": np.bool_}
"""How registers are kept, by the beginning of their names."""

UNWRITTEN = 0xA5
"""Every byte that nothing has written: of shared memory, and of a register in some threads."""

MOST_INSTRUCTIONS = 1_000_000
"""Instructions that one program may run; one that takes more does not end."""


class PtxError(Exception):
    """What a program does that it must not, or what the interpreter does not know."""


def launch(
    ptx: str,
    entry: str,
    grid: int,
    threads: int,
    shared_bytes: int,
    arguments: Sequence[Array | int],
) -> None:
    """Run a kernel; output buffers are written in place.

    Args:
        ptx: The module's text.
        entry: Name of the kernel.
        grid: Programs.
        threads: Per program.
        shared_bytes: Dynamic shared memory of a program.
        arguments: Contiguous arrays for pointers, numbers for 32-bit integers.

    Raises:
        PtxError: if the program goes wrong or uses what is not known here.
    """
    found = re.search(rf"\.entry {re.escape(entry)}\((.*?)\n\)(.*?)\n\{{(.*?)\n\}}", ptx, re.DOTALL)
    if found is None:
        raise PtxError(f"no kernel {entry}")
    kinds = re.findall(r"\.param \.(\w+)", found[1])
    required = re.search(r"\.reqntid (\d+)", found[2])
    if required is None or int(required[1]) != threads:
        raise PtxError(f"started with {threads} threads; the kernel wants {found[2].strip()}")
    expected = ["u32" if isinstance(value, int) else "u64" for value in arguments]
    if kinds != expected:
        raise PtxError(f"parameters are {kinds}; the arguments are {expected}")
    memory = GlobalMemory([value for value in arguments if not isinstance(value, int)])
    bases = iter(memory.bases)
    parameters = {
        f"{entry}_param_{index}": value if isinstance(value, int) else next(bases)
        for index, value in enumerate(arguments)
    }
    instructions, labels = parse(found[3])
    for program in range(grid):
        _Program(instructions, labels, parameters, memory, program, threads, shared_bytes).run()


def parse(body: str) -> tuple[list[tuple[str | None, str, list[str]]], dict[str, int]]:
    """Instructions as (predicate, name, operands), and the index that each label stands for."""
    text = re.sub(r"//[^\n]*", "", body)
    instructions: list[tuple[str | None, str, list[str]]] = []
    labels: dict[str, int] = {}
    for statement in re.findall(r"\$\w+:|[^;\s][^;]*;", text):
        if statement.endswith(":"):
            labels[statement[:-1]] = len(instructions)
            continue
        found = re.fullmatch(r"(?:@(!?%p\d+)\s+)?([\w.]+)\s*(.*?)\s*;", statement, re.DOTALL)
        if found is None and not statement.startswith(".reg"):
            raise PtxError(f"cannot read {statement!r}")
        if found is not None and found[2] != ".reg":
            operands = [
                part.strip() for part in re.findall(r"\{[^}]*\}|\[[^]]*\]|[^,\s][^,]*", found[3])
            ]
            instructions.append((found[1], found[2], operands))
    return instructions, labels


class GlobalMemory:
    """Buffers at addresses far from each other."""

    def __init__(self, buffers: Sequence[Array]) -> None:
        self._buffers = [buffer.reshape(-1).view(np.uint8) for buffer in buffers]
        if not all(buffer.flags.c_contiguous for buffer in buffers):
            raise PtxError("a buffer is not contiguous")
        self.bases = [(index + 1) << 40 for index in range(len(buffers))]

    def load(self, addresses: Array, size: int) -> Array:
        """Bytes ``[n, size]``."""
        buffer, offsets = self._places(addresses, size)
        return buffer[offsets]

    def store(self, addresses: Array, values: Array) -> None:
        """Write bytes ``[n, size]``."""
        buffer, offsets = self._places(addresses, values.shape[1])
        buffer[offsets] = values

    def _places(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """The one buffer that all addresses lie in, and offsets ``[n, size]`` of the bytes."""
        index = int(addresses[0] >> np.uint64(40)) - 1
        if not 0 <= index < len(self._buffers):
            raise PtxError(f"address {addresses[0]:#x} lies in no buffer")
        buffer = self._buffers[index]
        offsets = addresses.astype(np.int64) - self.bases[index]
        if (offsets < 0).any() or (offsets + size > buffer.size).any():
            raise PtxError(f"offsets {offsets.min()} to {offsets.max()} of {buffer.size} bytes")
        if (offsets % size).any():
            raise PtxError(f"an address is not a multiple of {size}")
        return buffer, offsets[:, None] + np.arange(size)


class SharedMemory:
    """A program's shared memory, which knows what was accessed since the last barrier."""

    def __init__(self, size: int, warps: int) -> None:
        self._bytes = np.full(size, UNWRITTEN, np.uint8)
        self._read, self._written = np.zeros((2, warps, size), bool)

    def barrier(self) -> None:
        """All threads have come here."""
        self._read[:] = self._written[:] = False

    def load(self, addresses: Array, size: int, warps: Array) -> Array:
        """Bytes ``[n, size]`` for threads of those warps."""
        offsets = self._offsets(addresses, size)
        self._read[warps[:, None], offsets] = True
        self._see_order()
        return self._bytes[offsets]

    def store(self, addresses: Array, values: Array, warps: Array) -> None:
        """Write bytes ``[n, size]``; several warps may write the same to one place."""
        offsets = self._offsets(addresses, values.shape[1])
        others = self._written.any(0)[offsets] & ~self._written[warps[:, None], offsets]
        changed = others & (self._bytes[offsets] != values)
        self._bytes[offsets] = values
        if changed.any() or (self._bytes[offsets] != values).any():
            raise PtxError("a race in shared memory: threads write different values to one place")
        self._written[warps[:, None], offsets] = True
        self._see_order()

    def _offsets(self, addresses: Array, size: int) -> Array:
        offsets = addresses.astype(np.int64)[:, None] + np.arange(size)
        if (offsets >= len(self._bytes)).any() or (addresses % size).any():
            raise PtxError(f"shared addresses up to {offsets.max()} of {len(self._bytes)}")
        return offsets

    def _see_order(self) -> None:
        several = (self._read | self._written).sum(0) > 1
        if (several & self._read.any(0) & self._written.any(0)).any():
            raise PtxError("a race in shared memory: no barrier between two warps' accesses")


class _Program:
    """One program: registers as ``[threads]`` arrays of raw bits."""

    def __init__(
        self,
        instructions: list[tuple[str | None, str, list[str]]],
        labels: Mapping[str, int],
        parameters: Mapping[str, int],
        memory: GlobalMemory,
        program: int,
        threads: int,
        shared_bytes: int,
    ) -> None:
        self.instructions, self.labels, self.parameters = instructions, labels, parameters
        self.memory, self.shared = memory, SharedMemory(shared_bytes, threads // WARP)
        self.thread = np.arange(threads, dtype=np.uint32)
        self.special = {
            "%tid.x": self.thread,
            "%ctaid.x": np.full(threads, program, np.uint32),
            "global_smem": np.zeros(threads, np.uint32),
        }
        self.registers: dict[str, Array] = {}

    def run(self) -> None:
        """From the first instruction to ``ret``."""
        at = 0
        for _ in range(MOST_INSTRUCTIONS):
            guard, name, operands = self.instructions[at]
            at += 1
            active = np.ones(len(self.thread), bool)
            if guard is not None:
                active = self.register(guard.removeprefix("!")) ^ guard.startswith("!")
            if name in ("bra", "bra.uni"):
                if active.any() != active.all():
                    raise PtxError("a branch that only some threads take")
                at = self.labels[operands[0]] if active.all() else at
            elif name == "ret":
                return
            elif name == "bar.sync":
                self.shared.barrier()
            else:
                self.execute(name, operands, active)
        raise PtxError(f"no end after {MOST_INSTRUCTIONS} instructions")

    def execute(self, name: str, operands: list[str], active: Array) -> None:
        """One instruction that is no branch and no barrier."""
        operation, _, kind = name.partition(".")
        if operation in ("ld", "st"):
            self.move_memory(operation, kind, operands, active)
        elif name in ("mov.b32", "mov.b64") and any(o.startswith("{") for o in operands):
            self.repack(operands, active)
        elif name.startswith("redux.sync."):
            self.reduce_warps(kind.split(".")[1], operands, active)
        elif name == "shfl.sync.bfly.b32":
            self.exchange(operands, active)
        elif name in INSTRUCTIONS:
            kinds, compute = INSTRUCTIONS[name]
            with np.errstate(all="ignore"):
                result = compute(
                    *(self.read(o, k) for o, k in zip(operands[1:], kinds, strict=True))
                )
            self.write(operands[0], result, active)
        else:
            raise PtxError(f"unknown instruction {name}")

    def register(self, name: str) -> Array:
        """Raw bits of a register."""
        if name not in self.registers:
            raise PtxError(f"{name} is read and was not written")
        return self.registers[name]

    def read(self, operand: str, kind: str) -> Array:
        """An operand as numbers of a type; ``pred`` for truth."""
        if operand.startswith("0f"):
            bits: Any = np.uint32(int(operand[2:], 16))
        elif re.match(r"-?\d", operand):
            number = np.array(int(operand, 0) & (1 << 64) - 1, np.uint64)
            bits = number.astype(np.bool_ if kind == "pred" else f"u{TYPES[kind]().itemsize}")
        elif operand in self.special:
            bits = self.special[operand]
        else:
            bits = self.register(operand)
        values = np.ascontiguousarray(np.broadcast_to(bits, self.thread.shape))
        return values.view(np.bool_ if kind == "pred" else TYPES[kind])

    def write(self, name: str, values: Array, active: Array) -> None:
        """Put values into a register, in the threads that take part."""
        found = re.fullmatch(r"%(rs|rd|r|p)\d+", name)
        if found is None:
            raise PtxError(f"unknown register {name}")
        width = np.dtype(WIDTHS[found[1]])
        if name not in self.registers:
            fill = np.full(len(self.thread) * width.itemsize, UNWRITTEN, np.uint8)
            self.registers[name] = fill.view(width) if width != np.bool_ else fill > 0
        bits = np.ascontiguousarray(values).view(width)
        self.registers[name] = np.where(active, bits, self.registers[name])

    def move_memory(self, operation: str, kind: str, operands: list[str], active: Array) -> None:
        """``ld`` and ``st`` of parameters, global and shared memory."""
        space, *vector, kind = kind.split(".")
        registers, place = operands if operation == "ld" else operands[::-1]
        names = re.findall(r"%\w+", registers)
        found = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+)\s*)?\]", place)
        size = np.dtype(TYPES[kind]).itemsize
        if found is None or len(names) != int(vector[0][1:] if vector else 1):
            raise PtxError(f"cannot read {operation}.{space} {operands}")
        if space == "param" and operation == "ld":
            value = np.full(len(self.thread), self.parameters[found[1]] & (1 << 64) - 1, np.uint64)
            self.write(names[0], value if size == 8 else value.astype(np.uint32), active)
            return
        if not active.any():
            return
        base = self.read(found[1], "u64" if space == "global" else "u32")
        addresses = (base.astype(np.uint64) + np.uint64(int(found[2] or 0)))[active]
        memory: Any = {"global": self.memory, "shared": self.shared}.get(space)
        if memory is None:
            raise PtxError(f"unknown memory {operation}.{space}")
        warps = () if space == "global" else ((self.thread // WARP)[active].astype(np.int64),)
        if operation == "ld":
            loaded = memory.load(addresses, size * len(names), *warps).view(TYPES[kind])
            for name, column in zip(names, loaded.T, strict=True):
                values = np.zeros(len(self.thread), loaded.dtype)
                values[active] = column
                self.write(name, values, active)
        else:
            columns = np.stack([self.register(name)[active] for name in names], 1)
            memory.store(addresses, columns.view(np.uint8), *warps)

    def repack(self, operands: list[str], active: Array) -> None:
        """``mov`` between a register and its two halves, of which the lower stands first."""
        target, source = operands
        names = re.findall(r"%\w+", target if target.startswith("{") else source)
        if target.startswith("{"):
            whole = self.register(source).copy()
            halves = whole.view({8: np.uint32, 4: np.uint16}[whole.itemsize]).reshape(-1, 2)
            for name, half in zip(names, halves.T, strict=True):
                self.write(name, half, active)
        else:
            halves = np.stack([self.register(name) for name in names], 1)
            self.write(
                target, halves.view({4: np.uint64, 2: np.uint32}[halves.itemsize])[:, 0], active
            )

    def exchange(self, operands: list[str], active: Array) -> None:
        """``shfl.sync.bfly``: what the thread holds whose lane differs in the given bits."""
        target, source, bits, lanes, mask = operands
        if (
            not active.all()
            or int(lanes, 0) != WARP - 1
            or int(mask, 0) not in (-1, (1 << WARP) - 1)
        ):
            raise PtxError("an exchange that is not among all threads of a warp")
        self.write(target, self.register(source)[self.thread ^ np.uint32(int(bits, 0))], active)

    def reduce_warps(self, operation: str, operands: list[str], active: Array) -> None:
        """``redux.sync`` over whole warps."""
        target, source, mask = operands
        if not active.all() or not (self.read(mask, "s32") == -1).all():
            raise PtxError("a reduction that not all threads of a warp take part in")
        lanes = self.read(source, "s32").reshape(-1, WARP)
        reduce = {"add": np.add, "min": np.minimum}[operation].reduce
        self.write(target, np.repeat(reduce(lanes, 1, dtype=np.int32), WARP), active)


def fma(a: Array, b: Array, c: Array) -> Array:
    """``a b + c`` of float32, rounded once.

    The product is exact in float64. Their sum is rounded to odd, which a second rounding to
    float32 does not see (Boldo, Melquiond: Emulation of FMA and correctly rounded sums, 2008).
    """
    product, more = a.astype(np.float64) * b, c.astype(np.float64)
    total = product + more
    part = total - product
    error = (product - (total - part)) + (more - part)
    even = (total.view(np.uint64) & np.uint64(1)) == 0
    inexact = np.isfinite(total) & (error != 0) & even
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where(inexact, odd, total).astype(np.float32)


def _pairs(compute: Callable[..., Array]) -> Callable[..., Array]:
    """An operation on the two float32 numbers of 64-bit registers."""
    return lambda *values: compute(*(v.view(np.float32) for v in values)).view(np.uint64)


def _quotient(a: Array, b: Array) -> Array:
    """Whole quotient, towards zero."""
    if (b == 0).any():
        raise PtxError("a division by zero")
    return (np.sign(a) * np.sign(b) * (np.abs(a.astype(np.int64)) // np.abs(b))).astype(np.int32)


def _bfloat16_bits(x: Array) -> Array:
    """float32 to the nearest bfloat16, ties to even, as uint16."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def _two_halves(high: Array, low: Array) -> Array:
    """16-bit numbers as one of 32 bits; the first operand becomes the upper half."""
    upper, lower = (part.view(np.uint16).astype(np.uint32) for part in (high, low))
    return (upper << np.uint32(16)) | lower


def _wide(kind: type) -> Callable[..., Array]:
    """Product of 32-bit numbers in 64 bits, plus a third operand of 64 bits."""
    return lambda a, b, c=None: a.astype(kind) * b.astype(kind) + (0 if c is None else c)


Compute = Callable[..., Array]

INSTRUCTIONS: dict[str, tuple[tuple[str, ...], Compute]] = {
    "add.s32": (("s32", "s32"), np.add),
    "add.s64": (("s64", "s64"), np.add),
    "add.f32": (("f32", "f32"), np.add),
    "sub.s32": (("s32", "s32"), np.subtract),
    "mul.f32": (("f32", "f32"), np.multiply),
    "mul.f32x2": (("b64", "b64"), _pairs(np.multiply)),
    "mul.lo.s32": (("s32", "s32"), np.multiply),
    "mul.wide.s32": (("s32", "s32"), _wide(np.int64)),
    "mad.wide.s32": (("s32", "s32", "s64"), _wide(np.int64)),
    "mad.wide.u32": (("u32", "u32", "u64"), _wide(np.uint64)),
    "mad.lo.s64": (("s64", "s64", "s64"), lambda a, b, c: a * b + c),
    "div.s32": (("s32", "s32"), _quotient),
    "div.rn.f32": (("f32", "f32"), np.divide),
    "fma.rn.f32": (("f32", "f32", "f32"), fma),
    "fma.rn.f32x2": (("b64", "b64", "b64"), _pairs(fma)),
    "min.s32": (("s32", "s32"), np.minimum),
    "popc.b32": (
        ("b32",),
        lambda a: np.unpackbits(a.view(np.uint8).reshape(-1, 4), 1).sum(1, np.uint32),
    ),
    "and.b16": (("b16", "b16"), np.bitwise_and),
    "or.b16": (("b16", "b16"), np.bitwise_or),
    "shl.b16": (("b16", "u32"), lambda a, b: a << b.astype(np.uint16)),
    "selp.b16": (("b16", "b16", "pred"), lambda a, b, p: np.where(p, a, b)),
    "cvt.u32.u16": (("b16",), lambda a: a.astype(np.uint32)),
    "and.b32": (("b32", "b32"), np.bitwise_and),
    "or.b32": (("b32", "b32"), np.bitwise_or),
    "and.pred": (("pred", "pred"), np.logical_and),
    "shl.b32": (("b32", "u32"), np.left_shift),
    "shl.b64": (("b64", "u32"), lambda a, b: a << b.astype(np.uint64)),
    "shr.u32": (("u32", "u32"), np.right_shift),
    "selp.b32": (("b32", "b32", "pred"), lambda a, b, p: np.where(p, a, b)),
    "mov.b16": (("b16",), np.array),
    "mov.u16": (("b16",), np.array),
    "mov.u32": (("u32",), np.array),
    "mov.b32": (("b32",), np.array),
    "mov.b64": (("b64",), np.array),
    "mov.pred": (("pred",), np.array),
    "cvt.u64.u32": (("u32",), lambda a: a.astype(np.uint64)),
    "cvt.u32.u64": (("u64",), lambda a: a.astype(np.uint32)),
    "cvt.f32.f16": (("f16",), lambda a: a.astype(np.float32)),
    "cvt.f32.bf16": (("b16",), lambda a: (a.astype(np.uint32) << np.uint32(16)).view(np.float32)),
    "cvt.rn.f16x2.f32": (
        ("f32", "f32"),
        lambda a, b: _two_halves(a.astype(np.float16), b.astype(np.float16)),
    ),
    "cvt.rn.bf16x2.f32": (
        ("f32", "f32"),
        lambda a, b: _two_halves(_bfloat16_bits(a), _bfloat16_bits(b)),
    ),
    "setp.eq.b32": (("b32", "b32"), np.equal),
    "setp.ne.b32": (("b32", "b32"), np.not_equal),
    "setp.lt.s32": (("s32", "s32"), np.less),
    "setp.gt.s32": (("s32", "s32"), np.greater),
    "setp.lt.u32": (("u32", "u32"), np.less),
    "setp.gt.u32": (("u32", "u32"), np.greater),
    "setp.eq.s32": (("s32", "s32"), np.equal),
}
"""Types of the sources and what is computed from them, by name."""
