"""Keep what learned predictors score highest (DynamicViT, arXiv 2106.02034)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.lowering import accumulate_dtype
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.reducers.base import LayerContext, ModelShape
from tome_export.reducers.learned import RANDOM, absolute, filled, random_module, state_of_file
from tome_export.reducers.staged import StagedReducer

_OWN = "score_predictor."


@dataclass(frozen=True)
class DynamicViT(StagedReducer):
    """In front of a few layers a predictor scores the tokens, and a fixed share of them stays.

    For the n tokens behind the prefix ``z = GELU(Linear(LayerNorm(x)))``; its first half stays
    local, its second half becomes the mean over all n tokens; an MLP and a log-softmax over (keep,
    drop) follow (section 3.2, equations 1 to 5), and the score is that of keep. Of the n_0 tokens
    of the first layer ``floor(rate n_0)`` stay, the rates being keep, keep^2, keep^3 (section 3.3),
    or ``keep`` itself if it has several. The weights are in the layout of the public checkpoints;
    schedules count for layers with a predictor and no others. docs/reducers.md says more.

    Attributes:
        weights: A file, ``random``, or None for the file of the model's weights.
    """

    weights: str | None = None

    name = "dynamicvit"
    summary = "drop the tokens that trained predictors score lowest"
    source = "DynamicViT: Efficient Vision Transformers with Dynamic Sparsification, 2106.02034"
    behind_block = True
    drops = True
    own_keys = (_OWN,)

    def __post_init__(self) -> None:
        super().__post_init__()
        if 0 in self.at:
            raise InputError(
                "option at of reducer dynamicvit has layer 0; expected layers from 1, because "
                "tokens go in front of them"
            )
        object.__setattr__(self, "weights", absolute(self.weights))

    def blocks(self, depth: int) -> list[int]:
        """Blocks behind which tokens go."""
        return [layer - 1 for layer in self.stages(depth)]

    def counts(self, shape: ModelShape) -> Schedule:
        """The shares of the tokens of the first layer, as in the authors' code."""
        left = initial = shape.tokens - shape.prefix
        removed = [0] * shape.depth
        for number, (layer, rate) in enumerate(self.stages(shape.depth).items()):
            share = rate if len(self.keep) > 1 else rate ** (number + 1)
            stay = min(left, max(1, int(initial * share)))
            removed[layer - 1] = left - stay
            left = stay
        return Schedule(per_layer=tuple(removed))

    def layers(self, schedule: Schedule, shape: ModelShape) -> tuple[LayerTokens, ...]:
        """See ``Reducer.layers``; a layer without predictor removes nothing."""
        blocks = self.blocks(shape.depth)
        wanted = enumerate(schedule.resolve(shape.depth))
        there = tuple(r if block in blocks else 0 for block, r in wanted)
        return super().layers(Schedule(per_layer=there), shape)

    def module(self, shape: ModelShape) -> nn.Module:
        """One predictor per stage."""
        count = len(self.blocks(shape.depth))
        if shape.width % 4:
            raise InputError(
                f"reducer dynamicvit needs a width that 4 divides; the model's is {shape.width}"
            )
        if self.weights == RANDOM:
            return random_module(lambda: Predictors(shape.width, count))
        if self.weights is None:
            where, state = "the file of the model's weights", shape.learned or {}
        else:
            where, state = f"weights file {self.weights}", state_of_file(self.weights)
        own = {key: value for key, value in state.items() if key.startswith(_OWN)}
        if not own:
            raise InputError(
                f"{where} has no {_OWN}*, the predictors of reducer dynamicvit; give a DynamicViT "
                "checkpoint with --weights PATH or --reducer-option weights=PATH, or try the "
                "toolchain with --reducer-option weights=random"
            )
        return filled(Predictors(shape.width, count), own, where, self.name)

    def macs(self, layer: LayerTokens, shape: ModelShape) -> int:
        """MACs of the linear layers."""
        c = shape.width
        per_token = c * c + c * (c // 2) + (c // 2) * (c // 4) + (c // 4) * 2
        return (layer.tokens_in - shape.prefix) * per_token

    def signals(self, layer: LayerContext) -> tuple[Tensor, ...]:
        """Log-probability of keeping each token, ``[B, N - P]``."""
        assert isinstance(layer.module, Predictors)  # noqa: S101 (what ``module`` made)
        stage = self.blocks(layer.depth).index(layer.index)
        return (layer.module.score_predictor[stage](layer.x[:, layer.prefix :])[..., 0],)


class Predictors(nn.Module):
    """The predictors of all stages, with the keys of the public checkpoints."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.score_predictor = nn.ModuleList(Predictor(width) for _ in range(count))


class Predictor(nn.Module):
    """Scores of one stage, ``[B, n, C]`` -> ``[B, n, 2]`` float32 (float64 for float64)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.in_conv = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, half), nn.GELU(), nn.Linear(half, quarter), nn.GELU(),
            nn.Linear(quarter, 2),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Equations 1 to 5 of the paper with a mask of ones."""
        local, part = self.in_conv(x).chunk(2, dim=-1)
        mean = part.mean(dim=1, keepdim=True, dtype=accumulate_dtype(part)).to(part.dtype)
        scores = self.out_conv(torch.cat([local, mean.expand_as(part)], dim=-1))
        return torch.log_softmax(scores, dim=-1, dtype=accumulate_dtype(scores))
