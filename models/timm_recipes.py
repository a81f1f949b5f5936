"""Recipes of timm's models: ViT, DeiT, DINOv2, MAE, and image towers. Imports no timm."""

from __future__ import annotations

from typing import Any

from tome_export.models.recipe import (
    CLIP_NORM,
    HALF_NORM,
    IMAGENET_NORM,
    RULE,
    Geometry,
    Norm,
    Recipe,
    recommended_r,
)
from tome_export.models.timm_models import TimmLoader
from tome_export.spec import Preprocessing

_README = "ToMe README, {}"
_B, _L = 768, 1024
# A map head: its one query and output, keys and values of every token, an MLP.
_MAP_HEAD = 2 * _B**2 + 8 * _B**2
_MAP_TOKEN = 2 * _B**2 + 2 * _B


_SIZES = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
"""Width and depth by the name of the size (ViT, arXiv 2010.11929, table 1; DeiT, table 1)."""


def _geometry(arch: str, *, heads: int = 1, registers: int = 0, classes: int = 1000) -> Geometry:
    """Sizes by timm's names ``<model>_<size>_patch<pixels>``; each head has a prefix token."""
    width, depth = _SIZES[arch.split("_")[1]]
    patch = int(arch.partition("_patch")[2].partition("_")[0])
    return Geometry(width, depth, 4 * width, patch, heads + registers, heads * width * classes)


def _timm(
    name: str,
    timm_name: str,
    description: str,
    r: int,
    r_source: str,
    *,
    size: int = 224,
    norm: Norm = IMAGENET_NORM,
    crop_pct: float = 0.9,
    by: str,
    **more: Any,
) -> Recipe:
    facts = {"licence": "apache-2.0", **more}
    return Recipe(
        name=name,
        timm_name=timm_name,
        preprocessing=Preprocessing((3, size, size), *norm, crop_pct, "bicubic"),
        recommended_r=r,
        loader=TimmLoader(),
        r_source=r_source,
        description=description,
        weights_source=f"{by}; hub repository timm/{timm_name}",
        **facts,
    )


def _augreg(
    name: str,
    arch: str,
    description: str,
    r: int,
    r_source: str,
    *,
    tag: str = "augreg",
    size: int = 224,
) -> Recipe:
    return _timm(
        name,
        f"{arch}.{tag}_in21k_ft_in1k",
        f"{description}, ImageNet-21k then 1k, AugReg",
        r,
        r_source,
        size=size,
        norm=HALF_NORM,
        crop_pct=1.0 if size == 384 else 0.9,
        by="Google Research (How to train your ViT)",
        geometry=_geometry(arch),
        label_set="imagenet-1k",
        aliases=(arch,),
    )


def _deit(name: str, arch: str, description: str, r_source: str) -> Recipe:
    return _timm(
        name,
        f"{arch}.fb_in1k",
        description,
        13,
        r_source,
        by="Meta Research (DeiT)",
        geometry=_geometry(arch, heads=2 if "_distilled_" in arch else 1),
        label_set="imagenet-1k",
        aliases=(arch,),
    )


def _dinov2(name: str, arch: str, description: str, tokens: int) -> Recipe:
    # timm's default of 518 pixels is the resolution of the last stage of training; 224 is that of
    # DINOv2's published evaluations: 16 x 16 = 256 patches, position embedding resampled by timm.
    return _timm(
        name,
        f"{arch}.lvd142m",
        f"{description}, self-supervised on LVD-142M; features, at 224 pixels (256 patches)",
        recommended_r(tokens, 12),
        RULE,
        crop_pct=1.0,
        by="Meta Research (DINOv2)",
        geometry=_geometry(arch, registers=tokens - 257, classes=0),
        timm_kwargs=(("img_size", 224),),
        output_name="features",
    )


