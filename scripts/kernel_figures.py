"""Write the figures of plugins/README.md, from kernels that are compiled and assembled here.

python scripts/kernel_figures.py

It needs no GPU: the package of the Triton language brings the assembler and the disassembler.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from tome_export.merge import spec
from tome_export.plugins import aot
from tome_export.plugins.match import contract as match
from tome_export.plugins.merge import contract as merge
from tome_export.plugins.store import DEFAULT_CAPABILITIES, Binary, parse_capability
from tome_export.plugins.variants import ITEM_BYTES, MAX_REGISTERS, MAX_SHARED_BYTES, Variant

PAGE = Path(__file__).parents[1] / "plugins" / "README.md"
MARKS = ("<!-- figures by scripts/kernel_figures.py -->\n", "<!-- end of figures -->")

CONTRACTS: dict[str, ModuleType] = {spec.MATCH: match, spec.MERGE: merge}

SHIPPED = (
    *(match.variant(tokens, 64, "float16") for tokens in (197, 577, 1025, 4096)),
    match.variant(197, 64, "bfloat16"),
    match.variant(197, 64, "float32"),
    *(merge.variant(width, "float16") for width in (768, 1024)),
    merge.variant(768, "bfloat16"),
    merge.variant(768, "float32"),
)
"""The kernels of ViT-B and ViT-L at 224, 384 and 512 pixels, and of the longest sequence."""


REGISTER_FILE = 1 << 16
"""32-bit registers of a multiprocessor."""


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
"""Architecture of each compute capability that is compiled for by default."""


@dataclass(frozen=True)
class Limits:
    """What the machine code of a variant is held to on one architecture.

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


def limits_of(variant: Variant, capability: str) -> Limits:
    """What the machine code of a kernel may use on a GPU compiled for by default."""
    if variant.op == spec.MERGE:
        return merge_limits(capability)
    return match_limits(variant, capability)


def match_limits(variant: Variant, capability: str) -> Limits:
    """What the machine code may use on a GPU compiled for by default.

    Keys in flight are those of all heads that are loaded at a time, 16 bytes each. The product is
    three of TF32 numbers per block of D. For 8.0 the assembler lacks a register or two in the
    shortest variant, where the loops over the keys begin and end.

    Args:
        variant: The kernel, for keys in which 16 bytes lie together.
        capability: Such as ``9.0``.
    """
    tensor_core = ARCHITECTURES[capability].tensor_core
    threads = 32 * variant.num_warps
    key_bytes = (match.BLOCK_A + match.BLOCK_B) * match.BLOCK_D * ITEM_BYTES[variant.dtype]
    block = match.BLOCK_A * match.BLOCK_B * match.BLOCK_D
    issuers = variant.num_warps // (tensor_core.warps or variant.num_warps)
    return Limits(
        MAX_REGISTERS,
        spill_bytes=12 if capability == "8.0" and variant.constants["TILES"] == 1 else 0,
        loads_in_flight=match.UNROLL * key_bytes // (16 * threads),
        tensor_core=tensor_core.instruction,
        tensor_core_count=3 * block // (tensor_core.products * issuers),
    )


def merge_limits(capability: str) -> Limits:
    """What the machine code may use on a GPU compiled for by default.

    Registers as few as let a multiprocessor hold all the threads it can, given out by eights: the
    kernel waits for memory. A folded token is two loads, of its size and of its numbers.

    Args:
        capability: Such as ``9.0``.
    """
    registers = REGISTER_FILE // ARCHITECTURES[capability].threads // 8 * 8
    return Limits(registers, spill_bytes=0, loads_in_flight=2)


class Instruction(NamedTuple):
    """One line of machine code: its name with modifiers, and its operands as text."""

    name: str
    operands: tuple[str, ...]


@dataclass(frozen=True)
class Figures:
    """What the machine code of one kernel shows.

    Attributes:
        registers: Per thread.
        spill_bytes: Stored and loaded per thread for want of registers.
        loop_spills: Instructions in the loop below that access such memory.
        shared_bytes: Static and dynamic shared memory of a program.
        loads_in_flight: See ``loads_in_flight``, of the innermost loop with most global loads.
        tensor_cores: Tensor-core instructions and how many of each there are.
        parameters: Offset and size of each in bytes, by ordinal.
    """

    registers: int
    spill_bytes: int
    loop_spills: int
    shared_bytes: int
    loads_in_flight: int
    tensor_cores: Mapping[str, int]
    parameters: tuple[tuple[int, int], ...]

    @property
    def cell(self) -> str:
        """As the table gives them: registers, bytes spilled, loads in flight."""
        return f"{self.registers} · {self.spill_bytes} · {self.loads_in_flight}"


