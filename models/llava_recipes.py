"""LLaVA's vision towers: what a checkpoint says of its own, making it, and recipes.

Two layouts of ``config.json`` are understood: that of LLaVA's own code (``mm_vision_tower`` and its
siblings) and that of Transformers (``vision_config``). Both use CLIP's vision transformer. Of the
weights only the tower's and its projector's tensors are read, never the language model's. Imports
no torch by itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError, UsageError
from tome_export.models.hf_checkpoint import (
    PADS,
    SQUASHES,
    TILES,
    attention_of,
    check_size,
    preprocessing_of,
    processor_of,
    quiet,
    read_config,
    refuse_quantised,
    vision_config,
    whole,
    without_processor,
)
from tome_export.models.hub import snapshot
from tome_export.models.loading import loaded, random_model, refuse_depth
from tome_export.models.recipe import (
    CLIP_NORM,
    RULE,
    Geometry,
    LoadedModel,
    Recipe,
    WeightsInfo,
    recommended_r,
)
from tome_export.spec import SELECT_FEATURES, Preprocessing, SelectFeature, TowerOptions
from tome_export.weights.files import (
    Checkpoint,
    check_finite,
    check_fit,
    check_stored,
    read_checkpoint,
    sha256,
    stored_dtype,
)
from tome_export.weights.shards import tensors_from_folder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from tome_export.models.llava import LlavaTower, Projector

    State = dict[str, Tensor]

L14_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 336,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""OpenAI's CLIP ViT-L/14 at 336 pixels, as its configuration says."""

_CLIP_L14_336 = "openai/clip-vit-large-patch14-336"
KNOWN = {
    _CLIP_L14_336: L14_336,
    "openai/clip-vit-large-patch14": L14_336 | {"image_size": 224},
}
"""Vision towers by their names on the hub: their shape needs no download."""

STRATEGIES = {"default": "patch", "full": "cls_patch"}
"""Transformers' names of what LLaVA's own code calls patch and cls_patch."""

DEFAULTS = TowerOptions("llava", -2, "patch", False)
"""LLaVA-1.5's, without the projector."""

_LLAVA15_WIDTH = 4096
_SHAPE = ("hidden_size", "num_hidden_layers", "patch_size", "image_size")
_R_L384 = (23, "ToMe README, ViT-L/16 @ 384, which has as many tokens")

_VISION = re.compile(
    r"(?:model\.)?(?:(?:vision_tower\.){1,2}(?:vision_model\.)?|vision_model\.)(.+)"
    r"|((?:embeddings|pre_layrnorm|encoder)\..+)"
)
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.")
_PROJECTOR = re.compile(r"(?:model\.)?mm_projector\.(.+)")
_OURS = re.compile(r"(?:model\.)?multi_modal_projector\.(.+)")
_LINEAR = re.compile(r"linear_([1-9])\.(.+)")


@dataclass(frozen=True)
class LlavaConfig:
    """What a checkpoint's configuration says of its tower.

    Attributes:
        folder: The checkpoint; empty for ``llava15_tower``.
        vision: Arguments of ``CLIPVisionConfig``; empty where ``vision_name`` has yet to say.
        vision_name: Folder or hub name of the CLIP model, for weights that are not in ``folder``.
        options: Selected layer and feature; the projector is left out unless asked for.
        projector: Linear layers of the projector; None if it has none.
        outputs: Width of the language model.
        bias: Whether the projector's layers have one.
        needs_grid: Why the language model needs every patch; empty if it does not.
        bare: Whether the projector is one layer by itself, see ``llava.Projector``.
        attention: The tower's attention implementation.
        remark: What its preprocessing does that is not done here; empty if nothing.
    """

    folder: str
    vision: dict[str, Any]
    vision_name: str
    options: TowerOptions
    projector: int | None
    outputs: int
    bias: bool = True
    needs_grid: str = ""
    bare: bool = False
    attention: str = "sdpa"
    remark: str = ""

    @property
    def layers(self) -> int:
        """Layers up to the selected one."""
        select = self.options.select_layer
        return kept_layers(-2 if select is None else select, self.vision["num_hidden_layers"])


