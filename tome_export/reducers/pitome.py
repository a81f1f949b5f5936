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
from tome_export.reducers.base import LayerContext, LayerSpec, ScoredReducer
from tome_export.reducers.plans import patch_directions, plan_by_position

_NEVER = -2.0
"""Below every cosine."""

_FIRST_HALF, _LAST_HALF = "deit", "mae"
_SPLITS = ("none", _FIRST_HALF, _LAST_HALF)


@dataclass(frozen=True)
class PiToMe(ScoredReducer):
    """The 2r patches of highest energy merge in pairs; the rest are left alone.

    With k the mean key over heads, l the layer of L, counted from 0, and M patches::

        E_i = 1/M sum_j f(cos(k_i, k_j) - m),   m = margin (1 - l / L)
        f(x) = x for x >= 0, else alpha (exp(x) - 1)

    The 2r of highest E, in order of rank, go to sets A and B in turn. Each of A merges into the
    most similar one of B by size-weighted mean. In the layers that ``split`` names all patches go
    to A and B in turn, and the r most similar pairs merge, as the official code
    (hchautran/PiToMe) runs DeiT and MAE. docs/reducers.md says more.

    Attributes:
        margin: Margin of the first layer; it falls to 0 behind the last.
        alpha: How much distant neighbours count against a token.
        split: Where all patches are split: ``none``, ``deit`` (the first half of the layers) or
            ``mae`` (the last).
    """

    name = "pitome"
    summary = "merge redundant tokens, those of high energy; protect the others"
    source = "Accelerating Transformers with Spectrum-Preserving Token Merging, arXiv 2405.16148"
    prop_attn = False

    margin: float = 0.9
    alpha: float = 1.0
    split: str = "none"

    def __post_init__(self) -> None:
        for name in ("margin", "alpha"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} of reducer pitome is {value:g}; expected 0 or more")
        if self.split not in _SPLITS:
            raise InputError(
                f"split of reducer pitome is {self.split!r}; expected {', '.join(_SPLITS)}"
            )

    def splits(self, layer: int, depth: int) -> bool:
        """Whether all patches of a layer are split, and not only the 2r."""
        first = layer < math.ceil(depth / 2)
        return self.split == (_FIRST_HALF if first else _LAST_HALF)

    def signals(self, layer: LayerContext) -> tuple[Tensor, ...]:
        """Energies ``[B, M]`` and cosines ``[B, M, M]``."""
        directions = patch_directions(layer)
        cosines = directions @ directions.transpose(-1, -2)
        margin = self.margin * (1.0 - layer.index / layer.depth)
        energies = functional.elu(cosines - margin, alpha=self.alpha).mean(dim=-1)
        return energies, cosines

    def plan(self, signals: tuple[Tensor, ...], layer: LayerSpec) -> MergePlan:
        """Rank by energy, split, and match A with B."""
        energies, cosines = signals
        order = rank(energies)
        end = order.shape[1] if self.splits(layer.index, layer.depth) else 2 * layer.r
        a, b = order[:, 0:end:2], order[:, 1:end:2]
        in_b = torch.zeros_like(energies).scatter(1, b, 1.0) > 0
        # Over all patches and not over B alone, so that the first maximum is the lowest position.
        to_b = torch.where(in_b[:, None], cosines, _NEVER)
        if end > 2 * layer.r:
            # Over all patches likewise, those of B last; so of equal pairs the lowest A goes.
            ranked = rank(torch.where(in_b, _NEVER, to_b.amax(dim=-1)))
            a, stay = ranked[:, : layer.r], ranked[:, layer.r :]
        else:
            stay = torch.cat([b, order[:, end:]], dim=1) if end < order.shape[1] else b
        best = gather_tokens(to_b, a).argmax(dim=-1)
        return plan_by_position(stay, a, best, layer.prefix)
