"""The recipes, and finding one by name."""

from __future__ import annotations

import difflib
from types import MappingProxyType

from tome_export.errors import InputError
from tome_export.merge.schedule import VideoOptions
from tome_export.models.clip4clip_recipes import CLIP4CLIP, with_video
from tome_export.models.hf_recipes import HF
from tome_export.models.llava_recipes import llava15_tower, with_tower
from tome_export.models.mae_recipes import MAE
from tome_export.models.open_clip_recipes import OPEN_CLIP
from tome_export.models.recipe import RULE, OutputName, Recipe, recommended_r
from tome_export.models.timm_towers import TIMM_TOWERS
from tome_export.models.torchvision_recipes import TORCHVISION
from tome_export.spec import Preprocessing, TowerOptions

INCEPTION = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

_README = "ToMe README, {}"


def _timm(
    name: str,
    timm_name: str,
    description: str,
    r: int,
    r_source: str,
    *,
    size: int = 224,
    norm: tuple[tuple[float, ...], tuple[float, ...]] = IMAGENET,
    crop_pct: float = 0.9,
    kwargs: tuple[tuple[str, object], ...] = (),
    output: OutputName = "logits",
    by: str,
) -> Recipe:
    return Recipe(
        name=name,
        timm_name=timm_name,
        timm_kwargs=kwargs,
        preprocessing=Preprocessing((3, size, size), *norm, crop_pct, "bicubic"),
        recommended_r=r,
        r_source=r_source,
        output_name=output,
        description=description,
        weights_source=f"{by}; hub repository timm/{timm_name}",
        licence="apache-2.0",
        label_set="imagenet-1k" if output == "logits" else None,
        aliases=(timm_name.partition(".")[0],) if not kwargs else (),
    )


def _augreg(
    name: str, arch: str, description: str, r: int, r_source: str, *, tag: str = "augreg", **kw: int
) -> Recipe:
    size = kw.get("size", 224)
    return _timm(
        name,
        f"{arch}.{tag}_in21k_ft_in1k",
        f"{description}, ImageNet-21k then 1k, AugReg",
        r,
        r_source,
        size=size,
        norm=INCEPTION,
        crop_pct=1.0 if size == 384 else 0.9,
        by="Google Research (How to train your ViT)",
    )


def _deit(name: str, arch: str, description: str, r_source: str) -> Recipe:
    return _timm(name, f"{arch}.fb_in1k", description, 13, r_source, by="Meta Research (DeiT)")


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
        kwargs=(("img_size", 224),),
        output="features",
        by="Meta Research (DINOv2)",
    )


_DIGITS = Recipe(
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
    r_source="measured on its test images; also the " + RULE,
    description="ViT of 6 blocks on scikit-learn's digits; its weights and test images come along",
    weights_source="trained by scripts/train_vit_digits.py on scikit-learn's digits",
    licence="apache-2.0",
    labels=tuple("0123456789"),
    bundled="vit_digits.safetensors",
)

_RECIPES = (
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
    *MAE,
    *TIMM_TOWERS,
    *OPEN_CLIP,
    *TORCHVISION,
    *HF,
    llava15_tower(),
    *CLIP4CLIP,
    _DIGITS,
)

RECIPES = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})
"""Every recipe by its name, in the order to show them."""


def resolve(
    name: str, tower: TowerOptions | None = None, video: VideoOptions | None = None
) -> Recipe:
    """Find a model.

    Args:
        name: A recipe (``vit_b16``), ``timm:<name>``, ``hf:<folder or hub name>``,
            ``open_clip:<arch>[/<weights>]``, ``torchvision:<name>[.<weights>]``, or
            ``module:function``.
        tower: What a language model takes of it; for vision towers only.
        video: Frames of one video and how they are joined; for video towers only.

    Raises:
        InputError: if there is no such model, naming close ones.
        UsageError: if options of towers or videos are given for a model that is none.
    """
    recipe = _find(name.strip(), tower or TowerOptions())
    recipe = with_tower(recipe, tower) if tower else recipe
    return with_video(recipe, video or VideoOptions())


def _find(name: str, tower: TowerOptions) -> Recipe:
    known = {alias: recipe for recipe in _RECIPES for alias in (recipe.name, *recipe.aliases)}
    if name in known:
        return known[name]
    kind, colon, rest = name.partition(":")
    if kind == "timm" and colon:
        from tome_export.models.timm_names import recipe_from_timm

        return recipe_from_timm(rest)
    if kind == "open_clip" and colon:
        from tome_export.models.open_clip_models import recipe_from_open_clip

        return recipe_from_open_clip(rest)
    if kind == "torchvision" and colon:
        from tome_export.models.torchvision_models import recipe_from_torchvision

        return recipe_from_torchvision(rest)
    if kind == "hf" and colon:
        from tome_export.models.hf_recipes import recipe_from_hf

        return recipe_from_hf(name, rest, tower)
    if colon:
        from tome_export.models.custom import recipe_from_function

        return recipe_from_function(name)
    raise InputError(f"unknown model {name!r}; {_suggestion(name, known)}")


def _suggestion(name: str, known: dict[str, Recipe]) -> str:
    from tome_export.models.timm_names import close_timm_names

    close = difflib.get_close_matches(name, RECIPES, n=3)
    close += [f"timm:{match}" for match in close_timm_names(name) if match not in known]
    if close:
        return f"did you mean {', '.join(close)}? `tome-export models` lists the recipes"
    return (
        "expected a recipe that `tome-export models` lists, timm:<name>, hf:<folder or hub name>, "
        "open_clip:<arch>[/<weights>], torchvision:<name>[.<weights>], or module:function"
    )
