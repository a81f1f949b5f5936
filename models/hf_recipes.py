"""Recipes of Transformers models: those with a name, and those of checkpoints. Imports no torch."""

from __future__ import annotations

from typing import Any

from tome_export.models.hf_config import RESAMPLES, HfConfig, hf_config
from tome_export.models.hf_loader import HfLoader
from tome_export.models.llava_config import read_config
from tome_export.models.llava_recipes import CLIP_NORM, tower_from_folder
from tome_export.models.recipe import RULE, Geometry, Recipe, recommended_r
from tome_export.spec import Preprocessing, TowerOptions

_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_NORMS = {"clip_vision_model": CLIP_NORM, "siglip_vision_model": _HALF, "vit": _HALF}
"""Mean and standard deviation of each model type's own image processor, where not ImageNet's."""

_SQUARES = ("deit", "siglip_vision_model", "vit")
"""Model types whose image processor reads a size of one number as height and width."""


def norm_of(model_type: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the image processor of a model type."""
    return _NORMS.get(model_type, _IMAGENET)


def _clip(
    name: str, hub: str, title: str, width: int, depth: int, patch: int, size: int, projection: int
) -> Recipe:
    arguments = {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": width // 64,
        "patch_size": patch,
        "image_size": size,
        "projection_dim": projection,
        "hidden_act": "quick_gelu",
    }
    return _named(
        name,
        hub,
        HfConfig("CLIPVisionModelWithProjection", arguments, "clip_vision_model"),
        Geometry(width, depth, 4 * width, patch, 1, width * projection),
        f"CLIP {title} of Transformers, image embeddings",
        "OpenAI (CLIP)",
        "mit",
    )


def _siglip_b16() -> Recipe:
    width, size, patch = 768, 224, 16
    arguments = {"hidden_size": width, "image_size": size, "patch_size": patch}
    tokens = (size // patch) ** 2
    # The pooling's MLP and its projections of the probe, and of its keys and values per token;
    # the tokens of the list are counted with those that are left.
    pooling = 2 * width**2 + 2 * width * 4 * width
    return _named(
        "hf_siglip_b16",
        "google/siglip-base-patch16-224",
        HfConfig("SiglipVisionModel", arguments, "siglip_vision_model"),
        Geometry(width, 12, 4 * width, patch, 0, pooling, 2 * width**2 + 2 * width),
        f"SigLIP ViT-B/16 of Transformers, pooled image features, {tokens} patches",
        "Google (SigLIP)",
        "apache-2.0",
    )


def _named(
    name: str,
    hub: str,
    config: HfConfig,
    geometry: Geometry,
    description: str,
    by: str,
    licence: str,
) -> Recipe:
    size = config.arguments["image_size"]
    tokens = (size // geometry.patch) ** 2 + geometry.prefix
    return Recipe(
        name=name,
        family="hf_clip",
        preprocessing=Preprocessing((3, size, size), *_NORMS[config.model_type], 1.0, "bicubic"),
        recommended_r=recommended_r(tokens, geometry.depth),
        r_source=RULE,
        output_name="features",
        description=description,
        weights_source=f"{by}; hub repository {hub}",
        licence=licence,
        loader=HfLoader(config, hub),
        geometry=geometry,
    )


HF = (
    _clip("hf_clip_b32", "openai/clip-vit-base-patch32", "ViT-B/32", 768, 12, 32, 224, 512),
    _clip("hf_clip_b16", "openai/clip-vit-base-patch16", "ViT-B/16", 768, 12, 16, 224, 512),
    _clip("hf_clip_l14", "openai/clip-vit-large-patch14", "ViT-L/14", 1024, 24, 14, 224, 768),
    _clip(
        "hf_clip_l14_336",
        "openai/clip-vit-large-patch14-336",
        "ViT-L/14 at 336 pixels",
        1024,
        24,
        14,
        336,
        768,
    ),
    _siglip_b16(),
)
"""Recipes with a name; their sizes are those of the checkpoints' configurations."""


def recipe_from_hf(name: str, where: str, tower: TowerOptions) -> Recipe:
    """A recipe for ``hf:<folder>`` or ``hf:<name on the hub>``, its facts from the checkpoint.

    Of a model of images and text its image tower is taken. LLaVA's checkpoints are handed on to
    ``llava_recipes``.

    Args:
        name: What the user called it.
        where: Folder or name on the hub.
        tower: Options of a LLaVA tower.

    Raises:
        InputError: if there is no such checkpoint, or no supported vision model in it.
    """
    from tome_export.models.hf_files import described
    from tome_export.models.hf_preprocess import check_size, preprocessing_of, read_processor

    folder = described(where)
    if found := tower_from_folder(name, folder, tower):
        return found
    config = hf_config(read_config(folder), where)
    full, tokens = _sizes(HfLoader(config, where))
    defaults = Preprocessing(
        (int(full.num_channels), *_pair(full.image_size)),
        *norm_of(config.model_type),
        1.0,
        "bicubic",
    )
    squares = config.model_type in _SQUARES
    values = read_processor(folder)
    preprocessing, remark = preprocessing_of(values, defaults, where, squares=squares)
    image_size = None
    if preprocessing.input_size != defaults.input_size:
        height, width = preprocessing.input_size[1:]
        if config.model_type not in RESAMPLES or height != width:
            check_size(preprocessing, defaults, where)
        image_size = height
        tokens = _sizes(HfLoader(config, where, image_size))[1]
    title = config.cls if not remark else f"{config.cls}; {remark}"
    return Recipe(
        name=name,
        family="hf_clip" if config.model_type.endswith("_vision_model") else "hf_vit",
        preprocessing=preprocessing,
        recommended_r=recommended_r(tokens, int(full.num_hidden_layers)),
        r_source=RULE,
        output_name="logits" if config.classifies else "features",
        description=f"Transformers' {title}",
        weights_source=where,
        licence="not stated by the checkpoint",
        labels=config.labels,
        dense_only=config.dense_only,
        loader=HfLoader(config, where, image_size),
    )


def _sizes(loader: HfLoader) -> tuple[Any, int]:
    """The library's configuration, its defaults filled in, and the tokens of the first layer."""
    from tome_export.patch import patch

    model: Any = loader.architecture()
    merged = patch(model, 0, dense=True)
    return model.config, merged.layers[0].tokens_in if merged.layers else merged.prefix


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)
