"""Attention whose keys come out and into which token sizes go, in parts that libraries share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import BaseTorchFunctionMode

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch.checks import require
from tome_export.reducers.base import AttentionInputs


def log_size_bias(
    size: Tensor | None, dtype: torch.dtype, queries: int | None = None
) -> Tensor | None:
    """Bias of proportional attention (ToMe, eq. 1): ``log(size)`` as ``[B, 1, Q, N]``.

    It is constant over the queries; their dimension is expanded because ONNX Runtime's Attention
    does not broadcast it. ``size`` is ``[B, N]`` float32, or None before the first merge; Q is N in
    self-attention.
    """
    if size is None:
        return None
    queries = size.shape[1] if queries is None else queries
    return size.log().to(dtype)[:, None, None, :].expand(-1, -1, queries, -1)


def linear_weights(*modules: nn.Module) -> int:
    """Number of weights of all linear layers in some modules, which is their MACs per token."""
    parts = (part for module in modules for part in module.modules())
    return sum(part.weight.numel() for part in parts if isinstance(part, nn.Linear))


def check_multihead(attn: nn.Module, model_name: str, role: str = "attention") -> None:
    """Refuse what ``multihead`` does not compute."""
    require(attn, {nn.MultiheadAttention}, role, model_name)
    given: Any = attn
    if given.bias_k is not None or given.add_zero_attn:
        option = "add_zero_attn" if given.add_zero_attn else "add_bias_kv"
        raise InputError(
            f"{role} of model {model_name} is a MultiheadAttention with {option}, whose extra key "
            "is no token that could be matched; it is not supported"
        )


def multihead(
    attn: Any, queries: Tensor, context: Tensor, bias: Tensor | None
) -> tuple[Tensor, AttentionInputs]:
    """Compute what ``torch.nn.MultiheadAttention`` does, with packed or separate projections.

    ``check_multihead`` has passed the module; ``batch_first`` does not matter. ``queries [B, Q,
    C]``, already normalised, attend to ``context [B, N, C']``, themselves for self-attention, with
    a ``bias [B, 1, Q, N]`` or None. Returns the output ``[B, Q, C]`` and what was compared.
    """
    if attn.in_proj_weight is not None and context is queries:
        packed = functional.linear(queries, attn.in_proj_weight, attn.in_proj_bias)
        q, k, v = packed.chunk(3, dim=-1)
    else:
        if attn.in_proj_weight is not None:
            weights = attn.in_proj_weight.chunk(3)
        else:
            weights = attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight
        biases = (None,) * 3 if attn.in_proj_bias is None else attn.in_proj_bias.chunk(3)
        inputs = queries, context, context
        q, k, v = map(functional.linear, inputs, weights, biases)
    heads = attn.num_heads, attn.head_dim
    q, k, v = (x.reshape(*x.shape[:2], *heads).transpose(1, 2) for x in (q, k, v))
    dropout = attn.dropout if attn.training else 0.0
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
    return attn.out_proj(out.transpose(1, 2).flatten(-2)), AttentionInputs(
        k, q, None, bias, context
    )


@contextmanager
def same_arithmetic() -> Iterator[None]:
    """Let the class's own ``forward`` go through scaled dot-product attention, as ``multihead``.

    Its fast path for inference is another kernel, whose rounding grows over many layers.
    """
    # The class leaves its fast path wherever a tensor's functions may be overridden. A mode that
    # overrides nothing says so for this thread only; the switch of torch.backends.mha is one for
    # the whole process, and threads that leave in another order than they came would leave it off.
    with BaseTorchFunctionMode():
        yield


def multihead_block_cost(width: int, *mlp: nn.Module) -> BlockCost:
    """MACs per token of a block of self-attention over ``width`` and an MLP."""
    return BlockCost(before=4 * width**2, attention=2 * width, after=linear_weights(*mlp))
