"""Merging for torchvision's ``VisionTransformer``, SWAG's among them."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from tome_export.patch.attention import (
    check_multihead,
    multihead,
    multihead_block_cost,
    same_arithmetic,
)
from tome_export.patch.base import MergedModel, ModelLayout
from tome_export.patch.checks import check_unhooked, require
from tome_export.patch.heads import OutputChoice, output_choice_from_heads
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.spec import PatchGrid


class MergedTorchvision(MergedModel):
    """A torchvision ViT that merges tokens; see ``MergedModel``."""

    library_classes = ("torchvision.models.vision_transformer.VisionTransformer",)

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        _check(model)
        patch, width = int(model.patch_size), int(model.hidden_dim)
        # A pair is for images that are not square, which the library's own forward refuses.
        size = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
        blocks = model.encoder.layers
        # Behind a convolutional stem a patch is a cell of its features.
        grid = PatchGrid(size[0] // patch, size[1] // patch, patch, patch)
        layout = ModelLayout(
            blocks=blocks,
            costs=[multihead_block_cost(width, block.mlp) for block in blocks],
            width=width,
            input_size=(3, *map(int, size)),
            tokens=grid.patches + 1,
            prefix=1,
            class_token=True,
            grid=grid,
        )
        super().__init__(model, settings, layout)

    @property
    def output_choice(self) -> OutputChoice:
        """Class scores, unless the heads were taken off."""
        return output_choice_from_heads(self.model.heads)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token and patches, positions added."""
        encoder = self.model.encoder
        return cast(Tensor, encoder.dropout(self._patches(pixel_values) + encoder.pos_embedding))

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """Torchvision's ``EncoderBlock``."""
        normed = block.ln_1(tokens.x)
        out, attended = multihead(block.self_attention, normed, normed, bias)
        tokens = merger(Tokens(block.dropout(out) + tokens.x, tokens.size), attended, layer)
        return Tokens(tokens.x + block.mlp(block.ln_2(tokens.x)), tokens.size)

    def final(self, x: Tensor) -> Tensor:
        """The last norm."""
        return cast(Tensor, self.model.encoder.ln(x))

    def head(self, tokens: Tokens) -> Tensor:
        """The classifier on the class token."""
        return cast(Tensor, self.model.heads(tokens.x[:, 0]))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What torchvision's model itself gives."""
        model, dense = self.model, self.settings.dense
        with same_arithmetic():
            if not dense and not isinstance(model.image_size, tuple):
                return cast(Tensor, model(pixel_values))
            tokens = model.encoder(self._patches(pixel_values))
            return cast(Tensor, tokens[:, 1:] if dense else model.heads(tokens[:, 0]))

    def _patches(self, pixel_values: Tensor) -> Tensor:
        """As its ``_process_input``, which asks for squares, and the class token in front."""
        patches = self.model.conv_proj(pixel_values).flatten(2).transpose(1, 2)
        return torch.cat([self.model.class_token.expand(patches.shape[0], -1, -1), patches], dim=1)


def _check(model: Any) -> None:
    from torchvision.models.vision_transformer import Encoder, EncoderBlock, MLPBlock

    name = "torchvision VisionTransformer"
    check_unhooked(model, name)
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
