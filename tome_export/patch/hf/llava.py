"""Merging for the vision tower of LLaVA (``models.llava.LlavaTower``)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor

from tome_export.patch.base import MergedModel, ModelLayout
from tome_export.patch.checks import check_unhooked
from tome_export.patch.hf import base as hf
from tome_export.patch.hf.clip import check_layer, layer_cost, layer_forward
from tome_export.patch.merger import Merger, MergeSettings, Tokens


class MergedLlavaTower(MergedModel):
    """A LLaVA tower that merges in all of its layers; see ``MergedModel``.

    The class token is protected also where the language model does not get it.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        name = type(model).__name__
        hf.check_placed(model, name)
        check_unhooked(model, name)
        vision = model.vision_model
        hf.check_modules(vision, name)
        layers = tuple(vision.encoder.layers)
        for layer in layers:
            check_layer(layer, name)
        config = vision.embeddings.config
        grid = hf.grid_from_config(vision.config, name)
        layout = ModelLayout(
            blocks=layers,
            costs=[layer_cost(layer) for layer in layers],
            width=int(vision.embeddings.embed_dim),
            input_size=(int(config.num_channels), *hf.pair(config.image_size)),
            tokens=grid.patches + 1,
            prefix=1,
            class_token=True,
            grid=grid,
        )
        super().__init__(model, settings, layout)

    @property
    def gives_tokens(self) -> bool:
        """One feature vector per token that is left, or per patch where they are dense."""
        return True

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token and patches, positions added, normalised."""
        vision = self.model.vision_model
        return cast(Tensor, vision.pre_layrnorm(vision.embeddings(pixel_values)))

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """The library's encoder layer, of those up to the selected one."""
        return layer_forward(block, tokens, bias, merger, layer)

    def head(self, tokens: Tokens) -> Tensor:
        """The selected features of the tokens that are left, projected."""
        return cast(Tensor, self.model.project(self.model.select(tokens.x)))

    def token_features(self, tokens: Tokens) -> Tensor:
        """Projected before they are unmerged, which is less work and the same."""
        return cast(Tensor, self.model.project(tokens.x))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the tower itself gives, by the library's own forward."""
        output: Tensor = self.model(pixel_values)
        # Dense outputs never hold the class token.
        keeps_class = self.model.select_feature == "cls_patch"
        return output[:, 1:] if self.settings.dense and keeps_class else output
