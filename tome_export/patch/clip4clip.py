"""Merging for CLIP4Clip's video tower: ToMe in frames, TempMe (arXiv 2409.01156) across them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, cast

from torch import Tensor, nn

from tome_export.merge.macs import BlockCost
from tome_export.patch.attention import log_size_bias
from tome_export.patch.base import MergedModel
from tome_export.patch.checks import Zeros, check_plain, counted_macs
from tome_export.patch.clips import ClipMerger
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.patch.multihead import multihead, multihead_block_cost, same_arithmetic
from tome_export.patch.video import MergedVideo
from tome_export.spec import VIDEO_MASK

SUPPORTED = "CLIP4Clip's video tower (clip4clip_b32)"

_TOWER = ("tome_export.models.clip4clip", "Clip4ClipTower")


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family."""
    # By name: this layer lies below the one that makes models.
    if (type(model).__module__, type(model).__qualname__) == _TOWER:
        return MergedClip4Clip(model, settings)
    return None


class MergedClip4Clip(MergedVideo):
    """CLIP4Clip's tower that merges tokens; see ``MergedVideo``."""

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        check_plain(model, type(model).__name__)
        super().__init__(model, settings, prefix=1)

    @property
    def extra_inputs(self) -> Mapping[str, tuple[int, ...]]:
        """Which frames count."""
        return {VIDEO_MASK: (self.frames,)}

    @cached_property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block."""
        model: Any = self.model
        return tuple(
            multihead_block_cost(self.width, block.mlp) for block in model.transformer.resblocks
        )

    def fixed_macs(self, tokens: int) -> int:  # noqa: ARG002 (only class tokens are projected)
        """MACs per video of patch embedding and projection."""
        model: Any = self.model

        def outside(zeros: Zeros) -> None:
            model.conv1(zeros(*self.input_size))
            model.project(zeros(self.frames, self.width))

        return counted_macs(model, outside)

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """The blocks over the frames of all videos; clips are joined as scheduled."""
        model: Any = self.model
        clips, positions = cast(ClipMerger, merger), self.positions
        tokens = Tokens(model.embed(pixel_values.flatten(0, 1)))
        for layer, block in enumerate(model.transformer.resblocks):
            tokens = clips.join(tokens, layer, positions)
            x, size = tokens.x, tokens.size
            normed = block.ln_1(x)
            bias = log_size_bias(size if self.settings.prop_attn else None, x.dtype)
            out, attended = multihead(block.attn, normed, normed, bias)
            tokens = clips(Tokens(x + out, size), attended, layer)
            tokens = Tokens(tokens.x + block.mlp(block.ln_2(tokens.x)), tokens.size)
        return tokens

    def finish(self, tokens: Tokens, inputs: Mapping[str, Tensor]) -> Tensor:
        """The class tokens of all frames, projected and averaged over those that count."""
        model: Any = self.model
        classes = tokens.x[:, : self.clips[-1].prefix].flatten(0, 1)
        per_video = classes.reshape(-1, self.frames, self.width)
        return cast(Tensor, model.pool(per_video, inputs[VIDEO_MASK]))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the tower itself gives, of videos whose frames all count."""
        with same_arithmetic():
            return cast(
                Tensor, self.model(pixel_values, pixel_values.new_ones(pixel_values.shape[:2]))
            )
