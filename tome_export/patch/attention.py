"""timm's attention classes, run so that their keys come out and the token sizes go in.

Each function computes what the class's own ``forward`` computes; with ``bias=None`` the result is
equal, which a test checks for every model of timm's registry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.reducers.base import AttentionInputs


def log_size_bias(size: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Proportional attention's bias (ToMe, eq. 1).

    Args:
        size: ``[B, N]`` float32, or None before the first merge.
        dtype: That of the queries.

    Returns:
        ``log(size)`` as ``[B, 1, N, N]``, constant over the queries; the query dimension is
        expanded because ONNX Runtime's Attention does not broadcast it.
    """
    if size is None:
        return None
    tokens = size.shape[1]
    return size.log().to(dtype)[:, None, None, :].expand(-1, -1, tokens, -1)


def _attend(module: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    dropout = module.attn_drop.p if module.training else 0.0
    return functional.scaled_dot_product_attention(
        q, k, v, attn_mask=bias, dropout_p=dropout, scale=module.scale
    )


def attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """``timm.layers.Attention``: gate, q/k norm and scale norm included.

    Args:
        attn: The module.
        x: ``[B, N, C]``, already normalised.
        bias: ``[B, 1, N, N]`` or None.

    Returns:
        Output ``[B, N, C]`` and what was compared, keys behind the key norm if there is one.
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


AttentionForward = Callable[[nn.Module, Tensor, "Tensor | None"], tuple[Tensor, AttentionInputs]]