def tool(name: str) -> Path:
    """A program in the package of the Triton language."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def assembler(capability: str) -> Path:
    """The one that the Triton language itself takes for such a GPU."""
    return tool("ptxas" if parse_capability(capability) < (10, 0) else "ptxas-blackwell")


def missing_tool() -> str | None:
    """Why no figures can be taken here, or None."""
    needed = {assembler(c) for c in DEFAULT_CAPABILITIES} | {tool("nvdisasm"), tool("cuobjdump")}
    missing = sorted(path.name for path in needed if not path.exists())
    return f"this package of the Triton language has no {', '.join(missing)}" if missing else None


def figures(binary: Binary, folder: Path) -> Figures:
    """Assemble a kernel and read its machine code.

    Args:
        binary: The kernel.
        folder: An empty one; the machine code is left there as ``kernel.cubin``.

    Raises:
        subprocess.CalledProcessError: if a tool refuses it.
    """
    (folder / "kernel.ptx").write_text(binary.ptx)
    command = [assembler(binary.compute_capability), "-v", "--gpu-name", binary.target]
    report = _run([*command, "kernel.ptx", "-o", "kernel.cubin"], folder).stderr
    code = _run([tool("nvdisasm"), "-c", "kernel.cubin"], folder).stdout
    instructions, labels = parse(code)
    loop = max(innermost_loops(instructions, labels), key=_global_loads, default=[])
    static = re.search(r"(\d+) bytes smem", report)
    return Figures(
        registers=int(re.findall(r"Used (\d+) registers", report)[0]),
        spill_bytes=sum(int(n) for n in re.findall(r"(\d+) bytes spill", report)),
        loop_spills=sum(i.name.startswith(("LDL", "STL")) for i in loop),
        shared_bytes=binary.shared_bytes + (int(static[1]) if static else 0),
        loads_in_flight=loads_in_flight(loop),
        tensor_cores=Counter(i.name for i in instructions if re.match(r"[A-Z]*MMA\b", i.name)),
        parameters=_parameters(_run([tool("cuobjdump"), "-elf", "kernel.cubin"], folder).stdout),
    )


def _run(command: Sequence[object], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, command)], cwd=folder, capture_output=True, text=True, check=True
    )


def _parameters(elf: str) -> tuple[tuple[int, int], ...]:
    """Offsets and sizes from the attributes EIATTR_KPARAM_INFO of the kernel's section."""
    entry = r"Ordinal : 0x(\w+)\s+Offset\s+: 0x(\w+)\s+Size\s+: 0x(\w+)"
    found = sorted(tuple(int(n, 16) for n in match) for match in re.findall(entry, elf))
    if [ordinal for ordinal, _, _ in found] != list(range(len(found))):
        raise SystemExit(f"the machine code numbers its parameters {found}; expected each once")
    return tuple((offset, size) for _, offset, size in found)


def parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions in program order, and the index of the one that follows each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        label = re.match(r"(\.L_\w+):", line)
        found = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            operands = tuple(part.strip() for part in found[2].split(",")) if found[2] else ()
            instructions.append(Instruction(found[1], operands))
    return instructions, labels


def innermost_loops(
    instructions: list[Instruction], labels: Mapping[str, int]
) -> Iterator[list[Instruction]]:
    """What lies between a label and a branch back to it, with no other such pair inside."""
    ends = []
    for index, instruction in enumerate(instructions):
        target = re.search(r"`\((\.L_\w+)\)", " ".join(instruction.operands))
        if instruction.name.startswith("BRA") and target and labels[target[1]] <= index:
            ends.append((labels[target[1]], index))
    for start, end in ends:
        if not any(start <= s and e <= end for s, e in ends if (s, e) != (start, end)):
            yield instructions[start : end + 1]


def _global_loads(body: list[Instruction]) -> int:
    return sum(instruction.name.startswith("LDG") for instruction in body)


