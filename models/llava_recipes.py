"""Recipes of LLaVA's vision towers: one with a name, and those of checkpoints. Imports no torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from tome_export.errors import InputError, UsageError
from tome_export.models.clip_config import KNOWN, L14_336, clip_arguments, clip_attention
from tome_export.models.hf_preprocess import check_size, preprocessing_of, read_processor
from tome_export.models.llava_config import (
    DEFAULTS,
    LlavaConfig,
    is_llava,
    kept_layers,
    llava_config,
    read_config,
)
from tome_export.models.llava_loader import LlavaLoader, vision_folder
from tome_export.models.recipe import RULE, Geometry, Recipe, recommended_r
from tome_export.spec import Preprocessing, TowerOptions

CLIP_NORM = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
"""Mean and standard deviation of CLIP's training images (arXiv 2103.00020's code)."""

_CLIP_L14_336 = "openai/clip-vit-large-patch14-336"
_LLAVA15_WIDTH = 4096
_SHAPE = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")


_R_L384 = (23, "ToMe README, ViT-L/16 @ 384, which has as many tokens")


def _r_of(vision: dict[str, Any], layers: int) -> tuple[int, str]:
    """Recommended r of a tower, and its source."""
    same = all(vision[key] == L14_336[key] for key in _SHAPE)
    # The cut before the last layer is LLaVA's own; the published r is for all of them.
    if same and layers >= L14_336["num_hidden_layers"] - 1:
        return _R_L384
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    return recommended_r(tokens, layers), RULE


def _family_preprocessing(vision: dict[str, Any]) -> Preprocessing:
    size = vision["image_size"]
    channels = vision.get("num_channels", 3)
    return Preprocessing((channels, size, size), *CLIP_NORM, 1.0, "bicubic")


def _preprocessing(
    config: LlavaConfig, vision: dict[str, Any], folders: list[Path]
) -> tuple[Preprocessing, str]:
    """Preprocessing as the first of some folders says, and what it leaves unsaid."""
    defaults = _family_preprocessing(vision)
    for folder in folders:
        if values := read_processor(folder):
            found, remark = preprocessing_of(values, defaults, str(folder))
            check_size(found, defaults, str(folder))
            break
    else:
        known = any(vision is shape for shape in KNOWN.values())
        found, remark = (defaults, "") if known else preprocessing_of({}, defaults, "")
    return found, config.remark or remark


def _recipe(name: str, config: LlavaConfig, vision: dict[str, Any], **more: Any) -> Recipe:
    loader = LlavaLoader(config, vision)
    r, r_source = _r_of(vision, loader.layers)
    facts: dict[str, Any] = {
        "name": name,
        "family": "llava",
        "preprocessing": _family_preprocessing(vision),
        "recommended_r": r,
        "r_source": r_source,
        "licence": "not stated by the checkpoint",
        "output_name": "features",
        "loader": loader,
        "tower": config.options,
        "needs_grid": config.needs_grid,
        "geometry": Geometry(
            width=vision["hidden_size"],
            depth=loader.layers,
            mlp=vision["intermediate_size"],
            patch=vision["patch_size"],
        ),
    }
    return Recipe(**{**facts, **more})


def llava15_tower() -> Recipe:
    """LLaVA-1.5's tower: OpenAI's CLIP ViT-L/14 at 336 pixels, which LLaVA did not train."""
    config = LlavaConfig(
        folder="",
        vision=L14_336,
        vision_name=_CLIP_L14_336,
        options=DEFAULTS,
        projector=2,
        outputs=_LLAVA15_WIDTH,
    )
    return _recipe(
        "llava15_tower",
        config,
        L14_336,
        description="LLaVA-1.5's vision tower, CLIP ViT-L/14 at 336 pixels cut behind layer 23",
        weights_source=f"OpenAI (CLIP); hub repository {_CLIP_L14_336}",
        licence="mit",
    )


def recipe_from_llava(name: str, folder: Path, tower: TowerOptions) -> Recipe:
    """The tower of a LLaVA checkpoint, in the layout of LLaVA's own code or of Transformers.

    Args:
        name: What the user called it.
        folder: The checkpoint; its ``config.json`` says which tower, and where it is cut.
        tower: Options that go before those of the configuration.

    Raises:
        InputError: if the configuration is not understood.
    """
    config = llava_config(read_config(folder), str(folder))
    config = replace(config, options=tower.over(config.options))
    vision = config.vision
    folders = [folder]
    if vision is None:
        where = vision_folder(config)
        found = read_config(where)
        vision = clip_arguments(found, config.vision_name)
        config = replace(config, attention=clip_attention(found, config.vision_name))
        folders.append(where)
    preprocessing, remark = _preprocessing(config, vision, folders)
    return _recipe(
        name,
        config,
        vision,
        preprocessing=preprocessing,
        description="; ".join(filter(None, (f"vision tower of {folder.name}", remark))),
        weights_source=str(folder),
    )


def tower_from_folder(name: str, folder: Path, tower: TowerOptions) -> Recipe | None:
    """The LLaVA tower of a checkpoint folder; None where it is a model of another kind.

    Args:
        name: What the user called it.
        folder: A checkpoint of LLaVA, or of CLIP where a tower is asked for.
        tower: Its options.

    Raises:
        InputError: if the configuration is not understood.
    """
    if not (folder / "config.json").is_file():
        return None
    if is_llava(read_config(folder)):
        return recipe_from_llava(name, folder, tower)
    return recipe_from_clip(name, folder, tower) if tower.kind else None


def recipe_from_clip(name: str, folder: Path, tower: TowerOptions) -> Recipe:
    """A LLaVA tower cut from a CLIP checkpoint, which brings no projector.

    Args:
        name: What the user called it.
        folder: The checkpoint of a CLIP model or of its vision half.
        tower: Options of the tower.

    Raises:
        InputError: if the folder holds no CLIP model.
    """
    found = read_config(folder)
    vision = clip_arguments(found, str(folder))
    config = LlavaConfig(
        folder=str(folder),
        vision=vision,
        vision_name=str(folder),
        options=tower.over(DEFAULTS),
        projector=None,
        outputs=0,
        attention=clip_attention(found, str(folder)),
    )
    preprocessing, remark = _preprocessing(config, vision, [folder])
    return _recipe(
        name,
        config,
        vision,
        preprocessing=preprocessing,
        description="; ".join(filter(None, (f"LLaVA tower cut from {folder.name}", remark))),
        weights_source=str(folder),
    )


def with_tower(recipe: Recipe, tower: TowerOptions) -> Recipe:
    """The recipe of the same tower with other options; any recipe where none are given.

    Raises:
        UsageError: if options are given for a model that is no tower.
        InputError: if the tower has no such layer, or no projector.
    """
    if not tower.given:
        return recipe
    if not isinstance(recipe.loader, LlavaLoader) or recipe.geometry is None:
        names = ", ".join(f"--{key.replace('_', '-')}" for key in tower.given)
        raise UsageError(
            f"{names.replace('--kind', '--tower')}: {recipe.name} is no vision tower; these are "
            "for llava15_tower and for hf:<folder> of a LLaVA or CLIP checkpoint"
        )
    loader = recipe.loader
    config = replace(loader.config, options=tower.over(loader.config.options))
    loader = replace(loader, config=config)
    select = config.options.select_layer
    kept = kept_layers(-2 if select is None else select, loader.vision["num_hidden_layers"])
    if config.options.projector and (config.projector is None or not config.outputs):
        raise InputError(
            f"{recipe.name} has no projector; leave --projector out, or name a LLaVA checkpoint "
            "(hf:<folder>)"
        )
    r, r_source = _r_of(loader.vision, kept)
    return replace(
        recipe,
        recommended_r=r,
        r_source=r_source,
        loader=loader,
        tower=config.options,
        geometry=replace(recipe.geometry, depth=kept),
    )
