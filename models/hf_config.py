"""A Transformers checkpoint's ``config.json``: which class it makes, of which sizes and labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tome_export.errors import InputError

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
    kind = config.get("model_type")
    supported = ", ".join((*TOWERS, *CLASSES, "llava"))
    if kind not in TOWERS and kind not in CLASSES:
        if not any(key in config for key in ("vision_config", "image_size", "patch_size")):
            raise InputError(
                f"{where} is a model of model type {kind!r} without a vision tower, so it has no "
                f"image tokens to merge; expected model type {supported}"
            )
        raise InputError(f"model type {kind!r} of {where} is not supported; supported: {supported}")
    if config.get("quantization_config"):
        raise InputError(
            f"weights of {where} are quantised (quantization_config in config.json), which is not "
            "supported; use the checkpoint in float32, float16 or bfloat16"
        )
    attention = config.get("_attn_implementation") or config.get("attn_implementation")
    if kind in TOWERS:
        arguments, cls = dict(config.get("vision_config") or {}), TOWERS[kind]
        if kind == "clip" and "projection_dim" in config:
            arguments["projection_dim"] = config["projection_dim"]
        kind = f"{kind}_vision_model"
    else:
        arguments, cls = dict(config), _class_of(config, str(kind), where)
    arguments = {key: value for key, value in arguments.items() if key not in _DROPPED}
    return HfConfig(cls, arguments, str(kind), attention)


def _class_of(config: dict[str, Any], kind: str, where: str) -> str:
    found = (config.get("architectures") or [CLASSES[kind][0]])[0]
    if found not in CLASSES[kind]:
        raise InputError(
            f"architecture {found} of {where} is not supported; supported: "
            f"{', '.join(CLASSES[kind])}"
        )
    return str(found)
