"""One small model of every family, made by its own library, and what that gives without us.

Configurations are tiny; every parameter is drawn at random so that it matters. ``families.py``
builds them by name: ``family_models:<function>``, or a checkpoint folder that the library saved.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
from timm.models.vision_transformer import VisionTransformer
from torchvision.models import vision_transformer as torchvision_vit

from tome_export.spec import TowerOptions

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import hf_models
from towers import live

Plain = Callable[[Any], Any]
"""``pixel_values [B, C, H, W]`` to the library model's own output of the form that is built."""

TIMM: dict[str, Any] = {
    "img_size": 64,
    "patch_size": 8,
    "embed_dim": 64,
    "depth": 3,
    "num_heads": 2,
}
OPEN_CLIP: dict[str, Any] = {
    "image_size": 64,
    "patch_size": 8,
    "width": 64,
    "layers": 3,
    "heads": 2,
}
OPEN_CLIP |= {"mlp_ratio": 2, "output_dim": 32}
VISION = {**hf_models.SMALL, **hf_models.MLP, "num_hidden_layers": 4}
LANGUAGE = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1}
LANGUAGE |= {"num_attention_heads": 2, "vocab_size": 64}


@dataclass(frozen=True)
class Family:
    """A family, and how one of it is built.

    Attributes:
        name: For people, and the key of the result.
        library: Package that the untouched model comes from.
        make: Saves what has to be saved in a folder of the current one; gives the model's name
            for ``build`` and the untouched model's output.
        form: Arguments of ``BuildRequest`` besides.
    """

    name: str
    library: str
    make: Callable[[], tuple[str, Plain]]
    form: dict[str, Any] = field(default_factory=dict)


def vit() -> Any:
    """Timm's ViT, a classifier."""
    return live(timm.create_model("vit_tiny_patch16_224", **TIMM, num_classes=10))


def dinov2_registers() -> Any:
    """DINOv2 with four registers in timm."""
    small = {**TIMM, "img_size": 56, "patch_size": 7}
    return live(timm.create_model("vit_small_patch14_reg4_dinov2", **small))


def mae() -> Any:
    """MAE fine-tuned by its authors: mean of the patches, norm behind it."""
    return live(VisionTransformer(**TIMM, num_classes=10, global_pool="avg"))


def eva02_clip() -> Any:
    """EVA-CLIP, with rotary positions and SwiGLU."""
    return live(timm.create_model("eva02_base_patch16_clip_224", **TIMM))


def dinov3() -> Any:
    """DINOv3, with rotary positions and registers."""
    return live(timm.create_model("vit_small_patch16_dinov3", **TIMM))


def timm_clip() -> Any:
    """CLIP's image tower in timm."""
    return live(timm.create_model("vit_base_patch16_clip_quickgelu_224", **TIMM))


def timm_siglip() -> Any:
    """SigLIP's image tower in timm."""
    return live(timm.create_model("vit_base_patch16_siglip_224", **TIMM))


def torchvision() -> Any:
    """Torchvision's ViT."""
    return live(torchvision_vit.VisionTransformer(64, 8, 3, 2, 64, 128, num_classes=10))


def swag() -> Any:
    """Torchvision's ViT with the patches of SWAG's ViT-H/14."""
    return live(torchvision_vit.VisionTransformer(112, 14, 3, 2, 64, 128, num_classes=10))


def open_clip() -> Any:
    """open_clip's ViT, the class token projected."""
    from open_clip.transformer import VisionTransformer as ClipVit

    return live(ClipVit(**OPEN_CLIP))


def open_clip_pooler() -> Any:
    """open_clip's ViT with an attentional pooler, as in CoCa."""
    from open_clip.transformer import VisionTransformer as ClipVit

    return live(
        ClipVit(**OPEN_CLIP, attentional_pool=True, attn_pooler_queries=8, attn_pooler_heads=4)
    )


def open_clip_timm() -> Any:
    """A ViT of timm's with attention pooling inside open_clip's ``TimmModel``, as SigLIP is."""
    from open_clip.timm_model import TimmModel

    return live(TimmModel("test_vit3", 96, image_size=160, pool="map", proj="none"))


def _called(model: Any, pixel_values: Any) -> Any:
    return model(pixel_values)


