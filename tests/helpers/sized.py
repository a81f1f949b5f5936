"""A small model of every family, and what its own library gives at an image size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import hf_models
import torch
from towers import live

from tome_export.models import Recipe, resolve
from tome_export.models.timm.loader import TimmLoader

Size = tuple[int, int]
INTERPOLATE = "interpolate_pos_encoding"


@dataclass(frozen=True)
class Sized:
    """A model that can be had at another size.

    Attributes:
        recipe: It at its own size.
        weights: What to load.
        library: Given a size, the library's own forward pass of images of that size.
        depth: Blocks that are made of it; None for all.
    """

    recipe: Recipe
    weights: str
    library: Callable[[Size], Callable[[Any], Any]]
    depth: int | None = None


def timm_model(name: str, own: int, patch: int = 0, **more: Any) -> Callable[[Path], Sized]:
    """A timm architecture at 64 channels; reference: timm itself, reading the same file."""

    def make(folder: Path) -> Sized:
        import timm
        from safetensors.torch import save_file

        small = {"embed_dim": 64, "depth": 2, "num_heads": 2, "img_size": own, **more}
        if patch:
            small["patch_size"] = patch
        module = live(timm.create_model(name, **small))
        path = folder / "model.safetensors"
        save_file({k: v.contiguous() for k, v in module.state_dict().items()}, path)
        recipe = resolve(f"timm:{name}")
        loader = TimmLoader(name, tuple(small.items()))
        recipe = replace(
            recipe,
            source=replace(recipe.source, loader=loader),
            preprocessing=replace(recipe.preprocessing, input_size=(3, own, own)),
        )

        def library(size: Size) -> Any:
            overlay = {"file": str(path), "input_size": (3, own, own), "custom_load": False}
            overlay |= {"num_classes": module.num_classes}
            given = {**small, "img_size": size}
            made = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **given)
            return made.eval()

        return Sized(recipe, str(path), library)

    return make


def hf_model(kind: str, output: Callable[[Any], Any], **changed: Any) -> Callable[[Path], Sized]:
    """A checkpoint of Transformers, which interpolates positions in its forward pass."""

    def make(folder: Path) -> Sized:
        model = hf_models.make(kind, **changed)
        model.save_pretrained(folder)
        # DINOv2 interpolates unasked.
        asked = {} if model.config.model_type.startswith("dino") else {INTERPOLATE: True}
        recipe = resolve(f"hf:{folder}")
        return Sized(recipe, "pretrained", lambda _size: lambda x: output(model(x, **asked)))

    return make


def llava(folder: Path) -> Sized:
    """The tower of a LLaVA checkpoint of Transformers."""
    import transformers as hf

    vision = {**hf_models.SMALL, **hf_models.MLP, "num_hidden_layers": 4}
    language = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 1}
    language |= {"num_attention_heads": 2, "vocab_size": 64}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**language)
    )
    live(hf.LlavaForConditionalGeneration(config)).save_pretrained(folder)
    model: Any = hf.LlavaForConditionalGeneration.from_pretrained(folder).eval()
    tower = getattr(model, "model", model).vision_tower

    def features(images: Any) -> Any:
        found = tower(images, output_hidden_states=True, **{INTERPOLATE: True})
        return found.hidden_states[config.vision_feature_layer][:, 1:]

    return Sized(resolve(f"hf:{folder}"), "pretrained", lambda _size: features)


def open_clip_model(vision: dict[str, Any]) -> Callable[[Path], Sized]:
    """A model that open_clip reads by name, and at a size with its ``force_image_size``."""

    def make(folder: Path) -> Sized:
        import json

        import open_clip
        from safetensors.torch import save_file

        text = {"context_length": 8, "vocab_size": 16, "width": 32, "heads": 2, "layers": 1}
        config = {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}
        name = f"tiny-{folder.name}"
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        model = open_clip.create_model(name)
        live(model.visual)
        path = folder / "open_clip.safetensors"
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)

        def library(size: Size) -> Any:
            made = open_clip.create_model(name, pretrained=str(path), force_image_size=size)
            return made.eval().visual

        return Sized(resolve(f"open_clip:{name}"), str(path), library)

    return make


def torchvision_model(folder: Path) -> Sized:
    """ViT-B/32 of one block; squares only, as the library's resampling and forward are."""
    from safetensors.torch import save_file
    from torchvision.models import vision_transformer as vit

    def made(side: int) -> Any:
        return vit.VisionTransformer(side, 32, 1, 12, 768, 3072)

    own = live(made(224))
    path = folder / "torchvision.safetensors"
    save_file(own.state_dict(), path)

    def library(size: Size) -> Any:
        state, module = own.state_dict(), made(size[0]).eval()
        if size[0] == size[1]:
            module.load_state_dict(vit.interpolate_embeddings(size[0], 32, dict(state)))
            return module
        # As it resamples and runs, line by line, for a grid that it has no size of.
        grid = (size[0] // 32, size[1] // 32)
        table = state.pop("encoder.pos_embedding")
        square = table[:, 1:].permute(0, 2, 1).reshape(1, 768, 7, 7)
        other = torch.nn.functional.interpolate(square, grid, mode="bicubic", align_corners=True)
        table = torch.cat([table[:, :1], other.reshape(1, 768, -1).permute(0, 2, 1)], dim=1)
        module.load_state_dict(state, strict=False)
        module.encoder.pos_embedding = torch.nn.Parameter(table)

        def forward(images: Any) -> Any:
            x = module.conv_proj(images).reshape(len(images), 768, -1).permute(0, 2, 1)
            x = torch.cat([module.class_token.expand(len(images), -1, -1), x], dim=1)
            return module.heads(module.encoder(x)[:, 0])

        return forward

    recipe = resolve("torchvision:vit_b_32")
    return Sized(recipe, str(path), library, depth=1)


def _pooled(found: Any) -> Any:
    return found.pooler_output


def _logits(found: Any) -> Any:
    return found.logits


CLIP_VISION = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2, "head_width": 32}
TIMM_VISION = {"timm_model_name": "test_vit3", "timm_pool": "map", "image_size": 160}

