"""STOP's two prompts made from the video itself (arXiv 2503.15973, sections 3.2 and 3.3).

Names of the tensors are those of the public code, which calls the setting ``group2-2``; so are the
sizes of its kernels and the factor 0.05.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.models.clip_sizes import HEAD_WIDTH

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
    """A 3-d convolution that fits into memory in every precision.

    On CPUs torch has kernels for float32 alone. For other dtypes it writes out the window of every
    pixel, 31 GB for a video at full size; so float64 goes frame by frame, and half precision is
    computed in float32 and rounded, which is how its kernels add up, too.

    Args:
        x: ``[B, C, F, H, W]``.
        weight: ``[D, C, T, R, S]``.
        bias: ``[D]``.
        padding: Of frames, rows and columns.
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
    return torch.cat(one, dim=2).unflatten(2, (len(x), -1)).squeeze(0).transpose(0, 1)


class TemporalPrompt(nn.Module):
    """Prompts inside frames, added to their pixels, and between frames, tokens of each frame."""

    def __init__(self, width: int, patches: int, prompts: int) -> None:
        """Make it with fresh weights.

        Args:
            width: C of the tokens.
            patches: Of one frame.
            prompts: Tokens for each frame.
        """
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
