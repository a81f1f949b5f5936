"""Portable ways to compute a merge; each has a twin of the same name among the ONNX functions."""

from __future__ import annotations

import torch
from torch import Tensor

from tome_export.merge.plan import MergePlan


def accumulate_dtype(x: Tensor) -> torch.dtype:
    """Sums are fp32; fp64 for fp64 inputs, which serve as the yardstick of fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def mean_keys(keys: Tensor) -> Tensor:
    """The metric of ToMe (section 3.1): the keys averaged over heads.

    Args:
        keys: ``[B, H, N, D]``, any float dtype, or a ready metric ``[B, N, D]``.

    Returns:
        ``[B, N, D]`` float32 (float64 for float64 keys).
    """
    dtype = accumulate_dtype(keys)
    return keys.to(dtype) if keys.ndim == 3 else keys.mean(1, dtype=dtype)


def gather_tokens(x: Tensor, index: Tensor) -> Tensor:
    """``x [B, N, C]`` at ``index [B, K]`` -> ``[B, K, C]``."""
    return x.gather(1, index.long()[..., None].expand(-1, -1, x.shape[-1]))


def merge_index_add(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Size-weighted mean by scatter-add (ToMe, section 3.1).

    Args:
        x: ``[B, N, C]`` tokens, any float dtype.
        size: ``[B, N]`` patches that each token stands for, float32.
        plan: The merge plan.

    Returns:
        ``x' [B, K, C]`` in the dtype of x and ``size' [B, K]`` float32. Sums are float32.
    """
    dtype = accumulate_dtype(x)
    weighted = x.to(dtype) * size.to(dtype)[..., None]
    dst = plan.dst.long()
    total = gather_tokens(weighted, plan.keep).scatter_add(
        1, dst[..., None].expand(-1, -1, x.shape[-1]), gather_tokens(weighted, plan.src)
    )
    merged = size.gather(1, plan.keep.long()).scatter_add(1, dst, size.gather(1, plan.src.long()))
    return (total / merged.to(dtype)[..., None]).to(x.dtype), merged


def merge_matmul(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """The same with a one-hot matrix product, for runtimes without scatter-add.

    The matrix holds the sizes rather than ones, so that both factors stay exact where the
    product runs on reduced-precision units: sizes are small whole numbers and x is already in
    the model's precision.

    Args and returns: as ``merge_index_add``.
    """
    dtype = accumulate_dtype(x)
    kept = plan.keep.shape[1]
    moved = size.gather(1, plan.src.long())
    rows = torch.arange(kept, device=x.device, dtype=plan.dst.dtype)
    weights = (rows[None, :, None] == plan.dst[:, None, :]) * moved[:, None, :]
    size_kept = size.gather(1, plan.keep.long())
    merged = size_kept + weights.sum(-1)
    total = gather_tokens(x, plan.keep).to(dtype) * size_kept.to(dtype)[..., None]
    total = total + weights.to(dtype) @ gather_tokens(x, plan.src).to(dtype)
    return (total / merged.to(dtype)[..., None]).to(x.dtype), merged
