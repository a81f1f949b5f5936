"""Do the kernels compiled ahead of time, started as TensorRT starts them, give the same results?

Each is compiled for this GPU and for every older architecture whose code runs on it, loaded by the
driver from its PTX, started with the plugin's own grid, threads, shared memory and parameters, and
compared bit for bit with what the Triton language's own runtime starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu_check import described
from gpu_driver import Driver, parameters
from gpu_oracle import Keys, judge_match, judge_merge, make_keys
from gpu_rows import attempt
from torch import Tensor

from tome_export.merge import ops
from tome_export.plugins import torch_ops
from tome_export.plugins.aot import compile_ptx
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import benchmark as merge_benchmark
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.merge.benchmark import MergeCase
from tome_export.plugins.store import DEFAULT_CAPABILITIES, Binary, parse_capability
from tome_export.plugins.variants import Launch, Variant

PART = "aot"
GUARD = 256
"""Elements before and behind each output that no kernel may touch."""


@dataclass(frozen=True)
class Work:
    """One launch: its kernel, inputs, and the results of the other runtime to compare with."""

    case: Keys | MergeCase
    variant: Variant
    launch: Launch
    inputs: tuple[Tensor, ...]
    expected: tuple[Tensor, ...]


def match_work(case: Keys) -> Work:
    """Keys as TensorRT hands them over: contiguous."""
    keys = make_keys(case).cuda().contiguous()
    sizes = (case.tokens, case.width)
    return Work(
        case,
        match_contract.variant(*sizes, case.dtype),
        match_contract.launch(
            case.batch, max(1, case.heads), *sizes, case.r, case.prefix, case.class_token
        ),
        (keys,),
        torch_ops.match(keys, case.r, case.prefix, case.class_token),
    )


def merge_work(case: MergeCase) -> Work:
    """Tokens with a random plan."""
    inputs = merge_benchmark.make_inputs(case, torch.Generator("cuda").manual_seed(0))
    x, size, keep, src, dst = inputs = tuple(part.contiguous() for part in inputs)
    return Work(
        case,
        merge_contract.variant(case.width, case.dtype),
        merge_contract.launch(case.batch, case.tokens, case.r),
        inputs,
        torch_ops.merge(x, size, keep, src, dst),
    )


def works(quick: bool) -> Iterator[Work]:
    """A few of each operator: every kind of tile, dtype and rank."""
    yield match_work(Keys(8, 12, 197, 64, 16))
    yield merge_work(MergeCase(8, 197, 768, 16))
    if quick:
        return
    yield match_work(Keys(8, 16, 577, 64, 23))
    yield match_work(Keys(4, 16, 4096, 64, 500))
    yield match_work(Keys(4, 0, 197, 64, 16, dtype="float32"))
    yield match_work(Keys(3, 3, 50, 72, 20, prefix=0, class_token=False, dtype="bfloat16"))
    yield merge_work(MergeCase(8, 577, 1024, 23))
    yield merge_work(MergeCase(4, 197, 384, 16, dtype="float32"))
    yield merge_work(MergeCase(3, 50, 100, 20, dtype="bfloat16"))


def capabilities(own: tuple[int, int]) -> list[tuple[int, int]]:
    """The GPU's own, then those of the default set that are not newer."""
    older = [parse_capability(text) for text in DEFAULT_CAPABILITIES]
    return [own, *(capability for capability in older if capability < own)]


def main(quick: bool) -> None:
    """Emit a row per kernel and architecture."""
    torch.zeros(1, device="cuda")  # makes torch's context current
    driver = Driver()
    own = torch.cuda.get_device_capability()
    for work in works(quick):
        for capability in capabilities(own):
            about = described(work.case) | {"compute_capability": "{}.{}".format(*capability)}
            attempt(PART, work.variant.op, about, run, driver, work, capability, own)


def run(
    driver: Driver, work: Work, capability: tuple[int, int], own: tuple[int, int]
) -> dict[str, Any]:
    """Compile, load, start, compare.

    For the GPU's own architecture the results have to be the same bits. Code for an older one uses
    other instructions, so there the exact oracle decides, as in the part ``check``.
    """
    binary = compile_ptx(work.variant, capability)
    about = {
        "target": binary.target,
        "threads": binary.threads,
        "shared_bytes": binary.shared_bytes,
        "ptx_bytes": len(binary.ptx),
    }
    if not binary.runs_on(own):
        return {**about, "skipped": f"{binary.target} does not run on {own[0]}.{own[1]}"}
    outputs, untouched, loaded = start(driver, work, binary)
    differing = sum(
        int((_bits(a) != _bits(b)).sum()) for a, b in zip(outputs, work.expected, strict=True)
    )
    if isinstance(work.case, Keys):
        verdict = judge_match(work.case, make_keys(work.case), outputs)
    else:
        with torch_ops.eager():
            eager = ops._merge(*work.inputs)
        verdict = judge_merge(work.inputs, outputs, eager)
    right = verdict["passed"] and untouched and (capability != own or differing == 0)
    return {
        **about,
        **loaded,
        **verdict,
        "differing": differing,
        "stays_inside": untouched,
        "passed": bool(right),
    }


def start(
    driver: Driver, work: Work, binary: Binary
) -> tuple[tuple[Tensor, ...], bool, dict[str, Any]]:
    """Run one binary.

    Returns:
        The outputs; whether the memory around them is as it was; registers, local memory and the
        driver's remarks.
    """
    buffers = [
        torch.empty(t.numel() + 2 * GUARD, dtype=t.dtype, device="cuda") for t in work.expected
    ]
    for buffer in buffers:
        _poison(buffer)
    before = [_bits(buffer).clone() for buffer in buffers]
    outputs = tuple(
        buffer[GUARD : GUARD + like.numel()].view(like.shape)
        for buffer, like in zip(buffers, work.expected, strict=True)
    )
    kernel = driver.load(binary.ptx, binary.entry)
    try:
        driver.start(
            kernel,
            work.launch.grid,
            binary.threads,
            binary.shared_bytes,
            torch.cuda.current_stream().cuda_stream,
            parameters(
                [tensor.data_ptr() for tensor in work.inputs],
                work.launch.scalars,
                [tensor.data_ptr() for tensor in outputs],
            ),
        )
        torch.cuda.synchronize()
    finally:
        driver.unload(kernel)
    untouched = all(
        torch.equal(_bits(buffer)[part], first[part])
        for buffer, first in zip(buffers, before, strict=True)
        for part in (slice(None, GUARD), slice(-GUARD, None))
    )
    about = {"registers": kernel.registers, "local_bytes": kernel.local_bytes, "log": kernel.log}
    return outputs, untouched, about


def _poison(buffer: Tensor) -> None:
    """Values that no kernel writes, so that what stays unwritten is seen."""
    if buffer.dtype.is_floating_point:
        buffer.fill_(float("nan"))
    else:
        buffer.fill_(-1 << 30)


def _bits(tensor: Tensor) -> Tensor:
    """The same memory as integers: NaN is equal to itself, -0 is not 0."""
    kinds = {2: torch.int16, 4: torch.int32}
    return tensor.view(kinds[tensor.element_size()])
