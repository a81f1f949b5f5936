"""Patching: give a library model token merging without changing it.

One file per model family; ``patch`` finds the family of a model by its exact class.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.patch.base import MergedModel, NoImageOutputError
from tome_export.patch.merger import LayerTrace, MergeSettings
from tome_export.reducers import DEFAULT, reducer_class

if TYPE_CHECKING:
    from torch import nn

    from tome_export.reducers.base import Reducer

__all__ = [
    "LayerTrace",
    "MergeSettings",
    "MergedModel",
    "NoImageOutputError",
    "UnknownModelError",
    "patch",
    "patched",
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
    "clip4clip",
    "stop",
)
"""Modules of this package, one per family, each with ``merged(model, settings)``: the patched
model, or None for a class of another family."""


class UnknownModelError(InputError):
    """The model is of no family at all, unlike one with a single part that is not understood."""


def patch(
    model: nn.Module,
    r: int | tuple[int, float] | list[int] | Schedule | None,
    *,
    prop_attn: bool | None = None,
    reducer: Reducer | None = None,
    **options: Any,
) -> MergedModel:
    """Give a model token merging (ToMe, arXiv 2210.09461).

    The model itself is left as it is; weights are shared. Patching a patched model replaces its
    settings. On CUDA tensors match and merge run the plugins' kernels.

    Args:
        model: A model of one of the families.
        r: Tokens to remove per layer: a number, (r, inflection), a list, or a ``Schedule``; None
            for what the options of a reducer such as EViT say.
        prop_attn: Proportional attention (ToMe, eq. 1); None for the reducer's own way, which for
            ToMe is on. Off for off-the-shelf MAE.
        reducer: How tokens become fewer; None for ToMe.
        options: Further fields of ``MergeSettings``: ``dense``, ``source_map``, ``entropy``,
            ``compressor``, ``learned``.

    Raises:
        InputError: if the model is not understood or the schedule does not fit it; an
            ``UnknownModelError`` if it is of no family.
    """
    reducer = reducer or reducer_class(DEFAULT)()
    if prop_attn is None:
        prop_attn = reducer.proportional()
    schedule = None if r is None else Schedule.of(r)
    return patched(model, MergeSettings(schedule, prop_attn, reducer=reducer, **options))


def patched(model: nn.Module, settings: MergeSettings) -> MergedModel:
    """As ``patch``, by settings that are ready."""
    model = unpatch(model)
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
