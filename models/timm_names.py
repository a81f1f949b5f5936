"""Recipes for any timm name."""

from __future__ import annotations

import difflib
from typing import Any, cast, get_args

from tome_export.errors import InputError
from tome_export.models.recipe import RULE, Recipe, recommended_r
from tome_export.spec import Interpolation, Preprocessing

_LABEL_SETS = {1000: "imagenet-1k", 21843: "imagenet-21k-goog", 11821: "imagenet-12k"}


def close_timm_names(name: str) -> list[str]:
    """Up to three timm architectures whose names are close, or that start or end like it."""
    from timm import list_models

    names = list_models()
    arch = name.partition(".")[0].lower()
    if arch in names:
        return [arch]
    close = difflib.get_close_matches(arch, names, n=3, cutoff=0.75)
    return close or [match for match in names if len(arch) > 4 and match.startswith(arch)][:3]


def recipe_from_timm(name: str) -> Recipe:
    """A recipe for ``timm:<name>``, its facts from timm's pretrained configuration.

    The name may carry a tag of weights (``vit_base_patch16_224.mae``). r is
    ``registry.recommended_r``; proportional attention is on except for MAE weights, as the ToMe
    authors advise.

    Raises:
        InputError: if timm has no such name, or the model has no tokens to merge.
    """
    from timm import get_pretrained_cfg, is_model, list_pretrained

    arch, _, tag = name.partition(".")
    if not is_model(arch):
        close = [f"timm:{match}" for match in close_timm_names(name)]
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise InputError(f"timm has no model {arch!r}; {hint}")
    cfg: Any = get_pretrained_cfg(arch)
    if tag:
        tags = [m.partition(".")[2] for m in list_pretrained(f"{arch}.*")]
        if tag not in tags:
            raise InputError(
                f"timm has no weights {tag!r} of {arch}; it has {', '.join(tags) or 'none'}"
            )
        cfg = get_pretrained_cfg(name)
    if cfg is not None and cfg.tag:
        name = f"{arch}.{cfg.tag}"
    tokens, depth, classes = _shape(name)
    values: dict[str, Any] = cfg.to_dict() if cfg is not None else {}
    return Recipe(
        name=f"timm:{name}",
        timm_name=name,
        preprocessing=preprocessing_from_cfg(values),
        recommended_r=recommended_r(tokens, depth),
        r_source=RULE,
        prop_attn="mae" not in (cfg.tag or "").split("_") if cfg is not None else True,
        output_name="logits" if classes and not _is_clip(arch, cfg) else "features",
        description=_description(arch, values),
        weights_source=str(values.get("hf_hub_id") or values.get("url") or "none"),
        licence=str(values.get("license") or "not stated by timm"),
        label_set=_LABEL_SETS.get(classes),
    )


def _is_clip(arch: str, cfg: Any) -> bool:
    """Whether timm's head is CLIP's projection and not a classifier trained behind it."""
    tag = str(cfg.tag or "") if cfg is not None else ""
    return "_clip_" in arch and not {"ft", "classification"} & set(tag.split("_"))


def preprocessing_from_cfg(cfg: dict[str, Any]) -> Preprocessing:
    """Preprocessing from a timm pretrained configuration; ImageNet's where it is silent.

    Args:
        cfg: The configuration as a dict.
    """
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    interpolation = cfg.get("interpolation") or "bicubic"
    if interpolation not in get_args(Interpolation):
        raise InputError(
            f"timm resizes images for this model with {interpolation!r}; "
            f"supported: {', '.join(get_args(Interpolation))}"
        )
    return Preprocessing(
        input_size=(channels, height, width),
        mean=tuple(cfg.get("mean") or (0.485, 0.456, 0.406)),
        std=tuple(cfg.get("std") or (0.229, 0.224, 0.225)),
        crop_pct=float(cfg.get("crop_pct") or 0.875),
        interpolation=cast(Interpolation, interpolation),
    )


def _description(arch: str, cfg: dict[str, Any]) -> str:
    mode = cfg.get("crop_mode") or "center"
    if mode == "center":
        return f"timm's {arch}"
    # Preprocessing has the centre crop only, so the difference is told instead of hidden.
    return (
        f"timm's {arch}; timm's evaluation uses crop mode {mode!r}, here images are centre-cropped"
    )


def _shape(name: str) -> tuple[int, int, int]:
    """Tokens, blocks and classes, from the architecture alone: no memory, no weights."""
    import torch
    from timm import create_model

    with torch.device("meta"):
        model: Any = create_model(name)
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    blocks = getattr(model, "blocks", None)
    if patches is None or blocks is None:
        raise InputError(
            f"timm model {name} (class {type(model).__name__}) has no sequence of tokens to "
            "merge; expected a VisionTransformer"
        )
    prefix = int(getattr(model, "num_prefix_tokens", 0))
    return int(patches) + prefix, len(blocks), int(model.num_classes)
