"""PiToMe: redundant tokens, those of high energy, merge with each other (arXiv 2405.16148)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from tome_export.errors import InputError
from tome_export.merge.lowering import gather_tokens, rank
from tome_export.merge.plan import MergePlan
from tome_export.reducers.base import Place, ScoredReducer, Seen
from tome_export.reducers.bipartite import patch_directions, plan_by_position

_NEVER = -2.0
"""Below every cosine."""


@dataclass(frozen=True)
class PiToMe(ScoredReducer):
    """The 2r patches of highest energy merge in pairs; the rest are left alone.

    With k the mean key over heads, l the layer of L, counted from 0, and M patches::

        E_i = 1/M sum_j f(cos(k_i, k_j) - m),   m = margin (1 - l / L)
        f(x) = x for x >= 0, else alpha (exp(x) - 1)

    The 2r of highest E, in order of rank, go to sets A and B in turn. Each of A merges into the
    most similar one of B by size-weighted mean.

    The mean takes in j = i, the same constant for all, as in the official code. There the margin
    starts at 0.9 for BLIP, 0.75 for DeiT and 0.95 for CLIP. For DeiT that code splits all patches
    in the first half of the layers, and the r best pairs merge; here the same algorithm runs in
    all layers. Register and distillation tokens are protected with the class token. Output is in
    order of position, not of energy.

    Attributes:
        margin: Of the first layer; it falls to 0 behind the last.
        alpha: How much distant neighbours count against a token.
    """

    name = "pitome"
    summary = "merge redundant tokens, those of high energy; protect the others"
    source = "Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv 2405.16148"

    margin: float = 0.9
    alpha: float = 1.0

    def __post_init__(self) -> None:
        for name in ("margin", "alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} of reducer pitome is {value:g}; expected 0 or more")

    def signals(self, seen: Seen) -> tuple[Tensor, ...]:
        """Energies ``[B, M]`` and cosines ``[B, M, M]``."""
        directions = patch_directions(seen)
        cosines = directions @ directions.transpose(-1, -2)
        margin = self.margin * (1.0 - seen.layer / seen.depth)
        energies = functional.elu(cosines - margin, alpha=self.alpha).mean(dim=-1)
        return energies, cosines

    def plan(self, signals: tuple[Tensor, ...], place: Place) -> MergePlan:
        """Rank by energy, split, and match A with B."""
        energies, cosines = signals
        order = rank(energies)
        a, b = order[:, 0 : 2 * place.r : 2], order[:, 1 : 2 * place.r : 2]
        in_b = torch.zeros_like(energies).scatter(1, b, 1.0) > 0
        # Over all patches and not over B alone, so that the first maximum is the lowest position.
        best = torch.where(in_b[:, None], gather_tokens(cosines, a), _NEVER).argmax(dim=-1)
        stay = b
        if 2 * place.r < order.shape[1]:
            stay = torch.cat([b, order[:, 2 * place.r :]], dim=1)
        return plan_by_position(stay, a, best, place.prefix)
