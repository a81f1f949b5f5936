"""STOP's video tower (arXiv 2503.15973): CLIP4Clip with prompts for the video and every frame.

Each frame has its class token, its prompts and its patches. A few global prompts attend to every
token of the video; a frame attends to them and to itself. Prompts of frames are new in every block.
Two prompts are made from the video itself (sections 3.2 and 3.3): names of their tensors are those
of the public code, which calls the setting ``group2-2``; so are the sizes of its kernels and the
factor 0.05.

The merged tower, ToMe inside frames and across them, is the sound reading of a public combination
of the two that cannot run; docs/video-towers.md says where it differs and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.merge.macs import SharedCost
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.patch.attention import multihead_block_cost, same_arithmetic
from tome_export.patch.checks import check_unhooked
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.reducers.base import AttentionInputs
from tome_export.video.clip4clip import ClipBlock, ClipFrames, frame_positions
from tome_export.video.options import HEAD_WIDTH, ClipSizes, without_last_merge
from tome_export.video.tower import MergedVideo

PROMPTS = 4
"""Prompts of each frame, and global ones: the public code's default for both."""

ADAPTER_WIDTH, ADAPTER_STRENGTH = 32, 0.1

STRENGTH = 0.05
"""How much of a prompt is added."""

REGIONS = 6
"""Patch positions of every frame that count as the ones with most motion."""


