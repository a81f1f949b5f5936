"""Merging for timm's models inside open_clip's ``TimmModel``, as SigLIP and EVA-CLIP are there."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.patch import timm_eva, timm_vit
from tome_export.patch.base import MergedModel
from tome_export.patch.checks import Zeros, check_plain, counted_macs, require
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.spec import PatchGrid


class MergedTimmTower(MergedModel):
    """A ``TimmModel`` whose trunk merges tokens; see ``MergedModel``.

    Raises:
        InputError: if a part of the trunk or of the head is not understood.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        from timm.layers import Mlp

        name = "open_clip TimmModel"
        check_plain(model, name)
        trunk = timm_vit.merged(model.trunk, settings) or timm_eva.merged(model.trunk, settings)
        if trunk is None:
            raise InputError(
                f"trunk class {type(model.trunk).__name__} of {name} is not supported; "
                f"supported: {timm_vit.SUPPORTED}; {timm_eva.SUPPORTED}"
            )
        for part in model.head:
            require(part, {nn.Identity, nn.Dropout, nn.Linear, Mlp}, "head", name)
        first = trunk.layers[0].tokens_in if trunk.layers else trunk.prefix
        # In a tuple, so that its parameters are not registered a second time.
        self._trunk = (trunk,)
        super().__init__(model, settings, len(trunk.layers), first, trunk.prefix)

    @property
    def class_token(self) -> bool:
        """Whether one of the prefix tokens is a class token."""
        return self._trunk[0].class_token

    @property
    def width(self) -> int:
        """C of the tokens between the blocks."""
        return self._trunk[0].width

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, in pixels."""
        return self._trunk[0].image_size

    @property
    def patch_grid(self) -> PatchGrid | None:
        """Where the patches lie in the image."""
        return self._trunk[0].patch_grid

    @property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block."""
        return self._trunk[0].block_costs

    def fixed_macs(self, tokens: int) -> int:
        """MACs per image of patch embedding, pooling and projection."""
        trunk = self._trunk[0].fixed_macs(tokens)
        if self.settings.dense:
            return trunk
        model: Any = self.model

        def outside(zeros: Zeros) -> None:
            linear = next((m for m in model.head.modules() if isinstance(m, nn.Linear)), None)
            if linear is not None:
                model.head(zeros(1, linear.in_features))

        return trunk + counted_macs(model, outside)

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """The trunk's blocks and final norm."""
        return self._trunk[0].encode(pixel_values, merger)

    def head(self, tokens: Tokens) -> Tensor:
        """The trunk's pooling, then open_clip's projection."""
        model: Any = self.model
        return cast(Tensor, model.head(self._trunk[0].head(tokens)))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What open_clip's model itself gives, not of unit length."""
        if self.settings.dense:
            return self._trunk[0].library(pixel_values)
        return cast(Tensor, self.model(pixel_values))