def kept_layers(select_layer: int, depth: int) -> int:
    """How many layers of ``depth`` lead to a hidden state; see ``TowerOptions.select_layer``.

    Raises:
        InputError: if the model has no such hidden state, or it comes before the first layer.
    """
    kept = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 1 <= kept <= depth:
        raise InputError(
            f"select layer is {select_layer} of a tower of {depth} layers; expected 1 to {depth}, "
            f"or -1 to -{depth}"
        )
    return kept


def llava_config(values: dict[str, Any], folder: str) -> LlavaConfig:
    """Read the ``config.json`` of a LLaVA checkpoint in ``folder``.

    Raises:
        InputError: if its tower or projector is of a kind that is not supported, or quantised.
    """
    refuse_quantised(values, folder)
    if "mm_vision_tower" in values or "mm_projector_type" in values:
        return _official(values, folder)
    if "vision_config" in values:
        return _transformers(values, folder)
    raise InputError(
        f"config.json of {folder} names no vision tower; expected mm_vision_tower (LLaVA's own "
        "layout) or vision_config (that of Transformers)"
    )


def _official(values: dict[str, Any], folder: str) -> LlavaConfig:
    name = values.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"config.json of {folder}: mm_vision_tower is {name!r}; expected the folder or hub "
            "name of a CLIP model"
        )
    if values.get("s2") or values.get("mm_s2"):
        raise InputError(
            f"config.json of {folder} asks for S2 (several scales joined on a grid), which merged "
            "tokens cannot give; not supported"
        )
    kind = str(values.get("mm_projector_type", "linear"))
    mlp = re.fullmatch(r"mlp([1-9]\d?)x_gelu", kind)
    layers = {"linear": 1, "identity": 0}.get(kind, int(mlp[1]) if mlp else None)
    if layers is None:
        raise InputError(
            f"config.json of {folder}: mm_projector_type is {kind!r}; supported: mlp<N>x_gelu "
            "with N from 1 to 99, linear, identity"
        )
    aspect = str(values.get("image_aspect_ratio") or "")
    spatial = str(values.get("mm_patch_merge_type") or "flat").startswith("spatial")
    grid = "image_aspect_ratio" if "anyres" in aspect else spatial and "mm_patch_merge_type"
    options = TowerOptions(
        select_layer=_layer(values, "mm_vision_select_layer"),
        select_feature=_feature(values.get("mm_vision_select_feature", "patch"), folder),
    )
    # The identity hands on the tower's own width, whatever the language model's is.
    key = "hidden_size" if layers else "mm_hidden_size"
    width = values.get(key)
    return LlavaConfig(
        folder=folder,
        vision=KNOWN.get(name, {}),
        vision_name=name,
        options=options.over(DEFAULTS),
        projector=layers,
        outputs=0 if width is None else whole(width, f"config.json of {folder}: {key}"),
        needs_grid=f"{grid} of {folder} is {values[grid]!r}" if grid else "",
        bare=kind == "linear",
        remark=TILES if "anyres" in aspect else PADS if aspect == "pad" else "",
    )


def _transformers(values: dict[str, Any], folder: str) -> LlavaConfig:
    model_type = values.get("model_type")
    if model_type not in ("llava", "llava_next"):
        raise InputError(
            f"model type {model_type!r} of {folder} is not supported; supported: llava and "
            "llava_next of Transformers, and LLaVA's own layout with mm_vision_tower"
        )
    vision, text = (_object(values, key, folder) for key in ("vision_config", "text_config"))
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise InputError(
            f"vision tower {kind!r} of {folder} is not supported; supported: clip_vision_model"
        )
    activation = values.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise InputError(f"projector_hidden_act of {folder} is {activation!r}; supported: gelu")
    strategy = values.get("vision_feature_select_strategy", "default")
    known = STRATEGIES.get(strategy, strategy) if isinstance(strategy, str) else strategy
    options = TowerOptions(
        select_layer=_layer(values, "vision_feature_layer"),
        select_feature=_feature(known, folder),
    )
    tiles = model_type == "llava_next"
    return LlavaConfig(
        folder=folder,
        vision=_clip_arguments({"model_type": kind, **vision}, folder) if vision else L14_336,
        vision_name=folder,
        options=options.over(DEFAULTS),
        projector=2,
        outputs=_text_width(text, folder),
        bias=bool(values.get("multimodal_projector_bias", True)),
        needs_grid=f"model type of {folder} is llava_next (anyres)" if tiles else "",
        attention=attention_of(values),
        remark=TILES if tiles else "",
    )


