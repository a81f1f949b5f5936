"""Merging for timm's ``VisionTransformer`` and ``VisionTransformerDistilled``."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import log_size_bias
from tome_export.patch.base import MergedModel, OutputChoice
from tome_export.patch.blocks import BlockForward, block_cost, block_forward
from tome_export.patch.checks import (
    Zeros,
    check_plain,
    counted_macs,
    model_name,
    pretrained_configuration,
)
from tome_export.patch.heads import choice_by_heads, head_width
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.spec import PatchGrid

SUPPORTED = "timm's VisionTransformer and VisionTransformerDistilled"

POOLS = ("", "avg", "avgmax", "max", "token", "map")


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family.

    Raises:
        InputError: if a part of the model is not understood.
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    if type(model) in (VisionTransformer, VisionTransformerDistilled):
        return MergedVisionTransformer(model, settings)
    return None


PROJECTION_UNIT = 64
"""Embeddings are so wide, or a multiple of it, in every CLIP that timm has, and no label set is."""


def output_choice(model: Any) -> OutputChoice:
    """What the output of a timm model is: class scores, or features.

    Timm keeps the projection of CLIP's and the Perception Encoder's towers as their head. It is the
    head of the pretrained weights as they are, whose width its configuration has as ``num_classes``
    and no label set has; any other head was put there to classify.

    Args:
        model: A ``VisionTransformer``, ``VisionTransformerDistilled`` or ``Eva``; also without
            memory for its weights.
    """
    from timm.data import infer_imagenet_subset

    choice = choice_by_heads(getattr(model, "head", None), getattr(model, "head_dist", None))
    if not choice.classifies:
        return choice
    if getattr(model, "global_pool", None) == "":
        why = "without pooling (global_pool='') the output is every token's, not the image's"
        return OutputChoice(classifies=False, why=why)
    width = head_width(model.head)
    cfg = pretrained_configuration(model)
    pretrained = cfg.get("num_classes")
    if width is None or not pretrained or infer_imagenet_subset({"num_classes": pretrained}):
        return choice
    if cfg.get("label_names") or pretrained % PROJECTION_UNIT:
        return choice
    if width != pretrained:
        why = f"{choice.why}, not the {pretrained} of the weights' projection to image features"
        return OutputChoice(classifies=True, why=why)
    why = (
        f"the head of {width} outputs is the pretrained weights' own, which is a projection to "
        "image features and no list of classes"
    )
    return OutputChoice(classifies=False, why=why)


class MergedVisionTransformer(MergedModel):
    """A timm ViT that merges tokens; see ``MergedModel``.

    Class, distillation and register tokens are protected. Average pooling weights tokens by
    size, so that every patch counts once; attention pooling gets log(size) as attention does.

    Raises:
        InputError: if a part of the model is not understood.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        name = model_name(model)
        check_plain(model, name)
        self._forwards = tuple(self.block_forward(block, name) for block in model.blocks)
        _check_pooling(model, name)
        _check_patches(model, name)
        height, width = model.patch_embed.img_size
        # Kept, because token counts stay those of this size if timm's set_input_size comes later.
        self._input_size = int(model.in_chans), int(height), int(width)
        self._patch_grid = _patch_grid(model.patch_embed)
        prefix = int(model.num_prefix_tokens)
        tokens = int(model.patch_embed.num_patches) + prefix
        super().__init__(model, settings, len(model.blocks), tokens, prefix)

    @staticmethod
    def block_forward(block: nn.Module, name: str) -> BlockForward:
        """The merging forward of a block, for a model of this name."""
        return block_forward(block, name)

    @property
    def class_token(self) -> bool:
        """Whether one of the prefix tokens is a class token."""
        return bool(self.model.has_class_token)

    @property
    def width(self) -> int:
        """C of the tokens between the blocks."""
        return int(self.model.embed_dim)  # type: ignore[arg-type]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""
        return self._input_size

    @property
    def patch_grid(self) -> PatchGrid | None:
        """Where the patches lie in the image; for a hybrid the pixels per cell of its features."""
        return self._patch_grid

    @property
    def output_choice(self) -> OutputChoice:
        """See ``output_choice``."""
        return output_choice(self.model)

    @cached_property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block."""
        model: Any = self.model
        return tuple(block_cost(block) for block in model.blocks)

    def fixed_macs(self, tokens: int) -> int:
        """MACs per image of patch embedding, pooling and head, as torch counts them."""
        model: Any = self.model

        def outside(zeros: Zeros) -> None:
            model.patch_embed(zeros(1, *self.input_size))
            if not self.settings.dense:
                model.forward_head(zeros(1, tokens, model.embed_dim))

        return counted_macs(model, outside)

    def library(self, pixel_values: Tensor) -> Tensor:
        """What timm's model itself gives."""
        model: Any = self.model
        if self.settings.dense:
            return model.forward_features(pixel_values)[:, self.prefix :]  # type: ignore[no-any-return]
        return model(pixel_values)  # type: ignore[no-any-return]

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """Timm's ``forward_features``, with ``merger`` called once in every block."""
        model: Any = self.model
        x = model._pos_embed(model.patch_embed(pixel_values))
        tokens = Tokens(model.norm_pre(model.patch_drop(x)))
        for layer, (block, forward) in enumerate(zip(model.blocks, self._forwards, strict=True)):
            tokens = forward(block, tokens, self._bias(tokens), merger, layer)
            tokens = merger.behind(tokens, layer)
        return Tokens(model.norm(tokens.x), tokens.size)

    def head(self, tokens: Tokens) -> Tensor:
        """Timm's ``forward_head``, pooling weighted by size."""
        model: Any = self.model
        # Without pooling timm hands on every token, prefix included.
        if tokens.size is None or model.global_pool in ("", "token"):
            return model.forward_head(tokens.x)  # type: ignore[no-any-return]
        return self._head(tokens.x, tokens.size)

    def _bias(self, tokens: Tokens) -> Tensor | None:
        size = tokens.size if self.settings.prop_attn else None
        return log_size_bias(size, tokens.x.dtype)

    def _head(self, x: Tensor, size: Tensor) -> Tensor:
        model: Any = self.model
        if not model.pool_include_prefix:
            x, size = x[:, self.prefix :], size[:, self.prefix :]
        x = model.head_drop(model.fc_norm(self._pool(x, size)))
        return model.head(x)  # type: ignore[no-any-return]

    def _pool(self, x: Tensor, size: Tensor) -> Tensor:
        model: Any = self.model
        if model.attn_pool is not None:
            mask = size.log().to(x.dtype)[:, None, None, :] if self.settings.prop_attn else None
            if mask is not None:
                mask = mask.expand(-1, -1, model.attn_pool.latent_len, -1)
            return model.attn_pool(x, attn_mask=mask)  # type: ignore[no-any-return]
        if model.global_pool == "max":
            return x.amax(dim=1)
        weight = (size / size.sum(dim=1, keepdim=True)).to(torch.promote_types(x.dtype, size.dtype))
        mean = (x.to(weight.dtype) * weight[..., None]).sum(dim=1).to(x.dtype)
        return 0.5 * (x.amax(dim=1) + mean) if model.global_pool == "avgmax" else mean


