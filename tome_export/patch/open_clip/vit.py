"""Merging for the image towers of open_clip: its own ``VisionTransformer``, and timm's inside it.

Outputs are those of ``encode_image(image, normalize=False)``: not of unit length.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from tome_export.errors import InputError
from tome_export.patch.attention import (
    check_multihead,
    multihead,
    multihead_block_cost,
    same_arithmetic,
)
from tome_export.patch.base import MergedModel, ModelLayout
from tome_export.patch.checks import check_unhooked, require
from tome_export.patch.heads import mean_of_patches
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.patch.timm.eva import MergedEva
from tome_export.patch.timm.vit import MergedVisionTransformer
from tome_export.reducers.base import AttentionInputs
from tome_export.spec import PatchGrid


class MergedOpenClip(MergedModel):
    """An open_clip ViT that merges tokens; see ``MergedModel``.

    Average pooling weights patches by size; an attentional pooler gets log(size) as attention
    does.
    """

    library_classes = ("open_clip.transformer.VisionTransformer",)

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        _check(model)
        blocks, width = model.transformer.resblocks, int(model.transformer.width)
        grid = PatchGrid(*map(int, (*model.grid_size, *model.patch_size)))
        layout = ModelLayout(
            blocks=blocks,
            costs=[multihead_block_cost(width, block.mlp) for block in blocks],
            width=width,
            input_size=(int(model.conv1.in_channels), *map(int, model.image_size)),
            tokens=grid.patches + 1,
            prefix=1,
            class_token=True,
            grid=grid,
        )
        super().__init__(model, settings, layout)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token and patches, positions added, normalised."""
        return cast(Tensor, self.model._embeds(pixel_values))

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """Open_clip's ``ResidualAttentionBlock`` and its custom sibling."""
        out, attended = _attention(block, tokens.x, bias)
        tokens = merger(Tokens(tokens.x + block.ls_1(out), tokens.size), attended, layer)
        return Tokens(tokens.x + block.ls_2(block.mlp(block.ln_2(tokens.x))), tokens.size)

    def token_features(self, tokens: Tokens) -> Tensor:
        """The last block's tokens, behind the final norm where that is of the tokens' width."""
        model = self.model
        return tokens.x if model.attn_pool is not None else cast(Tensor, model.ln_post(tokens.x))

    def head(self, tokens: Tokens) -> Tensor:
        """Pooling, norm and projection."""
        model = self.model
        if model.attn_pool is not None:
            pooled = self._pool(Tokens(model.ln_post(self._attention_pool(tokens))))
        elif model.final_ln_after_pool:
            pooled = model.ln_post(self._pool(tokens))
        else:
            pooled = self._pool(Tokens(model.ln_post(tokens.x), tokens.size))
        return cast(Tensor, pooled if model.proj is None else pooled @ model.proj)

    def library(self, pixel_values: Tensor) -> Tensor:
        """What open_clip's model itself gives, not of unit length."""
        model = self.model
        with same_arithmetic():
            if self.settings.dense:
                x = model.transformer(model._embeds(pixel_values))
                return self.token_features(Tokens(x))[:, 1:]
            output = model(pixel_values)
        return cast(Tensor, output[0] if model.output_tokens else output)

    def _pool(self, tokens: Tokens) -> Tensor:
        """As ``_global_pool`` of the library, where every patch counts once."""
        if self.model.pool_type == "tok":
            return tokens.x[:, 0]
        size = None if tokens.size is None else tokens.size[:, 1:]
        return mean_of_patches(tokens.x[:, 1:], size)

    def _attention_pool(self, tokens: Tokens) -> Tensor:
        pool = self.model.attn_pool
        queries = pool.ln_q(pool.query).expand(tokens.x.shape[0], -1, -1)
        bias = self.size_bias(tokens, queries.shape[1])
        return multihead(pool.attn, queries, pool.ln_k(tokens.x), bias)[0]


class MergedTimmModel(MergedModel):
    """A ``TimmModel``, as SigLIP and EVA-CLIP are in open_clip, whose trunk merges tokens."""

    library_classes = ("open_clip.timm_model.TimmModel",)

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        from timm.layers import Mlp

        name = "open_clip TimmModel"
        check_unhooked(model, name)
        trunk_class = type(model.trunk)
        full_name = f"{trunk_class.__module__}.{trunk_class.__qualname__}"
        families = (MergedVisionTransformer, MergedEva)
        merged = next((one for one in families if full_name in one.library_classes), None)
        if merged is None:
            raise InputError(
                f"trunk class {trunk_class.__name__} of {name} is not supported; supported: timm's "
                "VisionTransformer, VisionTransformerDistilled and Eva"
            )
        trunk = merged(model.trunk, settings)
        for part in model.head:
            require(part, {nn.Identity, nn.Dropout, nn.Linear, Mlp}, "head", name)
        # In a tuple, so that its parameters are not registered a second time.
        self._trunk = (trunk,)
        super().__init__(model, settings, trunk.layout)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """What enters the trunk's first block."""
        return self._trunk[0].embed(pixel_values)

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """The trunk's blocks and final norm."""
        return self._trunk[0].encode(pixel_values, merger)

    def head(self, tokens: Tokens) -> Tensor:
        """The trunk's pooling, then open_clip's projection."""
        return cast(Tensor, self.model.head(self._trunk[0].head(tokens)))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What open_clip's model itself gives, not of unit length."""
        if self.settings.dense:
            return self._trunk[0].library(pixel_values)
        return cast(Tensor, self.model(pixel_values))


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
    check_unhooked(model, name)
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
