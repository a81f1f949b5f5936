"""What every patched model is: the untouched library model, run with merging between its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost, total_macs
from tome_export.merge.plan import MergePlan, unmerge
from tome_export.merge.schedule import LayerTokens
from tome_export.patch.checks import check_undispatched
from tome_export.patch.merger import (
    LayerTrace,
    Merger,
    MergeSettings,
    Observer,
    Tokens,
    check_reducer,
)
from tome_export.reducers.base import Tower
from tome_export.spec import PatchGrid

_INNER, _LEARNED = "model.", "reducer."


class MergedModel(nn.Module, ABC):
    """A library model together with its merging. The inner model is neither copied nor changed.

    Weights are shared with the inner model, and ``state_dict`` has the inner model's own keys,
    so checkpoints load into either. ``copy.deepcopy`` separates the two.

    Attributes:
        model: The library model, exactly as it was given.
        settings: How it merges.
        layers: Clamped token counts of each block.
        reducer: The reducer's learned part, or None.
    """

    def __init__(
        self, model: nn.Module, settings: MergeSettings, depth: int, tokens: int, prefix: int
    ) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix
        self.tower = Tower(self.width, depth, tokens, prefix)
        check_reducer(settings, self.class_token)
        reducer = settings.reducer
        schedule = settings.schedule
        if schedule is None:
            schedule = reducer.counts(self.tower)
        self.settings = replace(settings, schedule=schedule)
        self.layers = reducer.layers(schedule, self.tower)
        self.reducer = reducer.module(self.tower) if self.merges else None
        self.training = model.training
        self.register_state_dict_post_hook(_drop_inner_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_inner_prefix)  # type: ignore[no-untyped-call]

    @property
    @abstractmethod
    def class_token(self) -> bool:
        """Whether one of the prefix tokens is a class token."""

    @property
    @abstractmethod
    def width(self) -> int:
        """C of the tokens between the blocks."""

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
    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """All blocks and what treats tokens alone after them, merging with ``merger``."""

    @abstractmethod
    def head(self, tokens: Tokens) -> Tensor:
        """The library model's own output from the final tokens."""

    @abstractmethod
    def library(self, pixel_values: Tensor) -> Tensor:
        """What the library model itself gives for images, in this model's form of output."""

    @property
    def classifies(self) -> bool:
        """Whether the model's own output is one score per class, and not features."""
        return False

    def token_features(self, tokens: Tokens) -> Tensor:
        """``[B, K, C]``, prefix tokens included: what dense outputs hold for each token."""
        return tokens.x

    def run(self, pixel_values: Tensor, merger: Merger) -> Tensor:
        """The forward pass to the main output, handing each layer's tokens to ``merger``."""
        tokens = self.encode(pixel_values, merger)
        if not self.settings.dense:
            return self.head(tokens)
        x = self.token_features(tokens)
        if merger.positions is not None:
            return unmerge(x, merger.positions[:, self.prefix :])
        return x[:, self.prefix :]

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
        reducer = self.settings.reducer
        learned = sum(reducer.macs(layer, self.tower) for layer in layers if layer.r)
        return learned + total_macs(self.block_costs, layers, self.fixed_macs(final))

    @property
    def extra_inputs(self) -> Mapping[str, tuple[int, ...]]:
        """Inputs besides the images: shape of each without the batch, float32."""
        return self.settings.reducer.inputs(self.tower) if self.merges else {}

    def merger(
        self,
        forced: Mapping[int, MergePlan] | None = None,
        observe: Observer | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        layers: Sequence[LayerTokens] | None = None,
    ) -> Merger:
        """A fresh merger.

        Args:
            forced: Plans to apply instead of the layers' own, by layer index.
            observe: Called with every layer that removes tokens.
            inputs: The model's inputs besides the images, by name.
            layers: Token counts other than the model's own.
        """
        return Merger(
            self.layers if layers is None else layers,
            self.prefix,
            self.class_token,
            forced,
            observe,
            self.settings.dense or self.settings.source_map,
            self.settings.reducer,
            self.reducer,
            inputs,
        )

    def forward(self, pixel_values: Tensor, *extra: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Classify or embed images.

        Args:
            pixel_values: ``[B, C, H, W]``.
            extra: The other inputs, in the order of ``extra_inputs``.

        Returns:
            What the library model returns: ``[B, classes]`` or ``[B, features]``; dense models
            give ``[B, patches, features]``. With a source map also that, ``[B, patches]`` int32:
            the final token of each patch, counted behind the prefix tokens.

        Raises:
            InputError: if the image size is not the one the token counts were made for, or hooks
                move the inner model's weights between devices.
        """
        merger = self.merger(inputs=dict(zip(self.extra_inputs, extra, strict=True)))
        output = self.run(self._checked(pixel_values), merger)
        return (output, self._source_map(output, merger)) if self.settings.source_map else output

    def _source_map(self, output: Tensor, merger: Merger) -> Tensor:
        if merger.positions is None:
            count = self.layers[0].tokens_in - self.prefix if self.layers else 0
            patches = torch.arange(count, dtype=torch.int32, device=output.device)
            return patches.expand(output.shape[0], -1)
        places = merger.positions[:, self.prefix :]
        if self.settings.reducer.drops:
            return torch.where(places < 0, places, places - self.prefix).to(torch.int32)
        return (places - self.prefix).to(torch.int32)

    def forward_traced(
        self,
        pixel_values: Tensor,
        forced: Mapping[int, MergePlan] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, list[LayerTrace]]:
        """As ``forward``, with the keys and plan of every merging layer.

        Args:
            pixel_values: ``[B, C, H, W]``.
            forced: Plans to apply instead of the layers' own, by layer index.
            inputs: The other inputs by name.
        """
        trace: list[LayerTrace] = []
        return self.forward_observed(pixel_values, trace.append, forced, inputs), trace

    def forward_observed(
        self,
        pixel_values: Tensor,
        observe: Observer,
        forced: Mapping[int, MergePlan] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As ``forward_traced``, but each layer is handed out in turn and none is kept.

        Args:
            pixel_values: ``[B, C, H, W]``.
            observe: Called with every merging layer as it merges.
            forced: Plans to apply instead of the layers' own, by layer index.
            inputs: The other inputs by name.
        """
        return self.run(self._checked(pixel_values), self.merger(forced, observe, inputs))

    def _checked(self, pixel_values: Tensor) -> Tensor:
        check_undispatched(self.model)
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
    own = prefix + _LEARNED
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
        state[inner + key.removeprefix(prefix)] = state.pop(key)
