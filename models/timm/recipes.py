"""Recipes of timm's models: those with a name, and ``timm:<name>``. Imports no timm by itself."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

from tome_export.errors import InputError
from tome_export.models.facts import (
    CLIP_NORM,
    HALF_NORM,
    IMAGENET_NORM,
    RULE,
    Geometry,
    MergingAdvice,
    ModelOutput,
    Norm,
    dinov2_advice,
    rule_advice,
)
from tome_export.models.preprocessing import in_words, interpolation_from
from tome_export.models.recipe import ModelSource, Recipe, recipe_from_model, unmerged
from tome_export.models.timm.loader import TimmLoader
from tome_export.spec import Preprocessing, Resize

_SIZES = {
    "tiny": (192, 12),
    "small": (384, 12),
    "base": (768, 12),
    "large": (1024, 24),
    "huge": (1280, 32),
}
"""Width and depth by the name of the size (ViT, arXiv 2010.11929, table 1; DeiT, table 1)."""


def _sizes(arch: str, prefix: int = 1, outputs: int = 0) -> Geometry:
    """Sizes by timm's names ``<model>_<size>_patch<pixels>``, and of a linear head."""
    width, depth = _SIZES[arch.split("_")[1]]
    patch = int(arch.partition("_patch")[2].partition("_")[0])
    return Geometry(width, depth, 4 * width, patch, prefix, head_macs=width * outputs)


def _timm(
    name: str,
    timm_name: str,
    description: str,
    geometry: Geometry,
    by: str,
    *,
    published: tuple[int, str] | None = None,
    advice: MergingAdvice | None = None,
    size: int = 224,
    norm: Norm = IMAGENET_NORM,
    crop_pct: float = 0.9,
    output: str = "features",
    label_set: str | None = None,
    licence: str = "apache-2.0",
    prop_attn: bool = True,
    arguments: tuple[tuple[str, Any], ...] = (),
    family: str = "timm_vit",
    aliases: tuple[str, ...] = (),
    advise: Callable[[int, int], MergingAdvice] = rule_advice,
) -> Recipe:
    r, where = published or (geometry.recommended_r(size), "")
    return Recipe(
        name=name,
        source=ModelSource(
            TimmLoader(timm_name, arguments), f"{by}; hub repository timm/{timm_name}", licence
        ),
        preprocessing=Preprocessing((3, size, size), *norm, crop_pct, "bicubic"),
        merging=advice or MergingAdvice(r, f"ToMe README, {where}" if where else RULE, prop_attn),
        output=ModelOutput(output, label_set=label_set),
        family=family,
        description=description,
        aliases=aliases,
        geometry=geometry,
        advise=advise,
    )


def _classifier(name: str, arch: str, tag: str, description: str, by: str, **more: Any) -> Recipe:
    prefix = 2 if "_distilled_" in arch else 1
    geometry = _sizes(arch, prefix, prefix * 1000)
    more |= {"output": "logits", "label_set": "imagenet-1k", "aliases": (arch,)}
    return _timm(name, f"{arch}.{tag}", description, geometry, by, **more)


def _augreg(
    name: str,
    arch: str,
    title: str,
    published: tuple[int, str] | None = None,
    *,
    tag: str = "augreg",
    size: int = 224,
) -> Recipe:
    return _classifier(
        name,
        arch,
        f"{tag}_in21k_ft_in1k",
        f"{title}, ImageNet-21k then 1k, AugReg",
        "Google Research (How to train your ViT)",
        published=published,
        size=size,
        norm=HALF_NORM,
        crop_pct=1.0 if size == 384 else 0.9,
    )


def _deit(name: str, arch: str, title: str, trained: str = "") -> Recipe:
    published = (13, trained) if trained else None
    description, by = f"{title}, ImageNet-1k", "Meta Research (DeiT)"
    return _classifier(name, arch, "fb_in1k", description, by, published=published)


def _dinov2(name: str, arch: str, title: str, registers: int = 0) -> Recipe:
    # timm's default of 518 pixels is the resolution of the last stage of training; 224 is that of
    # DINOv2's published evaluations: 16 x 16 = 256 patches, position embedding resampled by timm.
    geometry = _sizes(arch, 1 + registers)
    return _timm(
        name,
        f"{arch}.lvd142m",
        f"{title}, self-supervised on LVD-142M; features, at 224 pixels (256 patches)",
        geometry,
        "Meta Research (DINOv2)",
        advice=dinov2_advice(256 + geometry.prefix, geometry.depth),
        advise=dinov2_advice,
        crop_pct=1.0,
        arguments=(("img_size", 224),),
    )


