"""timm's block classes with a merge in the middle, and what each costs.

A block is understood or it is refused by name: an unknown class may mix tokens in a way that
merging would break without anyone noticing. Each attention function computes what the class's own
``forward`` computes; with ``bias=None`` the result is equal, which a test checks for every model of
timm's registry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import linear_weights
from tome_export.patch.checks import require
from tome_export.patch.merger import Merger, Tokens
from tome_export.reducers.base import AttentionInputs

AttentionForward = Callable[[Any, Tensor, "Tensor | None"], tuple[Tensor, AttentionInputs]]
BlockForward = Callable[[Any, Tokens, "Tensor | None", Merger, int], Tokens]


def attention_forwards() -> dict[type, AttentionForward]:
    """Attention classes that are understood, and what computes each."""
    from timm.layers import Attention, DiffAttention

    return {Attention: attention, DiffAttention: diff_attention}


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    dropout = module.attn_drop.p if module.training else 0.0
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, scale=module.scale
    )


def attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """``timm.layers.Attention``: gate, q/k norm and scale norm included.

    ``x [B, N, C]``, already normalised, and ``bias [B, 1, N, N]`` or None, to the output
    ``[B, N, C]`` and what was compared, keys behind the key norm if there is one.
    """
    batch, tokens, _ = x.shape
    heads = (batch, tokens, attn.num_heads, attn.head_dim)
    q, k, v = (part.reshape(heads).transpose(1, 2) for part in attn.qkv(x).chunk(3, dim=-1))
    q, k = attn.q_norm(q), attn.k_norm(k)
    out = _attend(attn, q, k, v, bias).transpose(1, 2).reshape(batch, tokens, attn.attn_dim)
    out = attn.norm(out)
    if attn.gate is not None:
        out = out * attn.gate(x).sigmoid()
    return attn.proj_drop(attn.proj(out)), AttentionInputs(k, q, attn.scale, bias, x)


def joined(branches: Sequence[AttentionInputs]) -> AttentionInputs:
    """The heads of parallel attentions over the same tokens as those of one."""
    keys = torch.cat([branch.keys for branch in branches], dim=1)
    queries = [branch.queries for branch in branches if branch.queries is not None]
    if len(queries) < len(branches):
        return AttentionInputs(keys)
    return AttentionInputs(keys, torch.cat(queries, dim=1), branches[0].scale, branches[0].bias)


def _differential(
    module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None
) -> tuple[Tensor, AttentionInputs]:
    """The difference of two softmax maps (arXiv 2410.05258); q, k, v are ``[B, N, C]``."""
    batch, tokens, width = q.shape
    halves = (batch, tokens, 2 * module.num_heads, module.head_dim)
    q = module.q_norm(q.reshape(halves).transpose(1, 2))
    k = module.k_norm(k.reshape(halves).transpose(1, 2))
    v = v.reshape(batch, tokens, module.num_heads, 2 * module.head_dim).transpose(1, 2)
    pairs = (batch, module.num_heads, 2, tokens, module.head_dim)
    (q1, q2), (k1, k2) = q.reshape(pairs).unbind(2), k.reshape(pairs).unbind(2)
    factor = module._compute_lambda().type_as(q)
    out = _attend(module, q1, k1, v, bias) - factor * _attend(module, q2, k2, v, bias)
    out = module.sub_norm(out) * (1 - module.lambda_init)
    return out.transpose(1, 2).reshape(batch, tokens, width), AttentionInputs(k)


def diff_attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """``timm.layers.DiffAttention``; the keys ``[B, 2 H, N, D]`` are those of all half-heads."""
    q, k, v = attn.qkv(x).chunk(3, dim=2)
    out, keys = _differential(attn, q, k, v, bias)
    return attn.proj_drop(attn.proj(attn.norm(out))), keys._replace(tokens=x)


def parallel_scaling(block: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """``ParallelScalingBlock`` (arXiv 2302.05442): attention and MLP side by side."""
    batch, tokens, width = x.shape
    normed = block.in_norm(x)
    mlp, q, k, v = block.in_proj(normed).split(block.in_split, dim=-1)
    heads = (batch, tokens, block.num_heads, block.head_dim)
    q = block.q_norm(q.view(heads)).transpose(1, 2)
    k = block.k_norm(k.view(heads)).transpose(1, 2)
    out = _attend(block, q, k, v.view(heads).transpose(1, 2), bias)
    out = out.transpose(1, 2).reshape(batch, tokens, width)
    return x + _parallel_output(block, out, mlp), AttentionInputs(k, q, block.scale, bias, normed)


def diff_parallel_scaling(
    block: Any, x: Tensor, bias: Tensor | None
) -> tuple[Tensor, AttentionInputs]:
    """``DiffParallelScalingBlock``: as above with differential attention."""
    normed = block.in_norm(x)
    mlp, q, k, v = block.in_proj(normed).split(block.in_split, dim=-1)
    out, keys = _differential(block, q, k, v, bias)
    return x + _parallel_output(block, out, mlp), keys._replace(tokens=normed)


def _parallel_output(block: Any, attn_out: Tensor, mlp: Tensor) -> Tensor:
    if block.mlp_bias is not None:
        mlp = mlp + block.mlp_bias
    mlp = block.mlp_drop(block.mlp_act(mlp))
    if block.out_proj is not None:
        out = block.out_proj(torch.cat((attn_out, mlp), dim=-1))
    else:
        out = block.attn_out_proj(attn_out) + block.mlp_out_proj(mlp)
    return cast(Tensor, block.drop_path(block.ls(out)))


def _run_attention(
    attn: nn.Module, x: Tensor, bias: Tensor | None
) -> tuple[Tensor, AttentionInputs]:
    return attention_forwards()[type(attn)](attn, x, bias)


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
    t = merge(Tokens(t.x + out, t.size), joined([a for _, _, a in branches]), layer)
    return Tokens(t.x + torch.stack([ffn(t.x) for ffn in block.ffns]).sum(dim=0), t.size)


def _merged_behind(side_by_side: AttentionForward) -> BlockForward:
    # Attention and MLP read the same tokens, so the merge can only come behind both.
    def forward(block: Any, t: Tokens, bias: Tensor | None, merge: Merger, layer: int) -> Tokens:
        out, attended = side_by_side(block, t.x, bias)
        return merge(Tokens(out, t.size), attended, layer)

    return forward


def block_forward(block: nn.Module, model_name: str) -> BlockForward:
    """The merging forward of a block."""
    from timm.models import vision_transformer as vit

    forwards: dict[type, BlockForward] = {
        vit.Block: _pre_norm,
        vit.ResPostBlock: _post_norm,
        vit.ParallelThingsBlock: _parallel_things,
        vit.ParallelScalingBlock: _merged_behind(parallel_scaling),
        vit.DiffParallelScalingBlock: _merged_behind(diff_parallel_scaling),
    }
    require(block, set(forwards), "block", model_name)
    for attn in _parts(block, "attn", "attns"):
        require(attn, set(attention_forwards()), "attention", model_name)
    for mlp in _parts(block, "mlp", "ffns"):
        require(mlp, pointwise_mlps(), "MLP", model_name)
    check_norms(block, model_name)
    return forwards[type(block)]


def _parts(block: Any, name: str, branches: str) -> list[Any]:
    """The block's part of a name, or that of each of its parallel branches."""
    if hasattr(block, name):
        return [getattr(block, name)]
    return [getattr(branch, name) for branch in getattr(block, branches, ())]


