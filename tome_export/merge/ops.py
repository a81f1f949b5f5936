"""``tome_export::match`` and ``tome_export::merge`` as torch custom operators.

Custom operators keep each step one node through ``torch.export``, so that the ONNX graph can
name it and a TensorRT plugin can take it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tome_export.merge import spec
from tome_export.merge.lowering import gather_tokens, mean_keys, merge_index_add, unit_vectors
from tome_export.merge.plan import MergePlan


def scores_and_masks(keys: Tensor, prefix: int) -> Tensor:
    """Cosine scores of set A against set B, ``[B, ceil(N/2), floor(N/2)]``; see ``match``.

    They are float32 (float64 for float64 keys); rows and columns of prefix tokens are -inf, those
    of tokens without a direction 0.
    """
    unit = unit_vectors(mean_keys(keys))
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(-1, -2)
    scores[:, : (prefix + 1) // 2] = -torch.inf
    scores[:, :, : prefix // 2] = -torch.inf
    return scores


def eager_match(
    keys: Tensor, r: int, prefix: int, class_token: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``match`` in PyTorch's own operations, without its checks; returns keep, src, dst."""
    batch, tokens = keys.shape[0], keys.shape[-2]
    rows_a, rows_b = (tokens + 1) // 2, tokens // 2
    prefix_a, prefix_b = (prefix + 1) // 2, prefix // 2
    scores = scores_and_masks(keys, prefix)
    best = scores.argmax(-1)  # the first of equal maxima
    value = scores.gather(-1, best[..., None])[..., 0]
    rank = value.sort(dim=-1, descending=True, stable=True).indices
    merged, rest = rank[:, :r], rank[:, r : rows_a - prefix_a]
    if class_token:
        rest = rest.sort(dim=-1).values
    device = keys.device
    first = torch.arange(prefix, device=device).expand(batch, prefix)
    last = 2 * torch.arange(prefix_b, rows_b, device=device) + 1
    keep = torch.cat([first, 2 * rest, last.expand(batch, rows_b - prefix_b)], dim=1)
    # Set B closes the output, so its token j stands at a fixed distance from the end.
    dst = best.gather(1, merged) + (tokens - r - rows_b)
    return keep.int(), (2 * merged).int(), dst.int()


_match = torch.library.custom_op("tome_export::match", eager_match, mutates_args=())


@_match.register_fake
def _(keys: Tensor, r: int, prefix: int, class_token: bool) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ARG001
    batch, tokens = keys.shape[0], keys.shape[-2]

    def index(length: Any) -> Tensor:
        return keys.new_empty((batch, length), dtype=torch.int32)

    return index(tokens - r), index(r), index(r)


def eager_merge(
    x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor
) -> tuple[Tensor, Tensor]:
    """``merge`` in PyTorch's own operations."""
    return merge_index_add(x, size, MergePlan(keep, src, dst))


_merge = torch.library.custom_op("tome_export::merge", eager_merge, mutates_args=())


@_merge.register_fake
def _(x: Tensor, size: Tensor, keep: Tensor, src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    batch, kept = keep.shape
    return x.new_empty((batch, kept, x.shape[-1])), size.new_empty((batch, kept))


def _merge_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    _, size, keep, src, dst = inputs
    ctx.save_for_backward(size, keep, src, dst, output[1])


def _merge_backward(ctx: Any, grad: Tensor, _grad_size: Tensor) -> tuple[Tensor | None, ...]:
    size, keep, src, dst, merged = ctx.saved_tensors
    share = grad / merged[..., None].to(grad.dtype)
    width = grad.shape[-1]
    out = grad.new_empty((*size.shape, width))
    out.scatter_(1, keep.long()[..., None].expand(-1, -1, width), share)
    moved = gather_tokens(share, dst.clamp_min(0)) * (dst >= 0)[..., None]
    out.scatter_(1, src.long()[..., None].expand(-1, -1, width), moved)
    return out * size[..., None].to(grad.dtype), None, None, None, None


_merge.register_autograd(_merge_backward, setup_context=_merge_setup)


def _marked_plan(
    keep: Tensor,
    src: Tensor,
    dst: Tensor,
    layer: int,  # noqa: ARG001 (names the node)
) -> tuple[Tensor, Tensor, Tensor]:
    return keep.clone(), src.clone(), dst.clone()


_plan = torch.library.custom_op("tome_export::plan", _marked_plan, mutates_args=())
_plan.register_fake(_marked_plan)


def _marked_signal(x: Tensor, layer: int, index: int) -> Tensor:  # noqa: ARG001
    return x.clone()


_signal = torch.library.custom_op("tome_export::signal", _marked_signal, mutates_args=())
_signal.register_fake(_marked_signal)


def mark_plan(plan: MergePlan, layer: int) -> MergePlan:
    """The plan itself; in exported graphs behind a node ``TomePlan`` named by the layer."""
    return MergePlan(*_plan(*plan, layer)) if torch.compiler.is_exporting() else plan


def mark_signal(x: Tensor, layer: int, index: int) -> Tensor:
    """The tensor itself; in exported graphs behind a node ``TomeSignal`` named by the layer."""
    return _signal(x, layer, index) if torch.compiler.is_exporting() else x


def match(keys: Tensor, r: int, prefix: int, class_token: bool) -> MergePlan:
    """Bipartite soft matching (ToMe, section 3.1): which tokens merge into which.

    The metric is the mean of the keys over heads. Even positions form set A, odd ones set B. Every
    A token is matched with its most similar B token by cosine; the r best pairs merge. Prefix
    tokens neither merge nor are merged into. Output order: the prefix tokens, then what stays of A
    (by position with a class token, else by rank), then B. Ties go to the lowest index. Mean and
    scores are float32 (float64 for float64 keys).

    A token whose metric's L2 norm is not finite in float32 (NaN or infinite keys, or an overflow;
    for float64 keys: a norm of 2^64 or more) has the zero vector as its direction: it scores 0 with
    every token. So the plan is well-formed whatever the keys hold.

    Args:
        keys: ``[B, H, N, D]``, any float dtype, or a ready metric ``[B, N, D]``.
        r: Tokens to merge, ``1 <= r <= (N - prefix) // 2``.
        prefix: Protected tokens P at the front (class, distillation, registers).
        class_token: Whether one of them is a class token.

    Returns:
        The merge plan: ``keep [B, N - r]``, ``src [B, r]``, ``dst [B, r]``, int32.

    Raises:
        ValueError: if keys have another rank or r is out of range; schedules clamp it.
    """
    if keys.ndim not in (3, 4):
        raise ValueError(
            f"keys have shape {tuple(keys.shape)}; expected [B, H, N, D], or [B, N, D] for a metric"
        )
    tokens = keys.shape[-2]
    limit = spec.clamp_r(tokens, tokens, prefix)
    if not 1 <= r <= limit:
        raise ValueError(f"r is {r}; expected 1 to {limit} for {tokens} tokens")
    return MergePlan(*_match(keys.detach(), r, prefix, class_token))


def merge(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of merged tokens (ToMe, section 3.1), differentiable in x.

    Args:
        x: ``[B, N, C]``, any float dtype.
        size: ``[B, N]`` float32, patches that each token stands for.
        plan: A plan over the N tokens; dropped ones (dst -1) count for nothing.

    Returns:
        ``x' [B, K, C]`` in the dtype of x, ``size' [B, K]`` float32. Sums are float32.
    """
    merged: tuple[Tensor, Tensor] = _merge(x, size, *plan)
    return merged
