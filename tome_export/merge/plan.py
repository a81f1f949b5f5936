"""The merge plan: what every reducer produces and every aggregator consumes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class MergePlan(NamedTuple):
    """Which tokens stay and where the others go, with static shapes.

    Invariant: ``keep`` and ``src`` together name every input token exactly once.

    Attributes:
        keep: ``[B, K]`` int32, input index of each output token in output order, prefix first.
        src: ``[B, R]`` int32, input indices of the tokens folded away, best match first.
        dst: ``[B, R]`` int32, for each src the OUTPUT position it is folded into; -1 for a token
            that is dropped and leaves nothing behind.
    """

    keep: Tensor
    src: Tensor
    dst: Tensor


class Across(NamedTuple):
    """The merge across sequences that a layer joins, ahead of its attention.

    Attributes:
        layer: Index of the block.
    """

    layer: int


Step = int | Across
"""One merge of a model: a layer's own by its number, or the one across sequences ahead of it."""

StepPlans = Mapping[Step, MergePlan]


def step_layer(step: Step) -> int:
    """The block that a merge belongs to."""
    return step.layer if isinstance(step, Across) else step


def step_number(step: Step) -> int:
    """A number for each merge; they rise in the order in which merges happen."""
    return 2 * step_layer(step) + (not isinstance(step, Across))


def step_name(step: Step) -> str:
    """Name of a merge in graphs: ``blocks.8``, or ``blocks.8.across``."""
    return f"blocks.{step_layer(step)}{'.across' if isinstance(step, Across) else ''}"


def step_from_name(name: str) -> Step | None:
    """The merge that a node of a graph belongs to, such as ``blocks.8.across.match``; or None."""
    parts = name.split(".")
    if len(parts) < 3 or parts[0] != "blocks" or not parts[1].isdigit():
        return None
    layer = int(parts[1])
    return Across(layer) if parts[2] == "across" else layer


def token_map(plan: MergePlan) -> Tensor:
    """Output position of every input token.

    Returns:
        ``[B, N]`` int64 with ``N = K + R``; -1 for dropped tokens.
    """
    batch, kept = plan.keep.shape
    positions = torch.arange(kept, device=plan.keep.device).expand(batch, kept)
    index = torch.cat([plan.keep, plan.src], dim=1).long()
    # Every index occurs once, so the scatter has no order.
    return torch.zeros_like(index).scatter(1, index, torch.cat([positions, plan.dst.long()], dim=1))


def compose_plans(before: Tensor | None, plan: MergePlan, *, drops: bool = True) -> Tensor:
    """Where the first layer's tokens are behind one more plan, ``[B, N]`` int64.

    Args:
        before: Where they were in front of it, -1 for those dropped; None for all in order.
        plan: The plan.
        drops: Whether any plan so far can have dropped tokens; without, the graph is simpler.
    """
    moved = token_map(plan)
    if before is None:
        return moved
    if not drops:
        return moved.gather(1, before)
    return torch.where(before < 0, before, moved.gather(1, before.clamp_min(0)))


def source_map(plans: Sequence[MergePlan | None], batch: int, tokens: int) -> Tensor:
    """Where each token of the first layer ends up, by composing the plans of all layers.

    Args:
        plans: One plan per layer in order; None where a layer does not merge.
        batch: Batch size B.
        tokens: Tokens N that enter the first layer.

    Returns:
        ``[B, N]`` int64: the final output position of each initial token, -1 if it was dropped.
    """
    places = torch.arange(tokens).expand(batch, tokens)
    for plan in plans:
        if plan is not None:
            places = compose_plans(places.to(plan.keep.device), plan)
    return places


def unmerge(x: Tensor, mapping: Tensor) -> Tensor:
    """Give every original token its merged token's value (ToMe, section 3.2, dense outputs).

    ``x [B, K, C]`` and a mapping ``[B, N]`` int64 from ``token_map`` or ``source_map``, of tokens
    of which none was dropped, to ``[B, N, C]``.
    """
    return x.gather(1, mapping[..., None].expand(-1, -1, x.shape[-1]))
