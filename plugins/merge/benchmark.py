"""How TomeMerge is measured: shapes, bytes that must move, and what the kernel is held against.

``benchmarks/gpu.py`` runs it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Merge = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class MergeCase:
    """One measurement.

    Attributes:
        batch: B.
        tokens: N.
        width: C.
        r: Tokens folded away.
        prefix: Tokens at the front that take no part.
        dtype: Of x.
    """

    batch: int
    tokens: int
    width: int
    r: int
    prefix: int = 1
    dtype: str = "float16"


def bytes_moved(case: MergeCase) -> int:
    """Bytes that must move: x, size and the plan once, x' and size' once."""
    return _rows(case, 2 * case.tokens - case.r) + _sizes_and_plan(case)


def bytes_moved_fused(case: MergeCase) -> int:
    """The same for one kernel that adds the residual before and normalises after.

    It reads x and what is added to it, and writes x', which the next residual needs, and the
    normalised x'. A LayerNorm's weights stay in the cache.
    """
    return _rows(case, 2 * case.tokens + 2 * (case.tokens - case.r)) + _sizes_and_plan(case)


def _rows(case: MergeCase, count: int) -> int:
    return case.batch * count * case.width * ITEM_BYTES[case.dtype]


def _sizes_and_plan(case: MergeCase) -> int:
    sizes = 4 * case.batch * (2 * case.tokens - case.r)
    return sizes + 4 * case.batch * (case.tokens + case.r)


def make_inputs(case: MergeCase, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Normal x ``[B, N, C]``, sizes 1 to 4 ``[B, N]``, and a random plan in position order.

    Args:
        case: The shapes.
        generator: On the device where the tensors are made.

    Returns:
        ``x, size, keep [B, N - r], src [B, r], dst [B, r]``.
    """
    import torch

    b, n, r, prefix = case.batch, case.tokens, case.r, case.prefix
    device = generator.device
    kind: Any = {"device": device, "generator": generator}
    x = torch.randn((b, n, case.width), dtype=getattr(torch, case.dtype), **kind)
    size = torch.randint(1, 5, (b, n), **kind).float()
    rows_a, rows_b = (n + 1) // 2, n // 2
    first_a, first_b = (prefix + 1) // 2, prefix // 2
    order = torch.rand((b, rows_a - first_a), **kind).argsort(1) + first_a
    src = 2 * order[:, :r]
    stays = 2 * order[:, r:].sort(1).values
    front = torch.arange(prefix, device=device).expand(b, prefix)
    last = (2 * torch.arange(first_b, rows_b, device=device) + 1).expand(b, rows_b - first_b)
    keep = torch.cat([front, stays, last], 1)
    dst = torch.randint(first_b, rows_b, (b, r), **kind) + (n - r - rows_b)
    return x, size, keep.int(), src.int(), dst.int()


def candidates(eager: Merge) -> dict[str, Merge]:
    """What is timed on the same tokens and plan, by name.

    Args:
        eager: ``tome_export::merge`` by PyTorch's own operations.
    """
    from tome_export.plugins import torch_ops

    return {"kernel": torch_ops.merge, "eager": eager}
