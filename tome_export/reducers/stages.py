"""Keep rates at a few layers: the counts of EViT, DynamicViT and their like."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.reducers.base import LayerContext, ModelShape, ScoredReducer

KEEP = 0.7
"""The keep rate that both EViT (table 1) and DynamicViT (table 1) recommend."""


def check_rates(name: str, keep: tuple[float, ...], at: tuple[int, ...]) -> None:
    """Refuse options that fit no model.

    Args:
        name: Of the reducer, for messages.
        keep: Keep rates, one for all stages or one for each.
        at: Layers of the stages; empty for the quarters of the depth.

    Raises:
        InputError: naming the option.
    """
    wrong = [rate for rate in keep if not 0 < rate <= 1]
    if wrong or not keep:
        got = ",".join(map(str, keep)) or "empty"
        raise InputError(f"option keep of reducer {name} is {got}; expected rates above 0, up to 1")
    if any(layer < 0 for layer in at) or any(a >= b for a, b in pairwise(at)):
        raise InputError(
            f"option at of reducer {name} is {','.join(map(str, at))}; expected layers from 0 in "
            "ascending order, such as 3,6,9"
        )


def stages(name: str, keep: tuple[float, ...], at: tuple[int, ...], depth: int) -> dict[int, float]:
    """Keep rate of each stage by its layer.

    Args:
        name: Of the reducer, for messages.
        keep: Keep rates, one for all stages or one for each.
        at: Layers of the stages; empty for the quarters of the depth, which are 3, 6 and 9 of 12,
            4, 8 and 12 of 16, 5, 10 and 15 of 20, as published.
        depth: Blocks of the model.

    Raises:
        InputError: if a layer is not of the model, or the rates are not as many as the layers.
    """
    found = at or tuple(sorted({quarter * depth // 4 for quarter in (1, 2, 3)} - {0}))
    if found and found[-1] >= depth:
        raise InputError(
            f"option at of reducer {name} has layer {found[-1]}; the model has layers 0 to "
            f"{depth - 1}"
        )
    if len(keep) not in (1, len(found)):
        raise InputError(
            f"option keep of reducer {name} has {len(keep)} rates for {len(found)} layers "
            f"({','.join(map(str, found))}); give one for all, or one for each"
        )
    return dict(zip(found, keep * len(found) if len(keep) == 1 else keep, strict=True))


@dataclass(frozen=True)
class AttentiveReducer(ScoredReducer):
    """Keeps the tokens with the most class attention, at a few layers; see EViT.

    Attributes:
        keep: Share of the tokens behind the prefix that stay in each stage.
        at: Layers of the stages, from 0; empty for the quarters of the depth.
    """

    keep: tuple[float, ...] = (KEEP,)
    at: tuple[int, ...] = ()

    prop_attn = False
    attention = True
    own_counts = True
    fused: ClassVar[int]
    """Tokens that stand for those not kept."""

    def __post_init__(self) -> None:
        check_rates(self.name, self.keep, self.at)

    def limit(self, tokens: int, prefix: int) -> int:
        """One patch stays, beside the one that the others are fused into."""
        return max(0, tokens - prefix - 1 - self.fused)

    def counts(self, tower: ModelShape) -> Schedule:
        """``ceil(keep * (N - P))`` of the tokens stay (EViT, section 3.1), and the fused one."""
        removed, tokens = [0] * tower.depth, tower.tokens
        for layer, rate in stages(self.name, self.keep, self.at, tower.depth).items():
            left = math.ceil(rate * (tokens - tower.prefix))
            wanted = tokens - tower.prefix - left - self.fused
            removed[layer] = max(0, min(wanted, self.limit(tokens, tower.prefix)))
            tokens -= removed[layer]
        return Schedule(per_layer=tuple(removed))

    def signals(self, seen: LayerContext) -> tuple[Tensor, ...]:
        """Class attention ``[B, N - P]``."""
        return (seen.class_attention[:, seen.prefix :],)
