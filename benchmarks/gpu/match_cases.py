"""How TomeMatch is measured: shapes, and bytes that must move. ``benchmarks/gpu`` runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from tome_export.plugins.variants import ITEM_BYTES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Layout = Literal["contiguous", "qkv"]


@dataclass(frozen=True)
class MatchCase:
    """One measurement.

    Attributes:
        batch: B.
        heads: H.
        tokens: N.
        width: D.
        r: Tokens to merge.
        prefix: Protected tokens.
        class_token: Whether the output order is by position.
        dtype: Of the keys.
        layout: ``qkv``: a view of the output ``[B, N, 3 H D]`` of the projection, what PyTorch and
            TensorRT hand over; or ``contiguous`` as ``[B, H, N, D]``, where no product holds the
            keys.
    """

    batch: int
    heads: int
    tokens: int
    width: int
    r: int
    prefix: int = 1
    class_token: bool = True
    dtype: str = "float16"
    layout: Layout = "contiguous"


def bytes_moved(case: MatchCase) -> int:
    """Bytes that must move: the keys once, the plan once."""
    keys = case.batch * case.heads * case.tokens * case.width * ITEM_BYTES[case.dtype]
    return keys + plan_bytes(case.batch, case.tokens, case.r)


def plan_bytes(batch: int, tokens: int, r: int) -> int:
    """Bytes of ``keep [B, N - r]``, ``src [B, r]`` and ``dst [B, r]``, int32."""
    return 4 * batch * (tokens + r)


def make_keys(case: MatchCase, generator: torch.Generator) -> Tensor:
    """Normal keys ``[B, H, N, D]`` in the case's layout, on the generator's device."""
    import torch

    b, h, n, d = case.batch, case.heads, case.tokens, case.width
    kind: Any = {
        "dtype": getattr(torch, case.dtype),
        "device": generator.device,
        "generator": generator,
    }
    if case.layout == "contiguous":
        return torch.randn((b, h, n, d), **kind)
    qkv = torch.randn((b, n, 3 * h * d), **kind)
    return qkv.chunk(3, dim=-1)[1].reshape(b, n, h, d).transpose(1, 2)