def _check_patches(model: Any, name: str) -> None:
    """Refuse padding, whose tokens timm's own patch count leaves out."""
    embed = model.patch_embed
    pads = getattr(embed, "dynamic_img_pad", False)
    if pads and any(
        side % patch for side, patch in zip(embed.img_size, embed.patch_size, strict=True)
    ):
        raise InputError(
            f"model {name} pads images of {embed.img_size} to whole patches of "
            f"{embed.patch_size}, so its tokens cannot be counted; make it with an image size "
            "divisible by the patch size"
        )


def _patch_grid(embed: Any) -> PatchGrid | None:
    from timm.layers import HybridEmbed, PatchEmbed

    if type(embed) not in (PatchEmbed, HybridEmbed):
        return None
    rows, cols = (int(n) for n in embed.grid_size)
    height, width = (int(n) for n in embed.img_size)
    if type(embed) is PatchEmbed:
        return PatchGrid(rows, cols, *(int(n) for n in embed.patch_size))
    # A cell of a backbone's features sees more than its part of the image, but stands for that.
    if height % rows == 0 and width % cols == 0:
        return PatchGrid(rows, cols, height // rows, width // cols)
    return None


def _check_pooling(model: Any, name: str) -> None:
    from timm.layers import AttentionPoolLatent

    if model.global_pool not in POOLS:
        raise InputError(
            f"global pooling {model.global_pool!r} of model {name} is not supported; "
            f"supported: {', '.join(repr(pool) for pool in POOLS)}"
        )
    if model.attn_pool is not None and type(model.attn_pool) is not AttentionPoolLatent:
        raise InputError(
            f"attention pooling class {type(model.attn_pool).__name__} of model {name} is not "
            "supported; supported: AttentionPoolLatent"
        )
    if getattr(model.attn_pool, "pos_embed", None) is not None:
        raise InputError(
            f"attention pooling of model {name} has a position embedding, which merged tokens "
            "cannot keep; not supported"
        )
