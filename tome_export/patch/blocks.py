"""timm's block classes with a merge in the middle, and what each costs.

A block is understood or it is refused by name: an unknown class may mix tokens in a way that
merging would break without anyone noticing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tome_export.merge.macs import BlockCost
from tome_export.patch import attention as attn_forward
from tome_export.patch.checks import require
from tome_export.patch.merger import Merger, Tokens
from tome_export.reducers.base import AttentionInputs

BlockForward = Callable[[Any, Tokens, "Tensor | None", Merger, int], Tokens]


def _attention_forwards() -> dict[type, attn_forward.AttentionForward]:
    from timm.layers import Attention, DiffAttention

    return {Attention: attn_forward.attention, DiffAttention: attn_forward.diff_attention}


def _pre_norm(block: Any, t: Tokens, bias: Tensor | None, merge: Merger, layer: int) -> Tokens:
    out, attended = _run_attention(block.attn, block.norm1(t.x), bias)
    t = merge(Tokens(t.x + block.drop_path1(block.ls1(out)), t.size), attended, layer)
    return Tokens(t.x + block.drop_path2(block.ls2(block.mlp(block.norm2(t.x)))), t.size)


def _post_norm(block: Any, t: Tokens, bias: Tensor | None, merge: Merger, layer: int) -> Tokens:
    out, attended = _run_attention(block.attn, t.x, bias)
    t = merge(Tokens(t.x + block.drop_path1(block.norm1(out)), t.size), attended, layer)
    return Tokens(t.x + block.drop_path2(block.norm2(block.mlp(t.x))), t.size)


def _parallel_things(
    block: Any, t: Tokens, bias: Tensor | None, merge: Merger, layer: int
) -> Tokens:
    branches = [(a, *_run_attention(a.attn, a.norm(t.x), bias)) for a in block.attns]
    out = torch.stack([a.drop_path(a.ls(y)) for a, y, _ in branches]).sum(dim=0)
    t = merge(Tokens(t.x + out, t.size), attn_forward.joined([a for _, _, a in branches]), layer)
    return Tokens(t.x + torch.stack([ffn(t.x) for ffn in block.ffns]).sum(dim=0), t.size)


def _parallel_scaling(
    block: Any, t: Tokens, bias: Tensor | None, merge: Merger, layer: int
) -> Tokens:
    # Attention and MLP read the same tokens, so the merge can only come behind both.
    out, attended = attn_forward.parallel_scaling(block, t.x, bias)
    return merge(Tokens(out, t.size), attended, layer)


def _diff_parallel_scaling(
    block: Any, t: Tokens, bias: Tensor | None, merge: Merger, layer: int
) -> Tokens:
    out, attended = attn_forward.diff_parallel_scaling(block, t.x, bias)
    return merge(Tokens(out, t.size), attended, layer)


def _run_attention(
    attn: nn.Module, x: Tensor, bias: Tensor | None
) -> tuple[Tensor, AttentionInputs]:
    return _attention_forwards()[type(attn)](attn, x, bias)


def _block_forwards() -> dict[type, BlockForward]:
    from timm.models import vision_transformer as vit

    return {
        vit.Block: _pre_norm,
        vit.ResPostBlock: _post_norm,
        vit.ParallelThingsBlock: _parallel_things,
        vit.ParallelScalingBlock: _parallel_scaling,
        vit.DiffParallelScalingBlock: _diff_parallel_scaling,
    }


def block_forward(block: nn.Module, model_name: str) -> BlockForward:
    """The merging forward of a block.

    Raises:
        InputError: naming the class, if the block, its attention or its MLP is not understood.
    """
    forwards = _block_forwards()
    require(block, set(forwards), "block", model_name)
    attentions: list[Any] = [block.attn] if hasattr(block, "attn") else []
    attentions += [branch.attn for branch in _branches(block, "attns")]
    mlps: list[Any] = [block.mlp] if hasattr(block, "mlp") else []
    mlps += [branch.mlp for branch in _branches(block, "ffns")]
    for module in attentions:
        require(module, set(_attention_forwards()), "attention", model_name)
    for module in mlps:
        require(module, pointwise_mlps(), "MLP", model_name)
    for name, module in block.named_modules():
        if "norm" in name.rpartition(".")[2]:
            require(module, pointwise_norms(), "normalisation", model_name)
    return forwards[type(block)]


def _branches(block: nn.Module, name: str) -> list[Any]:
    """The parallel branches of a block; none for other blocks."""
    return list(getattr(block, name, ()))


def pointwise_mlps() -> set[type]:
    """MLPs that treat every token alone, which merging relies on."""
    from timm.layers import GluMlp, Mlp, SwiGLU
    from timm.models.vitamin import GeGluMlp

    return {Mlp, GluMlp, SwiGLU, GeGluMlp}


def pointwise_norms() -> set[type]:
    """Normalisations that treat every token alone."""
    from timm import layers

    named = ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32")
    return {nn.Identity, nn.LayerNorm, nn.RMSNorm, *(getattr(layers, name) for name in named)}


def block_cost(block: Any) -> BlockCost:
    """MACs per token of a block, read from its linear layers' weights."""
    if hasattr(block, "in_proj"):
        attention = 2 * block.num_heads * _head_width(block)
        return BlockCost(before=_weights(block), attention=attention, after=0)
    attns = [block.attn] if hasattr(block, "attn") else [a.attn for a in block.attns]
    mlps = [block.mlp] if hasattr(block, "mlp") else list(block.ffns)
    return BlockCost(
        before=sum(_weights(attn) for attn in attns),
        attention=sum(2 * attn.num_heads * _head_width(attn) for attn in attns),
        after=sum(_weights(mlp) for mlp in mlps),
    )


def _head_width(module: Any) -> int:
    """Half the width of a head's scores and values together.

    A differential head has two maps of half width, each over the whole value.
    """
    width = int(module.head_dim)
    return 3 * width if hasattr(module, "lambda_init") else width


def _weights(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))
