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
from tome_export.merge.plan import MergePlan, token_map, unmerge
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.merge.spec import clamp_r
from tome_export.patch.checks import check_undispatched
from tome_export.spec import PatchGrid

_INNER = "model."


@dataclass(frozen=True)
class MergeSettings:
    """How a model merges.

    Attributes:
        schedule: Tokens to merge per layer.
        prop_attn: Add log(size) to the attention logits from the first merge on (ToMe, eq. 1).
            On for supervised models, off for off-the-shelf MAE.
        dense: Give the features of every patch, those of one group alike, in place of the model's
            own output (ToMe, section 3.2: unmerging).
        source_map: Give also which final token each patch went into.
    """

    schedule: Schedule
    prop_attn: bool = True
    dense: bool = False
    source_map: bool = False


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

    ``observe`` is told of every merging layer; its keys are not kept here, because they are views
    that hold the whole query-key-value tensor of their layer.

    Attributes:
        positions: ``[B, N]`` int64, where each of the first layer's tokens is by now; None before
            the first merge, or where nobody asked to track it.
        plan: What the last call applied; None if it did not merge.
    """

    def __init__(
        self,
        layers: Sequence[LayerTokens],
        prefix: int,
        class_token: bool,
        forced: Mapping[int, MergePlan] | None = None,
        observe: Observer | None = None,
        track: bool = False,
    ) -> None:
        self.track = track
        self.positions: Tensor | None = None
        self.plan: MergePlan | None = None
        self.layers = layers
        self.prefix = prefix
        self.class_token = class_token
        self.forced = forced or {}
        self.observe = observe

    def __call__(self, tokens: Tokens, keys: Tensor, layer: int) -> Tokens:
        """Merge the tokens of one layer by its attention keys ``[B, H, N, D]``."""
        # Fewer tokens than scheduled come when patches are dropped in training.
        r = clamp_r(keys.shape[2], self.layers[layer].r, self.prefix)
        self.plan = None
        if r == 0:
            return tokens
        size = tokens.size
        if size is None:
            size = keys.new_ones((keys.shape[0], keys.shape[2]), dtype=torch.float32)
        chosen = match(keys, r, self.prefix, self.class_token)
        plan = self.plan = self.forced.get(layer, chosen)
        x, size = merge(tokens.x, size, plan)
        if self.observe is not None:
            self.observe(LayerTrace(layer, keys, plan, chosen))
        if self.track:
            moved = token_map(plan)
            before = self.positions
            self.positions = moved if before is None else moved.gather(1, before)
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
        return total_macs(self.block_costs, layers, self.fixed_macs(final))

    def merger(
        self, forced: Mapping[int, MergePlan] | None = None, observe: Observer | None = None
    ) -> Merger:
        """A fresh merger; ``forced`` plans, by layer, are applied instead of the layers' own."""
        track = self.settings.dense or self.settings.source_map
        return Merger(self.layers, self.prefix, self.class_token, forced, observe, track)

    def forward(self, pixel_values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Classify or embed images.

        Args:
            pixel_values: ``[B, C, H, W]``.

        Returns:
            What the library model returns: ``[B, classes]`` or ``[B, features]``; dense models
            give ``[B, patches, features]``. With a source map also that, ``[B, patches]`` int32:
            the final token of each patch, counted behind the prefix tokens.

        Raises:
            InputError: if the image size is not the one the token counts were made for, or hooks
                move the inner model's weights between devices.
        """
        merger = self.merger()
        output = self.run(self._checked(pixel_values), merger)
        return (output, self._source_map(output, merger)) if self.settings.source_map else output

    def _source_map(self, output: Tensor, merger: Merger) -> Tensor:
        if merger.positions is None:
            count = self.layers[0].tokens_in - self.prefix if self.layers else 0
            patches = torch.arange(count, dtype=torch.int32, device=output.device)
            return patches.expand(output.shape[0], -1)
        return (merger.positions[:, self.prefix :] - self.prefix).to(torch.int32)

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
    for key in [key for key in state if key.startswith(prefix)]:
        state[inner + key.removeprefix(prefix)] = state.pop(key)
