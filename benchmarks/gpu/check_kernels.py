"""Are the carried kernels right on this GPU? Plans against exact ones, merges against float64.

Each is loaded by the driver from its PTX, started with the plugin's own grid, threads, shared
memory and parameters, writes between guards that no kernel may touch, and is run twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import merge_cases
from benchmarks.gpu.driver import Driver
from benchmarks.gpu.kernels import PrecompiledKernels
from benchmarks.gpu.merge_cases import MergeCase
from benchmarks.gpu.oracle import Keys, judge_match, judge_merge, make_keys
from benchmarks.gpu.parts import Context
from benchmarks.gpu.rows import Row, attempt
from tome_export.merge import ops
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.store import Binary, KernelStore
from tome_export.plugins.variants import Launch, Variant

GUARD = 256
"""Elements before and behind each output that no kernel may touch."""
QKV = "qkv"


@dataclass(frozen=True)
class Case:
    """One kernel and what it is run on.

    Attributes:
        data: Keys, or tokens with a plan.
        layout: Of keys: contiguous, or ``qkv``, the middle third of the product ``[B, N, 3 H D]``.
        every_code: Also run the code for older GPUs.
    """

    data: Keys | MergeCase
    layout: str = "contiguous"
    every_code: bool = False

    @property
    def variant(self) -> Variant:
        """The kernel."""
        if isinstance(self.data, MergeCase):
            return merge_contract.variant(self.data.width, self.data.dtype)
        where = {} if self.layout != QKV else _places(self.data)
        return match_contract.variant(self.data.tokens, self.data.width, self.data.dtype, **where)


def cases() -> list[Case]:
    """The shapes of ViTs first, then ties, odd numbers, other types and orders, long sequences."""
    return [
        Case(Keys(8, 12, 197, 64, 16), every_code=True),
        Case(MergeCase(8, 197, 768, 16), every_code=True),
        Case(Keys(8, 12, 197, 64, 16), QKV),
        Case(Keys(8, 16, 577, 64, 23)),
        Case(MergeCase(8, 577, 1024, 23)),
        Case(Keys(4, 16, 1025, 64, 40)),
        Case(Keys(4, 1, 197, 64, 40, content="one-hot")),
        Case(Keys(3, 12, 197, 64, 16, content="not finite")),
        Case(Keys(8, 12, 198, 64, 60, content="duplicates")),
        Case(Keys(8, 6, 50, 64, 20, prefix=0, class_token=False)),
        Case(Keys(8, 6, 101, 64, 40, prefix=5)),
        Case(Keys(64, 12, 197, 64, 16, dtype="float32")),
        Case(Keys(8, 16, 577, 64, 23, dtype="bfloat16")),
        Case(Keys(2, 16, 4096, 64, 2000)),
        Case(MergeCase(8, 197, 1024, 8, dtype="float32")),
        Case(MergeCase(3, 50, 768, 24, dtype="bfloat16")),
        Case(MergeCase(2, 4096, 1024, 2000)),
    ]


def memcheck_cases() -> list[Case]:
    """One match and one merge only, for a tool that watches every access and is slow."""
    return [Case(Keys(2, 12, 197, 64, 16), QKV), Case(MergeCase(2, 197, 768, 16))]


def variants() -> list[Variant]:
    """Kernels that all the cases need."""
    every = (*cases(), *memcheck_cases())
    return list({case.variant.name: case.variant for case in every}.values())


def _places(keys: Keys) -> dict[str, Any]:
    """Where keys lie in the QKV product, as the plugin's contract takes it."""
    across = keys.heads * keys.width
    strides = (keys.tokens * 3 * across, keys.width, 3 * across)
    return {"strides": strides, "offset": across}


@dataclass(frozen=True)
class KernelRun:
    """One launch.

    Attributes:
        case: What it is.
        launch: Grid and scalars.
        inputs: What the kernel reads.
        shapes: Shape and dtype of what it writes.
    """

    case: Case
    launch: Launch
    inputs: tuple[Tensor, ...]
    shapes: tuple[tuple[tuple[int, ...], torch.dtype], ...]


def kernel_run_from_case(case: Case, device: str) -> KernelRun:
    """The inputs on the device, and the launch by the contract."""
    data = case.data
    if isinstance(data, MergeCase):
        generator = torch.Generator(device).manual_seed(0)
        inputs = merge_cases.make_inputs(data, generator)
        kept = (data.batch, data.tokens - data.r)
        return KernelRun(
            case,
            merge_contract.launch(data.batch, data.tokens, data.r),
            tuple(tensor.contiguous() for tensor in inputs),
            (((*kept, data.width), inputs[0].dtype), (kept, torch.float32)),
        )
    keys = make_keys(data)
    where: dict[str, Any] = {}
    if case.layout == QKV:
        where = _places(data)
        rest = torch.full_like(keys, torch.nan)  # queries and values, which no match may read
        parts = torch.stack([rest, keys, rest]).permute(1, 3, 0, 2, 4)
        keys = parts.reshape(data.batch, data.tokens, -1)
    sizes = (data.batch, max(1, data.heads), data.tokens, data.width)
    counts = (data.tokens - data.r, data.r, data.r)
    return KernelRun(
        case,
        match_contract.launch(*sizes, data.r, data.prefix, data.class_token, **where),
        (keys.to(device).contiguous(),),
        tuple(((data.batch, count), torch.int32) for count in counts),
    )


