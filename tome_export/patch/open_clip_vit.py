"""Merging for the image towers of open_clip: its own ``VisionTransformer``, and timm's inside it.

Outputs are those of ``encode_image(image, normalize=False)``: not of unit length.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import log_size_bias
from tome_export.patch.base import MergedModel
from tome_export.patch.checks import Zeros, check_plain, counted_macs, require
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.patch.multihead import (
    check_multihead,
    multihead,
    multihead_block_cost,
    same_arithmetic,
)
from tome_export.reducers.base import AttentionInputs
from tome_export.spec import PatchGrid

SUPPORTED = "open_clip's VisionTransformer and TimmModel"


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family.

    Raises:
        InputError: if a part of the model is not understood, or it is not the image tower alone.
    """
    if type(model).__module__.partition(".")[0] != "open_clip":
        return None
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer

    if type(model) is VisionTransformer:
        return MergedOpenClip(model, settings)
    if type(model) is TimmModel:
        from tome_export.patch.open_clip_timm import MergedTimmTower

        return MergedTimmTower(model, settings)
    if isinstance(getattr(model, "visual", None), nn.Module):
        raise InputError(
            f"model class {type(model).__name__} is a whole open_clip model; patch its image "
            "tower alone: patch(model.visual, r)"
        )
    return None


