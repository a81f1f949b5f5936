"""Recipes of torchvision's ViTs: those with a name, and ``torchvision:<name>[.<weights>]``."""

from __future__ import annotations

import difflib
from typing import Any

from tome_export.errors import InputError
from tome_export.models.facts import IMAGENET_NORM, RULE, Geometry, MergingAdvice, ModelOutput
from tome_export.models.preprocessing import crop_pct_of, interpolation_from
from tome_export.models.recipe import ModelSource, Recipe, recipe_from_model, unmerged
from tome_export.models.torchvision.loader import TorchvisionLoader
from tome_export.spec import Preprocessing

SWAG_LICENCE, UNSTATED = "cc-by-nc-4.0", "not stated by torchvision"


def recipe_from_torchvision(name: str) -> Recipe:
    """A recipe for ``torchvision:<name>``, its facts from torchvision's table of weights.

    The name may carry the name of weights (``vit_b_16.IMAGENET1K_SWAG_E2E_V1``); without, those
    that torchvision calls its default.
    """
    from torchvision.models import list_models

    arch, _, tag = name.partition(".")
    known = [model for model in list_models() if model.startswith("vit_")]
    if arch not in known:
        close = difflib.get_close_matches(arch, known, n=3)
        hint = f"did you mean torchvision:{close[0]}?" if close else f"it has {', '.join(known)}"
        raise InputError(f"torchvision has no ViT {arch!r}; {hint}")
    entry = TorchvisionLoader(arch, tag or "DEFAULT").entry
    loader = TorchvisionLoader(arch, str(entry.name))
    name = f"torchvision:{arch}.{entry.name}"
    return recipe_from_model(
        name,
        ModelSource(loader, str(entry.url), licence_of(entry.meta)),
        preprocessing_of(entry.transforms()),
        unmerged(f"{name} is", loader.architecture()),
        family="torchvision_vit",
        description=f"torchvision's {arch}",
        output=ModelOutput(labels=tuple(entry.meta["categories"])),
    )


def licence_of(meta: dict[str, Any]) -> str:
    """Licence of weights by torchvision's table, which gives the address of SWAG's and no other."""
    found = str(meta.get("license") or "")
    return SWAG_LICENCE if "/SWAG/" in found else found or UNSTATED


def preprocessing_of(transforms: Any) -> Preprocessing:
    """Preprocessing from torchvision's ``ImageClassification`` transforms."""
    side, resized = int(transforms.crop_size[0]), int(transforms.resize_size[0])
    return Preprocessing(
        input_size=(3, side, side),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
        crop_pct=crop_pct_of(side, resized),
        interpolation=interpolation_from(transforms.interpolation.value, "torchvision"),
    )


_WIDTH_DEPTH = {"b": (768, 12), "l": (1024, 24), "h": (1280, 32)}


def _named(
    name: str,
    arch: str,
    tag: str,
    file: str,
    *,
    size: int = 224,
    resize: int | None = None,
    swag_r: int | None = None,
) -> Recipe:
    _, letter, patch = arch.split("_")
    width, depth = _WIDTH_DEPTH[letter]
    geometry = Geometry(width, depth, 4 * width, int(patch), head_macs=1000 * width)
    title, crop_pct = f"ViT-{letter.upper()}", crop_pct_of(size, resize or size)
    if swag_r is None:
        merging = MergingAdvice(geometry.recommended_r(size), RULE)
        what, licence, resampling = "torchvision's weights, ImageNet-1k", UNSTATED, "bilinear"
    else:
        merging = MergingAdvice(swag_r, f"ToMe README, SWAG {title} @ {size}")
        what, licence, resampling = "SWAG, fine-tuned on ImageNet-1k", SWAG_LICENCE, "bicubic"
    url = f"https://download.pytorch.org/models/{file}"
    return Recipe(
        name=name,
        source=ModelSource(TorchvisionLoader(arch, tag), url, licence),
        preprocessing=Preprocessing(
            (3, size, size), *IMAGENET_NORM, crop_pct, interpolation_from(resampling, "torchvision")
        ),
        merging=merging,
        output=ModelOutput(label_set="imagenet-1k"),
        family="torchvision_vit",
        description=f"{title}/{patch} at {size} pixels, {what}",
        geometry=geometry,
    )


_PLAIN, _SWAG = "IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"

TORCHVISION = (
    _named("torchvision_b16", "vit_b_16", _PLAIN, "vit_b_16-c867db91.pth", resize=256),
    _named("torchvision_b32", "vit_b_32", _PLAIN, "vit_b_32-d86f8d99.pth", resize=256),
    _named("torchvision_l16", "vit_l_16", _PLAIN, "vit_l_16-852ce7e3.pth", resize=242),
    _named("swag_b16_384", "vit_b_16", _SWAG, "vit_b_16_swag-9ac1b537.pth", size=384, swag_r=45),
    _named("swag_l16_512", "vit_l_16", _SWAG, "vit_l_16_swag-4f3808c9.pth", size=512, swag_r=40),
    _named("swag_h14_518", "vit_h_14", _SWAG, "vit_h_14_swag-80465313.pth", size=518, swag_r=40),
)
"""Recipes with a name, SWAG's among them."""
