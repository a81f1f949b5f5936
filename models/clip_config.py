"""The configuration of CLIP's vision transformer, of which LLaVA's towers are cut."""

from __future__ import annotations

from typing import Any

from tome_export.errors import InputError
from tome_export.models.hf_loader import library
from tome_export.models.hf_values import (
    attention_of,
    clip_vision_half,
    positive,
    refuse_quantised,
    whole,
)

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

KNOWN = {
    "openai/clip-vit-large-patch14-336": L14_336,
    "openai/clip-vit-large-patch14": L14_336 | {"image_size": 224},
}
"""Vision towers by their names on the hub: their shape needs no download."""


def vision_arguments(vision: dict[str, Any], name: str) -> dict[str, Any]:
    """What shapes a vision transformer of CLIP, defaults filled in.

    Args:
        vision: The ``config.json`` of a model's vision half.
        name: Of the checkpoint, for the message.

    Raises:
        InputError: if a value is none that the library takes.
        MissingComponentError: if Transformers is not installed.
    """
    transformers = library()
    defaults = transformers.CLIPVisionConfig()
    full = {key: getattr(defaults, key) for key in (*L14_336, "num_channels")}
    full |= {key: vision[key] for key in full if vision.get(key) is not None}
    for key, value in full.items():
        what = f"config.json of {name}: {key} of the vision tower"
        if key == "layer_norm_eps":
            full[key] = positive(value, what)
        elif key != "hidden_act":
            whole(value, what)
        elif not isinstance(value, str) or value not in transformers.activations.ACT2FN:
            raise InputError(
                f"{what} is {value!r}; expected an activation of Transformers, such as "
                f"{L14_336['hidden_act']}"
            )
    width, heads = full["hidden_size"], full["num_attention_heads"]
    if width % heads:
        raise InputError(
            f"config.json of {name}: hidden_size of the vision tower is {width}, and it has "
            f"{heads} heads; expected a multiple"
        )
    return full


def clip_arguments(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Arguments of ``CLIPVisionConfig`` from the ``config.json`` of a CLIP model.

    Args:
        config: That of the whole model or of its vision half.
        name: For the message.

    Raises:
        InputError: if it is not a CLIP model's, or quantised.
    """
    refuse_quantised(config, name)
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise InputError(
            f"vision tower {name} is a {kind!r} model; a LLaVA tower is cut from clip or "
            "clip_vision_model"
        )
    return vision_arguments(clip_vision_half(config, name) if kind == "clip" else config, name)


def clip_attention(config: dict[str, Any], name: str) -> str | None:
    """The attention implementation that the ``config.json`` of a CLIP model names, if it does."""
    half = clip_vision_half(config, name) if config.get("model_type") == "clip" else {}
    return attention_of(half, config)