def _patches(model: Any, pixel_values: Any) -> Any:
    return model.forward_features(pixel_values)[:, model.num_prefix_tokens :]


def of_function(make: Callable[[], Any], output: Callable[[Any, Any], Any] = _called) -> Any:
    """A model as a user of ``module:function`` brings it."""

    def ready() -> tuple[str, Plain]:
        model = make()
        return f"{__name__}:{make.__name__}", lambda pixel_values: output(model, pixel_values)

    return ready


def _transformers() -> Any:
    """The library, without its progress bars."""
    import transformers

    bars: Any = transformers.utils.logging
    bars.disable_progress_bar()
    return transformers


def of_checkpoint(kind: str, output: Callable[[Any], Any]) -> Any:
    """A checkpoint folder that Transformers wrote, and the model that it reads from it."""

    def ready() -> tuple[str, Plain]:
        _transformers()
        made = hf_models.make(kind)
        folder = type(made).__name__
        made.save_pretrained(folder)
        model = type(made).from_pretrained(folder).eval()
        return f"hf:{folder}", lambda pixel_values: output(model(pixel_values))

    return ready


def of_llava(projected: bool) -> Any:
    """A whole LLaVA checkpoint, language model included, and its own image features."""

    def ready() -> tuple[str, Plain]:
        hf = _transformers()
        config = hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION), text_config=hf.LlamaConfig(**LANGUAGE)
        )
        folder = "Llava"
        live(hf.LlavaForConditionalGeneration(config)).save_pretrained(folder)
        model: Any = hf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
        inner = getattr(model, "model", model)

        def features(pixel_values: Any) -> Any:
            states = inner.vision_tower(pixel_values, output_hidden_states=True).hidden_states
            patches = states[config.vision_feature_layer][:, 1:]
            return inner.multi_modal_projector(patches) if projected else patches

        return f"hf:{folder}", features

    return ready


def _pooled(found: Any) -> Any:
    return found.pooler_output


def _logits(found: Any) -> Any:
    return found.logits


DENSE = {"dense": True, "source_map": True}
PROJECTED = {"tower": TowerOptions("llava", projector=True)}

FAMILIES = (
    Family("ViT", "timm", of_function(vit)),
    Family("DINOv2 with registers, dense", "timm", of_function(dinov2_registers, _patches), DENSE),
    Family("MAE", "timm", of_function(mae), {"prop_attn": False}),
    Family("CLIP", "timm", of_function(timm_clip)),
    Family("SigLIP", "timm", of_function(timm_siglip)),
    Family("EVA-CLIP with RoPE", "timm", of_function(eva02_clip)),
    Family("DINOv3 with RoPE", "timm", of_function(dinov3)),
    Family("CLIP", "transformers", of_checkpoint("CLIP", _pooled)),
    Family(
        "CLIP with projection",
        "transformers",
        of_checkpoint("CLIP, projection", lambda found: found.image_embeds),
    ),
    Family("SigLIP", "transformers", of_checkpoint("SigLIP", _pooled)),
    Family("ViT classifier", "transformers", of_checkpoint("ViT, classifier", _logits)),
    Family("DeiT classifier", "transformers", of_checkpoint("DeiT, classifier", _logits)),
    Family("DINOv2", "transformers", of_checkpoint("DINOv2", _pooled)),
    Family(
        "DINOv2 with registers, dense",
        "transformers",
        # The class token and two registers stand in front.
        of_checkpoint("registers", lambda found: found.last_hidden_state[:, 3:]),
        DENSE,
    ),
    Family("LLaVA tower", "transformers", of_llava(projected=False)),
    Family("LLaVA tower and projector", "transformers", of_llava(projected=True), PROJECTED),
    Family(
        "LLaVA tower and projector, dense",
        "transformers",
        of_llava(projected=True),
        {**PROJECTED, "dense": True},
    ),
    Family("ViT, class token", "open_clip", of_function(open_clip)),
    Family("ViT, attentional pooler", "open_clip", of_function(open_clip_pooler)),
    Family("TimmModel", "open_clip", of_function(open_clip_timm)),
    Family("ViT", "torchvision", of_function(torchvision)),
    Family("SWAG", "torchvision", of_function(swag)),
)
"""Every family, as the table of results lists them."""
