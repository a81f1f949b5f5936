"""The recipes, and finding one by name."""

from __future__ import annotations

import difflib
from types import MappingProxyType

from tome_export.errors import InputError
from tome_export.models.custom import recipe_from_function
from tome_export.models.hf.recipes import HF, recipe_from_hf
from tome_export.models.hub import config_folder
from tome_export.models.llava.recipes import LLAVA15_TOWER, tower_from_folder, with_tower
from tome_export.models.open_clip.recipes import OPEN_CLIP, recipe_from_open_clip
from tome_export.models.recipe import Recipe
from tome_export.models.timm.recipes import DIGITS, TIMM, close_timm_names, recipe_from_timm
from tome_export.models.torchvision.recipes import TORCHVISION, recipe_from_torchvision
from tome_export.models.video.recipes import CLIP4CLIP, with_video
from tome_export.spec import ImageSize, TowerOptions
from tome_export.video.options import VideoOptions

_RECIPES = (*TIMM, *OPEN_CLIP, *TORCHVISION, *HF, LLAVA15_TOWER, *CLIP4CLIP, DIGITS)

_LIBRARIES = {
    "timm": recipe_from_timm,
    "open_clip": recipe_from_open_clip,
    "torchvision": recipe_from_torchvision,
}

RECIPES = MappingProxyType({recipe.name: recipe for recipe in _RECIPES})
"""Every recipe by its name, in the order to show them."""


def resolve(
    name: str,
    tower: TowerOptions | None = None,
    video: VideoOptions | None = None,
    image_size: ImageSize | None = None,
) -> Recipe:
    """Find a model.

    Args:
        name: A recipe (``vit_b16``), ``timm:<name>``, ``hf:<folder or hub name>``,
            ``open_clip:<arch>[/<weights>]``, ``torchvision:<name>[.<weights>]``, or
            ``module:function``.
        tower: What a language model takes of it; for vision towers only.
        video: Frames of one video and how they are joined; for video towers only.
        image_size: Size of the images; None for the model's own.
    """
    recipe = _find(name.strip(), tower or TowerOptions())
    recipe = with_tower(recipe, tower) if tower else recipe
    recipe = with_video(recipe, video or VideoOptions())
    return recipe if image_size is None else recipe.at(image_size)


def _find(name: str, tower: TowerOptions) -> Recipe:
    known = {alias: recipe for recipe in _RECIPES for alias in (recipe.name, *recipe.aliases)}
    if name in known:
        return known[name]
    library, colon, rest = name.partition(":")
    if library in _LIBRARIES and colon:
        return _LIBRARIES[library](rest)
    if library == "hf" and colon:
        folder = config_folder(rest)
        return tower_from_folder(name, folder, tower) or recipe_from_hf(name, rest, folder)
    if colon:
        return recipe_from_function(name)
    close = difflib.get_close_matches(name, RECIPES, n=3)
    close += [f"timm:{match}" for match in close_timm_names(name) if match not in known]
    if close:
        hint = f"did you mean {', '.join(close)}? `tome-export models` lists the recipes"
    else:
        hint = (
            "expected a recipe that `tome-export models` lists, timm:<name>, "
            "hf:<folder or hub name>, open_clip:<arch>[/<weights>], "
            "torchvision:<name>[.<weights>], or module:function"
        )
    raise InputError(f"unknown model {name!r}; {hint}")
