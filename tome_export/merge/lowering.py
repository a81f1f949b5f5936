"""Portable ways to compute a merge; each has a twin of the same name among the ONNX functions."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_export.merge import spec
from tome_export.merge.plan import MergePlan


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Sums are fp32; fp64 for fp64 inputs, which serve as the yardstick of fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mean_keys(keys: Tensor) -> Tensor:
    """The metric of ToMe (section 3.1): the keys averaged over heads.

    ``[B, H, N, D]`` of any float type, or a ready metric ``[B, N, D]``, to ``[B, N, D]`` float32
    (float64 for float64 keys).
    """
    dtype = accumulate_dtype(keys)
    return keys.to(dtype) if keys.ndim == 3 else keys.mean(1, dtype=dtype)


def unit_vectors(metric: Tensor) -> Tensor:
    """Vectors ``[..., D]`` of length 1; the zero vector for those without a finite direction.

    See ``merge.ops.match`` for what that is.
    """
    norm = (metric * metric).sum(-1, keepdim=True).sqrt()
    unit = metric / norm.clamp_min(spec.NORM_EPS)
    return torch.where(norm < spec.NORM_LIMIT, unit, 0.0)  # NaN is not below it either


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, N, C]`` at ``index [B, K]`` -> ``[B, K, C]``."""
    return x.gather(1, index.long()[..., None].expand(-1, -1, x.shape[-1]))


def rank(values: Tensor) -> Tensor:
    """Indices from the largest to the smallest of ``values [..., N]``, int64; ties by position."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def by_position(index: Tensor) -> Tensor:
    """Token indices ``[..., K]`` int64 in ascending order."""
    # As float32, which is exact for token counts: TensorRT ranks no 64-bit integers.
    return index.float().sort(dim=-1, stable=True).values.long()


def behind_prefix(patches: Tensor, prefix: int) -> Tensor:
    """The P prefix tokens, then the patches ``[B, K - P]`` counted on: ``[B, K]`` int64."""
    tokens = patches + prefix
    if prefix == 0:  # runtimes take badly to empty tensors
        return tokens
    first = torch.arange(prefix, device=tokens.device).expand(tokens.shape[0], -1)
    return torch.cat([first, tokens], dim=1)


def spread(dst: Tensor, values: Tensor, kept: int) -> Tensor:
    """What each of ``kept`` output tokens receives of each folded one, ``[B, K, R]``; else 0.

    Args:
        dst: ``[B, R]`` int32, output positions; -1 for a dropped token.
        values: ``[B, R]``, or ``[B, 1]``.
        kept: Output tokens K.
    """
    rows = torch.arange(kept, device=dst.device, dtype=dst.dtype)
    return (rows[None, :, None] == dst[:, None, :]) * values[:, None, :]


def merged_size(size: Tensor, plan: MergePlan) -> Tensor:
    """Sizes behind a plan, ``[B, N] -> [B, K]``; a dropped token's is lost."""
    moved = spread(plan.dst, size.gather(1, plan.src.long()), plan.keep.shape[1])
    return size.gather(1, plan.keep.long()) + moved.sum(dim=-1)


def merge_index_add(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Size-weighted mean by scatter-add (ToMe, section 3.1); see ``merge.ops.merge``."""
    dtype = accumulate_dtype(x)
    moved = torch.where(plan.dst < 0, 0.0, size.gather(1, plan.src.long()))
    dst = plan.dst.long().clamp_min(0)
    kept = size.gather(1, plan.keep.long())
    total = (gather_tokens(x, plan.keep).to(dtype) * kept.to(dtype)[..., None]).scatter_add(
        1,
        dst[..., None].expand(-1, -1, x.shape[-1]),
        gather_tokens(x, plan.src).to(dtype) * moved.to(dtype)[..., None],
    )
    merged = kept.scatter_add(1, dst, moved)
    return (total / merged.to(dtype)[..., None]).to(x.dtype), merged


def merge_matmul(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """The same with a one-hot matrix product, for runtimes without scatter-add.

    The matrix holds the sizes rather than ones, so that both factors stay exact where the
    product runs on reduced-precision units: sizes are small whole numbers and x is already in
    the model's precision.
    """
    dtype = accumulate_dtype(x)
    weights = spread(plan.dst, size.gather(1, plan.src.long()), plan.keep.shape[1])
    size_kept = size.gather(1, plan.keep.long())
    merged = size_kept + weights.sum(-1)
    total = gather_tokens(x, plan.keep).to(dtype) * size_kept.to(dtype)[..., None]
    total = total + weights.to(dtype) @ gather_tokens(x, plan.src).to(dtype)
    return (total / merged.to(dtype)[..., None]).to(x.dtype), merged
