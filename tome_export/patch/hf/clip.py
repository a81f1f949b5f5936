"""Merging for the image towers of CLIP and SigLIP in Hugging Face Transformers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

from torch import Tensor

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import linear_weights
from tome_export.patch.base import MergedModel, NoImageOutputError
from tome_export.patch.heads import OutputChoice, mean_of_patches, output_choice_from_heads
from tome_export.patch.hf import base as hf
from tome_export.patch.merger import Merger, MergeSettings, Tokens

LAYERS = {"CLIPEncoderLayer": "CLIPAttention", "SiglipEncoderLayer": "SiglipAttention"}
"""Layers that are understood, and the attention of each."""


def check_layer(layer: Any, name: str) -> None:
    """Refuse a layer of an encoder that ``layer_forward`` does not compute as the library does."""
    cls = type(layer)
    known = cls.__name__ in LAYERS and cls.__module__.startswith("transformers.models.")
    if not known or type(layer.self_attn).__name__ != LAYERS[cls.__name__]:
        raise InputError(
            f"layer class {cls.__name__} of model {name} is not supported; "
            f"supported: {', '.join(LAYERS)}"
        )
    hf.check_modules(layer, name)
    hf.check_attention(layer.self_attn.config._attn_implementation, name)


def layer_forward(
    layer: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, index: int
) -> Tokens:
    """Run one layer of CLIP or SigLIP; arguments as in ``MergedModel.run_block``."""
    attn = layer.self_attn
    x = layer.layer_norm1(tokens.x)
    parts = attn.q_proj, attn.k_proj, attn.v_proj
    out, attended = hf.attention(attn, parts, x, bias, attn.head_dim, attn.scale, attn.dropout)
    tokens = merger(Tokens(tokens.x + attn.out_proj(out), tokens.size), attended, index)
    return Tokens(tokens.x + layer.mlp(layer.layer_norm2(tokens.x)), tokens.size)


def layer_cost(layer: Any) -> BlockCost:
    """MACs per token of one layer."""
    attn = layer.self_attn
    between = 2 * attn.num_heads * attn.head_dim
    return BlockCost(linear_weights(attn), between, linear_weights(layer.mlp))


class _MergedTower(MergedModel):
    """What CLIP's and SigLIP's towers share."""

    def __init__(self, model: Any, settings: MergeSettings, prefix: int) -> None:
        layers = _vision(model).encoder.layers
        for layer in layers:
            check_layer(layer, type(model).__name__)
        super().__init__(model, settings, hf.library_layout(model, layers, prefix, layer_cost))

    @property
    def vision(self) -> Any:
        """The vision transformer itself, in any layout."""
        return _vision(self.model)

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """The library's encoder layer."""
        return layer_forward(block, tokens, bias, merger, layer)

    @property
    def output_choice(self) -> OutputChoice:
        """Class scores of a classifier, unless it was taken off; else features."""
        heads = hf.classifiers_of(self.model)
        return output_choice_from_heads(*heads.values()) if heads else super().output_choice

    def head(self, tokens: Tokens) -> Tensor:
        """The tower's own output, or the library's classifier on the mean over patches."""
        if not hf.classifiers_of(self.model):
            return self.pooled(tokens)
        size = None if tokens.size is None else tokens.size[:, self.prefix :]
        mean = mean_of_patches(tokens.x[:, self.prefix :], size)
        return cast(Tensor, self.model.classifier(mean))

    @abstractmethod
    def pooled(self, tokens: Tokens) -> Tensor:
        """The output of a tower without a classifier."""

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the library's model itself gives."""
        model = self.model
        classifies = bool(hf.classifiers_of(model))
        if self.settings.dense:
            tower = model.vision_model if classifies else model
            output = tower(pixel_values, return_dict=True)
            return cast(Tensor, output.last_hidden_state[:, self.prefix :])
        output = model(pixel_values, return_dict=True)
        if classifies:
            return cast(Tensor, output.logits)
        projected = hasattr(model, "visual_projection")
        return cast(Tensor, output.image_embeds if projected else output.pooler_output)


def _vision(model: Any) -> Any:
    """The transformer itself, which transformers 4 and models with more around it wrap.

    The tower of a classifier is wrapped once more in some versions.
    """
    inner = getattr(model, "vision_model", model)
    return getattr(inner, "vision_model", inner)


class MergedClip(_MergedTower):
    """A CLIP image tower that merges tokens; see ``MergedModel``.

    The output is ``logits`` of a classifier, whose mean over patches counts every patch once;
    ``image_embeds`` with a projection, else ``pooler_output``. Dense features are
    ``last_hidden_state``, which CLIP takes before its last norm.
    """

    library_classes = hf.class_names(
        "clip", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"
    )

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        super().__init__(model, settings, prefix=1)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token and patches, positions added, normalised."""
        return cast(Tensor, self.vision.pre_layrnorm(self.vision.embeddings(pixel_values)))

    def pooled(self, tokens: Tokens) -> Tensor:
        """The class token, normalised and projected."""
        pooled = self.vision.post_layernorm(tokens.x[:, 0, :])
        project = getattr(self.model, "visual_projection", None)
        return cast(Tensor, pooled if project is None else project(pooled))


class MergedSiglip(_MergedTower):
    """A SigLIP image tower that merges tokens; see ``MergedModel``.

    It has no class token: the output is that of its attention pooling, in which a merged token
    counts by its size, or ``logits`` of a classifier, which takes the mean over patches instead.
    Dense features are ``last_hidden_state``, which is normalised. A tower without a pooling head
    is refused where the output is not dense, with a ``NoImageOutputError``.
    """

    library_classes = hf.class_names("siglip", "SiglipVisionModel", "SiglipForImageClassification")

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        pools = _vision(model).use_head or hf.classifiers_of(model)
        if not pools and not settings.dense:
            raise NoImageOutputError(
                "model SiglipVisionModel has no pooling head (vision_use_head is false), so "
                "there is no output for the whole image; use dense outputs"
            )
        super().__init__(model, settings, prefix=0)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches, positions added."""
        return cast(Tensor, self.vision.embeddings(pixel_values))

    def final(self, x: Tensor) -> Tensor:
        """The last norm."""
        return cast(Tensor, self.vision.post_layernorm(x))

    def pooled(self, tokens: Tokens) -> Tensor:
        """The library's pooling, with log(size) added to its logits."""
        head = self.vision.head
        if tokens.size is None or not self.settings.prop_attn:
            return cast(Tensor, head(tokens.x))
        probe = head.probe.repeat(tokens.x.shape[0], 1, 1)
        # A key padding mask of floats is added to the logits of every head.
        bias = tokens.size.log().to(tokens.x.dtype)
        x, _ = head.attention(probe, tokens.x, tokens.x, key_padding_mask=bias)
        return cast(Tensor, (x + head.mlp(head.layernorm(x)))[:, 0])
