"""STOP's video tower (arXiv 2503.15973): CLIP4Clip with prompts for the video and every frame.

Each frame has its class token, its prompts and its patches. A few global prompts attend to every
token of the video; a frame attends to them and to itself. Prompts of frames are new in every block.
Two prompts are made from the video itself (sections 3.2 and 3.3): names of their tensors are those
of the public code, which calls the setting ``group2-2``; so are the sizes of its kernels and the
factor 0.05.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.models.clip4clip import ClipBlock, ClipFrames, frame_positions
from tome_export.models.recipe import HEAD_WIDTH, ClipSizes

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
        """Add the prompt inside frames.

        Args:
            video: ``[B, F, 3, H, W]``.
            side: Patches along one side of a frame.

        Returns:
            The video with its prompt, and ``[B, F, patches]`` of 0 and 1: where motion is largest.
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
        """The prompt tokens that every frame gets from all frames.

        The importance of frames is scaled to [0, 1] per video; the public code does it over the
        whole batch, so that a video's features depend on its neighbours there.

        Args:
            patches: ``[B, F, P, C]``, the tokens of the patches in front of the first block.
            motion: ``[B, F, P]`` of ``forward``.

        Returns:
            ``[B, F, prompts, C]``.
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
        """Everything in front of the first block.

        Args:
            pixel_values: ``[B, F, 3, H, W]``.

        Returns:
            Frames ``[B F, 1 + prompts + P, C]``; global prompts ``[B, G, C]``; and what the frames'
            prompts of every block have added to them, ``[B, F, prompts, C]``.
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

    def forward(self, pixel_values: Tensor) -> Tensor:
        """``[B, F, 3, H, W]`` to ``[B, E]``, of unit length."""
        x, shared, between = self.begin(pixel_values)
        for layer, block in enumerate(cast(StopBlocks, self.transformer).resblocks):
            if layer:
                prompts = (self.frame_prompts[layer] + between).flatten(0, 1)
                x = torch.cat([x[:, :1], prompts, x[:, 1 + PROMPTS :]], dim=1)
            x, shared = block(x, shared)
        return self.finish(shared)


def folded_prompts(state: Mapping[str, Tensor], frames: int, width: int) -> Tensor:
    """The frames' prompts of every block, from the tensors that training makes them of.

    With a shared latent space of the kind ``transformer``, one block runs over the rows of an
    embedding table, text prompts first, for each block of the tower; with ``linear``, which the
    public code can only run on a single frame, that frame has the table's rows.

    Args:
        state: Tensors by the public code's names, those of the whole CLIP, without ``clip.``.
        frames: Frames of one video.
        width: C.

    Returns:
        ``[depth, F, prompts, C]``.
    """
    if "visual_prompt_embedding" in state:
        table = state["visual_prompt_embedding"].float()
        rows = table.reshape(PROMPTS, -1, width).transpose(0, 1)
        return rows[:, None].expand(-1, frames, -1, -1).contiguous()
    table = state["unified_prompt_embedding.weight"].float()
    block = ClipBlock(width, max(1, width // HEAD_WIDTH))
    front = "PromptTransformer.resblocks.0."
    own = {key.removeprefix(front): v.float() for key, v in state.items() if key.startswith(front)}
    block.load_state_dict(own)
    rows = table.reshape(table.shape[0], -1, width).transpose(0, 1)
    with torch.no_grad():
        made: Tensor = block(rows)
    return made[:, -frames * PROMPTS :].reshape(-1, frames, PROMPTS, width).contiguous()