def main(context: Context) -> None:
    """Emit a row per case and code."""
    emit_rows(cases(), precompiled_kernels(context), context.device)


def memcheck(context: Context) -> bool:
    """Emit the rows of the cases for such a tool, and say whether every kernel ran and was right.

    The tool sees no wrong access of a kernel that never ran.
    """
    found = emit_rows(memcheck_cases(), precompiled_kernels(context), context.device)
    return all(row.get("passed") is True for row in found)


def emit_rows(chosen: Iterable[Case], kernels: PrecompiledKernels, device: str) -> list[Row]:
    """Emit and return a row per case, and per code where every one is asked for."""
    found = []
    for case in chosen:
        binaries = kernels.binaries(case.variant)
        for binary in binaries if case.every_code else binaries[:1]:
            about = described(case) | {"target": binary.target}
            found += attempt(case.variant.op, about, checked, case, kernels, binary, device)
    return found


def precompiled_kernels(context: Context) -> PrecompiledKernels:
    """The kernels that were brought, on the GPU of this process."""
    torch.zeros(1, device=context.device)  # makes torch's context current
    store = KernelStore.read(context.prepared.kernels)
    return PrecompiledKernels(store, Driver(), torch.cuda.get_device_capability())


def described(case: Case) -> dict[str, Any]:
    """What a row says of its case."""
    data = case.data
    name = data.case if isinstance(data, Keys) else f"N{data.tokens} C{data.width}"
    about = {"case": name, "dtype": data.dtype, "batch": data.batch, "r": data.r}
    return about | ({"layout": case.layout} if isinstance(data, Keys) else {})


def checked(case: Case, kernels: PrecompiledKernels, binary: Binary, device: str) -> dict[str, Any]:
    """Run one code twice and judge what it wrote."""
    kernel_run = kernel_run_from_case(case, device)
    (first, untouched), (second, _) = (run(kernels, binary, kernel_run) for _ in range(2))
    repeatable = all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, second, strict=True))
    if isinstance(case.data, Keys):
        verdict = judge_match(case.data, make_keys(case.data), first)
    else:
        verdict = judge_merge(kernel_run.inputs, first, ops.eager_merge(*kernel_run.inputs))
    kernel = kernels.loaded(binary)
    return {
        "threads": binary.threads,
        "shared_bytes": binary.shared_bytes,
        "registers": kernel.registers,
        "local_bytes": kernel.local_bytes,
        "log": kernel.log,
        **verdict,
        "stays_inside": untouched,
        "repeatable": repeatable,
        "passed": bool(verdict["passed"] and untouched and repeatable),
    }


def run(
    kernels: PrecompiledKernels, binary: Binary, kernel_run: KernelRun
) -> tuple[tuple[Tensor, ...], bool]:
    """Run one code.

    Returns:
        The outputs, and whether the memory around them is as it was.
    """
    device = kernel_run.inputs[0].device
    buffers = list(_poisoned(kernel_run, device))
    before = [_bits(buffer).clone() for buffer in buffers]
    outputs = tuple(
        buffer[GUARD:-GUARD].view(shape)
        for buffer, (shape, _) in zip(buffers, kernel_run.shapes, strict=True)
    )
    kernels.start(binary, kernel_run.launch, kernel_run.inputs, outputs)
    if device.type == "cuda":
        torch.cuda.synchronize()
    untouched = all(
        torch.equal(_bits(buffer)[part], first[part])
        for buffer, first in zip(buffers, before, strict=True)
        for part in (slice(None, GUARD), slice(-GUARD, None))
    )
    return outputs, untouched


def _poisoned(kernel_run: KernelRun, device: torch.device) -> Iterator[Tensor]:
    """Memory full of values that no kernel writes, so that what stays unwritten is seen."""
    for shape, dtype in kernel_run.shapes:
        value = torch.nan if dtype.is_floating_point else -1 << 30
        count = int(torch.Size(shape).numel()) + 2 * GUARD
        yield torch.full((count,), value, dtype=dtype, device=device)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: NaN is equal to itself, -0 is not 0."""
    kinds = {2: torch.int16, 4: torch.int32}
    return tensor.view(kinds[tensor.element_size()])