def _mae(name: str, arch: str, title: str, published: tuple[int, str] | None = None) -> Recipe:
    """MAE's ViTs, pretrained without labels; the features are the class token's.

    Proportional attention is off: off-the-shelf MAE weights do worse with it (ToMe, section 4.2).
    A fine-tuned classifier in the layout of MAE's authors (``fc_norm`` and ``head``) is given with
    ``--weights``; it pools the mean of all patches, weighted by size.
    """
    return _timm(
        name,
        f"{arch}.mae",
        f"MAE {title}; features, or a fine-tuned classifier",
        _sizes(arch),
        "Meta Research (MAE)",
        published=published,
        prop_attn=False,
        licence="cc-by-nc-4.0",
        label_set="imagenet-1k",
    )


def _openai(name: str, patch: int) -> Recipe:
    arch = f"vit_base_patch{patch}_clip_quickgelu_224"
    description = f"CLIP ViT-B/{patch} of OpenAI; image features not of unit length"
    geometry = _sizes(arch, outputs=512)
    return _timm(name, f"{arch}.openai", description, geometry, "OpenAI (CLIP)", norm=CLIP_NORM)


def _eva(name: str, timm_name: str, title: str, geometry: Geometry, **more: Any) -> Recipe:
    return _timm(
        name,
        timm_name,
        f"EVA-CLIP {title} on Merged-2B; image features not of unit length",
        geometry,
        "BAAI (EVA-CLIP)",
        norm=CLIP_NORM,
        licence="mit",
        family="timm_eva",
        **more,
    )


DIGITS = Recipe(
    name="vit_digits",
    source=ModelSource(
        TimmLoader(
            "vit_tiny_patch16_224",
            (
                ("img_size", 32),
                ("patch_size", 4),
                ("in_chans", 1),
                ("num_classes", 10),
                ("embed_dim", 64),
                ("depth", 6),
                ("num_heads", 4),
            ),
            bundled="vit_digits.safetensors",
        ),
        "trained by scripts/train_vit_digits.py on scikit-learn's digits",
        "apache-2.0",
    ),
    preprocessing=Preprocessing((1, 32, 32), (0.5,), (0.5,), 1.0, "bicubic"),
    merging=MergingAdvice(8, "measured on its test images; also the " + RULE),
    output=ModelOutput(labels=tuple("0123456789")),
    family="timm_vit",
    description="ViT of 6 blocks on scikit-learn's digits; its weights and test images come along",
    geometry=Geometry(64, 6, 256, 4, head_macs=640),
)
"""The model whose weights and test images come along."""

_SWAG_B384 = (45, "SWAG ViT-B/16 @ 384")
_B, _L = 768, 1024

