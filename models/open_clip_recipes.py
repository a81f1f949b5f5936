"""Recipes of open_clip's image towers."""

from __future__ import annotations

from tome_export.models.open_clip_models import OpenClipLoader
from tome_export.models.recipe import RULE, Geometry, Recipe, recommended_r
from tome_export.spec import Preprocessing

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


def _recipe(
    name: str, arch: str, tag: str, hub: str, *, width: int, depth: int, patch: int, features: int
) -> Recipe:
    tokens = (224 // patch) ** 2 + 1
    return Recipe(
        name=name,
        family="open_clip_vit",
        preprocessing=Preprocessing((3, 224, 224), _MEAN, _STD, 1.0, "bicubic"),
        recommended_r=recommended_r(tokens, depth),
        r_source=RULE,
        output_name="features",
        description=f"OpenCLIP {arch}, {tag}; image features not of unit length",
        weights_source=hub,
        licence="not stated by open_clip",
        loader=OpenClipLoader(arch, tag),
        geometry=Geometry(width, depth, 4 * width, patch, head_macs=width * features),
    )


_LAION, _DATACOMP = "laion/CLIP-{}-laion2B-{}/", "laion/CLIP-{}-DataComp.XL-s13B-b90K/"

OPEN_CLIP = (
    _recipe(
        "openclip_b32",
        "ViT-B-32",
        "laion2b_s34b_b79k",
        _LAION.format("ViT-B-32", "s34B-b79K"),
        width=768,
        depth=12,
        patch=32,
        features=512,
    ),
    _recipe(
        "openclip_b16",
        "ViT-B-16",
        "datacomp_xl_s13b_b90k",
        _DATACOMP.format("ViT-B-16"),
        width=768,
        depth=12,
        patch=16,
        features=512,
    ),
    _recipe(
        "openclip_l14",
        "ViT-L-14",
        "datacomp_xl_s13b_b90k",
        _DATACOMP.format("ViT-L-14"),
        width=1024,
        depth=24,
        patch=14,
        features=768,
    ),
    _recipe(
        "openclip_h14",
        "ViT-H-14",
        "laion2b_s32b_b79k",
        _LAION.format("ViT-H-14", "s32B-b79K"),
        width=1280,
        depth=32,
        patch=14,
        features=1024,
    ),
)
