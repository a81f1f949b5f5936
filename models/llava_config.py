"""A LLaVA checkpoint's ``config.json``: which tower, cut where, with which projector.

Two layouts are understood: that of LLaVA's own code (``mm_vision_tower`` and its siblings) and
that of Transformers (``vision_config``). Both use CLIP's vision transformer.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from tome_export.errors import InputError
from tome_export.models.clip_config import KNOWN, L14_336, vision_arguments
from tome_export.models.hf_loader import library
from tome_export.models.hf_preprocess import PADS, TILES
from tome_export.models.hf_values import (
    attention_of,
    name_at,
    object_at,
    refuse_quantised,
    whole,
)
from tome_export.spec import SELECT_FEATURES, SelectFeature, TowerOptions

STRATEGIES = {"default": "patch", "full": "cls_patch"}
"""Transformers' names of what LLaVA's own code calls patch and cls_patch."""

DEFAULTS = TowerOptions("llava", -2, "patch", False)
"""LLaVA-1.5's, without the projector."""


@dataclass(frozen=True)
class LlavaConfig:
    """What a checkpoint's configuration says of its tower.

    Attributes:
        folder: The checkpoint; empty for ``llava15_tower``.
        vision: Arguments of ``CLIPVisionConfig``; None where they are those of ``vision_name``.
        vision_name: Folder or hub name of the CLIP model, for weights that are not in ``folder``.
        options: Selected layer and feature; the projector is left out unless asked for.
        projector: Linear layers of the projector; None if it has none.
        outputs: Width of the language model.
        bias: Whether the projector's layers have one.
        needs_grid: Why the language model needs every patch; empty if it does not.
        bare: Whether the projector is one layer by itself, see ``llava.Projector``.
        attention: The tower's attention implementation; None where none is named.
        remark: What its preprocessing does that is not done here; empty if nothing.
    """

    folder: str
    vision: dict[str, Any] | None
    vision_name: str
    options: TowerOptions
    projector: int | None
    outputs: int
    bias: bool = True
    needs_grid: str = ""
    bare: bool = False
    attention: str | None = None
    remark: str = ""


