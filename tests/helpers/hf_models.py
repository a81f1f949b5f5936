"""Tiny Transformers models with live weights, one of every class that is supported."""

from __future__ import annotations

from typing import Any

from towers import live

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 4,
}
MLP = {"intermediate_size": 64}
DINO = {"mlp_ratio": 2, "num_labels": 7}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "CLIP": ("CLIPVisionModel", MLP),
    "CLIP, projection": ("CLIPVisionModelWithProjection", {**MLP, "projection_dim": 24}),
    "SigLIP": ("SiglipVisionModel", MLP),
    "ViT": ("ViTModel", MLP),
    "ViT, classifier": ("ViTForImageClassification", {**MLP, "num_labels": 7}),
    "DeiT": ("DeiTModel", MLP),
    "DeiT, classifier": ("DeiTForImageClassification", {**MLP, "num_labels": 7}),
    "DeiT, teacher": ("DeiTForImageClassificationWithTeacher", {**MLP, "num_labels": 7}),
    "DINOv2": ("Dinov2Model", DINO),
    "DINOv2, SwiGLU": ("Dinov2Model", {**DINO, "use_swiglu_ffn": True}),
    "DINOv2, classifier": ("Dinov2ForImageClassification", DINO),
    "registers": ("Dinov2WithRegistersModel", {**DINO, "num_register_tokens": 2}),
    "registers, classifier": (
        "Dinov2WithRegistersForImageClassification",
        {**DINO, "num_register_tokens": 2},
    ),
}


def make(kind: str, attention: str = "sdpa", extra: Any = None, **changed: Any) -> Any:
    """A model by its name in ``MODELS``."""
    import transformers

    name, values = MODELS[kind]
    cls = getattr(transformers, name)
    config = cls.config_class(**{**SMALL, **values, **changed})
    config._attn_implementation = attention
    return live(cls(config, **(extra or {})))


def position_of(model: Any) -> Any:
    """The position embedding."""
    return next(p for n, p in model.named_parameters() if "position_embedding" in n)
