"""Merging for ViT, DeiT and DINOv2 in Hugging Face Transformers."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import linear_weights
from tome_export.patch.base import MergedModel
from tome_export.patch.heads import OutputChoice, mean_of_patches, output_choice_from_heads
from tome_export.patch.hf import base as hf
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.reducers.base import AttentionInputs


def _classifies(model: nn.Module) -> bool:
    """Whether it is one of the library's classes with a classifier, taken off or not."""
    return hasattr(model, "classifier") or hasattr(model, "cls_classifier")


def attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, AttentionInputs]:
    """The attention of ViT, DeiT and DINOv2, in the layout of transformers 4 or 5.

    ``x [B, N, C]``, already normalised, and ``bias [B, 1, N, N]`` or None, to the output
    ``[B, N, C]`` and what was compared.
    """
    if hasattr(attn, "q_proj"):
        parts = attn.q_proj, attn.k_proj, attn.v_proj
        out, attended = hf.attention(
            attn, parts, x, bias, attn.head_dim, attn.scaling, attn.attention_dropout
        )
        return attn.o_proj(out), attended
    inner = attn.attention
    parts, width = (inner.query, inner.key, inner.value), inner.attention_head_size
    out, attended = hf.attention(inner, parts, x, bias, width, inner.scaling, inner.dropout_prob)
    return attn.output.dropout(attn.output.dense(out)), attended


def _layer_cost(layer: Any, *mlp: nn.Module) -> BlockCost:
    attn = layer.attention
    values = attn.v_proj if hasattr(attn, "v_proj") else attn.attention.value
    return BlockCost(linear_weights(attn), 2 * int(values.out_features), linear_weights(*mlp))


class _MergedTransformer(MergedModel):
    """What these models share: where their parts are."""

    def __init__(self, model: Any, settings: MergeSettings, prefix: int) -> None:
        base = _base(model)
        # In transformers 4 and, for DINOv2, in 5: ``encoder.layer``; else ``layers``.
        layers = base.encoder.layer if hasattr(base, "encoder") else base.layers
        layout = hf.library_layout(model, layers, prefix, self.layer_cost)
        super().__init__(model, settings, layout)

    @staticmethod
    @abstractmethod
    def layer_cost(layer: Any) -> BlockCost:
        """MACs per token of one layer."""

    @property
    def output_choice(self) -> OutputChoice:
        """Class scores, unless there is no classifier or it was taken off."""
        return output_choice_from_heads(*hf.classifiers_of(self.model).values())

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Prefix tokens and patches, positions added."""
        return cast(Tensor, _base(self.model).embeddings(pixel_values))

    def final(self, x: Tensor) -> Tensor:
        """The last norm."""
        return cast(Tensor, _base(self.model).layernorm(x))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the library's model itself gives."""
        model = self.model
        if self.settings.dense:
            output = _base(model)(pixel_values, return_dict=True)
            return cast(Tensor, output.last_hidden_state[:, self.prefix :])
        output = model(pixel_values, return_dict=True)
        if _classifies(model):
            return cast(Tensor, output.logits)
        pooled = output.pooler_output
        return cast(Tensor, output.last_hidden_state[:, 0] if pooled is None else pooled)


def _base(model: Any) -> Any:
    """The transformer inside a classifier; any other model is returned as it is."""
    return getattr(model, model.base_model_prefix, model) if _classifies(model) else model


