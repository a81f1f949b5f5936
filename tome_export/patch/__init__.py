"""Patching: give a library model token merging without changing it.

A folder per library, a file per family of its models; ``patch`` finds the family of a model by its
exact class.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.patch.base import MergedModel, NoImageOutputError
from tome_export.patch.hf.clip import MergedClip, MergedSiglip
from tome_export.patch.hf.vit import MergedDino, MergedVit
from tome_export.patch.merger import LayerTrace, MergeSettings
from tome_export.patch.open_clip.vit import MergedOpenClip, MergedTimmModel
from tome_export.patch.timm.eva import MergedEva
from tome_export.patch.timm.vit import MergedVisionTransformer
from tome_export.patch.torchvision.vit import MergedTorchvision
from tome_export.patch.whole import MergedWholeModel, backbone_inside
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
    "patch_with_settings",
    "unpatch",
]


FAMILIES: tuple[Any, ...] = (
    MergedVisionTransformer,
    MergedEva,
    MergedTorchvision,
    MergedOpenClip,
    MergedTimmModel,
    MergedClip,
    MergedSiglip,
    MergedVit,
    MergedDino,
)
"""Merging by the classes of libraries that each names; none imports its library."""

BACKBONES = {name: family for family in FAMILIES for name in family.backbone_classes}
"""Classes inside of a whole model, such as one of segmentation, and what merges in them."""

OWN_TOWERS = (
    "LLaVA's vision tower (hf:<checkpoint folder>)",
    "CLIP4Clip's video tower (clip4clip_b32)",
    "STOP's video tower (stop_b32)",
)
"""Models of this project, for messages. They have ``with_merging(settings) -> MergedModel``."""


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
            ``compressor``, ``learned``, ``preprocessing``.

    Raises:
        InputError: if the model is not understood or the schedule does not fit it; an
            ``UnknownModelError`` if it is of no family.
    """
    reducer = reducer or reducer_class(DEFAULT)()
    if prop_attn is None:
        prop_attn = reducer.proportional()
    schedule = None if r is None else Schedule.of(r)
    return patch_with_settings(
        model, MergeSettings(schedule, prop_attn, reducer=reducer, **options)
    )


def patch_with_settings(model: nn.Module, settings: MergeSettings) -> MergedModel:
    """As ``patch``, by settings that are ready."""
    model = unpatch(model)
    _use_kernels()
    cls = type(model)
    if hasattr(cls, "with_merging"):
        return model.with_merging(settings)  # type: ignore[operator, no-any-return]
    name = f"{cls.__module__}.{cls.__qualname__}"
    for family in FAMILIES:
        if name in family.library_classes:
            return family(model, settings)  # type: ignore[no-any-return]
    if name.startswith("open_clip.") and hasattr(model, "visual"):
        raise InputError(
            f"model class {cls.__name__} is a whole open_clip model; patch its image tower alone: "
            "patch(model.visual, r)"
        )
    if found := backbone_inside(model, BACKBONES):
        return MergedWholeModel(model, settings, *found)
    raise UnknownModelError(
        f"model class {cls.__name__} is not supported; supported: {'; '.join(_supported())}"
    )


def _supported() -> list[str]:
    by_library: dict[str, list[str]] = {}
    for name in (name for family in FAMILIES for name in family.library_classes):
        by_library.setdefault(name.partition(".")[0], []).append(name.rpartition(".")[2])
    libraries = [f"{name}'s {', '.join(classes)}" for name, classes in by_library.items()]
    inside = ", ".join(name.rpartition(".")[2] for name in BACKBONES)
    return [*libraries, *OWN_TOWERS, f"models that give a map by a head of their own on {inside}"]


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
