"""STOP's video tower (arXiv 2503.15973): CLIP4Clip with prompts for the video and every frame.

Each frame has its class token, its prompts and its patches. A few global prompts attend to every
token of the video; a frame attends to them and to itself. Prompts of frames are new in every block.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from tome_export.models.clip4clip import (
    ClipBlock,
    ClipFrames,
    frame_positions,
)
from tome_export.models.clip_sizes import HEAD_WIDTH, ClipSizes
from tome_export.models.stop_prompts import TemporalPrompt

PROMPTS = 4
"""Prompts of each frame, and global ones: the public code's default for both."""

ADAPTER_WIDTH, ADAPTER_STRENGTH = 32, 0.1


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
        """Make the tower with fresh weights.

        Args:
            sizes: Of the CLIP image tower.
            frames: Frames of one video.
            positions: For each layer with a frame position, how many clips enter it.
        """
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
        patches = x[:, 1:].unflatten(0, (batch, self.frames))
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
        for layer, block in enumerate(self.transformer.resblocks):
            if layer:
                prompts = (self.frame_prompts[layer] + between).flatten(0, 1)
                x = torch.cat([x[:, :1], prompts, x[:, 1 + PROMPTS :]], dim=1)
            x, shared = block(x, shared)
        return self.finish(shared)


def folded_prompts(state: Mapping[str, Tensor], frames: int, width: int) -> Tensor:
    """The frames' prompts of every block, from the tensors that training makes them of.

    With a shared latent space of the kind ``transformer``, one block runs over the rows of an
    embedding table, text prompts first, for each block of the tower; with ``linear``, every frame
    has the same few rows.

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
