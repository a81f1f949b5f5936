"""What a reducer is: it looks at the tokens of one layer, decides on a plan, and applies it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.lowering import accumulate_dtype, gather_tokens
from tome_export.merge.ops import mark_plan, mark_signal, match, merge
from tome_export.merge.plan import MergePlan
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.merge.spec import clamp_r


class AttentionInputs(NamedTuple):
    """What attention compares in one layer.

    Attributes:
        keys: ``[B, H, N, D]`` in the model's dtype.
        queries: ``[B, H', N, D]``, H' a multiple of H; None where there is no single softmax map.
        scale: Factor of the logits; None for ``D ** -0.5``.
        bias: Added to the logits, ``[B, 1, N, N]``; or None.
        tokens: What keys and queries are projected from, ``[B, N, C]``, already normalised; None
            where attentions side by side have one each.
    """

    keys: Tensor
    queries: Tensor | None = None
    scale: float | None = None
    bias: Tensor | None = None
    tokens: Tensor | None = None


class ModelShape(NamedTuple):
    """What token counts and learned parts of a reducer depend on.

    Attributes:
        width: C of the tokens.
        depth: Number of blocks.
        tokens: N that enter the first block, prefix included.
        prefix: Protected tokens at the front.
        learned: Weights under the reducer's ``own_keys`` in the file of the model's weights; None
            if there was no such file.
    """

    width: int
    depth: int
    tokens: int
    prefix: int
    learned: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class LayerSpec:
    """The numbers of one layer that a plan depends on.

    Attributes:
        index: Number of the block, from 0.
        r: Tokens to remove.
        prefix: Protected tokens P at the front.
        class_token: Whether one of them is a class token; it is the first then.
        depth: Number of blocks of the model.
        tokens: N.
    """

    index: int
    r: int
    prefix: int
    class_token: bool
    depth: int
    tokens: int


@dataclass(frozen=True)
class LayerContext(LayerSpec):
    """All that a reducer knows of one layer.

    Attributes:
        x: ``[B, N, C]`` tokens behind attention and its residual, or behind the whole block.
        size: ``[B, N]`` float32, patches that each token stands for.
        attention: What attention compares.
        module: The reducer's learned part for the whole model, or None.
        inputs: The model's inputs besides the images, by name.
    """

    x: Tensor
    size: Tensor
    attention: AttentionInputs
    module: nn.Module | None
    inputs: Mapping[str, Tensor]

    @cached_property
    def class_attention(self) -> Tensor:
        """Attention that the class token pays to every token, the mean over heads.

        Returns:
            ``[B, N]`` float32 (float64 for float64 keys); rows sum to 1.
        """
        keys, queries, scale, bias = self.attention[:4]
        if queries is None:
            raise InputError("this attention has no single map that could rank tokens")
        dtype = accumulate_dtype(keys)
        first = queries[:, :, :1].to(dtype)
        if first.shape[1] > keys.shape[1]:
            keys = keys.repeat_interleave(first.shape[1] // keys.shape[1], dim=1)
        logits = first * (keys.shape[-1] ** -0.5 if scale is None else scale)
        logits = logits @ keys.to(dtype).transpose(-1, -2)
        if bias is not None:
            logits = logits + bias[:, :, :1].to(dtype)
        return logits.softmax(dim=-1).mean(dim=1)[:, 0]

    def kept(self, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """Tokens ``[B, K, C]`` and sizes ``[B, K]`` that a plan keeps, as they are."""
        return gather_tokens(self.x, plan.keep), self.size.gather(1, plan.keep.long())


class Decision(NamedTuple):
    """A plan and what led to it.

    Attributes:
        metric: What a matching compared, ``[B, H, N, D]`` or ``[B, N, D]``; None without one.
        scores: The signals of a ``ScoredReducer``.
    """

    plan: MergePlan
    metric: Tensor | None = None
    scores: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Reducer(ABC):
    """One way to make fewer tokens of many, with static shapes. Its fields are its options.

    Attributes:
        name: What the command line calls it.
        summary: One line for help and tables.
        source: Where the method is published.
        behind_block: Whether tokens go behind the block's MLP, and not between attention and MLP.
        drops: Whether tokens can be dropped; nothing of them is left for dense outputs then.
        prop_attn: Whether attention is proportional as the authors run it; None where that is the
            model's setting, which is off for off-the-shelf MAE.
        needs_class_attention: Whether it ranks tokens by the class token's attention.
        at_most_half: Whether a layer removes at most half of its patches, and not all but one.
        own_counts: Whether its options say how many tokens each layer removes, and not a schedule.
        scored: Whether it is a ``ScoredReducer``.
        own_keys: How the keys of its weights begin in a file that holds the model's weights too.
        counts_patches: Whether sizes are numbers of patches, which the size entropy counts.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str]
    behind_block: ClassVar[bool] = False
    drops: ClassVar[bool] = False
    prop_attn: ClassVar[bool | None] = None
    needs_class_attention: ClassVar[bool] = False
    at_most_half: ClassVar[bool] = True
    own_counts: ClassVar[bool] = False
    scored: ClassVar[bool] = False
    own_keys: ClassVar[tuple[str, ...]] = ()
    counts_patches: ClassVar[bool] = True

    def proportional(self, model: bool = True) -> bool:
        """Its own setting of proportional attention, or else the model's."""
        return model if self.prop_attn is None else self.prop_attn

    def limit(self, tokens: int, prefix: int) -> int:
        """The most tokens that one layer can remove."""
        if self.at_most_half:
            return clamp_r(tokens, tokens, prefix)
        return max(0, tokens - prefix - 1)

    def counts(self, shape: ModelShape) -> Schedule:
        """The schedule that the options ask for; only of reducers with ``own_counts``.

        Raises:
            InputError: if the options do not fit the model.
        """
        raise NotImplementedError(f"{self.name} takes its counts from a schedule")

    def layers(self, schedule: Schedule, shape: ModelShape) -> tuple[LayerTokens, ...]:
        """Token counts of every block, no layer removing more than it can."""
        depth, tokens, prefix = shape.depth, shape.tokens, shape.prefix
        return schedule.tokens(depth, tokens, prefix, self.limit, behind_block=self.behind_block)

    def module(self, shape: ModelShape) -> nn.Module | None:  # noqa: ARG002
        """The learned part, with its weights; None if there is none.

        Raises:
            InputError: if its weights are missing or do not fit.
        """
        return None

    def macs(self, layer: LayerTokens, shape: ModelShape) -> int:  # noqa: ARG002
        """MACs per image of its learned part in one layer; comparing tokens is under 1 %."""
        return 0

    def inputs(self, shape: ModelShape) -> Mapping[str, tuple[int, ...]]:  # noqa: ARG002
        """Inputs of the model besides the images: shape of each without the batch, float32."""
        return {}

    def record(self) -> dict[str, Any]:
        """Name and options, as a manifest records them."""
        return {"name": self.name, "options": asdict(self)}

    @abstractmethod
    def decide(self, layer: LayerContext) -> Decision:
        """The plan of one layer."""

    def apply(self, layer: LayerContext, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """Carry out a plan: by default the mean weighted by size.

        Returns:
            ``x' [B, K, C]`` in the dtype of x and ``size' [B, K]`` float32.
        """
        return merge(layer.x, layer.size, plan)


class MatchReducer(Reducer):
    """A reducer by bipartite soft matching: one operator decides, which the plugin can take."""

    def metric(self, layer: LayerContext) -> Tensor:
        """What is compared: keys ``[B, H, N, D]`` or a metric ``[B, N, D]``."""
        return layer.attention.keys

    def decide(self, layer: LayerContext) -> Decision:
        """See ``merge.ops.match``."""
        metric = self.metric(layer)
        return Decision(match(metric, layer.r, layer.prefix, layer.class_token), metric)


class ScoredReducer(Reducer):
    """A reducer that computes scores, its signals, and decides by comparing them and nothing else.

    So a plan can be made again from signals alone: that is what the parity check rests on.
    """

    scored = True

    @abstractmethod
    def signals(self, layer: LayerContext) -> tuple[Tensor, ...]:
        """The numbers that the plan depends on, each ``[B, ...]`` float32 (float64 for float64)."""

    @abstractmethod
    def plan(self, signals: tuple[Tensor, ...], layer: LayerSpec) -> MergePlan:
        """The plan, by comparisons of signals only: no arithmetic on them.

        Ties go to the lowest index. Every token is in ``keep`` or ``src`` exactly once.
        """

    def decide(self, layer: LayerContext) -> Decision:
        """Signals, then the plan, both marked in exported graphs."""
        marked = tuple(
            mark_signal(torch.where(signal.isfinite(), signal, 0.0).detach(), layer.index, number)
            for number, signal in enumerate(self.signals(layer))
        )
        return Decision(mark_plan(self.plan(marked, layer), layer.index), scores=marked)