def _object(values: dict[str, Any], key: str, folder: str) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"config.json of {folder}: {key} is {found!r}; expected a JSON object")
    return found


def _clip_arguments(values: dict[str, Any], name: str) -> dict[str, Any]:
    """What shapes the vision transformer of a CLIP model, the library's defaults filled in."""
    refuse_quantised(values, name)
    kind = values.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(
            f"vision tower {name} is a {kind!r} model; a LLaVA tower is cut from clip or "
            "clip_vision_model"
        )
    config = vision_config(values, name)
    return {key: getattr(config, key) for key in (*L14_336, "num_channels")}


def _text_width(text: dict[str, Any], folder: str) -> int:
    """Width of the language model; its configuration leaves out what is the default."""
    if text.get("hidden_size") is not None:
        return whole(text["hidden_size"], f"config.json of {folder}: hidden_size of text_config")
    kind = text.get("model_type") or "llama"
    with quiet() as transformers:
        try:
            return int(transformers.AutoConfig.for_model(kind).hidden_size)
        except (ValueError, AttributeError):
            raise InputError(
                f"config.json of {folder} does not say how wide its language model ({kind!r}) is; "
                "expected text_config.hidden_size"
            ) from None


def _layer(values: dict[str, Any], key: str) -> int:
    value = values.get(key, -2)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(
            f"{key} is {value!r}; expected one whole number (features of several layers are not "
            "supported)"
        )
    return value


def _feature(value: object, folder: str) -> SelectFeature:
    for feature in SELECT_FEATURES:
        if value == feature:
            return feature
    raise InputError(
        f"selected feature of {folder} is {value!r}; expected {' or '.join(SELECT_FEATURES)} "
        f"(Transformers: {' or '.join(STRATEGIES)})"
    )


def tower_key(key: str, layers: int, projector: bool) -> str | None:
    """The tower's name of a checkpoint's tensor, in any layout; None for what is no part of it.

    What is stored among the tower's tensors has a name here even if the tower has no place for it,
    so that it is not passed over. Layers behind the first ``layers`` are cut off.
    """
    if vision := _VISION.fullmatch(key):
        name = vision[1] or vision[2]
        layer = _LAYER.match(name)
        behind = name.startswith("post_layernorm.") or (
            layer is not None and int(layer[1]) >= layers
        )
        # A buffer that older versions of the library saved.
        skip = behind or name == "embeddings.position_ids"
        return None if skip else f"vision_model.{name}"
    if projector and (official := _PROJECTOR.fullmatch(key)):
        return f"mm_projector.{official[1]}"
    if projector and (ours := _OURS.fullmatch(key)):
        linear = _LINEAR.fullmatch(ours[1])
        return f"mm_projector.{f'{2 * int(linear[1]) - 2}.{linear[2]}' if linear else ours[1]}"
    return None


