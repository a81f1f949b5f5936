"""A Transformers checkpoint's ``config.json``: which class it makes, of which sizes and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tome_export.errors import InputError
from tome_export.models.hf_values import (
    attention_of,
    clip_vision_half,
    name_at,
    object_at,
    refuse_quantised,
)

TOWERS = {"clip": "CLIPVisionModelWithProjection", "siglip": "SiglipVisionModel"}
"""What is taken of models of images and text: the class by their model type."""

CLASSES = {
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip_vision_model": ("SiglipVisionModel",),
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": (
        "DeiTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
    ),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
}
"""Model type to its classes, the bare model first."""

RESAMPLES = ("dinov2", "dinov2_with_registers")
"""Model types that the library itself resamples positions of, for images of any size."""

# What says nothing of the architecture, or is decided here.
_DROPPED = (
    "_attn_implementation",
    "_commit_hash",
    "_name_or_path",
    "_out_features",
    "_out_indices",
    "architectures",
    "attn_implementation",
    "dtype",
    "model_type",
    "out_features",
    "out_indices",
    "stage_names",
    "torch_dtype",
    "transformers_version",
)


@dataclass(frozen=True)
class HfConfig:
    """What a configuration says of the vision model in it.

    Attributes:
        cls: The library's name of the class.
        arguments: Of its configuration class.
        model_type: The library's name of the kind of the vision model.
        attention: Attention implementation, where the configuration names one.
    """

    cls: str
    arguments: dict[str, Any]
    model_type: str
    attention: str | None = None

    @property
    def classifies(self) -> bool:
        """Whether it gives logits."""
        return "ForImageClassification" in self.cls

    @property
    def dense_only(self) -> bool:
        """Whether it has no pooling head, so that there are features of patches only."""
        return self.cls == "SiglipVisionModel" and not self.arguments.get("vision_use_head", True)

    @property
    def labels(self) -> tuple[str, ...] | None:
        """Class names; None where they are the library's placeholders."""
        given = self.arguments.get("id2label") or {}
        names = [str(given[key]) for key in sorted(given, key=int)]
        if not self.classifies or all(name.startswith("LABEL_") for name in names):
            return None
        return tuple(names)


def hf_config(config: dict[str, Any], where: str) -> HfConfig:
    """Understand a configuration.

    Args:
        config: Content of ``config.json``.
        where: Name of the checkpoint, for messages.

    Raises:
        InputError: if it is not of a vision model that is supported.
    """
    refuse_quantised(config, where)
    kind = name_at(config, "model_type", where, "") or None
    supported = ", ".join((*TOWERS, *CLASSES, "llava"))
    if kind is None or (kind not in TOWERS and kind not in CLASSES):
        if not any(key in config for key in ("vision_config", "image_size", "patch_size")):
            raise InputError(
                f"{where} is a model of model type {kind!r} without a vision tower, so it has no "
                f"image tokens to merge; expected model type {supported}"
            )
        raise InputError(f"model type {kind!r} of {where} is not supported; supported: {supported}")
    half: dict[str, Any] = {}
    if kind in TOWERS:
        is_clip = kind == "clip"
        half = (
            clip_vision_half(config, where)
            if is_clip
            else object_at(config, "vision_config", where)
        )
        arguments, cls = dict(half), TOWERS[kind]
        if kind == "clip" and "projection_dim" in config:
            arguments["projection_dim"] = config["projection_dim"]
        kind = f"{kind}_vision_model"
    else:
        arguments, cls = dict(config), _class_of(config, kind, where)
    arguments = {key: value for key, value in arguments.items() if key not in _DROPPED}
    return HfConfig(cls, arguments, kind, attention_of(half, config))


def _class_of(config: dict[str, Any], kind: str, where: str) -> str:
    names = config.get("architectures") or [CLASSES[kind][0]]
    if not isinstance(names, list) or not isinstance(names[0], str):
        raise InputError(
            f"config.json of {where}: architectures is {names!r}; expected a list of names"
        )
    found = names[0]
    if found not in CLASSES[kind]:
        raise InputError(
            f"architecture {found} of {where} is not supported; supported: "
            f"{', '.join(CLASSES[kind])}"
        )
    return found
