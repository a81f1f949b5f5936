"""Patching: give a library model token merging without changing it.

One file per model family; ``patch`` finds the family of a model by its exact class.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.patch.base import LayerTrace, MergedModel, MergeSettings

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "LayerTrace",
    "MergeSettings",
    "MergedModel",
    "UnknownModelError",
    "patch",
    "unpatch",
]


FAMILIES = (
    "timm_vit",
    "timm_eva",
    "torchvision_vit",
    "open_clip_vit",
    "hf_clip",
    "hf_vit",
    "llava",
)
"""Modules of this package, one per family, each with ``merged(model, settings)``: the patched
model, or None for a class of another family."""


class UnknownModelError(InputError):
    """The model is of no family at all, unlike one with a single part that is not understood."""


def patch(
    model: nn.Module,
    r: int | tuple[int, float] | list[int] | Schedule,
    *,
    prop_attn: bool = True,
    dense: bool = False,
    source_map: bool = False,
) -> MergedModel:
    """Give a model token merging (ToMe, arXiv 2210.09461).

    The model itself is left as it is; weights are shared. Patching a patched model replaces its
    settings. On CUDA tensors match and merge run the plugins' kernels.

    Args:
        model: A model of one of the families.
        r: Tokens to merge per layer: a number, (r, inflection), a list, or a ``Schedule``.
        prop_attn: Proportional attention (ToMe, eq. 1); off for off-the-shelf MAE.
        dense: Give the features of every patch in place of the model's own output.
        source_map: Give also which final token each patch went into.

    Raises:
        InputError: if the model is not understood or the schedule does not fit it; an
            ``UnknownModelError`` if it is of no family.
    """
    model = unpatch(model)
    settings = MergeSettings(Schedule.of(r), prop_attn, dense, source_map)
    _use_kernels()
    supported: list[str] = []
    for name in FAMILIES:
        family = importlib.import_module(f"{__name__}.{name}")
        found = family.merged(model, settings)
        if found is not None:
            return found  # type: ignore[no-any-return]
        supported.append(family.SUPPORTED)
    raise UnknownModelError(
        f"model class {type(model).__name__} is not supported; supported: {'; '.join(supported)}"
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