@dataclass(frozen=True)
class LlavaLoader:
    """Makes the tower of one checkpoint; see ``Loader``.

    Attributes:
        config: What the checkpoint says, with the tower's options as they are wanted.
    """

    config: LlavaConfig

    def load(self, recipe: Recipe, weights: str, seed: int, depth: int | None) -> LoadedModel:
        """Make the tower; see ``Recipe.load``."""
        if weights == "random":
            return random_model(recipe, seed, lambda: self._tower(depth))
        refuse_depth(depth)
        module: Any = self.architecture()
        if weights == "pretrained":
            state, info = self._state()
        else:
            state, info = self._from_file(read_checkpoint(Path(weights), recipe.weights_key))
        who = f"weights of {info.source}"
        check_stored(state, who)
        check_fit(
            state,
            module.state_dict(),
            f"{who} do not fit its config.json",
            "the whole checkpoint of this architecture",
        )
        check_finite(state, f"{who} have")
        stored = stored_dtype(state.values())
        # One tensor at a time, so that no more than one is there in both types.
        ready = {key: state.pop(key).float() for key in list(state)}
        module.load_state_dict(ready, strict=True, assign=True)
        module.place_constants()
        return loaded(module, recipe, replace(info, stored_dtype=stored))

    def architecture(self, recipe: Recipe | None = None) -> nn.Module:  # noqa: ARG002
        """The tower without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self._tower()

    def _tower(self, depth: int | None = None) -> LlavaTower:
        from tome_export.models.llava import LlavaTower
        from tome_export.patch.hf.base import check_attention

        config = self.config
        check_attention(config.attention, config.folder or config.vision_name)
        feature = config.options.select_feature or "patch"
        layers = depth or config.layers
        return LlavaTower(config.vision, layers, feature, self._projector(), config.attention)

    def _projector(self) -> Projector | None:
        from tome_export.models.llava import Projector

        config = self.config
        if not config.options.projector:
            return None
        check_projector(config, config.folder or config.vision_name)
        inputs = config.vision["hidden_size"]
        return Projector(config.projector or 0, inputs, config.outputs, config.bias, config.bare)

    def _rename(self, key: str) -> str | None:
        return tower_key(key, self.config.layers, bool(self.config.options.projector))

    def _from_file(self, file: Checkpoint) -> tuple[State, WeightsInfo]:
        state = {new: value for key, value in file.state.items() if (new := self._rename(key))}
        return state, WeightsInfo("file", file.source, sha256(file.path), key=file.key)

    def _state(self) -> tuple[State, WeightsInfo]:
        """The tensors of the checkpoint, and of the CLIP model where it leaves those out."""
        config = self.config
        if config.options.projector and not config.folder:
            raise InputError(
                f"the projector is not in {config.vision_name}, which has the tower only; "
                "name a LLaVA checkpoint (hf:<folder>), or leave --projector out"
            )
        state: State = {}
        sources: list[str] = []
        if config.folder:
            folder = Path(config.folder)
            state, names = tensors_from_folder(folder, self._rename)
            sources = [f"{folder.name}/{name}" for name in names]
        if not any(key.startswith("vision_model.") for key in state):
            folder = vision_folder(config)
            more, names = tensors_from_folder(folder, self._rename)
            state = more | state
            sources += [f"{folder.name}/{name}" for name in names]
        # No digest of the files: they are the whole language model, and the artifact keeps that
        # of the tensors.
        return state, WeightsInfo("pretrained", ", ".join(sources) or config.folder)


def check_projector(config: LlavaConfig, name: str) -> None:
    """Raise an ``InputError`` that names the model where it has no projector."""
    if config.projector is None or not config.outputs:
        raise InputError(
            f"{name} has no projector; leave --projector out, or name a LLaVA checkpoint "
            "(hf:<folder>)"
        )


def vision_folder(config: LlavaConfig) -> Path:
    """The folder of the CLIP model that a checkpoint names, from the hub if it must be."""
    name = config.vision_name
    places = (Path(name), Path(config.folder) / name)
    return next((place for place in places if place.is_dir()), None) or snapshot(name)


def _r_of(config: LlavaConfig) -> tuple[int, str]:
    """Recommended r of a tower, and its source."""
    vision = config.vision
    same = all(vision[key] == L14_336[key] for key in _SHAPE)
    # The cut before the last layer is LLaVA's own; the published r is for all of them.
    if same and config.layers >= vision["num_hidden_layers"] - 1:
        return _R_L384
    tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    return recommended_r(tokens, config.layers), RULE


def _preprocessing(config: LlavaConfig, folders: list[Path]) -> tuple[Preprocessing, str]:
    """Preprocessing as the first of some folders says, and what it leaves unsaid."""
    size = config.vision["image_size"]
    channels = config.vision.get("num_channels", 3)
    found = family = Preprocessing((channels, size, size), *CLIP_NORM, 1.0, "bicubic")
    remark = (
        "" if any(config.vision is shape for shape in KNOWN.values()) else without_processor(family)
    )
    folder = next((folder for folder in folders if processor_of(folder)), None)
    if folder is not None:
        found, remark = preprocessing_of(folder, "clip_vision_model", family, str(folder))
        check_size(found, family, folder, str(folder))
    if config.remark:  # it says of the shape what holds, and the other file need not agree
        remark = remark.removeprefix(PADS).removeprefix(SQUASHES).removeprefix("; ")
    return found, "; ".join(filter(None, (config.remark, remark)))


def _recipe(
    name: str,
    config: LlavaConfig,
    description: str,
    weights_source: str,
    *folders: Path,
    licence: str = "not stated by the checkpoint",
) -> Recipe:
    r, r_source = _r_of(config)
    preprocessing, remark = _preprocessing(config, list(folders))
    return Recipe(
        name=name,
        family="llava",
        preprocessing=preprocessing,
        recommended_r=r,
        r_source=r_source,
        output_name="features",
        description="; ".join(filter(None, (description, remark))),
        weights_source=weights_source,
        licence=licence,
        loader=LlavaLoader(config),
        tower=config.options,
        needs_grid=config.needs_grid,
        geometry=Geometry(
            width=config.vision["hidden_size"],
            depth=config.layers,
            mlp=config.vision["intermediate_size"],
            patch=config.vision["patch_size"],
        ),
    )


def llava15_tower() -> Recipe:
    """LLaVA-1.5's tower: OpenAI's CLIP ViT-L/14 at 336 pixels, which LLaVA did not train."""
    return _recipe(
        "llava15_tower",
        LlavaConfig("", L14_336, _CLIP_L14_336, DEFAULTS, 2, _LLAVA15_WIDTH),
        "LLaVA-1.5's vision tower, CLIP ViT-L/14 at 336 pixels cut behind layer 23",
        f"OpenAI (CLIP); hub repository {_CLIP_L14_336}",
        licence="mit",
    )


def recipe_from_llava(name: str, folder: Path, tower: TowerOptions) -> Recipe:
    """The tower of a LLaVA checkpoint; ``tower`` goes before what its ``config.json`` says.

    Raises:
        InputError: if the configuration is not understood.
    """
    config = llava_config(read_config(folder), str(folder))
    config = replace(config, options=tower.over(config.options))
    folders = [folder]
    if not config.vision:
        folders.append(vision_folder(config))
        values = read_config(folders[-1])
        vision = _clip_arguments(values, config.vision_name)
        config = replace(config, vision=vision, attention=attention_of(values))
    return _recipe(name, config, f"vision tower of {folder.name}", str(folder), *folders)


def recipe_from_clip(name: str, folder: Path, tower: TowerOptions) -> Recipe:
    """A LLaVA tower cut from a checkpoint of CLIP or its vision half, which brings no projector.

    Raises:
        InputError: if the folder holds no CLIP model.
    """
    values = read_config(folder)
    config = LlavaConfig(
        folder=str(folder),
        vision=_clip_arguments(values, str(folder)),
        vision_name=str(folder),
        options=tower.over(DEFAULTS),
        projector=None,
        outputs=0,
        attention=attention_of(values),
    )
    return _recipe(name, config, f"LLaVA tower cut from {folder.name}", str(folder), folder)


def tower_from_folder(name: str, folder: Path, tower: TowerOptions) -> Recipe | None:
    """The LLaVA tower of a folder, or of CLIP's if one is asked for; None for other models.

    Raises:
        InputError: if the configuration is not understood.
    """
    values = read_config(folder)
    if "llava" in str(values.get("model_type", "")) or "mm_vision_tower" in values:
        return recipe_from_llava(name, folder, tower)
    return recipe_from_clip(name, folder, tower) if tower.kind else None


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
    config = recipe.loader.config
    config = replace(config, options=tower.over(config.options))
    r, r_source = _r_of(config)
    if config.options.projector:
        check_projector(config, recipe.name)
    return replace(
        recipe,
        recommended_r=r,
        r_source=r_source,
        loader=LlavaLoader(config),
        tower=config.options,
        geometry=replace(recipe.geometry, depth=config.layers),
    )
