"""Recipes of timm's CLIP, SigLIP, EVA-CLIP and DINOv3 image towers."""

from __future__ import annotations

from tome_export.models.recipe import RULE, Geometry, Recipe, recommended_r
from tome_export.spec import Preprocessing

_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _recipe(
    name: str,
    timm_name: str,
    description: str,
    geometry: Geometry,
    *,
    norm: tuple[tuple[float, ...], tuple[float, ...]],
    size: int = 224,
    crop_pct: float = 0.9,
    licence: str = "apache-2.0",
    family: str = "timm_vit",
    by: str,
) -> Recipe:
    tokens = (size // geometry.patch) ** 2 + geometry.prefix
    return Recipe(
        name=name,
        family=family,
        timm_name=timm_name,
        preprocessing=Preprocessing((3, size, size), *norm, crop_pct, "bicubic"),
        recommended_r=recommended_r(tokens, geometry.depth),
        r_source=RULE,
        output_name="features",
        description=description,
        weights_source=f"{by}; hub repository timm/{timm_name}",
        licence=licence,
        geometry=geometry,
    )


_B, _L = 768, 1024
# A map head: its one query and output, keys and values of every token, an MLP.
_MAP_HEAD = 2 * _B**2 + 8 * _B**2
_MAP_TOKEN = 2 * _B**2 + 2 * _B

TIMM_TOWERS = (
    _recipe(
        "clip_b32",
        "vit_base_patch32_clip_quickgelu_224.openai",
        "CLIP ViT-B/32 of OpenAI; image features not of unit length",
        Geometry(_B, 12, 4 * _B, 32, head_macs=_B * 512),
        norm=_CLIP,
        by="OpenAI (CLIP)",
    ),
    _recipe(
        "clip_b16",
        "vit_base_patch16_clip_quickgelu_224.openai",
        "CLIP ViT-B/16 of OpenAI; image features not of unit length",
        Geometry(_B, 12, 4 * _B, 16, head_macs=_B * 512),
        norm=_CLIP,
        by="OpenAI (CLIP)",
    ),
    _recipe(
        "siglip_b16",
        "vit_base_patch16_siglip_224.webli",
        "SigLIP ViT-B/16 on WebLI; image features not of unit length",
        Geometry(_B, 12, 4 * _B, 16, 0, head_macs=_MAP_HEAD, token_macs=_MAP_TOKEN),
        norm=_HALF,
        by="Google Research (SigLIP)",
    ),
    _recipe(
        "eva02_clip_b16",
        "eva02_base_patch16_clip_224.merged2b",
        "EVA-CLIP EVA02-B/16 on Merged-2B; image features not of unit length",
        Geometry(_B, 12, 4 * _B, 16, head_macs=_B * 512),
        norm=_CLIP,
        licence="mit",
        family="timm_eva",
        by="BAAI (EVA-CLIP)",
    ),
    _recipe(
        "eva02_clip_l14_336",
        "eva02_large_patch14_clip_336.merged2b",
        "EVA-CLIP EVA02-L/14 at 336 pixels on Merged-2B; image features not of unit length",
        # SwiGLU: three matrices to and from int(1024 * 8 / 3) = 2730.
        Geometry(_L, 24, 2730 * 3 // 2, 14, head_macs=_L * 768),
        norm=_CLIP,
        size=336,
        crop_pct=1.0,
        licence="mit",
        family="timm_eva",
        by="BAAI (EVA-CLIP)",
    ),
    _recipe(
        "dinov3_s16",
        "vit_small_patch16_dinov3.lvd1689m",
        "DINOv3 ViT-S/16, 4 registers, self-supervised on LVD-1689M; features",
        Geometry(384, 12, 4 * 384, 16, 5),
        norm=_IMAGENET,
        size=256,
        crop_pct=1.0,
        licence="dinov3-license",
        family="timm_eva",
        by="Meta Research (DINOv3)",
    ),
)