def loads_in_flight(body: list[Instruction]) -> int:
    """Most global loads of a loop that are under way at a time.

    The longest run of LDG in program order before an instruction reads a register that one of the
    run writes: there a thread waits, and what follows begins a new run.
    """
    most = count = 0
    under_way: set[int] = set()
    for name, operands in body:
        # Stores and branches write no register; all others write the first operand.
        first = 0 if re.match(r"ST|RED|BRA|BAR", name) else 1
        if under_way & {r for operand in operands[first:] for r in _registers(operand)}:
            count, under_way = 0, set()
        if name.startswith("LDG"):
            bits = re.search(r"\.(64|128)\b", name)
            start = int(operands[0].removeprefix("R"))
            under_way |= set(range(start, start + (int(bits[1]) // 32 if bits else 1)))
            count += 1
            most = max(most, count)
    return most


def _registers(operand: str) -> set[int]:
    """Registers that an operand reads; an address of 64 bits is two of them."""
    found = re.findall(r"\bR(\d+)(\.64)?", operand)
    return {int(number) + more for number, wide in found for more in range(2 if wide else 1)}


def expected_parameters(variant: Variant) -> tuple[tuple[int, int], ...]:
    """Offset and size of each argument of the contract: aligned to its size, one after another."""
    places, end = [], 0
    for kind in CONTRACTS[variant.op].signature(variant.dtype).values():
        size = 8 if kind.startswith("*") else int(kind.removeprefix("i")) // 8
        start = -(-end // size) * size
        places.append((start, size))
        end = start + size
    return tuple(places)


def problems(variant: Variant, capability: str, found: Figures) -> list[str]:
    """What a kernel's figures break of its contract."""
    limits = limits_of(variant, capability)
    product = {limits.tensor_core: limits.tensor_core_count} if limits.tensor_core else {}
    parameters = expected_parameters(variant)
    checks = [
        (
            found.registers <= limits.registers,
            f"{found.registers} registers; expected at most {limits.registers}",
        ),
        (
            found.spill_bytes <= limits.spill_bytes,
            f"{found.spill_bytes} bytes spilled; expected at most {limits.spill_bytes}",
        ),
        (
            found.loop_spills == 0,
            f"{found.loop_spills} accesses to what was spilled between loads; expected none",
        ),
        (
            found.shared_bytes <= MAX_SHARED_BYTES,
            f"{found.shared_bytes} bytes of shared memory; expected at most {MAX_SHARED_BYTES}",
        ),
        (
            found.loads_in_flight >= limits.loads_in_flight,
            f"{found.loads_in_flight} loads in flight; expected at least {limits.loads_in_flight}",
        ),
        (
            found.tensor_cores == product,
            f"tensor-core instructions {dict(found.tensor_cores)}; expected {product}",
        ),
        (
            found.parameters == parameters,
            f"parameters at {found.parameters} (offset, size); expected {parameters}",
        ),
    ]
    where = f"{variant.name} for compute capability {capability}"
    return [f"{where} has {text}" for holds, text in checks if not holds]


def table(found: Mapping[tuple[str, str], tuple[Binary, Figures]]) -> str:
    """The page's text between the marks.

    Args:
        found: Each kernel of ``SHIPPED`` by name and compute capability.
    """

    def row(title: str, cells: list[str]) -> str:
        return f"| {title} | {' | '.join(cells)} |"

    def of(op: str, capability: str) -> list[tuple[Binary, Figures]]:
        return [found[variant.name, capability] for variant in SHIPPED if variant.op == op]

    def shared(op: str, capability: str) -> str:
        return f"{max(figure.shared_bytes for _, figure in of(op, capability)):,}"

    def product(capability: str) -> str:
        counts = of(spec.MATCH, capability)[0][1].tensor_cores
        return ", ".join(f"{count} `{name}`" for name, count in counts.items())

    every = DEFAULT_CAPABILITIES
    lines = [
        f"Compiled by {aot.compiler()}; registers per thread · bytes spilled · loads in flight.",
        "",
        row("compute capability", list(every)),
        "|---" * (len(every) + 1) + "|",
        *(
            row(f"`{variant.name}`", [found[variant.name, c][1].cell for c in every])
            for variant in SHIPPED
        ),
        row("PTX for", [f"`{of(spec.MATCH, c)[0][0].target}`" for c in every]),
        row("assembled by", [assembler_version(c) for c in every]),
        *(row(f"shared bytes, {op}", [shared(op, c) for c in every]) for op in CONTRACTS),
        row("product of TomeMatch", [product(c) for c in every]),
        "",
    ]
    return "\n".join([*lines, *parameter_lines()]) + "\n"


def parameter_lines() -> list[str]:
    """Where a launch puts the arguments of each operator."""
    lines = []
    for op, contract in CONTRACTS.items():
        variant = next(variant for variant in SHIPPED if variant.op == op)
        places = zip(contract.signature(variant.dtype), expected_parameters(variant), strict=True)
        listed = ", ".join(f"`{name}` {offset}" for name, (offset, _) in places)
        lines.append(f"- Parameters of {op}, offsets in bytes: {listed}.")
    return lines


def assembler_version(capability: str) -> str:
    """Name and release of the assembler."""
    path = assembler(capability)
    release = re.search(r"release ([\d.]+)", _run([path, "--version"], path.parent).stdout)
    return f"ptxas {release[1] if release else 'of unknown release'}"


def written(page: str, made: str) -> str:
    """The page with its figures replaced."""
    start, end = MARKS
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise SystemExit(f"{PAGE} lacks the marks {start.strip()} and {end}")
    return before + start + made + end + after


def main() -> None:
    reason = missing_tool()
    if reason:
        raise SystemExit(reason)
    found, broken = {}, []
    with tempfile.TemporaryDirectory() as folder:
        # A cache of its own, so that everything is compiled anew.
        os.environ["TRITON_CACHE_DIR"] = str(Path(folder) / "cache")
        for variant in SHIPPED:
            for capability in DEFAULT_CAPABILITIES:
                work = Path(folder) / f"{variant.name}-{capability}"
                work.mkdir()
                binary = aot.compile_ptx(variant, parse_capability(capability))
                figure = figures(binary, work)
                found[variant.name, capability] = binary, figure
                broken += problems(variant, capability, figure)
                print(f"{variant.name} {capability}: {figure.cell}", file=sys.stderr)
    if broken:
        raise SystemExit("\n".join(broken))
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), table(found)), encoding="utf-8")


if __name__ == "__main__":
    main()