def is_llava(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a LLaVA checkpoint, in either layout."""
    return "llava" in str(config.get("model_type", "")) or "mm_vision_tower" in config


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``.

    Raises:
        InputError: if it is not there, or not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(
            f"folder {folder} has no config.json; expected a checkpoint folder as it is on the hub"
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not JSON ({error}); get the checkpoint again") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds a {type(found).__name__}; expected a JSON object")
    return found


def llava_config(config: dict[str, Any], folder: str) -> LlavaConfig:
    """Read the configuration of a LLaVA checkpoint.

    Args:
        config: Content of its ``config.json``.
        folder: The checkpoint's folder.

    Raises:
        InputError: if its tower or projector is of a kind that is not supported, or quantised.
    """
    refuse_quantised(config, folder)
    if "mm_vision_tower" in config or "mm_projector_type" in config:
        return _official(config, folder)
    if "vision_config" in config:
        return _transformers(config, folder)
    raise InputError(
        f"config.json of {folder} names no vision tower; expected mm_vision_tower (LLaVA's own "
        "layout) or vision_config (that of Transformers)"
    )


def _official(config: dict[str, Any], folder: str) -> LlavaConfig:
    name = config.get("mm_vision_tower")
    if not isinstance(name, str) or not name:
        raise InputError(
            f"config.json of {folder}: mm_vision_tower is {name!r}; expected the folder or hub "
            "name of a CLIP model"
        )
    if config.get("s2") or config.get("mm_s2"):
        raise InputError(
            f"config.json of {folder} asks for S2 (several scales joined on a grid), which merged "
            "tokens cannot give; not supported"
        )
    kind = config.get("mm_projector_type", "linear")
    mlp = re.fullmatch(r"mlp([1-9]\d?)x_gelu", str(kind))
    layers = {"linear": 1, "identity": 0}.get(str(kind), int(mlp[1]) if mlp else None)
    if layers is None:
        raise InputError(
            f"config.json of {folder}: mm_projector_type is {kind!r}; supported: mlp<N>x_gelu "
            "with N from 1 to 99, linear, identity"
        )
    aspect = str(config.get("image_aspect_ratio") or "")
    form = str(config.get("mm_patch_merge_type") or "flat")
    why = ""
    if "anyres" in aspect or form.startswith("spatial"):
        key = "image_aspect_ratio" if "anyres" in aspect else "mm_patch_merge_type"
        why = f"{key} of {folder} is {config[key]!r}"
    options = TowerOptions(
        select_layer=_layer(config.get("mm_vision_select_layer", -2), "mm_vision_select_layer"),
        select_feature=_feature(config.get("mm_vision_select_feature", "patch"), folder),
    )
    # The identity hands on the tower's own width, whatever the language model's is.
    key = "hidden_size" if layers else "mm_hidden_size"
    outputs = config.get(key)
    if outputs is not None:
        outputs = whole(outputs, f"config.json of {folder}: {key}")
    return LlavaConfig(
        folder=folder,
        vision=KNOWN.get(name),
        vision_name=name,
        options=options.over(DEFAULTS),
        projector=layers,
        outputs=outputs or 0,
        needs_grid=why,
        bare=kind == "linear",
        remark=TILES if "anyres" in aspect else PADS if aspect == "pad" else "",
    )


def _transformers(config: dict[str, Any], folder: str) -> LlavaConfig:
    model_type = config.get("model_type")
    if model_type not in ("llava", "llava_next"):
        raise InputError(
            f"model type {model_type!r} of {folder} is not supported; supported: llava and "
            "llava_next of Transformers, and LLaVA's own layout with mm_vision_tower"
        )
    vision = object_at(config, "vision_config", folder)
    kind = vision.get("model_type", "clip_vision_model")
    if kind != "clip_vision_model":
        raise InputError(
            f"vision tower {kind!r} of {folder} is not supported; supported: clip_vision_model"
        )
    activation = config.get("projector_hidden_act", "gelu")
    if activation != "gelu":
        raise InputError(f"projector_hidden_act of {folder} is {activation!r}; supported: gelu")
    strategy = name_at(config, "vision_feature_select_strategy", folder, "default")
    tiles = model_type == "llava_next"
    why = f"model type of {folder} is llava_next (anyres)" if tiles else ""
    options = TowerOptions(
        select_layer=_layer(config.get("vision_feature_layer", -2), "vision_feature_layer"),
        select_feature=_feature(STRATEGIES.get(strategy, strategy), folder),
    )
    return LlavaConfig(
        folder=folder,
        vision=vision_arguments(vision, folder) if vision else L14_336,
        vision_name=folder,
        options=options.over(DEFAULTS),
        projector=2,
        outputs=_text_width(object_at(config, "text_config", folder), folder),
        bias=bool(config.get("multimodal_projector_bias", True)),
        needs_grid=why,
        attention=attention_of(vision, config),
        remark=TILES if tiles else "",
    )


def _text_width(text: dict[str, Any], folder: str) -> int:
    """Width of the language model; its configuration leaves out what is the default."""
    if text.get("hidden_size") is not None:
        return whole(text["hidden_size"], f"config.json of {folder}: hidden_size of text_config")
    kind = name_at(text, "model_type", folder, "llama")
    try:
        return int(library().AutoConfig.for_model(kind).hidden_size)
    except (ValueError, AttributeError):
        raise InputError(
            f"config.json of {folder} does not say how wide its language model ({kind!r}) is; "
            "expected text_config.hidden_size"
        ) from None


def _layer(value: object, key: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(
            f"{key} is {value!r}; expected one whole number (features of several layers are not "
            "supported)"
        )
    return value


def _feature(value: object, folder: str) -> SelectFeature:
    if value not in SELECT_FEATURES:
        raise InputError(
            f"selected feature of {folder} is {value!r}; expected "
            f"{' or '.join(SELECT_FEATURES)} (Transformers: {' or '.join(STRATEGIES)})"
        )
    return cast(SelectFeature, value)


def kept_layers(select_layer: int, depth: int) -> int:
    """How many layers lead to a hidden state.

    Args:
        select_layer: See ``TowerOptions``.
        depth: Layers of the whole model.

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
