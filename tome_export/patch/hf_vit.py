"""Merging for ViT, DeiT and DINOv2 in Hugging Face Transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch import hf
from tome_export.patch.base import MergedModel, OutputChoice
from tome_export.patch.heads import choice_by_heads, mean_of_patches
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.reducers.base import AttentionInputs

CLASSES = {
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
SUPPORTED = f"transformers' {', '.join(name for names in CLASSES.values() for name in names)}"


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family.

    Raises:
        InputError: if a part of the model is not understood.
    """
    if not hf.library_class(model, CLASSES):
        return None
    is_dino = type(model).__name__.startswith("Dinov2")
    return MergedDino(model, settings) if is_dino else MergedVit(model, settings)


def _base(model: Any) -> Any:
    """The transformer inside a classifier; any other model is returned as it is."""
    return getattr(model, model.base_model_prefix, model) if _classifies(model) else model


def _classifies(model: nn.Module) -> bool:
    """Whether it is one of the library's classes with a classifier, taken off or not."""
    return hasattr(model, "classifier") or hasattr(model, "cls_classifier")


def _layers(base: Any) -> Any:
    """In transformers 4 and, for DINOv2, in 5: ``encoder.layer``; else ``layers``."""
    return base.encoder.layer if hasattr(base, "encoder") else base.layers


def attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """The attention of ViT, DeiT and DINOv2, in the layout of transformers 4 or 5.

    Args:
        attn: The module.
        x: ``[B, N, C]``, already normalised.
        bias: ``[B, 1, N, N]`` or None.

    Returns:
        Output ``[B, N, C]`` and what was compared.
    """
    if hasattr(attn, "q_proj"):
        parts, width = (attn.q_proj, attn.k_proj, attn.v_proj), attn.head_dim
        q, k, v = (hf.split_heads(part(x), width) for part in parts)
        out = hf.attend(attn, q, k, v, bias, attn.scaling, attn.attention_dropout)
        return attn.o_proj(out), AttentionInputs(k, q, attn.scaling, bias, x)
    inner = attn.attention
    parts, width = (inner.query, inner.key, inner.value), inner.attention_head_size
    q, k, v = (hf.split_heads(part(x), width) for part in parts)
    out = hf.attend(inner, q, k, v, bias, inner.scaling, inner.dropout_prob)
    out = attn.output.dropout(attn.output.dense(out))
    return out, AttentionInputs(k, q, inner.scaling, bias, x)


def attention_cost(attn: Any) -> tuple[int, int]:
    """MACs per token of an attention's linear layers, and per token and token it looks at."""
    values = attn.v_proj if hasattr(attn, "v_proj") else attn.attention.value
    return hf.linear_weights(attn), 2 * int(values.out_features)


class _Transformer(hf.MergedHf):
    """What these models share: where their parts are."""

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        super().__init__(model, settings, _layers(_base(model)))

    @property
    def base(self) -> Any:
        """The transformer without a classifier."""
        return _base(self.model)

    @property
    def output_choice(self) -> OutputChoice:
        """Class scores, unless there is no classifier or it was taken off."""
        return choice_by_heads(*hf.heads_of(self.model).values())

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Prefix tokens and patches, positions added."""
        return self.base.embeddings(pixel_values)  # type: ignore[no-any-return]

    def final(self, x: Tensor) -> Tensor:
        """The last norm."""
        return self.base.layernorm(x)  # type: ignore[no-any-return]

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the library's model itself gives."""
        model: Any = self.model
        if self.settings.dense:
            output = self.base(pixel_values, return_dict=True)
            return output.last_hidden_state[:, self.prefix :]  # type: ignore[no-any-return]
        output = model(pixel_values, return_dict=True)
        if _classifies(model):
            return output.logits  # type: ignore[no-any-return]
        pooled = output.pooler_output
        return output.last_hidden_state[:, 0] if pooled is None else pooled  # type: ignore[no-any-return]


