"""What a LLaVA checkpoint's ``config.json`` says of its vision tower. Imports no torch.

Two layouts are understood: that of LLaVA's own code (``mm_vision_tower`` and its siblings) and that
of Transformers (``vision_config``). Both use CLIP's vision transformer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tome_export.errors import InputError
from tome_export.models.hf.checkpoint import (
    attention_of,
    quiet,
    refuse_quantised,
    vision_config,
    whole,
)
from tome_export.models.hf.recipes import CLIP_L14, clip_arguments
from tome_export.models.hub import weights_folder
from tome_export.spec import SELECT_FEATURES, TowerOptions

L14_336 = clip_arguments(CLIP_L14, 336) | {"layer_norm_eps": 1e-5}
"""OpenAI's CLIP ViT-L/14 at 336 pixels, as its configuration says."""

CLIP_L14_336 = "openai/clip-vit-large-patch14-336"
KNOWN = {
    CLIP_L14_336: L14_336,
    "openai/clip-vit-large-patch14": L14_336 | {"image_size": 224},
}
"""Vision towers by their names on the hub: their shape needs no download."""

STRATEGIES = {"default": "patch", "full": "cls_patch"}
"""Transformers' names of what LLaVA's own code calls patch and cls_patch."""

DEFAULTS = TowerOptions("llava", -2, "patch", False)
"""LLaVA-1.5's, without the projector."""


@dataclass(frozen=True)
class Projector:
    """Shape of a LLaVA projector, from the tower's width to the language model's.

    Attributes:
        layers: Linear layers, with GELU between them; 0 for the identity.
        outputs: Width of the language model's tokens; 0 where the configuration does not say.
        bias: Whether the linear layers have one.
        bare: Whether a single layer's keys are ``weight`` and ``bias``, not ``0.weight``.
    """

    layers: int
    outputs: int
    bias: bool = True
    bare: bool = False


@dataclass(frozen=True)
class LlavaConfig:
    """What a checkpoint's configuration says of its tower.

    Attributes:
        folder: The checkpoint; empty for ``llava15_tower``.
        vision: Arguments of ``CLIPVisionConfig``; empty where ``vision_name`` has yet to say.
        vision_name: Folder or hub name of the CLIP model, for weights that are not in ``folder``.
        options: Selected layer and feature; the projector is left out unless asked for.
        projector: Shape of the projector; None if the checkpoint has none.
        needs_grid: Why the language model needs every patch; empty if it does not.
        attention: The tower's attention implementation.
        aspect: What becomes of an image's shape: ``processor`` is for the image processor to say.
    """

    folder: str
    vision: dict[str, Any]
    vision_name: str
    options: TowerOptions
    projector: Projector | None = None
    needs_grid: str = ""
    attention: str = "sdpa"
    aspect: Literal["processor", "pad", "tiles"] = "processor"

    @property
    def layers(self) -> int:
        """Layers up to the selected one."""
        select = self.options.select_layer
        return kept_layers(-2 if select is None else select, self.vision["num_hidden_layers"])

    @property
    def vision_folder(self) -> Path:
        """The folder of the CLIP model, from the hub if it must be."""
        places = (Path(self.vision_name), Path(self.folder) / self.vision_name)
        found = next((place for place in places if place.is_dir()), None)
        return found or weights_folder(self.vision_name)

    def wanted_projector(self, name: str) -> Projector | None:
        """The projector if it is asked for; raises an ``InputError`` if ``name`` has none."""
        if not self.options.projector:
            return None
        if self.projector is None or not self.projector.outputs:
            raise InputError(
                f"{name} has no projector; leave --projector out, or name a LLaVA checkpoint "
                "(hf:<folder>)"
            )
        return self.projector


def kept_layers(select_layer: int, depth: int) -> int:
    """How many layers of ``depth`` lead to a hidden state; see ``TowerOptions.select_layer``."""
    kept = select_layer if select_layer >= 0 else depth + 1 + select_layer
    if not 1 <= kept <= depth:
        raise InputError(
            f"select layer is {select_layer} of a tower of {depth} layers; expected 1 to {depth}, "
            f"or -1 to -{depth}"
        )
    return kept


def llava_config(values: dict[str, Any], folder: str) -> LlavaConfig:
    """Read the ``config.json`` of a LLaVA checkpoint in ``folder``."""
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
    feature = values.get("mm_vision_select_feature", "patch")
    aspect = str(values.get("image_aspect_ratio") or "")
    spatial = str(values.get("mm_patch_merge_type") or "flat").startswith("spatial")
    grid = "image_aspect_ratio" if "anyres" in aspect else spatial and "mm_patch_merge_type"
    # The identity hands on the tower's own width, whatever the language model's is.
    key = "hidden_size" if layers else "mm_hidden_size"
    width = values.get(key)
    outputs = 0 if width is None else whole(width, f"config.json of {folder}: {key}")
    return LlavaConfig(
        folder=folder,
        vision=KNOWN.get(name, {}),
        vision_name=name,
        options=_options(values, "mm_vision_select_layer", feature, folder),
        projector=Projector(layers, outputs, bare=kind == "linear"),
        needs_grid=f"{grid} of {folder} is {values[grid]!r}" if grid else "",
        aspect="tiles" if "anyres" in aspect else "pad" if aspect == "pad" else "processor",
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
    feature = STRATEGIES.get(strategy, strategy) if isinstance(strategy, str) else strategy
    bias = bool(values.get("multimodal_projector_bias", True))
    tiles = model_type == "llava_next"
    return LlavaConfig(
        folder=folder,
        vision=vision_arguments({"model_type": kind, **vision}, folder) if vision else L14_336,
        vision_name=folder,
        options=_options(values, "vision_feature_layer", feature, folder),
        projector=Projector(2, _text_width(text, folder), bias),
        needs_grid=f"model type of {folder} is llava_next (anyres)" if tiles else "",
        attention=attention_of(values),
        aspect="tiles" if tiles else "processor",
    )


def _object(values: dict[str, Any], key: str, folder: str) -> dict[str, Any]:
    found = values.get(key) or {}
    if not isinstance(found, dict):
        raise InputError(f"config.json of {folder}: {key} is {found!r}; expected a JSON object")
    return found


def vision_arguments(values: dict[str, Any], name: str) -> dict[str, Any]:
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


def _options(values: dict[str, Any], key: str, feature: object, folder: str) -> TowerOptions:
    layer = values.get(key, -2)
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise InputError(
            f"{key} is {layer!r}; expected one whole number (features of several layers are not "
            "supported)"
        )
    for known in SELECT_FEATURES:
        if feature == known:
            return TowerOptions(select_layer=layer, select_feature=known).over(DEFAULTS)
    raise InputError(
        f"selected feature of {folder} is {feature!r}; expected {' or '.join(SELECT_FEATURES)} "
        f"(Transformers: {' or '.join(STRATEGIES)})"
    )
