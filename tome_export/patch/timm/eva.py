"""Merging for timm's ``Eva``: EVA-02, EVA-CLIP, DINOv3, Perception Encoder, ViTs with RoPE.

Rotary position embeddings turn queries and keys by the place of their patch. The mean of rotations
is no rotation, so a merged token keeps one place: that of the token the others are merged into.
The keys that are matched are the turned ones, as attention compares them, so tokens of like content
far apart are not alike. The paper has no rule for this. Without merging nothing changes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.patch.checks import require
from tome_export.patch.merger import Merger, Tokens
from tome_export.patch.timm.blocks import BlockForward, check_norms, pointwise_mlps
from tome_export.patch.timm.vit import MergedVisionTransformer
from tome_export.reducers.base import AttentionInputs


class MergedEva(MergedVisionTransformer):
    """A timm ``Eva`` that merges tokens; see ``MergedModel``."""

    library_classes = ("timm.models.eva.Eva",)
    backbone_classes = ()

    @staticmethod
    def block_forward(block: nn.Module, name: str) -> BlockForward:
        """The merging forward of a block with its rotations, ``_RotatedBlock``."""
        from timm.layers import AttentionRope
        from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm

        given: Any = block
        require(block, {EvaBlock, EvaBlockPostNorm}, "block", name)
        require(given.attn, {EvaAttention, AttentionRope}, "attention", name)
        require(given.mlp, pointwise_mlps(), "MLP", name)
        check_norms(block, name)
        return _post_norm if type(block) is EvaBlockPostNorm else _pre_norm

    @staticmethod
    def has_class_token(model: Any) -> bool:
        """Whether one of the prefix tokens is a class token."""
        return model.cls_token is not None

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Prefix tokens and patches, positions added."""
        return self._embed(pixel_values)[0]

    def _embed(self, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
        """Also the rotations of the patches; None without rotary positions."""
        model = self.model
        x, rope = model._pos_embed(model.patch_embed(pixel_values))
        return model.norm_pre(x), rope

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """Timm's ``forward_features``, with ``merger`` called once in every block."""
        x, rope = self._embed(pixel_values)
        tokens, places = Tokens(x), None
        for layer, block in enumerate(self.blocks):
            table = rope if rope is None or not self.model.rope_mixed else rope[layer]
            rotated = _RotatedBlock(block, None if table is None else _rope_at(table, places))
            tokens = self.run_block(rotated, tokens, self.size_bias(tokens), merger, layer)
            tokens = merger.behind(tokens, layer)
            if rope is not None and merger.plan is not None:
                kept = merger.plan.keep[:, self.prefix :].long() - self.prefix
                places = kept if places is None else places.gather(1, kept)
        return Tokens(self.final(tokens.x), tokens.size)

    @property
    def pools_prefix(self) -> bool:
        """Only attention pooling sees the prefix."""
        return self.model.attn_pool is not None


class _RotatedBlock(NamedTuple):
    """A block and the rotations of its tokens: ``[..., N, 2 D]`` sines and cosines, or None."""

    block: Any
    rope: Tensor | None


def _rope_at(table: Tensor, places: Tensor | None) -> Tensor:
    """The rotations of the tokens whose patches are ``places [B, K]``; None for all in order.

    The table is ``[N, D]``, or ``[H, N, D]`` where heads differ; or with a batch, where patches
    were dropped in training: ``[B, 1 or H, N, D]``.
    """
    if places is None:
        return table
    if table.ndim == 4:
        index = places[:, None, :, None].expand(-1, table.shape[1], -1, table.shape[-1])
        return table.gather(2, index)
    if table.ndim == 3:
        return table[:, places].transpose(0, 1)
    return table[places][:, None]


def _pre_norm(given: Any, t: Tokens, bias: Tensor | None, merge: Merger, layer: int) -> Tokens:
    block = given.block
    out, attended = _attention(block.attn, block.norm1(t.x), given.rope, bias)
    out = out if block.gamma_1 is None else block.gamma_1 * out
    t = merge(Tokens(t.x + block.drop_path1(out), t.size), attended, layer)
    out = block.mlp(block.norm2(t.x))
    out = out if block.gamma_2 is None else block.gamma_2 * out
    return Tokens(t.x + block.drop_path2(out), t.size)


def _post_norm(given: Any, t: Tokens, bias: Tensor | None, merge: Merger, layer: int) -> Tokens:
    block = given.block
    out, attended = _attention(block.attn, t.x, given.rope, bias)
    t = merge(Tokens(t.x + block.drop_path1(block.norm1(out)), t.size), attended, layer)
    return Tokens(t.x + block.drop_path2(block.norm2(block.mlp(t.x))), t.size)


def _attention(
    attn: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, AttentionInputs]:
    """``EvaAttention`` and ``AttentionRope``: output ``[B, N, C]``, and what was compared."""
    from timm.layers import apply_rot_embed_cat

    heads = (*x.shape[:2], -1, attn.head_dim)  # fewer of keys and values than of queries
    q, k, v = (part.reshape(heads).transpose(1, 2) for part in _qkv(attn, x))
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        prefix = attn.num_prefix_tokens

        def turn(y: Tensor) -> Tensor:
            patches = apply_rot_embed_cat(y[:, :, prefix:], rope, half=attn.rotate_half)
            return torch.cat([y[:, :, :prefix], patches], dim=2).type_as(v)

        q, k = turn(q), turn(k)
    attended, groups = AttentionInputs(k, q, None, bias, x), q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    dropout = attn.attn_drop.p if attn.training else 0.0
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    out = attn.norm(out.transpose(1, 2).flatten(-2))
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out)), attended


def _qkv(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if attn.qkv is None:
        return attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
    bias = attn.qkv.bias
    if getattr(attn, "q_bias", None) is not None:
        # EVA's keys have no bias to learn; the buffer of zeros stands in for it.
        bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    q, k, v = functional.linear(x, attn.qkv.weight, bias).chunk(3, dim=-1)
    return q, k, v
