"""The merge plan: what every reducer produces and every aggregator consumes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MergePlan(NamedTuple):
    """Which tokens stay and where the others go, with static shapes.

    Invariant: ``keep`` and ``src`` together name every input token exactly once.

    Attributes:
        keep: ``[B, K]`` int32, input index of each output token in output order, prefix first.
        src: ``[B, R]`` int32, input indices of the tokens folded away, best match first.
        dst: ``[B, R]`` int32, for each src the OUTPUT position it is folded into.
    """

    keep: Tensor
    src: Tensor
    dst: Tensor


def token_map(plan: MergePlan) -> Tensor:
    """Output position of every input token.

    Returns:
        ``[B, N]`` int64 with ``N = K + R``.
    """
    batch, kept = plan.keep.shape
    positions = torch.arange(kept, device=plan.keep.device).expand(batch, kept)
    index = torch.cat([plan.keep, plan.src], dim=1).long()
    # Every index occurs once, so the scatter has no order.
    return torch.zeros_like(index).scatter(1, index, torch.cat([positions, plan.dst.long()], dim=1))


def source_map(plans: Sequence[MergePlan | None], batch: int, tokens: int) -> Tensor:
    """Where each token of the first layer ends up, by composing the plans of all layers.

    Args:
        plans: One plan per layer in order; None where a layer does not merge.
        batch: Batch size B.
        tokens: Tokens N that enter the first layer.

    Returns:
        ``[B, N]`` int64: the final output position of each initial token.
    """
    composed = torch.arange(tokens).expand(batch, tokens)
    for plan in plans:
        if plan is not None:
            composed = composed.to(plan.keep.device)
            composed = token_map(plan).gather(1, composed)
    return composed


def unmerge(x: Tensor, mapping: Tensor) -> Tensor:
    """Give every original token its merged token's value (ToMe, section 3.2, dense outputs).

    Args:
        x: ``[B, K, C]`` merged tokens.
        mapping: ``[B, N]`` int64 from ``token_map`` (one layer) or ``source_map`` (all layers).

    Returns:
        ``[B, N, C]``.
    """
    return x.gather(1, mapping[..., None].expand(-1, -1, x.shape[-1]))
