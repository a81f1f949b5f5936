"""Merging for the vision tower of LLaVA (``models.llava.LlavaTower``)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import Tensor, nn

from tome_export.merge.macs import BlockCost
from tome_export.patch import hf
from tome_export.patch.attention import log_size_bias
from tome_export.patch.base import MergedModel
from tome_export.patch.checks import Zeros, check_plain, counted_macs
from tome_export.patch.hf_clip import check_layer, layer_cost, layer_forward
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.spec import PatchGrid

SUPPORTED = "LLaVA's vision tower (hf:<checkpoint folder>)"

_TOWER = ("tome_export.models.llava", "LlavaTower")


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family.

    Raises:
        InputError: if a part of the model is not understood.
    """
    # By name: this layer lies below the one that makes models.
    if (type(model).__module__, type(model).__qualname__) == _TOWER:
        return MergedLlavaTower(model, settings)
    return None


class MergedLlavaTower(MergedModel):
    """A LLaVA tower that merges in all of its layers; see ``MergedModel``.

    The class token is protected also where the language model does not get it.

    Raises:
        InputError: if a part of the model is not understood.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        name = type(model).__name__
        hf.check_placed(model, name)
        check_plain(model, name)
        hf.check_modules(model.vision_model, name)
        self._encoder_layers = tuple(model.vision_model.encoder.layers)
        for layer in self._encoder_layers:
            check_layer(layer, name)
        self._patch_grid = hf.grid_of(model.vision_model.config, name)
        depth = len(self._encoder_layers)
        super().__init__(model, settings, depth, self._patch_grid.patches + 1, prefix=1)

    @property
    def class_token(self) -> bool:
        """CLIP's transformers all have one."""
        return True

    @property
    def width(self) -> int:
        """C of the tokens between the layers."""
        return int(self.model.vision_model.embeddings.embed_dim)  # type: ignore[union-attr, arg-type]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""
        embed: Any = self.model.vision_model.embeddings  # type: ignore[union-attr]
        config = embed.config
        return int(config.num_channels), *hf.pair(config.image_size)

    @property
    def patch_grid(self) -> PatchGrid:
        """Where the patches lie in the image."""
        return self._patch_grid

    @property
    def gives_tokens(self) -> bool:
        """One feature vector per token that is left, or per patch where they are dense."""
        return True

    @cached_property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each layer."""
        return tuple(layer_cost(layer) for layer in self._encoder_layers)

    def fixed_macs(self, tokens: int) -> int:
        """MACs per image of the patch embedding, and of the projector for the final tokens."""
        model: Any = self.model

        def outside(zeros: Zeros) -> None:
            embed = model.vision_model.embeddings
            embed.patch_embedding(zeros(1, *self.input_size))
            x = zeros(1, tokens, embed.embed_dim)
            whole = self.settings.dense or self.settings.compressor is not None
            model.project(x if whole else model.select(x))

        return counted_macs(model, outside)

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """The layers up to the selected one, with ``merger`` called once in every one."""
        model: Any = self.model
        vision = model.vision_model
        tokens = Tokens(vision.pre_layrnorm(vision.embeddings(pixel_values)))
        for index, layer in enumerate(self._encoder_layers):
            size = tokens.size if self.settings.prop_attn else None
            bias = log_size_bias(size, tokens.x.dtype)
            tokens = layer_forward(layer, tokens, bias, merger, index)
            tokens = merger.behind(tokens, index)
        return tokens

    def head(self, tokens: Tokens) -> Tensor:
        """The selected features of the tokens that are left, projected."""
        model: Any = self.model
        return model.project(model.select(tokens.x))  # type: ignore[no-any-return]

    def token_features(self, tokens: Tokens) -> Tensor:
        """Projected before they are unmerged, which is less work and the same."""
        model: Any = self.model
        return model.project(tokens.x)  # type: ignore[no-any-return]

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the tower itself gives, by the library's own forward."""
        model: Any = self.model
        output: Tensor = model(pixel_values)
        # Dense outputs never hold the class token.
        keeps_class = model.select_feature == "cls_patch"
        return output[:, 1:] if self.settings.dense and keeps_class else output
