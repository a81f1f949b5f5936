"""Recipes of torchvision's ViTs, SWAG's among them."""

from __future__ import annotations

from tome_export.models.recipe import RULE, Geometry, Recipe, recommended_r
from tome_export.models.torchvision_models import SWAG_LICENCE, UNSTATED, TorchvisionLoader
from tome_export.spec import Preprocessing

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WIDTH_DEPTH = {"b": (768, 12), "l": (1024, 24), "h": (1280, 32)}


def _recipe(
    name: str,
    arch: str,
    tag: str,
    file: str,
    *,
    size: int = 224,
    resize: int | None = None,
    swag_r: int | None = None,
) -> Recipe:
    _, letter, pixels = arch.split("_")
    width, depth = _WIDTH_DEPTH[letter]
    patch, resize = int(pixels), resize or size
    tokens = (size // patch) ** 2 + 1
    swag = swag_r is not None
    what = "SWAG, fine-tuned on ImageNet-1k" if swag else "torchvision's weights, ImageNet-1k"
    return Recipe(
        name=name,
        family="torchvision_vit",
        preprocessing=Preprocessing(
            (3, size, size), _MEAN, _STD, size / resize, "bicubic" if swag else "bilinear"
        ),
        recommended_r=swag_r if swag_r is not None else recommended_r(tokens, depth),
        r_source=f"ToMe README, SWAG ViT-{letter.upper()} @ {size}" if swag else RULE,
        description=f"ViT-{letter.upper()}/{patch} at {size} pixels, {what}",
        weights_source=f"https://download.pytorch.org/models/{file}",
        licence=SWAG_LICENCE if swag else UNSTATED,
        label_set="imagenet-1k",
        loader=TorchvisionLoader(arch, tag),
        geometry=Geometry(width, depth, 4 * width, patch, head_macs=1000 * width),
    )


_PLAIN, _SWAG = "IMAGENET1K_V1", "IMAGENET1K_SWAG_E2E_V1"

TORCHVISION = (
    _recipe("torchvision_b16", "vit_b_16", _PLAIN, "vit_b_16-c867db91.pth", resize=256),
    _recipe("torchvision_b32", "vit_b_32", _PLAIN, "vit_b_32-d86f8d99.pth", resize=256),
    _recipe("torchvision_l16", "vit_l_16", _PLAIN, "vit_l_16-852ce7e3.pth", resize=242),
    _recipe("swag_b16_384", "vit_b_16", _SWAG, "vit_b_16_swag-9ac1b537.pth", size=384, swag_r=45),
    _recipe("swag_l16_512", "vit_l_16", _SWAG, "vit_l_16_swag-4f3808c9.pth", size=512, swag_r=40),
    _recipe("swag_h14_518", "vit_h_14", _SWAG, "vit_h_14_swag-80465313.pth", size=518, swag_r=40),
)