def _mae(
    name: str, arch: str, width: int, depth: int, patch: int, trained_r: int | None = None
) -> Recipe:
    """MAE's ViTs, pretrained without labels; the features are the class token's.

    Proportional attention is off: off-the-shelf MAE weights do worse with it (ToMe, section 4.2).
    A fine-tuned classifier in the layout of MAE's authors (``fc_norm`` and ``head``) is given with
    ``--weights``; it pools the mean of all patches, weighted by size.
    """
    return _timm(
        name,
        f"{arch}.mae",
        f"MAE ViT-{name[4].upper()}/{patch}; features, or a fine-tuned classifier",
        trained_r or recommended_r((224 // patch) ** 2 + 1, depth),
        "ToMe README, MAE ViT-L/16 trained" if trained_r else RULE,
        by="Meta Research (MAE)",
        prop_attn=False,
        output_name="features",
        licence="cc-by-nc-4.0",
        label_set="imagenet-1k",
        geometry=Geometry(width, depth, 4 * width, patch),
    )


def _tower(
    name: str,
    timm_name: str,
    description: str,
    geometry: Geometry,
    *,
    size: int = 224,
    by: str,
    **more: Any,
) -> Recipe:
    return _timm(
        name,
        timm_name,
        description,
        recommended_r((size // geometry.patch) ** 2 + geometry.prefix, geometry.depth),
        RULE,
        size=size,
        by=by,
        geometry=geometry,
        output_name="features",
        **more,
    )


DIGITS = Recipe(
    name="vit_digits",
    timm_name="vit_tiny_patch16_224",
    timm_kwargs=(
        ("img_size", 32),
        ("patch_size", 4),
        ("in_chans", 1),
        ("num_classes", 10),
        ("embed_dim", 64),
        ("depth", 6),
        ("num_heads", 4),
    ),
    preprocessing=Preprocessing((1, 32, 32), (0.5,), (0.5,), 1.0, "bicubic"),
    recommended_r=8,
    loader=TimmLoader(),
    r_source="measured on its test images; also the " + RULE,
    description="ViT of 6 blocks on scikit-learn's digits; its weights and test images come along",
    weights_source="trained by scripts/train_vit_digits.py on scikit-learn's digits",
    licence="apache-2.0",
    labels=tuple("0123456789"),
    bundled="vit_digits.safetensors",
    geometry=Geometry(64, 6, 256, 4, head_macs=640),
)
"""The model whose weights and test images come along."""

TIMM = (
    _augreg(
        "vit_ti16", "vit_tiny_patch16_224", "ViT-Ti/16", 13, _README.format("DeiT-Ti/16 trained")
    ),
    _augreg("vit_s16", "vit_small_patch16_224", "ViT-S/16", 13, _README.format("ViT-S/16")),
    _augreg(
        "vit_b16",
        "vit_base_patch16_224",
        "ViT-B/16",
        13,
        _README.format("ViT-B/16; 16 halves the MACs"),
        tag="augreg2",
    ),
    _augreg("vit_l16", "vit_large_patch16_224", "ViT-L/16", 7, _README.format("ViT-L/16")),
    _augreg(
        "vit_b16_384",
        "vit_base_patch16_384",
        "ViT-B/16 at 384 pixels",
        45,
        _README.format("SWAG ViT-B/16 @ 384"),
        size=384,
    ),
    _augreg("vit_b32", "vit_base_patch32_224", "ViT-B/32", recommended_r(50, 12), RULE),
    _deit(
        "deit_ti16",
        "deit_tiny_patch16_224",
        "DeiT-Ti/16, ImageNet-1k",
        _README.format("DeiT-Ti/16 trained"),
    ),
    _deit(
        "deit_s16",
        "deit_small_patch16_224",
        "DeiT-S/16, ImageNet-1k",
        _README.format("DeiT-S/16 trained"),
    ),
    _deit("deit_b16", "deit_base_patch16_224", "DeiT-B/16, ImageNet-1k", RULE),
    *(
        _deit(
            f"deit_{short}16_distilled",
            f"deit_{long}_distilled_patch16_224",
            f"DeiT-{title}/16 with distillation token, ImageNet-1k",
            RULE,
        )
        for short, long, title in (("ti", "tiny", "Ti"), ("s", "small", "S"), ("b", "base", "B"))
    ),
    _deit("deit3_b16", "deit3_base_patch16_224", "DeiT III-B/16, ImageNet-1k", RULE),
    _dinov2("dinov2_s14", "vit_small_patch14_dinov2", "DINOv2 ViT-S/14", 257),
    _dinov2("dinov2_b14", "vit_base_patch14_dinov2", "DINOv2 ViT-B/14", 257),
    _dinov2("dinov2_s14_reg", "vit_small_patch14_reg4_dinov2", "DINOv2 ViT-S/14, 4 registers", 261),
    _dinov2("dinov2_b14_reg", "vit_base_patch14_reg4_dinov2", "DINOv2 ViT-B/14, 4 registers", 261),
    _mae("mae_b16", "vit_base_patch16_224", 768, 12, 16),
    _mae("mae_l16", "vit_large_patch16_224", 1024, 24, 16, trained_r=8),
    _mae("mae_h14", "vit_huge_patch14_224", 1280, 32, 14),
    _tower(
        "clip_b32",
        "vit_base_patch32_clip_quickgelu_224.openai",
        "CLIP ViT-B/32 of OpenAI; image features not of unit length",
        Geometry(_B, 12, 4 * _B, 32, head_macs=_B * 512),
        norm=CLIP_NORM,
        by="OpenAI (CLIP)",
    ),
    _tower(
        "clip_b16",
        "vit_base_patch16_clip_quickgelu_224.openai",
        "CLIP ViT-B/16 of OpenAI; image features not of unit length",
        Geometry(_B, 12, 4 * _B, 16, head_macs=_B * 512),
        norm=CLIP_NORM,
        by="OpenAI (CLIP)",
    ),
    _tower(
        "siglip_b16",
        "vit_base_patch16_siglip_224.webli",
        "SigLIP ViT-B/16 on WebLI; image features not of unit length",
        Geometry(_B, 12, 4 * _B, 16, 0, head_macs=_MAP_HEAD, token_macs=_MAP_TOKEN),
        norm=HALF_NORM,
        by="Google Research (SigLIP)",
    ),
    _tower(
        "eva02_clip_b16",
        "eva02_base_patch16_clip_224.merged2b",
        "EVA-CLIP EVA02-B/16 on Merged-2B; image features not of unit length",
        Geometry(_B, 12, 4 * _B, 16, head_macs=_B * 512),
        norm=CLIP_NORM,
        licence="mit",
        family="timm_eva",
        by="BAAI (EVA-CLIP)",
    ),
    _tower(
        "eva02_clip_l14_336",
        "eva02_large_patch14_clip_336.merged2b",
        "EVA-CLIP EVA02-L/14 at 336 pixels on Merged-2B; image features not of unit length",
        # SwiGLU: three matrices to and from int(1024 * 8 / 3) = 2730.
        Geometry(_L, 24, 2730 * 3 // 2, 14, head_macs=_L * 768),
        norm=CLIP_NORM,
        size=336,
        crop_pct=1.0,
        licence="mit",
        family="timm_eva",
        by="BAAI (EVA-CLIP)",
    ),
    _tower(
        "dinov3_s16",
        "vit_small_patch16_dinov3.lvd1689m",
        "DINOv3 ViT-S/16, 4 registers, self-supervised on LVD-1689M; features",
        Geometry(384, 12, 4 * 384, 16, 5),
        size=256,
        crop_pct=1.0,
        licence="dinov3-license",
        family="timm_eva",
        by="Meta Research (DINOv3)",
    ),
)
"""Recipes of timm's models, in the order to show them."""