class VideoConv(nn.Conv3d):
    """``Conv3d`` by ``convolved``; stride 1."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """``[B, C, F, H, W]``."""
        return convolved(input, self.weight, self.bias, self.around)

    @property
    def around(self) -> tuple[int, int, int]:
        """Padding of frames, rows and columns."""
        return cast("tuple[int, int, int]", self.padding)


def convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int, int]
) -> Tensor:
    """A 3-d convolution of ``[B, C, F, H, W]`` that fits into memory in every precision.

    On CPUs torch has kernels for float32 alone. For other dtypes it writes out the window of every
    pixel, 31 GB for a video at full size; so float64 goes frame by frame, and half precision is
    computed in float32 and rounded, which is how its kernels add up, too.
    """
    if x.dtype == torch.float32 or x.device.type != "cpu" or torch.compiler.is_exporting():
        return functional.conv3d(x, weight, bias, padding=padding)
    if x.dtype != torch.float64:
        wide = None if bias is None else bias.float()
        return functional.conv3d(x.float(), weight.float(), wide, padding=padding).to(x.dtype)
    time, *around = padding
    frames, window = x.shape[2] + 2 * time, weight.shape[2]
    padded = functional.pad(x, (0, 0, 0, 0, time, time))
    one = [
        functional.conv3d(padded[n : n + 1, :, t : t + window], weight, bias, padding=(0, *around))
        for n in range(len(x))
        for t in range(frames - window + 1)
    ]
    joined = torch.cat(one, dim=2).squeeze(0)
    return joined.reshape(len(weight), len(x), -1, *joined.shape[2:]).transpose(0, 1)


class TemporalPrompt(nn.Module):
    """Prompts inside frames, added to their pixels, and between frames, tokens of each frame."""

    def __init__(self, width: int, patches: int, prompts: int) -> None:
        """Make it with fresh weights, for frames of so many patches and prompts of some width."""
        super().__init__()
        kernel, same = (3, 11, 11), (1, 5, 5)
        # Two convolutions with nothing between them, as published.
        self.Conv = nn.Sequential(
            VideoConv(3, 9, kernel, padding=same),
            VideoConv(9, 9, kernel, padding=same),
            nn.PReLU(),
            VideoConv(9, 9, kernel, padding=same),
            nn.PReLU(),
            VideoConv(9, 16, kernel, padding=same),
        )
        self.MLP = nn.Sequential(nn.Linear(16, 16), nn.PReLU(), nn.Linear(16, 3))
        self.Cal_Net = VideoConv(3, 1, (5, 11, 11), padding=(2, 5, 5))
        self.Attention = nn.MultiheadAttention(width, max(1, width // HEAD_WIDTH), batch_first=True)
        wide, around = (3, 15, 25), (1, 7, 12)
        self.InterConv = nn.Sequential(
            VideoConv(1, 9, wide, padding=around),
            nn.PReLU(),
            VideoConv(9, 1, wide, padding=around),
        )
        self.InterMLP = nn.Sequential(nn.Linear(patches, 16), nn.PReLU(), nn.Linear(16, prompts))
        self.Cal_Net_Inter = VideoConv(1, 1, (5, 11, 11), padding=(2, 5, 5))

    def forward(self, video: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """Add the prompt inside frames ``[B, F, 3, H, W]``, of ``side`` patches along one side.

        Returns also ``[B, F, patches]`` of 0 and 1: where motion is largest.
        """
        x = video.transpose(1, 2)
        prompt = self.MLP(self.Conv(x).movedim(1, -1)).movedim(-1, 2)
        motion = self.moving(_wide(self.Cal_Net, x)[:, 0], side).to(video.dtype)
        # The public code repeats the grid of regions over the frame instead of enlarging it: pixel
        # (h, w) belongs to region (h mod side, w mod side). Its checkpoints are trained so.
        times = video.shape[-2] // side, video.shape[-1] // side
        tiled = motion.repeat(1, 1, *times)[:, :, None]
        prompted = video + STRENGTH * prompt + STRENGTH * prompt * tiled
        return prompted, motion.flatten(2)

    def moving(self, activity: Tensor, side: int) -> Tensor:
        """The regions above the seventh largest: ``[B, F, H, W]`` to ``[B, F, side, side]``."""
        batch, frames, height, width = activity.shape
        split = batch, frames, height // side, side, width // side, side
        regions = activity.reshape(split).mean(dim=(2, 4))
        least = regions.flatten(2).topk(REGIONS + 1, dim=-1).values[..., -1]
        return (regions > least[..., None, None]).to(activity.dtype)

    def between(self, patches: Tensor, motion: Tensor) -> Tensor:
        """The prompt tokens ``[B, F, prompts, C]`` that every frame gets from all frames.

        The importance of frames is scaled to [0, 1] per video; the public code does it over the
        whole batch, so that a video's features depend on its neighbours there. ``patches`` ``[B, F,
        P, C]`` are tokens in front of the first block, ``motion`` ``[B, F, P]`` is that of
        ``forward``.
        """
        flat = patches.flatten(1, 2)
        x = self.Attention(flat, flat, flat, need_weights=False)[0].unflatten(1, patches.shape[1:3])
        x = x[:, None]
        weight = self.Cal_Net_Inter(x)[:, 0]
        weight = (weight + weight * motion[..., None]).mean(dim=(2, 3))
        low, high = weight.amin(dim=1, keepdim=True), weight.amax(dim=1, keepdim=True)
        # Frames that are all alike are all unimportant.
        weight = (weight - low) / (high - low).clamp_min(torch.finfo(weight.dtype).tiny)
        x = self.InterMLP(self.InterConv(x)[:, 0].transpose(2, 3)).transpose(2, 3)
        return cast(Tensor, STRENGTH * (x + x * weight[..., None, None]))


def _wide(conv: VideoConv, x: Tensor) -> Tensor:
    """The convolution in float32 or wider: what is above the seventh largest hangs on little."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if conv.bias is None else conv.bias.to(dtype)
    return convolved(x.to(dtype), conv.weight.to(dtype), bias, conv.around)


