"""``tome-export models``: the recipes and what merging does to each, without torch for the list."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tome_export.merge.macs import BlockCost, SharedCost, total_macs
from tome_export.merge.schedule import LayerTokens, Schedule, clip_tokens, unmerged_end
from tome_export.models.recipe import Geometry

if TYPE_CHECKING:
    from tome_export.models import Recipe
    from tome_export.spec import TowerOptions

WIDTH_DEPTH = {"tiny": (192, 12), "small": (384, 12), "base": (768, 12), "large": (1024, 24)}
"""Width and depth by the name of the size (ViT, arXiv 2010.11929, table 1; DeiT, table 1)."""


@dataclass(frozen=True)
class Sizes:
    """What token counts and MACs of a model follow from.

    Attributes:
        tokens: Tokens that enter the first block, prefix tokens included.
        prefix: Class, distillation and register tokens.
        depth: Number of blocks.
        macs: Multiply-accumulates per image, unmerged.
        macs_merged: The same with the recommended r.
        layers: Token counts with the recommended r.
    """

    tokens: int
    prefix: int
    depth: int
    macs: int
    macs_merged: int
    layers: tuple[LayerTokens, ...]


def catalog() -> list[dict[str, Any]]:
    """Every recipe in one row: name, model, sizes, recommended r and what it saves."""
    from tome_export.models import RECIPES

    return [_row(recipe, sizes_from_name(recipe)) for recipe in RECIPES.values()]


def details(name: str) -> dict[str, Any]:
    """All about one model; a name that is not a recipe's is built, without weights, to be counted.

    Raises:
        InputError: if there is no such model, or it cannot be patched.
    """
    from tome_export.models import RECIPES, resolve

    recipe = resolve(name)
    known = recipe.name in RECIPES
    sizes = sizes_from_name(recipe) if known else sizes_from_model(recipe)
    return {
        **_row(recipe, sizes),
        "aliases": list(recipe.aliases),
        "prop_attn": recipe.prop_attn,
        "recommended_r_source": recipe.r_source,
        "layers": [asdict(layer) for layer in sizes.layers],
        "preprocessing": asdict(recipe.preprocessing),
        "weights": recipe.weights_source,
        "licence": recipe.licence,
    }


def recommended_r(name: str, tower: TowerOptions | None = None) -> int:
    """Tokens to merge per layer where the user names no r.

    Args:
        name: Of the model.
        tower: Options of a vision tower, which may have fewer layers for them.

    Raises:
        InputError: if there is no such model.
    """
    from tome_export.models import resolve

    return int(resolve(name, tower).recommended_r)


def _row(recipe: Recipe, sizes: Sizes) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "timm_name": recipe.timm_name,
        "input_size": list(recipe.preprocessing.input_size),
        "tokens": sizes.tokens,
        "prefix": sizes.prefix,
        "depth": sizes.depth,
        "macs": sizes.macs,
        "recommended_r": recipe.recommended_r,
        "macs_merged": sizes.macs_merged,
        "macs_ratio": sizes.macs / sizes.macs_merged,
        "output": recipe.output_name,
        "family": recipe.family,
        "description": recipe.description,
    }


def sizes_from_name(recipe: Recipe) -> Sizes:
    """Sizes of a recipe, from the conventions of timm's names: needs neither torch nor timm.

    Args:
        recipe: One of ``RECIPES``; its ``timm_kwargs`` count before the name.
    """
    if recipe.geometry is not None:
        return _sizes(recipe, recipe.geometry)
    given = dict(recipe.timm_kwargs)
    arch = recipe.timm_name.partition(".")[0]
    size = re.search("|".join(WIDTH_DEPTH), arch)
    patches = re.search(r"_patch(\d+)", arch)
    if size is None or patches is None:
        raise ValueError(f"{arch!r} does not follow timm's names <size>_patch<pixels>")
    width, depth = WIDTH_DEPTH[size[0]]
    width, depth = given.get("embed_dim", width), given.get("depth", depth)
    pixels = given.get("patch_size", int(patches[1]))
    registers = re.search(r"_reg(\d+)", arch)
    heads = 2 if "_distilled_" in arch else 1
    prefix = heads + (int(registers[1]) if registers else 0)
    classes = given.get("num_classes", 1000) if recipe.output_name == "logits" else 0
    head = heads * width * classes
    return _sizes(recipe, Geometry(width, depth, 4 * width, pixels, prefix, head))


def _sizes(recipe: Recipe, geometry: Geometry) -> Sizes:
    channels, height, image_width = recipe.preprocessing.input_size
    width, depth, patch = geometry.width, geometry.depth, geometry.patch
    grid = (height // patch) * (image_width // patch)
    fixed = grid * width * channels * patch**2 + geometry.head_macs
    # Projections of q, k, v and output; scores and values; an MLP of two matrices.
    costs = 4 * width**2, 2 * width, 2 * width * geometry.mlp
    each: list[BlockCost] = [BlockCost(*costs)] * depth
    if geometry.shared:
        shared = SharedCost(*costs, geometry.shared)
        each = [*[shared] * (depth - 1), replace(shared, last=True)]
    tokens = grid + geometry.prefix
    schedule = Schedule(recipe.recommended_r)
    layers: tuple[LayerTokens, ...] = schedule.tokens(depth, tokens, geometry.prefix)
    plain: tuple[LayerTokens, ...] = (LayerTokens(tokens, 0, tokens),) * depth
    if recipe.video is not None and recipe.video.frames is not None:
        frames, merging = recipe.video.frames, recipe.video.merging
        clips = clip_tokens(schedule.resolve(depth), merging, frames, tokens, geometry.prefix)
        layers = unmerged_end(clips) if geometry.shared else clips
        plain = clip_tokens((0,) * depth, None, frames, tokens, geometry.prefix)
        fixed = frames * fixed + geometry.video_macs

    def total(counted: tuple[LayerTokens, ...]) -> int:
        last = counted[-1].tokens_out * geometry.token_macs
        return total_macs(each, counted, fixed + last)

    return Sizes(plain[0].total_in, geometry.prefix, depth, total(plain), total(layers), layers)


def sizes_from_model(recipe: Recipe) -> Sizes:
    """Sizes of any model, counted on its architecture without memory for its weights.

    Raises:
        InputError: if the model cannot be patched.
    """
    from tome_export.models.timm_models import architecture
    from tome_export.patch import patch

    schedule = Schedule(recipe.recommended_r)
    model = patch(architecture(recipe), schedule, dense=recipe.dense_only)
    tokens = model.layers[0].total_in if model.layers else model.prefix
    return Sizes(
        tokens=tokens,
        prefix=model.prefix,
        depth=len(model.layers),
        macs=model.macs(merged=False),
        macs_merged=model.macs(),
        layers=model.layers,
    )
