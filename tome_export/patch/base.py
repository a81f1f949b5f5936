"""What every patched model is: the untouched library model, run with merging between its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.lowering import mean_keys
from tome_export.merge.macs import BlockCost, total_macs
from tome_export.merge.ops import match, merge
from tome_export.merge.plan import MergePlan
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.merge.spec import clamp_r
from tome_export.spec import PatchGrid

_INNER = "model."


@dataclass(frozen=True)
class MergeSettings:
    """How a model merges.

    Attributes:
        schedule: Tokens to merge per layer.
        prop_attn: Add log(size) to the attention logits from the first merge on (ToMe, eq. 1).
            On for supervised models, off for off-the-shelf MAE.
    """

    schedule: Schedule
    prop_attn: bool = True


class LayerTrace(NamedTuple):
    """What one merging layer saw and decided.

    Attributes:
        layer: Index of the block.
        keys: ``[B, H, N, D]`` in the model's dtype, those that attention compared.
        plan: The plan that was applied.
        chosen: The plan that the keys lead to; other than ``plan`` only when plans are forced.
    """

    layer: int
    keys: Tensor
    plan: MergePlan
    chosen: MergePlan

    @property
    def metric(self) -> Tensor:
        """``[B, N, D]`` float32 (float64 for float64 keys): the keys averaged over heads."""
        return mean_keys(self.keys)


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
    """Merges after each layer as scheduled; made anew for every forward pass.

    ``observe`` is told of every merging layer; nothing is kept here, because the keys are views
    that hold the whole query-key-value tensor of their layer.
    """

    def __init__(
        self,
        layers: Sequence[LayerTokens],
        prefix: int,
        class_token: bool,
        forced: Mapping[int, MergePlan] | None = None,
        observe: Observer | None = None,
    ) -> None:
        self.layers = layers
        self.prefix = prefix
        self.class_token = class_token
        self.forced = forced or {}
        self.observe = observe

    def __call__(self, tokens: Tokens, keys: Tensor, layer: int) -> Tokens:
        """Merge the tokens of one layer by its attention keys ``[B, H, N, D]``."""
        # Fewer tokens than scheduled come when patches are dropped in training.
        r = clamp_r(keys.shape[2], self.layers[layer].r, self.prefix)
        if r == 0:
            return tokens
        size = tokens.size
        if size is None:
            size = keys.new_ones((keys.shape[0], keys.shape[2]), dtype=torch.float32)
        chosen = match(keys, r, self.prefix, self.class_token)
        plan = self.forced.get(layer, chosen)
        x, size = merge(tokens.x, size, plan)
        if self.observe is not None:
            self.observe(LayerTrace(layer, keys, plan, chosen))
        return Tokens(x, size)


class MergedModel(nn.Module, ABC):
    """A library model together with its merging. The inner model is neither copied nor changed.

    Weights are shared with the inner model, and ``state_dict`` has the inner model's own keys,
    so checkpoints load into either. ``copy.deepcopy`` separates the two.

    Attributes:
        model: The library model, exactly as it was given.
        settings: How it merges.
        layers: Clamped token counts of each block.
    """

    def __init__(
        self, model: nn.Module, settings: MergeSettings, depth: int, tokens: int, prefix: int
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = settings
        self.prefix = prefix
        self.layers = settings.schedule.tokens(depth, tokens, prefix)
        self.training = model.training
        self.register_state_dict_post_hook(_drop_inner_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_inner_prefix)  # type: ignore[no-untyped-call]

    @property
    @abstractmethod
    def class_token(self) -> bool:
        """Whether one of the prefix tokens is a class token."""

    @property
    @abstractmethod
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""

    @property
    @abstractmethod
    def patch_grid(self) -> PatchGrid | None:
        """Where the patches lie in the image; None where a token is no rectangle of it."""

    @property
    @abstractmethod
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block."""

    @abstractmethod
    def fixed_macs(self, tokens: int) -> int:
        """MACs per image outside the blocks: patch embedding, pooling of ``tokens``, head."""

    @abstractmethod
    def run(self, pixel_values: Tensor, merger: Merger) -> Tensor:
        """The forward pass, handing the tokens of each layer to ``merger``."""

    @property
    def merges(self) -> bool:
        """Whether any layer merges."""
        return any(layer.r for layer in self.layers)

    def macs(self, *, merged: bool = True) -> int:
        """Multiply-accumulates per image, with or without merging."""
        layers = self.layers
        if not merged:
            first = layers[0].tokens_in if layers else 0
            layers = tuple(LayerTokens(first, 0, first) for _ in layers)
        final = layers[-1].tokens_out if layers else self.prefix
        return total_macs(self.block_costs, layers, self.fixed_macs(final))

    def merger(
        self, forced: Mapping[int, MergePlan] | None = None, observe: Observer | None = None
    ) -> Merger:
        """A fresh merger; ``forced`` plans, by layer, are applied instead of the layers' own."""
        return Merger(self.layers, self.prefix, self.class_token, forced, observe)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Classify or embed images.

        Args:
            pixel_values: ``[B, C, H, W]``.

        Returns:
            What the library model returns: ``[B, classes]`` or ``[B, features]``.

        Raises:
            InputError: if the image size is not the one the token counts were made for.
        """
        return self.run(self._checked(pixel_values), self.merger())

    def forward_traced(
        self, pixel_values: Tensor, forced: Mapping[int, MergePlan] | None = None
    ) -> tuple[Tensor, list[LayerTrace]]:
        """As ``forward``, with the keys and plan of every merging layer.

        Args:
            pixel_values: ``[B, C, H, W]``.
            forced: Plans to apply instead of the layers' own, by layer index.
        """
        trace: list[LayerTrace] = []
        return self.forward_observed(pixel_values, trace.append, forced), trace

    def forward_observed(
        self,
        pixel_values: Tensor,
        observe: Observer,
        forced: Mapping[int, MergePlan] | None = None,
    ) -> Tensor:
        """As ``forward_traced``, but each layer is handed out in turn and none is kept.

        Args:
            pixel_values: ``[B, C, H, W]``.
            observe: Called with every merging layer as it merges.
            forced: Plans to apply instead of the layers' own, by layer index.
        """
        return self.run(self._checked(pixel_values), self.merger(forced, observe))

    def _checked(self, pixel_values: Tensor) -> Tensor:
        if tuple(pixel_values.shape[1:]) != self.input_size:
            raise InputError(
                f"image shape is {tuple(pixel_values.shape[1:])}; this model's token counts are "
                f"fixed for {self.input_size} (channels, height, width)"
            )
        return pixel_values


def _drop_inner_prefix(
    _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    inner = prefix + _INNER
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _add_inner_prefix(
    _module: nn.Module, state: dict[str, Any], prefix: str, *_args: object
) -> None:
    inner = prefix + _INNER
    for key in [key for key in state if key.startswith(prefix)]:
        state[inner + key.removeprefix(prefix)] = state.pop(key)
