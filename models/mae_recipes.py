"""Recipes of MAE's ViTs, pretrained without labels.

Proportional attention is off: off-the-shelf MAE weights do worse with it (ToMe, section 4.2). The
features are the class token's. A fine-tuned classifier in the layout of MAE's authors (``fc_norm``
and ``head``) is given with ``--weights``; it pools the mean of all patches, weighted by size.
"""

from __future__ import annotations

from tome_export.models.recipe import RULE, Geometry, Recipe, recommended_r
from tome_export.spec import Preprocessing

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _recipe(
    name: str, arch: str, width: int, depth: int, patch: int, trained_r: int | None = None
) -> Recipe:
    tokens = (224 // patch) ** 2 + 1
    timm_name = f"{arch}.mae"
    return Recipe(
        name=name,
        timm_name=timm_name,
        preprocessing=Preprocessing((3, 224, 224), _MEAN, _STD, 0.9, "bicubic"),
        recommended_r=trained_r or recommended_r(tokens, depth),
        r_source="ToMe README, MAE ViT-L/16 trained" if trained_r else RULE,
        prop_attn=False,
        output_name="features",
        description=f"MAE ViT-{name[4].upper()}/{patch}; features, or a fine-tuned classifier",
        weights_source=f"Meta Research (MAE); hub repository timm/{timm_name}",
        licence="cc-by-nc-4.0",
        label_set="imagenet-1k",
        geometry=Geometry(width, depth, 4 * width, patch),
    )


MAE = (
    _recipe("mae_b16", "vit_base_patch16_224", 768, 12, 16),
    _recipe("mae_l16", "vit_large_patch16_224", 1024, 24, 16, trained_r=8),
    _recipe("mae_h14", "vit_huge_patch14_224", 1280, 32, 14),
)
