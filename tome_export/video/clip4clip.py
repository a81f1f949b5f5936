"""CLIP4Clip's video tower (arXiv 2104.08860), mean pooling: CLIP's image tower on every frame.

Written with torch's own layers, it is the yardstick of the merged tower: ToMe in frames, TempMe
(arXiv 2409.01156) across them. Names of its tensors are those of OpenAI's CLIP behind ``visual.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.patch.attention import multihead, multihead_block_cost, same_arithmetic
from tome_export.patch.checks import MakeZeros, check_unhooked, count_macs
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.video import VIDEO_MASK
from tome_export.video.options import ClipSizes
from tome_export.video.tower import MergedVideo


class QuickGELU(nn.Module):
    """CLIP's activation, ``x sigmoid(1.702 x)``."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return x * torch.sigmoid(1.702 * x)


class ClipBlock(nn.Module):
    """One block of CLIP: attention and MLP, each behind a norm and added to the tokens."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", QuickGELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to the same."""
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        return cast(Tensor, x + self.mlp(self.ln_2(x)))


class ClipBlocks(nn.Module):
    """The blocks in order; a module of its own for the names of its tensors."""

    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ClipBlock(width, heads) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to the same."""
        for block in self.resblocks:
            x = block(x)
        return x


class ClipFrames(nn.Module):
    """What is around the blocks of a CLIP image tower that runs on the frames of a video."""

    def __init__(self, sizes: ClipSizes, frames: int) -> None:
        super().__init__()
        self.sizes, self.frames = sizes, frames
        width, scale = sizes.width, sizes.width**-0.5
        self.conv1 = nn.Conv2d(3, width, sizes.patch, sizes.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(sizes.tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = self.make_blocks()
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(scale * torch.randn(width, sizes.features))

    def make_blocks(self) -> nn.Module:
        """The blocks, under ``resblocks``."""
        sizes = self.sizes
        return ClipBlocks(sizes.width, sizes.depth, sizes.heads)

    def embed(self, frames: Tensor) -> Tensor:
        """``[B F, 3, H, W]`` to the tokens ``[B F, N, C]`` that enter the first block."""
        x = self.conv1(frames).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(x.shape[0], 1, -1)
        x = torch.cat([first, x], dim=1) + self.positional_embedding
        return cast(Tensor, self.ln_pre(x))

    def project(self, x: Tensor) -> Tensor:
        """Tokens ``[..., C]`` to features ``[..., E]`` of unit length, at least in float32."""
        features = self.ln_post(x) @ self.proj
        wide = torch.promote_types(features.dtype, torch.float32)
        return functional.normalize(features.to(wide), dim=-1)


def frame_positions(positions: Mapping[int, int] | None, width: int) -> nn.ParameterDict:
    """TempMe's vectors ``[clips, C]``, zero, by the layer that so many clips enter."""
    return nn.ParameterDict(
        {
            str(layer): nn.Parameter(torch.zeros(clips, width))
            for layer, clips in (positions or {}).items()
        }
    )


class Clip4ClipTower(ClipFrames):
    """CLIP4Clip with mean pooling ("meanP", section 3.3): no weights beyond CLIP's own.

    Attributes:
        frame_positions: TempMe's learned vectors ``[clips, C]`` by the layer that joins clips,
            empty without; they act only where clips are merged, so not in ``forward``.
    """

    def __init__(
        self, sizes: ClipSizes, frames: int, positions: Mapping[int, int] | None = None
    ) -> None:
        """Make the tower with fresh weights; for ``positions`` see ``frame_positions``."""
        super().__init__(sizes, frames)
        self.frame_positions = frame_positions(positions, sizes.width)

    def with_merging(self, settings: MergeSettings) -> MergedClip4Clip:
        """The tower with token merging; ``patch`` calls it."""
        return MergedClip4Clip(self, settings)

    def forward(self, pixel_values: Tensor, video_mask: Tensor) -> Tensor:
        """Embed videos ``[B, F, 3, H, W]``: ``[B, E]``, the mean of the frames' unit features.

        ``video_mask`` ``[B, F]`` is 1 for frames that count and 0 for padding.
        """
        x = self.transformer(self.embed(pixel_values.flatten(0, 1)))
        return self.pool(x[:, 0].unflatten(0, (-1, self.frames)), video_mask)

    def pool(self, classes: Tensor, video_mask: Tensor) -> Tensor:
        """Class tokens ``[B, F, C]`` to ``[B, E]``: projected, unit length, mean over the mask."""
        features = self.project(classes)
        weight = video_mask.to(features.dtype)[..., None]
        # A video with no frame at all gives zero.
        return (features * weight).sum(dim=1) / weight.sum(dim=1).clamp_min(1.0)


class MergedClip4Clip(MergedVideo):
    """CLIP4Clip's tower that merges tokens; see ``MergedVideo``."""

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        check_unhooked(model, type(model).__name__)
        width, blocks = int(model.sizes.width), model.transformer.resblocks
        costs = [multihead_block_cost(width, block.mlp) for block in blocks]
        super().__init__(model, settings, 1, costs)

    @property
    def extra_inputs(self) -> Mapping[str, tuple[int, ...]]:
        """Which frames count."""
        return {VIDEO_MASK: (self.frames,)}

    def fixed_macs(self, tokens: int) -> int:  # noqa: ARG002 (only class tokens are projected)
        """MACs per video of patch embedding and projection."""
        model = self.model

        def outside(zeros: MakeZeros) -> None:
            model.conv1(zeros(*self.input_size))
            model.project(zeros(self.frames, self.width))

        return count_macs(model, outside)

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token and patches of every frame, ``[B F, N, C]``."""
        return cast(Tensor, self.model.embed(pixel_values.flatten(0, 1)))

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """A ``ClipBlock`` over the clips of all videos."""
        normed = block.ln_1(tokens.x)
        out, attended = multihead(block.attn, normed, normed, bias)
        tokens = merger(Tokens(tokens.x + out, tokens.size), attended, layer)
        return Tokens(tokens.x + block.mlp(block.ln_2(tokens.x)), tokens.size)

    def finish(self, tokens: Tokens, inputs: Mapping[str, Tensor]) -> Tensor:
        """The class tokens of all frames, projected and averaged over those that count."""
        classes = tokens.x[:, : self.frames // self.layers[-1].sequences].flatten(0, 1)
        per_video = classes.reshape(-1, self.frames, self.width)
        return cast(Tensor, self.model.pool(per_video, inputs[VIDEO_MASK]))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the tower itself gives, of videos whose frames all count."""
        ones = pixel_values.new_ones(pixel_values.shape[:2])
        with same_arithmetic():
            return cast(Tensor, self.model(pixel_values, ones))
