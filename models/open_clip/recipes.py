"""Recipes of open_clip's image towers: those with a name, and ``open_clip:<arch>[/<weights>]``.

The output is that of ``encode_image(image, normalize=False)``: features not of unit length.
"""

from __future__ import annotations

import difflib
from typing import Any

from tome_export.errors import InputError
from tome_export.models.facts import CLIP_NORM, Geometry, MergingAdvice, ModelOutput
from tome_export.models.open_clip.loader import OpenClipLoader, library
from tome_export.models.preprocessing import in_words, interpolation_from
from tome_export.models.recipe import ModelSource, Recipe, recipe_from_model, unmerged
from tome_export.spec import Preprocessing, Resize

_UNSTATED = "not stated by open_clip"


def recipe_from_open_clip(name: str) -> Recipe:
    """A recipe for ``open_clip:<arch>[/<weights>]``, its facts from open_clip's tables."""
    open_clip = library()
    arch, _, tag = name.partition("/")
    if arch not in open_clip.list_models():
        close = difflib.get_close_matches(arch, open_clip.list_models(), n=3)
        hint = f"did you mean open_clip:{close[0]}?" if close else "see open_clip.list_models()"
        raise InputError(f"open_clip has no model {arch!r}; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(arch)
    if tag and tag not in tags:
        raise InputError(
            f"open_clip has no weights {tag!r} of {arch}; it has {', '.join(tags) or 'none'}"
        )
    cfg: dict[str, Any] = open_clip.get_pretrained_cfg(arch, tag) if tag else {}
    quick = bool((open_clip.get_model_config(arch) or {}).get("quick_gelu", False))
    if tag and bool(cfg.get("quick_gelu", False)) != quick:
        other = f"{arch}-quickgelu" if not quick else arch.removesuffix("-quickgelu")
        raise InputError(
            f"weights {tag!r} of open_clip's {arch} were trained with another activation; use "
            f"open_clip:{other}/{tag}"
        )
    loader = OpenClipLoader(arch, tag)
    tower: Any = loader.architecture()
    preprocessing = preprocessing_of(tower.image_size, cfg)
    remarks = [f"open_clip's {arch}, image features not of unit length"]
    if not cfg:
        said = in_words(preprocessing)
        remarks.append(f"no weights are named, preprocessing is open_clip's default: {said}")
    weights = str(cfg.get("hf_hub") or cfg.get("url") or "none named")
    return recipe_from_model(
        f"open_clip:{name}",
        ModelSource(loader, weights, _UNSTATED),
        preprocessing,
        unmerged(f"open_clip:{name} is", tower),
        family="open_clip_vit",
        description="; ".join(remarks),
        output=ModelOutput("features"),
    )


_RESIZES: dict[str, Resize] = {"shortest": "crop", "longest": "letterbox", "squash": "squash"}
"""open_clip's names of the rules."""


def preprocessing_of(image_size: Any, cfg: dict[str, Any]) -> Preprocessing:
    """Preprocessing from open_clip's table; its own defaults where that is silent."""
    from open_clip.transform import PreprocessCfg

    default = PreprocessCfg()
    height, width = image_size if isinstance(image_size, tuple | list) else (image_size,) * 2
    resize = _RESIZES[cfg.get("resize_mode", default.resize_mode)]
    level = int(cfg.get("fill_color", default.fill_color))
    return Preprocessing(
        input_size=(3, int(height), int(width)),
        mean=tuple(cfg.get("mean", default.mean)),
        std=tuple(cfg.get("std", default.std)),
        crop_pct=1.0,
        interpolation=interpolation_from(
            cfg.get("interpolation", default.interpolation), "open_clip"
        ),
        resize=resize,
        fill=(level,) * 3 if resize == "letterbox" else (),
    )


def _named(name: str, arch: str, tag: str, hub: str, geometry: Geometry) -> Recipe:
    return Recipe(
        name=name,
        source=ModelSource(OpenClipLoader(arch, tag), f"laion/CLIP-{arch}-{hub}/", _UNSTATED),
        preprocessing=Preprocessing((3, 224, 224), *CLIP_NORM, 1.0, "bicubic"),
        merging=MergingAdvice(geometry.recommended_r(224)),
        output=ModelOutput("features"),
        family="open_clip_vit",
        description=f"OpenCLIP {arch}, {tag}; image features not of unit length",
        geometry=geometry,
    )


def _sizes(width: int, depth: int, patch: int, features: int) -> Geometry:
    return Geometry(width, depth, 4 * width, patch, head_macs=width * features)


_B32, _B16 = _sizes(768, 12, 32, 512), _sizes(768, 12, 16, 512)
_L14, _H14 = _sizes(1024, 24, 14, 768), _sizes(1280, 32, 14, 1024)
_DATACOMP = "datacomp_xl_s13b_b90k", "DataComp.XL-s13B-b90K"

OPEN_CLIP = (
    _named("openclip_b32", "ViT-B-32", "laion2b_s34b_b79k", "laion2B-s34B-b79K", _B32),
    _named("openclip_b16", "ViT-B-16", *_DATACOMP, _B16),
    _named("openclip_l14", "ViT-L-14", *_DATACOMP, _L14),
    _named("openclip_h14", "ViT-H-14", "laion2b_s32b_b79k", "laion2B-s32B-b79K", _H14),
)
"""Recipes with a name."""
