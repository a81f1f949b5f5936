"""Removing tokens in the layers of one forward pass, and what is seen of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tome_export.compressors.base import Compressor
from tome_export.errors import InputError
from tome_export.merge.lowering import mean_keys
from tome_export.merge.plan import Across, MergePlan, Step, StepPlans, compose_plans
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.reducers.base import AttentionInputs, LayerContext, Reducer
from tome_export.reducers.tome import ToMe
from tome_export.spec import Preprocessing


@dataclass(frozen=True)
class MergeSettings:
    """How a model merges.

    Attributes:
        schedule: Tokens to remove per layer; None for what the reducer's own options say.
        prop_attn: Add log(size) to the attention logits from the first merge on (ToMe, eq. 1).
            On for supervised models, off for off-the-shelf MAE.
        dense: Give the features of every patch, those of one group alike, in place of the model's
            own output (ToMe, section 3.2: unmerging).
        source_map: Give also which final token each patch went into.
        entropy: Give also the token-size entropy of each image; see ``merge.entropy``.
        reducer: How tokens become fewer.
        compressor: What makes a fixed number of tokens of those that are left, or None.
        learned: Weights of the reducer that came in the file of the model's weights, by key.
        preprocessing: In which form pixel values are handed over, and what is done to them here if
            they are an image's own; None for the form ``float32``.
    """

    schedule: Schedule | None
    prop_attn: bool = True
    dense: bool = False
    source_map: bool = False
    entropy: bool = False
    reducer: Reducer = field(default_factory=ToMe)
    compressor: Compressor | None = None
    learned: Mapping[str, Tensor] | None = field(default=None, compare=False)
    preprocessing: Preprocessing | None = None

    @property
    def unmerges(self) -> bool:
        """Whether the output needs the features of every patch."""
        return self.dense if self.compressor is None else self.compressor.places_patches


class LayerTrace(NamedTuple):
    """What one merging layer saw and decided.

    Attributes:
        keys: ``[B, H, N, D]`` in the model's dtype, those that attention compared; or the metric
            ``[B, N, D]`` that the reducer has in their place.
        chosen: The plan that the layer led to; other than ``plan`` only when plans are forced.
        scores: The signals of a reducer that decides by scores; see ``ScoredReducer``.
        across: Whether this is the merge across joined sequences, ahead of the attention; the keys
            are the hidden states ``[B, N, C]`` then.
    """

    layer: int
    keys: Tensor
    plan: MergePlan
    chosen: MergePlan
    scores: tuple[Tensor, ...] = ()
    across: bool = False

    @property
    def step(self) -> Step:
        """Which of the model's merges this is."""
        return Across(self.layer) if self.across else self.layer

    @property
    def metric(self) -> Tensor:
        """``[B, N, D]`` float32 (float64 for float64 keys): the keys averaged over heads."""
        return mean_keys(self.keys)

    @property
    def signals(self) -> tuple[Tensor, ...]:
        """What the decision hangs on: the scores, or else the metric."""
        return self.scores or (self.metric,)


@dataclass
class Tokens:
    """The tokens on their way through the layers of one forward pass.

    Attributes:
        x: ``[B, N, C]``.
        size: ``[B, N]`` float32 patches per token, or None before the first merge.
    """

    x: Tensor
    size: Tensor | None = None


Observer = Callable[[LayerTrace], None]


class Merger:
    """Removes tokens in each layer as scheduled; made anew for every forward pass.

    ``observe`` is called with every such layer; its keys are not kept here, because they are views
    that hold the whole query-key-value tensor of their layer.

    Attributes:
        positions: ``[B, N]`` int64, where each of the first layer's tokens is by now, -1 if it was
            dropped; None before the first plan, or where nobody asked to track it.
        size: ``[B, N]`` float32 patches of each token behind the last plan; None before the first.
        plan: What the last layer applied; None if it removed nothing.
    """

    def __init__(
        self,
        layers: Sequence[LayerTokens],
        prefix: int,
        class_token: bool,
        reducer: Reducer,
        module: nn.Module | None,
        *,
        forced: StepPlans | None = None,
        observe: Observer | None = None,
        track: bool = False,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.layers, self.prefix, self.class_token = layers, prefix, class_token
        self.reducer, self.module = reducer, module
        self.forced, self.observe, self.track = forced or {}, observe, track
        self.inputs = inputs or {}
        self.positions: Tensor | None = None
        self.size: Tensor | None = None
        self.plan: MergePlan | None = None
        self._attended: AttentionInputs | None = None

    def ahead(self, tokens: Tokens, layer: int) -> Tokens:  # noqa: ARG002
        """Called ahead of every block."""
        return tokens

    def __call__(self, tokens: Tokens, attended: AttentionInputs, layer: int) -> Tokens:
        """Called between attention and MLP of every block."""
        self.plan = None
        if self.reducer.behind_block:
            self._attended = attended
            return tokens
        return self._reduced(tokens, attended, layer)

    def behind(self, tokens: Tokens, layer: int) -> Tokens:
        """Called behind every block."""
        attended, self._attended = self._attended, None
        return tokens if attended is None else self._reduced(tokens, attended, layer)

    def _reduced(self, tokens: Tokens, attended: AttentionInputs, layer: int) -> Tokens:
        count = tokens.x.shape[1]
        # Fewer tokens than scheduled come when patches are dropped in training.
        r = max(0, min(self.layers[layer].r, self.reducer.limit(count, self.prefix)))
        if r == 0:
            return tokens
        size = tokens.size
        if size is None:
            size = tokens.x.new_ones((tokens.x.shape[0], count), dtype=torch.float32)
        context = LayerContext(
            index=layer,
            r=r,
            prefix=self.prefix,
            class_token=self.class_token,
            depth=len(self.layers),
            tokens=count,
            x=tokens.x,
            size=size,
            attention=attended,
            module=self.module,
            inputs=self.inputs,
        )
        decision = self.reducer.decide(context)
        plan = self.plan = self.forced.get(layer, decision.plan)
        x, size = self.reducer.apply(context, plan)
        self.size = size
        if self.observe is not None:
            keys = decision.metric if decision.metric is not None else attended.keys
            self.observe(LayerTrace(layer, keys, plan, decision.plan, decision.scores))
        if self.track:
            self.positions = compose_plans(self.positions, plan, drops=self.reducer.drops)
        return Tokens(x, size)


def check_reducer(settings: MergeSettings, class_token: bool) -> None:
    """Refuse what a reducer cannot give."""
    reducer = settings.reducer
    if reducer.needs_class_attention and not class_token:
        raise InputError(
            f"reducer {reducer.name} ranks tokens by the class token's attention, and this model "
            "has no class token; use a reducer that compares tokens, such as tome"
        )
    if reducer.drops and settings.unmerges:
        asked = "--dense" if settings.compressor is None else "--compress"
        raise InputError(
            f"reducer {reducer.name} drops tokens, so not every patch has features for {asked}; "
            "use a reducer that merges, such as tome"
        )
    if settings.entropy and not reducer.counts_patches:
        raise InputError(
            f"reducer {reducer.name} weighs the size of a token by similarity, so --entropy cannot "
            "count its patches; leave --entropy out"
        )