class MergedVit(_Transformer):
    """A ViT or DeiT that merges tokens; see ``MergedModel``.

    The output is ``logits`` of a classifier, else ``pooler_output``; without a pooler, the class
    token of ``last_hidden_state``. Dense features are ``last_hidden_state``.
    """

    @staticmethod
    def prefix_of(config: Any) -> int:
        """The class token, and DeiT's distillation token."""
        return 2 if config.model_type == "deit" else 1

    def layer_forward(
        self, layer: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, index: int
    ) -> Tokens:
        """One layer, merging between attention and MLP."""
        out, attended = attention(layer.attention, layer.layernorm_before(tokens.x), bias)
        drop = getattr(layer, "dropout", nn.Identity())
        tokens = merger(Tokens(drop(out) + tokens.x, tokens.size), attended, index)
        x = layer.layernorm_after(tokens.x)
        if hasattr(layer, "mlp"):
            return Tokens(drop(layer.mlp(x)) + tokens.x, tokens.size)
        return Tokens(layer.output(layer.intermediate(x), tokens.x), tokens.size)

    def layer_cost(self, layer: Any) -> BlockCost:
        """Cost per token of one layer."""
        before, per_pair = attention_cost(layer.attention)
        behind = (layer.mlp,) if hasattr(layer, "mlp") else (layer.intermediate, layer.output)
        return BlockCost(before=before, attention=per_pair, after=hf.linear_weights(*behind))

    def head(self, tokens: Tokens) -> Tensor:
        """The library's head, which looks at prefix tokens only."""
        model: Any = self.model
        x = tokens.x
        if hasattr(model, "distillation_classifier"):
            both = model.cls_classifier(x[:, 0, :]) + model.distillation_classifier(x[:, 1, :])
            return both / 2  # type: ignore[no-any-return]
        if _classifies(model):
            return model.classifier(x[:, 0, :])  # type: ignore[no-any-return]
        return x[:, 0] if model.pooler is None else model.pooler(x)


class MergedDino(_Transformer):
    """A DINOv2, with or without registers, that merges tokens; see ``MergedModel``.

    The output is ``logits`` of a classifier, whose mean over patches counts every patch once,
    else ``pooler_output``, the class token. Dense features are ``last_hidden_state``.

    Raises:
        InputError: also if its images are not square, for which it resamples positions wrongly.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        height, width = hf.pair(model.config.image_size)
        if height != width:
            raise InputError(
                f"model {type(model).__name__} has an image size of {height} x {width}; the "
                "library resamples its positions as those of square images; expected a square"
            )
        super().__init__(model, settings)

    @staticmethod
    def prefix_of(config: Any) -> int:
        """The class token and registers."""
        return 1 + int(getattr(config, "num_register_tokens", 0))

    def layer_forward(
        self, layer: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, index: int
    ) -> Tokens:
        """One layer, merging between attention and MLP."""
        out, attended = attention(layer.attention, layer.norm1(tokens.x), bias)
        x = layer.drop_path(layer.layer_scale1(out)) + tokens.x
        tokens = merger(Tokens(x, tokens.size), attended, index)
        out = layer.layer_scale2(layer.mlp(layer.norm2(tokens.x)))
        return Tokens(layer.drop_path(out) + tokens.x, tokens.size)

    def layer_cost(self, layer: Any) -> BlockCost:
        """Cost per token of one layer."""
        before, per_pair = attention_cost(layer.attention)
        return BlockCost(before=before, attention=per_pair, after=hf.linear_weights(layer.mlp))

    def head(self, tokens: Tokens) -> Tensor:
        """The class token, or a classifier of it and the mean of the patches."""
        model: Any = self.model
        x = tokens.x
        if not _classifies(model):
            return x[:, 0, :]
        size = None if tokens.size is None else tokens.size[:, self.prefix :]
        mean = mean_of_patches(x[:, self.prefix :], size)
        return model.classifier(torch.cat([x[:, 0], mean], dim=1))  # type: ignore[no-any-return]