class StopBlock(ClipBlock):
    """A block of CLIP with an adapter beside its MLP, which the public code calls LoRA."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__(width, heads)
        self.LoRA = nn.Sequential(
            nn.Linear(width, ADAPTER_WIDTH), nn.PReLU(), nn.Linear(ADAPTER_WIDTH, width)
        )

    def behind(self, x: Tensor) -> Tensor:
        """MLP and adapter: ``[..., C]`` to the same."""
        return cast(Tensor, x + self.mlp(self.ln_2(x)) + ADAPTER_STRENGTH * self.LoRA(x))

    def forward(self, x: Tensor, shared: Tensor | None = None) -> Any:
        """Frames ``[B F, N, C]`` and global prompts ``[B, G, C]`` to the same."""
        if shared is None:
            raise TypeError("a STOP block takes frames and global prompts")
        per_video = x.shape[0] // shared.shape[0]
        frames, prompts = self.ln_1(x), self.ln_1(shared)
        context = torch.cat([prompts.repeat_interleave(per_video, dim=0), frames], dim=1)
        everything = torch.cat([prompts, frames.reshape(shared.shape[0], -1, x.shape[-1])], dim=1)
        x = x + self.attn(frames, context, context, need_weights=False)[0]
        shared = shared + self.attn(prompts, everything, everything, need_weights=False)[0]
        return self.behind(x), self.behind(shared)


class StopBlocks(nn.Module):
    """The blocks, for the names of their tensors; the tower runs them."""

    def __init__(self, sizes: ClipSizes) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            StopBlock(sizes.width, sizes.heads) for _ in range(sizes.depth)
        )


class StopTower(ClipFrames):
    """STOP's tower; its output is the first global prompt's feature, of unit length.

    Attributes:
        prompt_embeddings: ``[1, G, C]``, the global prompts that enter the first block.
        frame_prompts: ``[depth, F, prompts, C]``, what training shares with the text tower: the
            public code makes it from an embedding table, the same for every video.
        frame_positions: As in ``Clip4ClipTower``.
    """

    def __init__(
        self, sizes: ClipSizes, frames: int, positions: Mapping[int, int] | None = None
    ) -> None:
        """Make the tower with fresh weights; for ``positions`` see ``frame_positions``."""
        super().__init__(sizes, frames)
        width = sizes.width
        self.prompt_embeddings = nn.Parameter(0.02 * torch.randn(1, PROMPTS, width))
        self.frame_prompts = nn.Parameter(0.02 * torch.randn(sizes.depth, frames, PROMPTS, width))
        self.TemporalPrompt = TemporalPrompt(width, sizes.side**2, PROMPTS)
        self.frame_positions = frame_positions(positions, width)

    def make_blocks(self) -> nn.Module:
        """Blocks with adapters."""
        return StopBlocks(self.sizes)

    def begin(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Everything in front of the first block, of ``[B, F, 3, H, W]``.

        Returns frames ``[B F, 1 + prompts + P, C]``; global prompts ``[B, G, C]``; and what the
        frames' prompts of every block have added to them, ``[B, F, prompts, C]``.
        """
        batch = pixel_values.shape[0]
        video, motion = self.TemporalPrompt(pixel_values, self.sizes.side)
        x = self.embed(video.flatten(0, 1))
        patches = x[:, 1:].reshape(batch, self.frames, -1, x.shape[-1])
        between = self.TemporalPrompt.between(patches, motion)
        prompts = (self.frame_prompts[0] + between).flatten(0, 1)
        x = torch.cat([x[:, :1], prompts, x[:, 1:]], dim=1)
        return x, self.prompt_embeddings.expand(batch, -1, -1), between

    def finish(self, shared: Tensor) -> Tensor:
        """Global prompts ``[B, G, C]`` to features ``[B, E]``."""
        return self.project(shared[:, 0])

    def with_merging(self, settings: MergeSettings) -> MergedStop:
        """The tower with token merging; ``patch`` calls it."""
        return MergedStop(self, settings)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, F, 3, H, W]`` to ``[B, E]``, of unit length."""
        x, shared, between = self.begin(pixel_values)
        for layer, block in enumerate(cast(StopBlocks, self.transformer).resblocks):
            if layer:
                prompts = (self.frame_prompts[layer] + between).flatten(0, 1)
                x = torch.cat([x[:, :1], prompts, x[:, 1 + PROMPTS :]], dim=1)
            x, shared = block(x, shared)
        return self.finish(shared)


class MergedStop(MergedVideo):
    """STOP's tower that merges tokens; see ``MergedVideo``.

    The class token and the prompts of a frame are protected, also where frames are joined: each
    block's new prompts take the places of the old ones.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        check_unhooked(model, type(model).__name__)
        self._prompts = int(model.frame_prompts.shape[2])
        width, shared = int(model.sizes.width), int(model.prompt_embeddings.shape[1])
        costs = []
        for block in model.transformer.resblocks:
            cost = multihead_block_cost(width, block.mlp, block.LoRA)
            costs.append(SharedCost(cost.before, cost.attention, cost.after, shared))
        costs[-1] = replace(costs[-1], last=True)
        super().__init__(model, settings, 1 + self._prompts, costs)

    def token_counts(self, schedule: Schedule) -> tuple[LayerTokens, ...]:
        """See ``MergedVideo``; nobody reads what the last merge would make."""
        return without_last_merge(super().token_counts(schedule))

    def embed(self, pixel_values: Tensor) -> Tensor:
        """Class token, prompts and patches of every frame, ``[B F, N, C]``."""
        return cast(Tensor, self.model.begin(pixel_values)[0])

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """The blocks; what is given on is the global prompts ``[B, G, C]``, not the frames."""
        x, shared, between = self.model.begin(pixel_values)
        tokens = Tokens(x)
        for layer, block in enumerate(self.blocks):
            if layer:
                prompts = self.model.frame_prompts[layer] + between
                tokens = Tokens(self._with_prompts(tokens.x, prompts, layer), tokens.size)
            tokens = merger.ahead(tokens, layer)
            x, shared, attended = self._attention(block, tokens, shared, layer)
            tokens = merger(Tokens(x, tokens.size), attended, layer)
            tokens = Tokens(block.behind(tokens.x), tokens.size)
            shared = block.behind(shared)
        return Tokens(shared)

    def finish(self, tokens: Tokens, inputs: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """The first global prompt's feature."""
        return cast(Tensor, self.model.finish(tokens.x))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the tower itself gives."""
        with same_arithmetic():
            return cast(Tensor, self.model(pixel_values))

    def _with_prompts(self, x: Tensor, prompts: Tensor, layer: int) -> Tensor:
        """Clips ``[B clips, N, C]`` with new prompts ``[B, F, prompts, C]`` of their frames."""
        each, counts = 1 + self._prompts, self.layers[layer]
        per_clip = self.frames // (counts.sequences * counts.joined)
        front = x[:, : per_clip * each].reshape(-1, per_clip, each, x.shape[2])
        new = prompts.reshape(-1, per_clip, self._prompts, x.shape[2])
        front = torch.cat([front[:, :, :1], new], dim=2).flatten(1, 2)
        return torch.cat([front, x[:, per_clip * each :]], dim=1)

    def _attention(
        self, block: Any, tokens: Tokens, shared: Tensor, layer: int
    ) -> tuple[Tensor, Tensor, AttentionInputs]:
        """Attention and its residual, of clips and of global prompts.

        Clips see the global prompts and themselves, global prompts everything. Each token is
        projected once; the tower's own forward projects those of frames twice.
        """
        attn, x, clips = block.attn, tokens.x, self.layers[layer].sequences
        batch = shared.shape[0]
        heads = attn.num_heads, attn.head_dim

        def projected(y: Tensor) -> list[Tensor]:
            packed = functional.linear(block.ln_1(y), attn.in_proj_weight, attn.in_proj_bias)
            return [p.reshape(*p.shape[:2], *heads).transpose(1, 2) for p in packed.chunk(3, -1)]

        def together(y: Tensor) -> Tensor:
            """Heads of all clips of a video as one sequence, ``[B, H, clips N, D]``."""
            return y.transpose(1, 2).reshape(batch, clips * x.shape[1], *heads).transpose(1, 2)

        def repeated(y: Tensor) -> Tensor:
            """For every clip of a video, ``[B clips, H, G, D]``."""
            return y[:, None].expand(-1, clips, -1, -1, -1).flatten(0, 1)

        q, k, v = projected(x)
        own_q, own_k, own_v = projected(shared)
        bias = all_bias = None
        if tokens.size is not None and self.settings.prop_attn:
            logs = tokens.size.log().to(x.dtype)
            count, rows = shared.shape[1], x.shape[1]
            one = functional.pad(logs, (count, 0))[:, None, None]
            bias = one.expand(-1, -1, rows, -1)
            all_logs = functional.pad(logs.reshape(batch, clips * x.shape[1]), (count, 0))[
                :, None, None
            ]
            all_bias = all_logs.expand(-1, -1, count, -1)
        keys, values = torch.cat([repeated(own_k), k], 2), torch.cat([repeated(own_v), v], 2)
        every_k, every_v = torch.cat([own_k, together(k)], 2), torch.cat([own_v, together(v)], 2)
        attend = functional.scaled_dot_product_attention
        out = attend(q, keys, values, attn_mask=bias).transpose(1, 2).reshape(x.shape)
        own = attend(own_q, every_k, every_v, attn_mask=all_bias).transpose(1, 2)
        own = own.reshape(shared.shape)
        return x + attn.out_proj(out), shared + attn.out_proj(own), AttentionInputs(k)
