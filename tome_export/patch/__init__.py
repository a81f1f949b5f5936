"""Patching: give a library model token merging without changing it.

One file per model family; ``patch`` finds the family of a model by its exact class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.patch.base import LayerTrace, MergedModel, MergeSettings

if TYPE_CHECKING:
    from torch import nn

__all__ = ["LayerTrace", "MergeSettings", "MergedModel", "patch", "unpatch"]


def patch(
    model: nn.Module,
    r: int | tuple[int, float] | list[int] | Schedule,
    *,
    prop_attn: bool = True,
) -> MergedModel:
    """Give a model token merging (ToMe, arXiv 2210.09461).

    The model itself is left as it is; weights are shared. Patching a patched model replaces its
    settings. On CUDA tensors match and merge run the plugins' kernels.

    Args:
        model: timm ``VisionTransformer`` or ``VisionTransformerDistilled``.
        r: Tokens to merge per layer: a number, (r, inflection), a list, or a ``Schedule``.
        prop_attn: Proportional attention (ToMe, eq. 1); off for off-the-shelf MAE.

    Raises:
        InputError: if the model is not understood or the schedule does not fit it.
    """
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    from tome_export.patch.timm_vit import MergedVisionTransformer

    model = unpatch(model)
    settings = MergeSettings(Schedule.of(r), prop_attn)
    _use_kernels()
    if type(model) in (VisionTransformer, VisionTransformerDistilled):
        return MergedVisionTransformer(model, settings)
    raise InputError(
        f"model class {type(model).__name__} is not supported; supported: timm's "
        "VisionTransformer and VisionTransformerDistilled"
    )


def _use_kernels() -> None:
    """Let the operators run the plugins' kernels on CUDA tensors, where there can be any."""
    import torch

    from tome_export.merge import ops
    from tome_export.plugins import torch_ops

    if torch.cuda.is_available():
        torch_ops.install(ops.eager_match, ops.eager_merge)


def unpatch(model: nn.Module) -> nn.Module:
    """The library model inside a patched one; any other model is returned as it is."""
    return model.model if isinstance(model, MergedModel) else model
