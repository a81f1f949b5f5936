"""Recipes of LLaVA's vision towers: LLaVA-1.5's by its name, and those of checkpoint folders."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tome_export.errors import UsageError
from tome_export.models.facts import CLIP_NORM, Geometry, MergingAdvice, ModelOutput
from tome_export.models.hf.checkpoint import (
    TILES,
    attention_of,
    check_size,
    padded,
    preprocessing_of,
    processor_of,
    read_config,
    without_processor,
)
from tome_export.models.llava.config import (
    CLIP_L14_336,
    DEFAULTS,
    KNOWN,
    L14_336,
    LlavaConfig,
    Projector,
    llava_config,
    vision_arguments,
)
from tome_export.models.llava.loader import LlavaLoader
from tome_export.models.recipe import ModelSource, Recipe
from tome_export.spec import Preprocessing, TowerOptions

_UNSTATED = "not stated by the checkpoint"
_LLAVA15_WIDTH = 4096
_SHAPE = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
_R_L384 = (23, "ToMe README, ViT-L/16 @ 384, which has as many tokens")


def _recipe(
    name: str,
    config: LlavaConfig,
    description: str,
    weights: str,
    *folders: Path,
    licence: str = _UNSTATED,
) -> Recipe:
    """The tower of ``config``; ``folders`` are where its image processor may be."""
    preprocessing, remark = _preprocessing(config, folders)
    return Recipe(
        name=name,
        source=ModelSource(LlavaLoader(config), weights, licence),
        preprocessing=preprocessing,
        merging=_advice(config),
        output=ModelOutput("features"),
        family="llava",
        description="; ".join(filter(None, (description, remark))),
        geometry=_geometry(config),
        tower=config.options,
    )


def _geometry(config: LlavaConfig) -> Geometry:
    vision = config.vision
    width, mlp = vision["hidden_size"], vision["intermediate_size"]
    return Geometry(width, config.layers, mlp, vision["patch_size"])


def _advice(config: LlavaConfig) -> MergingAdvice:
    vision = config.vision
    same = all(vision[key] == L14_336[key] for key in _SHAPE)
    # The cut before the last layer is LLaVA's own; the published r is for all of them.
    if same and config.layers >= vision["num_hidden_layers"] - 1:
        return MergingAdvice(*_R_L384, needs_grid=config.needs_grid)
    r = _geometry(config).recommended_r(vision["image_size"])
    return MergingAdvice(r, needs_grid=config.needs_grid)


def _preprocessing(config: LlavaConfig, folders: tuple[Path, ...]) -> tuple[Preprocessing, str]:
    """Preprocessing as the first of some folders says, and what it leaves unsaid."""
    size = config.vision["image_size"]
    channels = config.vision.get("num_channels", 3)
    found = family = Preprocessing(
        (channels, size, size), *CLIP_NORM, 1.0, "bicubic", crop_offset="floor"
    )
    known = any(config.vision is shape for shape in KNOWN.values())
    remark = "" if known else without_processor(family)
    folder = next((folder for folder in folders if processor_of(folder)), None)
    if folder is not None:
        found, remark = preprocessing_of(folder, "clip_vision_model", family, str(folder))
        check_size(found, family, folder, str(folder))
    if config.aspect == "pad":
        found = padded(found)
    elif config.aspect == "tiles":
        # Of the tiles the first is the whole image, squashed.
        found = replace(found, resize="squash", fill=())
        remark = "; ".join(filter(None, (TILES, remark)))
    return found, remark


LLAVA15_TOWER = _recipe(
    "llava15_tower",
    LlavaConfig("", L14_336, CLIP_L14_336, DEFAULTS, Projector(2, _LLAVA15_WIDTH), aspect="pad"),
    "LLaVA-1.5's vision tower, CLIP ViT-L/14 at 336 pixels cut behind layer 23",
    f"OpenAI (CLIP); hub repository {CLIP_L14_336}",
    licence="mit",
)
"""LLaVA-1.5's tower: OpenAI's CLIP ViT-L/14 at 336 pixels, which LLaVA did not train."""


def recipe_from_llava(name: str, folder: Path, tower: TowerOptions) -> Recipe:
    """The tower of a LLaVA checkpoint; ``tower`` goes before what its ``config.json`` says."""
    config = llava_config(read_config(folder), str(folder))
    config = replace(config, options=tower.over(config.options))
    folders = [folder]
    if not config.vision:
        folders.append(config.vision_folder)
        values = read_config(folders[-1])
        vision = vision_arguments(values, config.vision_name)
        config = replace(config, vision=vision, attention=attention_of(values))
    return _recipe(name, config, f"vision tower of {folder.name}", str(folder), *folders)


def recipe_from_clip(name: str, folder: Path, tower: TowerOptions) -> Recipe:
    """A LLaVA tower cut from a checkpoint of CLIP or its vision half, which brings no projector."""
    values = read_config(folder)
    where, vision = str(folder), vision_arguments(values, str(folder))
    options, attention = tower.over(DEFAULTS), attention_of(values)
    config = LlavaConfig(where, vision, where, options, attention=attention)
    return _recipe(name, config, f"LLaVA tower cut from {folder.name}", where, folder)


def tower_from_folder(name: str, folder: Path, tower: TowerOptions) -> Recipe | None:
    """The LLaVA tower of a folder, or of CLIP's if one is asked for; None for other models."""
    values = read_config(folder)
    if "llava" in str(values.get("model_type", "")) or "mm_vision_tower" in values:
        return recipe_from_llava(name, folder, tower)
    return recipe_from_clip(name, folder, tower) if tower.kind else None


def with_tower(recipe: Recipe, tower: TowerOptions) -> Recipe:
    """The recipe of the same tower with other options; any recipe where none are given."""
    if not tower.given:
        return recipe
    loader = recipe.source.loader
    if not isinstance(loader, LlavaLoader):
        names = ", ".join(f"--{key.replace('_', '-')}" for key in tower.given)
        raise UsageError(
            f"{names.replace('--kind', '--tower')}: {recipe.name} is no vision tower; these are "
            "for llava15_tower and for hf:<folder> of a LLaVA or CLIP checkpoint"
        )
    config = replace(loader.config, options=tower.over(loader.config.options))
    config.wanted_projector(recipe.name)
    return replace(
        recipe,
        source=replace(recipe.source, loader=LlavaLoader(config)),
        merging=_advice(config),
        geometry=_geometry(config),
        tower=config.options,
    )
