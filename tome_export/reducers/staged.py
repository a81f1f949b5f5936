"""Reducers that remove tokens at a few layers, the stages, by keep rates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from tome_export.errors import InputError
from tome_export.merge.plan import MergePlan
from tome_export.reducers.base import LayerContext, LayerSpec, ScoredReducer
from tome_export.reducers.plans import ranked_plan


@dataclass(frozen=True)
class StagedReducer(ScoredReducer):
    """A reducer with keep rates at stages; 0.7 is what EViT and DynamicViT recommend (table 1).

    Attributes:
        keep: Keep rates, one for all stages or one for each.
        at: Layers of the stages, from 0; empty for the quarters of the depth.
    """

    keep: tuple[float, ...] = (0.7,)
    at: tuple[int, ...] = ()

    prop_attn = False
    own_counts = True
    at_most_half = False

    def __post_init__(self) -> None:
        wrong = [rate for rate in self.keep if not 0 < rate <= 1]
        if wrong or not self.keep:
            got = ",".join(map(str, self.keep)) or "empty"
            raise InputError(
                f"option keep of reducer {self.name} is {got}; expected rates above 0, up to 1"
            )
        if any(layer < 0 for layer in self.at) or any(a >= b for a, b in pairwise(self.at)):
            raise InputError(
                f"option at of reducer {self.name} is {','.join(map(str, self.at))}; expected "
                "layers from 0 in ascending order, such as 3,6,9"
            )

    def stages(self, depth: int) -> dict[int, float]:
        """Keep rate of each stage by its layer.

        The quarters of the depth are 3, 6 and 9 of 12, 4, 8 and 12 of 16, 5, 10 and 15 of 20, as
        published.
        """
        at = self.at or tuple(sorted({quarter * depth // 4 for quarter in (1, 2, 3)} - {0}))
        if at and at[-1] >= depth:
            raise InputError(
                f"option at of reducer {self.name} has layer {at[-1]}; the model has layers 0 to "
                f"{depth - 1}"
            )
        if len(self.keep) not in (1, len(at)):
            raise InputError(
                f"option keep of reducer {self.name} has {len(self.keep)} rates for {len(at)} "
                f"layers ({','.join(map(str, at))}); give one for all, or one for each"
            )
        rates = self.keep * len(at) if len(self.keep) == 1 else self.keep
        return dict(zip(at, rates, strict=True))

    def plan(self, signals: tuple[Tensor, ...], layer: LayerSpec) -> MergePlan:
        """Rank, cut, and put what stays in order of position."""
        return ranked_plan(signals[0], layer)

    def apply(self, layer: LayerContext, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """The tokens that stay, as they are."""
        return layer.kept(plan)
