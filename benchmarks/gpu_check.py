"""Are the kernels right on this GPU? Decisions against the exact ones, merges against float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_oracle import Keys, judge_match, judge_merge, make_keys
from gpu_rows import attempt
from torch import Tensor

from tome_export.merge import ops
from tome_export.merge.plan import MergePlan
from tome_export.plugins import torch_ops
from tome_export.plugins.match import benchmark as match_benchmark
from tome_export.plugins.merge import benchmark as merge_benchmark
from tome_export.plugins.merge.benchmark import MergeCase

PART = "check"


def install() -> None:
    """Put the kernels behind the custom operators, as importing the package's GPU side does."""
    # CustomOpDef keeps the function it was made of; it is what runs without the kernels.
    if not torch_ops.install(ops.eager_match, ops.eager_merge):
        raise RuntimeError("the Triton language is not installed; expected pip install triton")


def match_cases(quick: bool) -> Iterator[Keys]:
    """Sizes, widths, dtypes, orders and contents; few compiled variants."""
    yield Keys(64, 12, 197, 64, 16)
    yield Keys(3, 12, 197, 64, 16, content="not finite")
    yield Keys(4, 1, 197, 64, 40, content="one-hot")
    if quick:
        return
    for dtype in ("float32", "bfloat16"):
        yield Keys(64, 12, 197, 64, 16, dtype=dtype)
        yield Keys(8, 16, 577, 64, 23, dtype=dtype)
        yield Keys(3, 4, 5, 64, 2, dtype=dtype)
    yield Keys(3, 2, 2, 64, 1, prefix=0, class_token=False)
    for tokens in (3, 4, 5, 50, 101, 198, 257):
        for prefix, class_token in ((0, False), (1, True), (2, True), (5, True), (1, False)):
            limit = (tokens - prefix) // 2
            for r in {1, min(16, limit), limit}:
                if 1 <= r <= limit:
                    yield Keys(3, 6, tokens, 64, r, prefix, class_token)
    for tokens, batch, r in ((577, 16, 23), (1025, 4, 100), (2048, 2, 1000), (4096, 2, 2000)):
        yield Keys(batch, 16, tokens, 64, r)
        yield Keys(batch, 16, tokens, 64, r, prefix=0, class_token=False)
        yield Keys(2, 1, tokens, 64, r, content="one-hot")
    for width in (72, 80, 128):
        yield Keys(16, 16, 197, width, 16)
        yield Keys(16, 16, 197, width, 16, dtype="float32")
    yield Keys(64, 0, 197, 64, 16, dtype="float32")
    yield Keys(8, 0, 577, 80, 23, dtype="float32")
    for heads in (1, 12):
        yield Keys(4, heads, 197, 64, 60, prefix=0, class_token=False, content="one-hot")
        yield Keys(8, heads, 198, 64, 60, content="duplicates")
        yield Keys(8, heads, 101, 64, 40, dtype="float32", content="duplicates")
        yield Keys(8, heads, 101, 64, 40, dtype="float32", content="not finite")
        yield Keys(8, heads, 101, 64, 40, dtype="float32", content="huge")


def merge_cases(quick: bool) -> Iterator[MergeCase]:
    """Shapes and dtypes of x; sizes are 1 to 4, and some tokens take several."""
    yield MergeCase(64, 197, 768, 16)
    if quick:
        return
    for dtype in ("float32", "float16", "bfloat16"):
        yield MergeCase(16, 197, 1024, 8, dtype=dtype)
        yield MergeCase(8, 577, 1024, 23, dtype=dtype)
        yield MergeCase(3, 50, 100, 24, dtype=dtype)
        yield MergeCase(2, 4096, 384, 2000, dtype=dtype)
    yield MergeCase(1, 2, 64, 1, prefix=0)
    yield MergeCase(5, 5, 72, 2)
    yield MergeCase(2, 101, 8192, 50)


def main(quick: bool) -> None:
    """Emit a row per case; see ``gpu_oracle`` for what passes."""
    install()
    for case in match_cases(quick):
        keys = make_keys(case)
        for precision in _precisions(case, quick):
            about = described(case) | {"products": precision}
            attempt(PART, "match", about, _match_row, case, keys, _matcher(case, precision))
    for shape in merge_cases(quick):
        attempt(PART, "merge", described(shape), _merge_row, shape)


def described(case: Keys | MergeCase) -> dict[str, Any]:
    """What a row says of its case."""
    name = case.case if isinstance(case, Keys) else f"N{case.tokens} C{case.width}"
    return {"case": name, "dtype": case.dtype, "batch": case.batch, "r": case.r}


def _precisions(case: Keys, quick: bool) -> tuple[str, ...]:
    """The other form of the product too, for some sizes: each is one more kernel to compile."""
    sizes = case.tokens in (197, 577) and case.width == 64 and case.heads > 0
    both = sizes and case.dtype != "bfloat16" and not quick
    precisions: tuple[str, ...] = match_benchmark.PRECISIONS
    return precisions if both else precisions[:1]


def _matcher(case: Keys, precision: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    rest = (case.r, case.prefix, case.class_token)
    if precision == match_benchmark.PRECISIONS[0]:
        return lambda keys: tuple(ops.match(keys, *rest))
    return lambda keys: torch_ops.match(keys, *rest, precision)


def _match_row(
    case: Keys, keys: Tensor, run: Callable[[Tensor], tuple[Tensor, ...]]
) -> dict[str, Any]:
    on_gpu = keys.cuda()
    plan = run(on_gpu)
    verdict = judge_match(case, keys, plan)
    repeated = all(torch.equal(a, b) for a, b in zip(plan, run(on_gpu), strict=True))
    return {**verdict, "repeatable": repeated, "passed": verdict["passed"] and repeated}


def _merge_row(case: MergeCase) -> dict[str, Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = merge_benchmark.make_inputs(case, generator)
    x, size, *plan = inputs
    kernel = ops.merge(x, size, MergePlan(*plan))
    with torch_ops.eager():
        eager = ops.merge(x, size, MergePlan(*plan))
    again = ops.merge(x, size, MergePlan(*plan))
    verdict = judge_merge(inputs, kernel, eager)
    repeated = all(torch.equal(a, b) for a, b in zip(kernel, again, strict=True))
    return {**verdict, "repeatable": repeated, "passed": verdict["passed"] and repeated}
