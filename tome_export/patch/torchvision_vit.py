"""Merging for torchvision's ``VisionTransformer``, SWAG's among them."""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import log_size_bias
from tome_export.patch.base import MergedModel, OutputChoice
from tome_export.patch.checks import Zeros, check_plain, counted_macs, require
from tome_export.patch.heads import choice_by_heads
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.patch.multihead import (
    check_multihead,
    multihead,
    multihead_block_cost,
    same_arithmetic,
)
from tome_export.spec import PatchGrid

SUPPORTED = "torchvision's VisionTransformer"


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family.

    Raises:
        InputError: if a part of the model is not understood.
    """
    if type(model).__module__.partition(".")[0] != "torchvision":
        return None
    from torchvision.models.vision_transformer import VisionTransformer

    return MergedTorchvision(model, settings) if type(model) is VisionTransformer else None


class MergedTorchvision(MergedModel):
    """A torchvision ViT that merges tokens; see ``MergedModel``.

    Raises:
        InputError: if a part of the model is not understood.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        _check(model)
        side, patch = int(model.image_size), int(model.patch_size)
        self._patch_grid = PatchGrid(side // patch, side // patch, patch, patch)
        depth = len(model.encoder.layers)
        super().__init__(model, settings, depth, self._patch_grid.patches + 1, prefix=1)

    @property
    def class_token(self) -> bool:
        """Torchvision's ViTs all have one."""
        return True

    @property
    def width(self) -> int:
        """C of the tokens between the blocks."""
        return int(self.model.hidden_dim)  # type: ignore[arg-type]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""
        model: Any = self.model
        return 3, int(model.image_size), int(model.image_size)

    @property
    def patch_grid(self) -> PatchGrid | None:
        """Where the patches lie in the image; behind a convolutional stem its feature cells."""
        return self._patch_grid

    @property
    def output_choice(self) -> OutputChoice:
        """Class scores, unless the heads were taken off."""
        return choice_by_heads(self.model.heads)

    @cached_property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block."""
        model: Any = self.model
        width = int(model.hidden_dim)
        return tuple(multihead_block_cost(width, block.mlp) for block in model.encoder.layers)

    def fixed_macs(self, tokens: int) -> int:  # noqa: ARG002 (the class token is the output)
        """MACs per image of patch embedding and classifier."""
        model: Any = self.model

        def outside(zeros: Zeros) -> None:
            model.conv_proj(zeros(1, *self.input_size))
            if not self.settings.dense:
                model.heads(zeros(1, model.hidden_dim))

        return counted_macs(model, outside)

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """Torchvision's encoder, with ``merger`` called once in every block."""
        model: Any = self.model
        x, encoder = self._embed(pixel_values), model.encoder
        tokens = Tokens(encoder.dropout(x + encoder.pos_embedding))
        for layer, block in enumerate(encoder.layers):
            size = tokens.size if self.settings.prop_attn else None
            normed = block.ln_1(tokens.x)
            bias = log_size_bias(size, normed.dtype)
            out, attended = multihead(block.self_attention, normed, normed, bias)
            tokens = Tokens(block.dropout(out) + tokens.x, tokens.size)
            tokens = merger(tokens, attended, layer)
            tokens = Tokens(tokens.x + block.mlp(block.ln_2(tokens.x)), tokens.size)
            tokens = merger.behind(tokens, layer)
        return Tokens(encoder.ln(tokens.x), tokens.size)

    def head(self, tokens: Tokens) -> Tensor:
        """The classifier on the class token."""
        model: Any = self.model
        return cast(Tensor, model.heads(tokens.x[:, 0]))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What torchvision's model itself gives."""
        model: Any = self.model
        with same_arithmetic():
            if self.settings.dense:
                return cast(Tensor, model.encoder(self._embed(pixel_values))[:, 1:])
            return cast(Tensor, model(pixel_values))

    def _embed(self, pixel_values: Tensor) -> Tensor:
        model: Any = self.model
        patches = model._process_input(pixel_values)
        return torch.cat([model.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)


def _check(model: Any) -> None:
    from torchvision.models.vision_transformer import Encoder, EncoderBlock, MLPBlock

    name = "torchvision VisionTransformer"
    check_plain(model, name)
    require(model.encoder, {Encoder}, "encoder", name)
    require(model.encoder.layers, {nn.Sequential}, "encoder.layers", name)
    require(model.encoder.ln, {nn.LayerNorm, nn.Identity}, "normalisation", name)
    for block in model.encoder.layers:
        require(block, {EncoderBlock}, "block", name)
        check_multihead(block.self_attention, name)
        require(block.mlp, {MLPBlock}, "MLP", name)
        for part in block.mlp:
            require(part, {nn.Linear, nn.GELU, nn.Dropout}, "MLP part", name)
        for norm in (block.ln_1, block.ln_2):
            require(norm, {nn.LayerNorm}, "normalisation", name)
