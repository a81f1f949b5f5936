"""Merging for STOP's video tower (arXiv 2503.15973): ToMe inside frames and across them.

The sound reading of a public combination of the two that cannot run; docs/video-towers.md says
where it differs and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.merge.macs import BlockCost, SharedCost
from tome_export.merge.schedule import unmerged_end
from tome_export.patch.base import MergedModel
from tome_export.patch.checks import Zeros, check_plain, counted_macs
from tome_export.patch.clips import ClipMerger
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.patch.multihead import multihead_block_cost, same_arithmetic
from tome_export.patch.video import MergedVideo
from tome_export.reducers.base import AttentionInputs

SUPPORTED = "STOP's video tower (stop_b32)"

_TOWER = ("tome_export.models.stop", "StopTower")


def merged(model: nn.Module, settings: MergeSettings) -> MergedModel | None:
    """The patched model, or None if the model is not of this family."""
    # By name: this layer lies below the one that makes models.
    if (type(model).__module__, type(model).__qualname__) == _TOWER:
        return MergedStop(model, settings)
    return None


class MergedStop(MergedVideo):
    """STOP's tower that merges tokens; see ``MergedVideo``.

    The class token and the prompts of a frame are protected, also where frames are joined: each
    block's new prompts take the places of the old ones.
    """

    def __init__(self, model: Any, settings: MergeSettings) -> None:
        check_plain(model, type(model).__name__)
        self._prompts = int(model.frame_prompts.shape[2])
        super().__init__(model, settings, prefix=1 + self._prompts)
        self.layers = self.clips = unmerged_end(self.clips)

    @cached_property
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block, its adapter included."""
        model: Any = self.model
        shared = int(model.prompt_embeddings.shape[1])
        costs = []
        for block in model.transformer.resblocks:
            both = nn.ModuleList([block.mlp, block.LoRA])
            cost = multihead_block_cost(self.width, both)
            costs.append(SharedCost(cost.before, cost.attention, cost.after, shared))
        return (*costs[:-1], replace(costs[-1], last=True))

    def fixed_macs(self, tokens: int) -> int:  # noqa: ARG002 (one prompt is projected)
        """MACs per video of the prompts made from it, patch embedding and projection."""
        model: Any = self.model

        def outside(zeros: Zeros) -> None:
            model.begin(zeros(1, *self.input_size))
            model.project(zeros(1, self.width))

        return counted_macs(model, outside)

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """The blocks; what is given on is the global prompts ``[B, G, C]``, not the frames."""
        model: Any = self.model
        clips, positions = cast(ClipMerger, merger), self.positions
        x, shared, between = model.begin(pixel_values)
        tokens = Tokens(x)
        for layer, block in enumerate(model.transformer.resblocks):
            if layer:
                prompts = model.frame_prompts[layer] + between
                tokens = Tokens(self._with_prompts(tokens.x, prompts, layer), tokens.size)
            tokens = clips.join(tokens, layer, positions)
            x, shared, attended = self._attention(block, tokens, shared, layer)
            tokens = clips(Tokens(x, tokens.size), attended, layer)
            tokens = Tokens(block.behind(tokens.x), tokens.size)
            shared = block.behind(shared)
        return Tokens(shared)

    def finish(self, tokens: Tokens, inputs: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        """The first global prompt's feature."""
        model: Any = self.model
        return cast(Tensor, model.finish(tokens.x))

    def library(self, pixel_values: Tensor) -> Tensor:
        """What the tower itself gives."""
        with same_arithmetic():
            return cast(Tensor, self.model(pixel_values))

    def _with_prompts(self, x: Tensor, prompts: Tensor, layer: int) -> Tensor:
        """Clips ``[B clips, N, C]`` with new prompts ``[B, F, prompts, C]`` of their frames."""
        each, counts = 1 + self._prompts, self.clips[layer]
        per_clip = self.frames // (counts.clips * counts.joined)
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
        attn, x, clips = block.attn, tokens.x, self.clips[layer].clips
        batch = shared.shape[0]
        heads = attn.num_heads, attn.head_dim

        def projected(y: Tensor) -> list[Tensor]:
            packed = functional.linear(block.ln_1(y), attn.in_proj_weight, attn.in_proj_bias)
            return [p.reshape(*p.shape[:2], *heads).transpose(1, 2) for p in packed.chunk(3, -1)]

        def together(y: Tensor) -> Tensor:
            """Of all clips of a video, ``[B, H, clips N, D]``."""
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
