"""Merging for timm's ``Eva``: EVA-02, EVA-CLIP, DINOv3, Perception Encoder, ViTs with RoPE.

Rotary position embeddings turn queries and keys by the place of their patch. The mean of rotations
is no rotation, so a merged token keeps one place: that of the token the others are merged into.
The keys that are matched are the turned ones, as attention compares them, so tokens of like content
far apart are not alike. The paper has no rule for this. Without merging nothing changes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.patch.base import MergedModel
from tome_export.patch.blocks import BlockForward, pointwise_mlps, pointwise_norms
from tome_export.patch.checks import require
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.patch.timm_vit import MergedVisionTransformer
from tome_export.reducers.base import AttentionInputs

SUPPORTED = "timm's Eva (EVA-02, EVA-CLIP, DINOv3)"


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family.

    Raises:
        InputError: if a part of the model is not understood.
    """
    from timm.models.eva import Eva

    return MergedEva(model, settings) if type(model) is Eva else None


class MergedEva(MergedVisionTransformer):
    """A timm ``Eva`` that merges tokens; see ``MergedModel``.

    Raises:
        InputError: if a part of the model is not understood.
    """

    @staticmethod
    def block_forward(block: nn.Module, name: str) -> BlockForward:
        """Refuses what is not understood; the forward itself is ``encode``'s."""
        from timm.layers import AttentionRope
        from timm.models.eva import EvaAttention, EvaBlock, EvaBlockPostNorm

        given: Any = block
        require(block, {EvaBlock, EvaBlockPostNorm}, "block", name)
        require(given.attn, {EvaAttention, AttentionRope}, "attention", name)
        require(given.mlp, pointwise_mlps(), "MLP", name)
        for where, module in block.named_modules():
            if "norm" in where.rpartition(".")[2]:
                require(module, pointwise_norms(), "normalisation", name)
        return _post_norm if type(block) is EvaBlockPostNorm else _pre_norm

    @property
    def class_token(self) -> bool:
        """Whether one of the prefix tokens is a class token."""
        return self.model.cls_token is not None

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """Timm's ``forward_features``, with ``merger`` called once in every block."""
        model: Any = self.model
        x, rope = model._pos_embed(model.patch_embed(pixel_values))
        tokens, places = Tokens(model.norm_pre(x)), None
        for layer, (block, forward) in enumerate(zip(model.blocks, self._forwards, strict=True)):
            table = rope[layer] if model.rope_mixed else rope
            turned = _Turned(block, None if table is None else _rope_at(table, places))
            tokens = forward(turned, tokens, self._bias(tokens), merger, layer)
            tokens = merger.behind(tokens, layer)
            if rope is not None and merger.plan is not None:
                kept = merger.plan.keep[:, self.prefix :].long() - self.prefix
                places = kept if places is None else places.gather(1, kept)
        return Tokens(model.norm(tokens.x), tokens.size)

    def _head(self, x: Tensor, size: Tensor) -> Tensor:
        model: Any = self.model
        if model.attn_pool is None:  # which sees the prefix, as no other pooling does
            x, size = x[:, self.prefix :], size[:, self.prefix :]
        return model.head(model.head_drop(model.fc_norm(self._pool(x, size))))  # type: ignore[no-any-return]


class _Turned:
    """A block and the rotations of its tokens: ``[..., N, 2 D]`` sines and cosines, or None."""

    def __init__(self, block: Any, rope: Tensor | None) -> None:
        self.block = block
        self.rope = rope


def _rope_at(table: Tensor, places: Tensor | None) -> Tensor:
    """The rotations of the tokens at ``places [B, K]``.

    Args:
        table: ``[N, D]``, or ``[H, N, D]`` where heads differ; or with a batch, where patches were
            dropped in training: ``[B, 1 or H, N, D]``.
        places: Patches of the tokens; None for all in order.
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