TIMM = (
    _augreg("vit_ti16", "vit_tiny_patch16_224", "ViT-Ti/16", (13, "DeiT-Ti/16 trained")),
    _augreg("vit_s16", "vit_small_patch16_224", "ViT-S/16", (13, "ViT-S/16")),
    _augreg(
        "vit_b16",
        "vit_base_patch16_224",
        "ViT-B/16",
        (13, "ViT-B/16; 16 halves the MACs"),
        tag="augreg2",
    ),
    _augreg("vit_l16", "vit_large_patch16_224", "ViT-L/16", (7, "ViT-L/16")),
    _augreg("vit_b16_384", "vit_base_patch16_384", "ViT-B/16 at 384 pixels", _SWAG_B384, size=384),
    _augreg("vit_b32", "vit_base_patch32_224", "ViT-B/32"),
    _deit("deit_ti16", "deit_tiny_patch16_224", "DeiT-Ti/16", "DeiT-Ti/16 trained"),
    _deit("deit_s16", "deit_small_patch16_224", "DeiT-S/16", "DeiT-S/16 trained"),
    _deit("deit_b16", "deit_base_patch16_224", "DeiT-B/16"),
    *(
        _deit(
            f"deit_{title.lower()}16_distilled",
            f"deit_{size}_distilled_patch16_224",
            f"DeiT-{title}/16 with distillation token",
        )
        for size, title in (("tiny", "Ti"), ("small", "S"), ("base", "B"))
    ),
    _deit("deit3_b16", "deit3_base_patch16_224", "DeiT III-B/16"),
    _dinov2("dinov2_s14", "vit_small_patch14_dinov2", "DINOv2 ViT-S/14"),
    _dinov2("dinov2_b14", "vit_base_patch14_dinov2", "DINOv2 ViT-B/14"),
    _dinov2("dinov2_s14_reg", "vit_small_patch14_reg4_dinov2", "DINOv2 ViT-S/14, 4 registers", 4),
    _dinov2("dinov2_b14_reg", "vit_base_patch14_reg4_dinov2", "DINOv2 ViT-B/14, 4 registers", 4),
    _mae("mae_b16", "vit_base_patch16_224", "ViT-B/16"),
    _mae("mae_l16", "vit_large_patch16_224", "ViT-L/16", (8, "MAE ViT-L/16 trained")),
    _mae("mae_h14", "vit_huge_patch14_224", "ViT-H/14"),
    _openai("clip_b32", 32),
    _openai("clip_b16", 16),
    _timm(
        "siglip_b16",
        "vit_base_patch16_siglip_224.webli",
        "SigLIP ViT-B/16 on WebLI; image features not of unit length",
        # A map head: its one query and output, keys and values of every token, an MLP.
        Geometry(_B, 12, 4 * _B, 16, 0, head_macs=10 * _B**2, token_macs=2 * _B**2 + 2 * _B),
        "Google Research (SigLIP)",
        norm=HALF_NORM,
    ),
    _eva(
        "eva02_clip_b16",
        "eva02_base_patch16_clip_224.merged2b",
        "EVA02-B/16",
        Geometry(_B, 12, 4 * _B, 16, head_macs=_B * 512),
    ),
    _eva(
        "eva02_clip_l14_336",
        "eva02_large_patch14_clip_336.merged2b",
        "EVA02-L/14 at 336 pixels",
        # SwiGLU: three matrices to and from int(1024 * 8 / 3) = 2730.
        Geometry(_L, 24, 2730 * 3 // 2, 14, head_macs=_L * 768),
        size=336,
        crop_pct=1.0,
    ),
    _timm(
        "dinov3_s16",
        "vit_small_patch16_dinov3.lvd1689m",
        "DINOv3 ViT-S/16, 4 registers, self-supervised on LVD-1689M; features",
        _sizes("vit_small_patch16_dinov3", 5),
        "Meta Research (DINOv3)",
        size=256,
        crop_pct=1.0,
        licence="dinov3-license",
        family="timm_eva",
    ),
)
"""Recipes of timm's models, in the order to show them."""

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

    The name may carry a tag of weights (``vit_base_patch16_224.mae``). r is ``recommended_r``, that
    of DINOv2 ``dinov2_advice``; proportional attention is on except for MAE weights, as the ToMe
    authors advise.
    """
    from timm import get_pretrained_cfg, is_model, list_pretrained

    arch, _, tag = name.partition(".")
    if not is_model(arch):
        close = [f"timm:{match}" for match in close_timm_names(name)]
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise InputError(f"timm has no model {arch!r}; {hint}")
    tags = [m.partition(".")[2] for m in list_pretrained(f"{arch}.*")]
    if tag and tag not in tags:
        known = ", ".join(tags) or "none"
        raise InputError(f"timm has no weights {tag!r} of {arch}; it has {known}")
    cfg: Any = get_pretrained_cfg(name)
    if cfg is not None and cfg.tag:
        name = f"{arch}.{cfg.tag}"
    values: dict[str, Any] = cfg.to_dict() if cfg is not None else {}
    loader = TimmLoader(name)
    model: Any = loader.architecture()
    weights = str(values.get("hf_hub_id") or values.get("url") or "none")
    licence = str(values.get("license") or "not stated by timm")
    return recipe_from_model(
        f"timm:{name}",
        ModelSource(loader, weights, licence),
        preprocessing_from_cfg(values),
        unmerged(f"timm:{name} is", model),
        family="timm_vit",
        description=_description(arch, values),
        output=ModelOutput(label_set=_LABEL_SETS.get(getattr(model, "num_classes", 0))),
        prop_attn="mae" not in str(values.get("tag") or "").split("_"),
        advise=dinov2_advice if arch.endswith("_dinov2") else rule_advice,
    )


_CROP_MODES: dict[str, Resize] = {"squash": "squash", "border": "letterbox"}
"""timm's names of the rules; any other is its ``center``."""


def preprocessing_from_cfg(cfg: dict[str, Any]) -> Preprocessing:
    """Preprocessing from a timm pretrained configuration; ImageNet's where it is silent."""
    channels, height, width = cfg.get("input_size") or (3, 224, 224)
    mean = tuple(cfg.get("mean") or IMAGENET_NORM[0])
    resize = _CROP_MODES.get(cfg.get("crop_mode") or "center", "crop")
    return Preprocessing(
        input_size=(channels, height, width),
        mean=mean,
        std=tuple(cfg.get("std") or IMAGENET_NORM[1]),
        crop_pct=float(cfg.get("crop_pct") or 0.875),
        interpolation=interpolation_from(cfg.get("interpolation") or "bicubic", "timm"),
        resize=resize,
        fill=tuple(round(255 * level) for level in mean) if resize == "letterbox" else (),
    )


def _description(arch: str, cfg: dict[str, Any]) -> str:
    if not cfg:
        said = in_words(preprocessing_from_cfg(cfg))
        return f"timm's {arch}; timm says nothing of its images, ImageNet's are taken: {said}"
    return f"timm's {arch}"