class MergedOpenClip(MergedModel):
    """An open_clip ViT that merges tokens; see ``MergedModel``.

    Average pooling weights patches by size; an attentional pooler gets log(size) as attention
    does.

    Raises:
        InputError: if a part of the model is not understood.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        _check(model)
        self._patch_grid = PatchGrid(*map(int, (*model.grid_size, *model.patch_size)))
        depth = len(model.transformer.resblocks)
        super().__init__(model, settings, depth, self._patch_grid.patches + 1, prefix=1)

    @property
    def class_token(self) -> bool:
        """Open_clip's ViTs all have one."""
        return True

    @property
    def width(self) -> int:
        """C of the tokens between the blocks."""
        return int(self.model.conv1.out_channels)  # type: ignore[union-attr, arg-type]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""
        model: Any = self.model
        height, width = model.image_size
        return int(model.conv1.in_channels), int(height), int(width)

    @property
    def patch_grid(self) -> PatchGrid | None:
        """Where the patches lie in the image."""
        return self._patch_grid

    @cached_property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block."""
        model: Any = self.model
        blocks = model.transformer.resblocks
        width = int(model.transformer.width)
        return tuple(multihead_block_cost(width, block.mlp) for block in blocks)

    def fixed_macs(self, tokens: int) -> int:
        """MACs per image of patch embedding, pooling and projection."""
        model: Any = self.model

        def outside(zeros: Zeros) -> None:
            model.conv1(zeros(1, *self.input_size))
            if not self.settings.dense:
                self.head(Tokens(zeros(1, tokens, model.transformer.width)))

        return counted_macs(model, outside)

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """Open_clip's transformer, with ``merger`` called once in every block."""
        model: Any = self.model
        tokens = Tokens(model._embeds(pixel_values))
        for layer, block in enumerate(model.transformer.resblocks):
            size = tokens.size if self.settings.prop_attn else None
            out, attended = _attention(block, tokens.x, log_size_bias(size, tokens.x.dtype))
            tokens = merger(Tokens(tokens.x + block.ls_1(out), tokens.size), attended, layer)
            out = block.ls_2(block.mlp(block.ln_2(tokens.x)))
            tokens = merger.behind(Tokens(tokens.x + out, tokens.size), layer)
        return tokens

    def token_features(self, tokens: Tokens) -> Tensor:
        """The last block's tokens, behind the final norm where that is of the tokens' width."""
        model: Any = self.model
        return tokens.x if model.attn_pool is not None else cast(Tensor, model.ln_post(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        """Pooling, norm and projection."""
        model: Any = self.model
        if model.attn_pool is not None:
            pooled = self._first(model.ln_post(self._attention_pool(tokens)))
        elif model.final_ln_after_pool:
            pooled = model.ln_post(self._pool(tokens.x, tokens.size))
        else:
            pooled = self._pool(model.ln_post(tokens.x), tokens.size)
        return cast(Tensor, pooled if model.proj is None else pooled @ model.proj)

    def library(self, pixel_values: Tensor) -> Tensor:
        """What open_clip's model itself gives, not of unit length."""
        model: Any = self.model
        with same_arithmetic():
            if self.settings.dense:
                x = model.transformer(model._embeds(pixel_values))
                return self.token_features(Tokens(x))[:, 1:]
            found = model(pixel_values)
        return cast(Tensor, found[0] if model.output_tokens else found)

    def _pool(self, x: Tensor, size: Tensor | None) -> Tensor:
        model: Any = self.model
        if model.pool_type == "tok":
            return x[:, 0]
        x = x[:, 1:]
        if size is None:
            return x.mean(dim=1)
        weight = size[:, 1:] / size[:, 1:].sum(dim=1, keepdim=True)
        weight = weight.to(torch.promote_types(x.dtype, size.dtype))
        return (x.to(weight.dtype) * weight[..., None]).sum(dim=1).to(x.dtype)

    def _first(self, x: Tensor) -> Tensor:
        """Of the pooler's answers, as ``_global_pool`` of the library takes them."""
        model: Any = self.model
        return x[:, 0] if model.pool_type == "tok" else x[:, 1:].mean(dim=1)

    def _attention_pool(self, tokens: Tokens) -> Tensor:
        pool: Any = self.model.attn_pool
        queries = pool.ln_q(pool.query).expand(tokens.x.shape[0], -1, -1)
        bias = None
        if tokens.size is not None and self.settings.prop_attn:
            log_size = tokens.size.log().to(tokens.x.dtype)
            bias = log_size[:, None, None, :].expand(-1, -1, queries.shape[1], -1)
        return multihead(pool.attn, queries, pool.ln_k(tokens.x), bias)[0]


def _attention(block: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """Output of, and what was compared by, either block's attention, on ``[B, N, C]``."""
    from open_clip.transformer import CustomResidualAttentionBlock

    normed = block.ln_1(x)
    if type(block) is CustomResidualAttentionBlock:
        out, attended = _custom_attention(block.attn, normed, bias)
        return block.ln_attn(out), attended
    return multihead(block.attn, normed, normed, bias)


def _custom_attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """``open_clip.transformer.Attention``: q/k norm, head scale and inner norm included."""
    packed = functional.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    heads = (*x.shape[:2], attn.num_heads, attn.head_dim)
    q, k, v = (part.reshape(heads).transpose(1, 2) for part in packed.chunk(3, dim=-1))
    q, k = attn.ln_q(q), attn.ln_k(k)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    if attn.head_scale is not None:
        out = out * attn.head_scale
    out = attn.ln_inner(out.transpose(1, 2).flatten(-2))
    return attn.out_drop(attn.out_proj(out)), AttentionInputs(k, q, None, bias, x)


def _check(model: Any) -> None:
    from open_clip import transformer as clip

    name = "open_clip VisionTransformer"
    norms = {clip.LayerNorm, nn.LayerNorm, nn.Identity}
    check_plain(model, name)
    require(model.transformer, {clip.Transformer}, "transformer", name)
    for block in model.transformer.resblocks:
        known = {clip.ResidualAttentionBlock, clip.CustomResidualAttentionBlock}
        require(block, known, "block", name)
        if type(block) is clip.CustomResidualAttentionBlock:
            require(block.attn, {clip.Attention}, "attention", name)
            if block.attn.logit_scale is not None:
                # Its own forward multiplies tensors of four dimensions with bmm, and fails.
                raise InputError(
                    f"attention of {name} is scaled cosine attention, which open_clip itself "
                    "cannot run; it is not supported"
                )
        else:
            check_multihead(block.attn, name)
        require(block.mlp, {nn.Sequential}, "MLP", name)
        for part in block.mlp:
            pointwise = {nn.Linear, nn.GELU, clip.QuickGELU, nn.SiLU, nn.ReLU} | norms
            require(part, pointwise, "MLP part", name)
        for part in (block.ls_1, block.ls_2):
            require(part, {nn.Identity, clip.LayerScale}, "scale", name)
    for where, module in model.named_modules():
        if where.rpartition(".")[2].startswith("ln_"):
            require(module, norms, "normalisation", name)
    pool = model.attn_pool
    if pool is not None:
        require(pool, {clip.AttentionalPooler}, "attention pooling", name)
        check_multihead(pool.attn, name, "attention pooling")
        if model.attn_pool_contrastive is not None:
            raise InputError(
                f"attention pooling {model.attn_pool_type!r} of {name} has two poolers; "
                "supported: one (attentional_pool=True)"
            )
    if model.pool_type == "none":
        raise InputError(
            f"pool type 'none' of {name} hands on every token; supported: 'tok', 'avg' "
            "(--dense gives the features of every patch)"
        )
