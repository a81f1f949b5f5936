"""Merging for the image towers of CLIP and SigLIP in Hugging Face Transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch import hf
from tome_export.patch.base import MergedModel, NoImageOutputError, OutputChoice
from tome_export.patch.heads import choice_by_heads, mean_of_patches
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.reducers.base import AttentionInputs

CLASSES = {
    "clip": ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPForImageClassification"),
    "siglip": ("SiglipVisionModel", "SiglipForImageClassification"),
}
SUPPORTED = f"transformers' {', '.join(name for names in CLASSES.values() for name in names)}"
LAYERS = {"CLIPEncoderLayer": "CLIPAttention", "SiglipEncoderLayer": "SiglipAttention"}


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family.

    Raises:
        InputError: if a part of the model is not understood.
    """
    if not hf.library_class(model, CLASSES):
        return None
    is_clip = type(model).__name__.startswith("CLIP")
    return MergedClip(model, settings) if is_clip else MergedSiglip(model, settings)


def check_layer(layer: Any, name: str) -> None:
    """Refuse a layer that ``layer_forward`` does not compute as the library does.

    Args:
        layer: One of an encoder's layers.
        name: Of the model, for the message.

    Raises:
        InputError: naming what is not understood.
    """
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
    """One layer of CLIP or SigLIP, merging between attention and MLP.

    Args:
        layer: ``CLIPEncoderLayer`` or ``SiglipEncoderLayer``.
        tokens: ``[B, N, C]`` and their sizes.
        bias: ``[B, 1, N, N]`` of proportional attention, or None.
        merger: Called once, between attention and MLP.
        index: Of the layer.
    """
    attn = layer.self_attn
    x = layer.layer_norm1(tokens.x)
    q, k, v = (hf.split_heads(p(x), attn.head_dim) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
    out = hf.attend(attn, q, k, v, bias, attn.scale, attn.dropout)
    attended = AttentionInputs(k, q, attn.scale, bias, x)
    tokens = merger(Tokens(tokens.x + attn.out_proj(out), tokens.size), attended, index)
    return Tokens(tokens.x + layer.mlp(layer.layer_norm2(tokens.x)), tokens.size)


def layer_cost(layer: Any) -> BlockCost:
    """Cost per token of one layer."""
    width = layer.self_attn.num_heads * layer.self_attn.head_dim
    return BlockCost(
        before=hf.linear_weights(layer.self_attn),
        attention=2 * width,
        after=hf.linear_weights(layer.mlp),
    )


class _Tower(hf.MergedHf):
    """What CLIP's and SigLIP's towers share."""

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        # transformers 4 wraps the transformer in ``vision_model``, and so do models with a
        # projection in any version.
        vision = _vision(model)
        for layer in vision.encoder.layers:
            check_layer(layer, type(model).__name__)
        super().__init__(model, settings, vision.encoder.layers)

    @property
    def vision(self) -> Any:
        """The vision transformer itself, in either layout."""
        return _vision(self.model)

    def layer_forward(
        self, layer: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, index: int
    ) -> Tokens:
        """See ``hf_clip.layer_forward``."""
        return layer_forward(layer, tokens, bias, merger, index)

    def layer_cost(self, layer: Any) -> BlockCost:
        """See ``hf_clip.layer_cost``."""
        return layer_cost(layer)

    @property
    def output_choice(self) -> OutputChoice:
        """Class scores of a classifier, unless it was taken off; else features."""
        heads = hf.heads_of(self.model)
        return choice_by_heads(*heads.values()) if heads else super().output_choice

    def classified(self, tokens: Tokens) -> Tensor:
        """The library's classifier, on the mean over patches."""
        size = None if tokens.size is None else tokens.size[:, self.prefix :]
        mean = mean_of_patches(tokens.x[:, self.prefix :], size)
        return self.model.classifier(mean)  # type: ignore[no-any-return, operator]

    def library_dense(self, pixel_values: Tensor) -> Tensor:
        """The library's features of every patch."""
        output = self.tower_model(pixel_values, return_dict=True)
        return output.last_hidden_state[:, self.prefix :]  # type: ignore[no-any-return]

    @property
    def tower_model(self) -> Any:
        """The model that gives the last hidden state: the tower in a classifier, else itself."""
        return self.model.vision_model if hf.heads_of(self.model) else self.model


def _vision(model: Any) -> Any:
    """The transformer; in some versions a classifier's tower wraps it once more."""
    inner = getattr(model, "vision_model", model)
    return getattr(inner, "vision_model", inner)


class MergedClip(_Tower):
    """A CLIP image tower that merges tokens; see ``MergedModel``.

    The output is ``logits`` of a classifier, whose mean over patches counts every patch once;
    ``image_embeds`` with a projection, else ``pooler_output``. Dense features are
    ``last_hidden_state``, which CLIP takes before its last norm.
    """

    @staticmethod
    def prefix_of(config: Any) -> int:  # noqa: ARG004 (others count by it)
        """The class token."""
        return 1

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token and patches, positions added, normalised."""
        return self.vision.pre_layrnorm(self.vision.embeddings(pixel_values))  # type: ignore[no-any-return]

    def head(self, tokens: Tokens) -> Tensor:
        """The class token, normalised and projected; or the classifier."""
        model: Any = self.model
        if hf.heads_of(model):
            return self.classified(tokens)
        pooled = self.vision.post_layernorm(tokens.x[:, 0, :])
        project = getattr(model, "visual_projection", None)
        return pooled if project is None else project(pooled)  # type: ignore[no-any-return]

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the library's model itself gives."""
        model: Any = self.model
        if self.settings.dense:
            return self.library_dense(pixel_values)
        output = model(pixel_values, return_dict=True)
        if hf.heads_of(model):
            return output.logits  # type: ignore[no-any-return]
        projected = hasattr(model, "visual_projection")
        return output.image_embeds if projected else output.pooler_output  # type: ignore[no-any-return]


class MergedSiglip(_Tower):
    """A SigLIP image tower that merges tokens; see ``MergedModel``.

    It has no class token: the output is that of its attention pooling, in which a merged token
    counts by its size, or ``logits`` of a classifier, which takes the mean over patches instead.
    Dense features are ``last_hidden_state``, which is normalised.

    Raises:
        InputError: if it has no pooling head, and the output is not dense.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        pools = _vision(model).use_head or hf.heads_of(model)
        if not pools and not settings.dense:
            raise NoImageOutputError(
                "model SiglipVisionModel has no pooling head (vision_use_head is false), so "
                "there is no output for the whole image; use dense outputs"
            )
        super().__init__(model, settings)

    @staticmethod
    def prefix_of(config: Any) -> int:  # noqa: ARG004 (others count by it)
        """SigLIP has patches only."""
        return 0

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Patches, positions added."""
        return self.vision.embeddings(pixel_values)  # type: ignore[no-any-return]

    def final(self, x: Tensor) -> Tensor:
        """The last norm."""
        return self.vision.post_layernorm(x)  # type: ignore[no-any-return]

    def head(self, tokens: Tokens) -> Tensor:
        """The library's pooling, with log(size) added to its logits; or the classifier."""
        if hf.heads_of(self.model):
            return self.classified(tokens)
        head = self.vision.head
        if tokens.size is None or not self.settings.prop_attn:
            return head(tokens.x)  # type: ignore[no-any-return]
        probe = head.probe.repeat(tokens.x.shape[0], 1, 1)
        # A key padding mask of floats is added to the logits of every head.
        bias = tokens.size.log().to(tokens.x.dtype)
        x, _ = head.attention(probe, tokens.x, tokens.x, key_padding_mask=bias)
        return (x + head.mlp(head.layernorm(x)))[:, 0]  # type: ignore[no-any-return]

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the library's model itself gives."""
        model: Any = self.model
        if self.settings.dense:
            return self.library_dense(pixel_values)
        output = model(pixel_values, return_dict=True)
        return output.logits if hf.heads_of(model) else output.pooler_output  # type: ignore[no-any-return]