_PATCH4 = ((48, 48), (48, 24), (16, 64))

MODELS: dict[str, tuple[Callable[[Path], Sized], tuple[Size, ...]]] = {
    "timm ViT/16": (timm_model("vit_tiny_patch16_224", 128), ((160, 160), (256, 128), (64, 256))),
    "timm ViT/8": (timm_model("vit_small_patch8_224", 64), ((96, 96), (64, 128), (32, 128))),
    "timm ViT/32": (timm_model("vit_base_patch32_224", 224), ((384, 384), (448, 224), (96, 160))),
    "timm DeiT distilled": (
        timm_model("deit_tiny_distilled_patch16_224", 96),
        ((160, 160), (96, 192), (48, 192)),
    ),
    "timm DINOv2 registers/14": (
        timm_model("vit_small_patch14_reg4_dinov2", 112),
        ((224, 224), (224, 112), (56, 224)),
    ),
    "timm CLIP": (
        timm_model("vit_base_patch16_clip_quickgelu_224", 96),
        ((160, 160), (96, 192), (48, 192)),
    ),
    "timm SigLIP": (
        timm_model("vit_base_patch16_siglip_224", 96),
        ((160, 160), (96, 192), (48, 192)),
    ),
    "timm EVA-02 (rotary)": (
        timm_model("eva02_base_patch16_clip_224", 96),
        ((160, 160), (96, 192), (48, 192)),
    ),
    "timm DINOv3 (rotary)": (
        timm_model("vit_small_patch16_dinov3", 96),
        ((160, 160), (96, 192), (48, 192)),
    ),
    "timm rope mixed": (
        timm_model("vit_small_patch16_rope_mixed_ape_224", 96),
        ((160, 160), (96, 192), (48, 192)),
    ),
    "timm Perception Encoder": (
        timm_model("vit_pe_core_tiny_patch16_384", 96),
        ((160, 160), (96, 192), (48, 192)),
    ),
    "hf CLIP": (hf_model("CLIP", _pooled), _PATCH4),
    "hf CLIP, projection": (hf_model("CLIP, projection", lambda x: x.image_embeds), _PATCH4),
    "hf SigLIP": (hf_model("SigLIP", _pooled), _PATCH4),
    "hf ViT": (hf_model("ViT, classifier", _logits), _PATCH4),
    "hf DeiT": (hf_model("DeiT, classifier", _logits), _PATCH4),
    "hf DINOv2/14": (
        hf_model("DINOv2", _pooled, image_size=112, patch_size=14),
        ((224, 224), (224, 112), (56, 224)),
    ),
    "hf DINOv2 registers": (hf_model("registers, classifier", _logits), _PATCH4),
    "hf LLaVA tower": (llava, _PATCH4),
    "open_clip ViT": (open_clip_model(CLIP_VISION), ((48, 48), (64, 32), (24, 64))),
    "open_clip TimmModel": (open_clip_model(TIMM_VISION), ((96, 96), (160, 96), (80, 320))),
    "torchvision ViT/32": (torchvision_model, ((384, 384), (448, 224), (96, 160))),
}
"""Every family, and three sizes of it: a larger square, one that is not, and one with as many
patches as its own or fewer than a square has."""
