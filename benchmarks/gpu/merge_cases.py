"""How TomeMerge is measured: shapes, and bytes that must move. ``benchmarks/gpu`` runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tome_export.plugins.variants import ITEM_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor


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
    read_and_written = 2 * case.tokens - case.r
    per_token = case.width * ITEM_BYTES[case.dtype] + 4
    plan = 4 * (case.tokens + case.r)
    return case.batch * (read_and_written * per_token + plan)


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
