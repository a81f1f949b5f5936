"""Keep the tokens that are relevant to a query, the model's second input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional

from tome_export.errors import InputError
from tome_export.merge.lowering import accumulate_dtype, mean_keys
from tome_export.merge.plan import MergePlan
from tome_export.merge.schedule import LayerTokens
from tome_export.merge.spec import NORM_EPS
from tome_export.reducers.base import LayerContext, LayerSpec, ModelShape, ScoredReducer
from tome_export.reducers.learned import RANDOM, absolute, filled, random_module, state_of_file
from tome_export.reducers.plans import cosines, ranked_plan

INPUT = "query"
DROP, MERGE = "drop", "merge"


@dataclass(frozen=True)
class Query(ScoredReducer):
    """The r tokens that are least relevant to a query go; how many stay is the schedule's to say.

    The relevance of token i is ``cos(W x_i, q)``: q is the model's input ``query [B, E]``, x_i the
    token behind attention, and W a linear layer's ``weight [E, C]`` and perhaps ``bias [E]`` of a
    file; without W, token and query are compared as they are. A dropped token leaves nothing
    behind; a merged one goes into the most similar token that stays, by the cosine of their mean
    keys, and the mean is weighted by size, as in ToMe (section 3.1).

    Attributes:
        weights: A file with W, ``random``, or None to go without.
        width: E; 0 for the width of the tokens.
        mode: ``drop`` or ``merge``.
    """

    weights: str | None = None
    width: int = 0
    mode: str = DROP

    name = "query"
    summary = "drop or merge the tokens that are least relevant to a second input"
    source = "this project's own rule; merging as in ToMe, arXiv 2210.09461"
    at_most_half = False

    def __post_init__(self) -> None:
        if self.mode not in (DROP, MERGE):
            raise InputError(
                f"option mode of reducer query is {self.mode!r}; expected drop or merge"
            )
        if self.width < 0:
            raise InputError(f"option width of reducer query is {self.width}; expected 0 or more")
        object.__setattr__(self, "weights", absolute(self.weights))
        # What the class says of every reducer hangs on the mode here. Sizes stay 1 when dropping.
        if self.mode == DROP:
            object.__setattr__(self, "drops", True)
            object.__setattr__(self, "prop_attn", False)

    def _width(self, shape: ModelShape) -> int:
        if self.weights is None and self.width not in (0, shape.width):
            raise InputError(
                f"option width of reducer query is {self.width} and the model's tokens are "
                f"{shape.width} wide; give a projection with --reducer-option weights=FILE"
            )
        return self.width or shape.width

    def inputs(self, shape: ModelShape) -> Mapping[str, tuple[int, ...]]:
        """The query, ``[B, E]``."""
        return {INPUT: (self._width(shape),)}

    def module(self, shape: ModelShape) -> nn.Module | None:
        """The projection W."""
        width = self._width(shape)
        if self.weights is None:
            return None
        if self.weights == RANDOM:
            return random_module(lambda: nn.Linear(shape.width, width))
        state = state_of_file(self.weights)
        layer = nn.Linear(shape.width, width, bias="bias" in state)
        return filled(layer, state, f"weights file {self.weights}", self.name)

    def macs(self, layer: LayerTokens, shape: ModelShape) -> int:
        """MACs of the projection."""
        if self.weights is None:
            return 0
        return (layer.tokens_in - shape.prefix) * shape.width * self._width(shape)

    def signals(self, layer: LayerContext) -> tuple[Tensor, ...]:
        """Relevance ``[B, n]``, and to merge the keys' cosines ``[B, n, n]``; n = N - P."""
        tokens = layer.x[:, layer.prefix :]
        projected = tokens if layer.module is None else layer.module(tokens)
        dtype = accumulate_dtype(projected)
        query = functional.normalize(layer.inputs[INPUT].to(dtype), dim=-1, eps=NORM_EPS)
        unit = functional.normalize(projected.to(dtype), dim=-1, eps=NORM_EPS)
        relevance = (unit * query[:, None]).sum(dim=-1)
        if self.mode == DROP:
            return (relevance,)
        return relevance, cosines(mean_keys(layer.attention.keys)[:, layer.prefix :])

    def plan(self, signals: tuple[Tensor, ...], layer: LayerSpec) -> MergePlan:
        """Rank, cut, and find the most similar token that stays."""
        similarity = signals[1] if self.mode == MERGE else None
        return ranked_plan(signals[0], layer, similarity, layer.r)

    def apply(self, layer: LayerContext, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """The tokens that stay, as they are or as means."""
        return layer.kept(plan) if self.mode == DROP else super().apply(layer, plan)