class MergedVit(_MergedTransformer):
    """A ViT or DeiT that merges tokens; see ``MergedModel``.

    The output is ``logits`` of a classifier, else ``pooler_output``; without a pooler, the class
    token of ``last_hidden_state``. Dense features are ``last_hidden_state``.
    """

    library_classes = (
        *hf.class_names("vit", "ViTModel", "ViTForImageClassification"),
        *hf.class_names("deit", "DeiTModel", "DeiTForImageClassification"),
        *hf.class_names("deit", "DeiTForImageClassificationWithTeacher"),
    )
    backbone_classes = (*hf.class_names("vit", "ViTModel"), *hf.class_names("deit", "DeiTModel"))

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        # The class token, and DeiT's distillation token.
        super().__init__(model, settings, prefix=2 if model.config.model_type == "deit" else 1)

    @staticmethod
    def layer_cost(layer: Any) -> BlockCost:
        """MACs per token of one layer."""
        mlp = (layer.mlp,) if hasattr(layer, "mlp") else (layer.intermediate, layer.output)
        return _layer_cost(layer, *mlp)

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """The library's ``ViTLayer`` or ``DeiTLayer``."""
        out, attended = attention(block.attention, block.layernorm_before(tokens.x), bias)
        drop = getattr(block, "dropout", nn.Identity())
        tokens = merger(Tokens(drop(out) + tokens.x, tokens.size), attended, layer)
        x = block.layernorm_after(tokens.x)
        if hasattr(block, "mlp"):
            return Tokens(drop(block.mlp(x)) + tokens.x, tokens.size)
        return Tokens(block.output(block.intermediate(x), tokens.x), tokens.size)

    def head(self, tokens: Tokens) -> Tensor:
        """The library's head, which looks at prefix tokens only."""
        model = self.model
        x = tokens.x
        if hasattr(model, "distillation_classifier"):
            both = model.cls_classifier(x[:, 0, :]) + model.distillation_classifier(x[:, 1, :])
            return cast(Tensor, both / 2)
        if _classifies(model):
            return cast(Tensor, model.classifier(x[:, 0, :]))
        return x[:, 0] if model.pooler is None else cast(Tensor, model.pooler(x))


class MergedDino(_MergedTransformer):
    """A DINOv2, with or without registers, that merges tokens; see ``MergedModel``.

    The output is ``logits`` of a classifier, whose mean over patches counts every patch once,
    else ``pooler_output``, the class token. Dense features are ``last_hidden_state``. Images that
    are not square are for models that ``patch.hf.positions.fit`` made ready for them.
    """

    library_classes = (
        *hf.class_names("dinov2", "Dinov2Model", "Dinov2ForImageClassification"),
        *hf.class_names("dinov2_with_registers", "Dinov2WithRegistersModel"),
        *hf.class_names("dinov2_with_registers", "Dinov2WithRegistersForImageClassification"),
    )
    backbone_classes = (
        *hf.class_names("dinov2", "Dinov2Model", "Dinov2Backbone"),
        *hf.class_names("dinov2_with_registers", "Dinov2WithRegistersModel"),
        *hf.class_names("dinov2_with_registers", "Dinov2WithRegistersBackbone"),
    )

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        height, width = hf.pair(model.config.image_size)
        if height != width and not hf.is_fitted(_base(model).embeddings):
            raise InputError(
                f"model {type(model).__name__} has an image size of {height} x {width}; the "
                "library resamples its positions as those of square images; expected a square"
            )
        registers = int(getattr(model.config, "num_register_tokens", 0))
        super().__init__(model, settings, prefix=1 + registers)

    @staticmethod
    def layer_cost(layer: Any) -> BlockCost:
        """MACs per token of one layer."""
        return _layer_cost(layer, layer.mlp)

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """The library's ``Dinov2Layer``."""
        out, attended = attention(block.attention, block.norm1(tokens.x), bias)
        x = block.drop_path(block.layer_scale1(out)) + tokens.x
        tokens = merger(Tokens(x, tokens.size), attended, layer)
        out = block.layer_scale2(block.mlp(block.norm2(tokens.x)))
        return Tokens(block.drop_path(out) + tokens.x, tokens.size)

    def head(self, tokens: Tokens) -> Tensor:
        """The class token, or a classifier of it and the mean of the patches."""
        x = tokens.x
        if not _classifies(self.model):
            return x[:, 0, :]
        size = None if tokens.size is None else tokens.size[:, self.prefix :]
        mean = mean_of_patches(x[:, self.prefix :], size)
        return cast(Tensor, self.model.classifier(torch.cat([x[:, 0], mean], dim=1)))