def pointwise_mlps() -> set[type]:
    """MLPs that treat every token alone, which merging relies on."""
    from timm.layers import GluMlp, Mlp, SwiGLU
    from timm.models.vitamin import GeGluMlp

    return {Mlp, GluMlp, SwiGLU, GeGluMlp}


def check_norms(block: nn.Module, model_name: str) -> None:
    """Refuse a normalisation in a block that does not treat every token alone."""
    from timm import layers

    named = ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32", "SimpleNorm", "SimpleNormFp32")
    known = {nn.Identity, nn.LayerNorm, nn.RMSNorm, *(getattr(layers, name) for name in named)}
    for name, module in block.named_modules():
        if "norm" in name.rpartition(".")[2]:
            require(module, known, "normalisation", model_name)


def block_cost(block: Any) -> BlockCost:
    """MACs per token of a block, read from its linear layers' weights."""
    if hasattr(block, "in_proj"):
        return BlockCost(linear_weights(block), 2 * block.num_heads * _head_width(block), 0)
    attns = _parts(block, "attn", "attns")
    return BlockCost(
        before=linear_weights(*attns),
        attention=sum(2 * attn.num_heads * _head_width(attn) for attn in attns),
        after=linear_weights(*_parts(block, "mlp", "ffns")),
    )


def _head_width(module: Any) -> int:
    """Half the width of a head's scores and values together.

    A differential head has two maps of half width, each over the whole value.
    """
    width = int(module.head_dim)
    return 3 * width if hasattr(module, "lambda_init") else width
