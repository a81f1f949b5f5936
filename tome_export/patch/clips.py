"""Merging in the layers of a video tower: inside clips as in images, and across clips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from tome_export.merge.ops import match, merge
from tome_export.merge.plan import Across, StepPlans, composed
from tome_export.merge.schedule import ClipTokens
from tome_export.patch.merger import LayerTrace, Merger, Tokens


class ClipMerger(Merger):
    """A merger that also joins neighbouring clips; a batch holds the clips of all its videos.

    The protected tokens of a joined clip are those of its parts, in order, at its front.
    """

    def join(
        self, tokens: Tokens, layer: int, position: Mapping[int, Tensor] | None = None
    ) -> Tokens:
        """Called ahead of every block: join clips, and merge across them by the hidden states.

        The metric is what enters the block; the frame position is added between matching and
        averaging, and not where nothing is merged (TempMe, section 3.3 and its public code).

        Args:
            tokens: ``[B clips, N, C]``.
            layer: Index of the block.
            position: For layers with one, a vector per clip that enters, ``[clips, C]``.

        Returns:
            ``[B clips / joined, joined N - cross, C]``.
        """
        counts = cast(ClipTokens, self.layers[layer])
        self.prefix = counts.prefix
        if counts.joined == 1:
            return tokens
        parts, protected = counts.joined, counts.prefix // counts.joined
        x, size = joined(tokens.x, parts, protected), tokens.size
        if size is not None:
            size = joined(size[..., None], parts, protected)[..., 0]
        if self.track:
            places = self.positions
            if places is None:
                places = torch.arange(tokens.x.shape[1], device=x.device).expand(
                    x.shape[0] * parts, -1
                )
            self.positions = joined_places(places, tokens.x.shape[1], parts, protected)
        if counts.cross == 0:
            return Tokens(x, size)
        if size is None:
            size = x.new_ones(x.shape[:2], dtype=torch.float32)
        chosen = match(x, counts.cross, self.prefix, True)
        plan = self.forced.get(Across(layer), chosen)
        if self.observe is not None:
            self.observe(LayerTrace(layer, x, plan, chosen, across=True))
        vectors = None if position is None else position.get(layer)
        if vectors is not None:
            moved = tokens.x.reshape(-1, vectors.shape[0], *tokens.x.shape[1:]) + vectors[:, None]
            x = joined(moved.flatten(0, 1), parts, protected)
        x, size = merge(x, size, plan)
        if self.track:
            self.positions = composed(self.positions, plan, drops=False)
        return Tokens(x, size)


def joined(x: Tensor, parts: int, protected: int) -> Tensor:
    """Every ``parts`` neighbours as one sequence, the protected tokens of all of them first.

    Args:
        x: ``[S, N, C]``.
        parts: Sequences that become one.
        protected: Tokens at the front of each that stay at the front.

    Returns:
        ``[S / parts, parts N, C]``.
    """
    x = x.reshape(-1, parts, *x.shape[1:])
    return torch.cat([x[:, :, :protected].flatten(1, 2), x[:, :, protected:].flatten(1, 2)], dim=1)


def joined_places(places: Tensor, tokens: int, parts: int, protected: int) -> Tensor:
    """Where the first layer's tokens are after ``joined``.

    Args:
        places: ``[S, M]`` int64, where they were in their own sequences of N tokens.
        tokens: N.
        parts: Sequences that became one.
        protected: Protected tokens of each.

    Returns:
        ``[S / parts, parts M]``, the first layer's tokens of one part behind those of another.
    """
    part = torch.arange(parts, device=places.device)[:, None]
    places = places.reshape(-1, parts, places.shape[1])
    front = places + part * protected
    rest = places + part * (tokens - protected) + (parts - 1) * protected
    return torch.where(places < protected, front, rest).flatten(1, 2)


def clip_places(clips: Sequence[ClipTokens], plans: StepPlans, frames: int) -> Tensor:
    """Where every token of every frame ends, by joining and by the plans of all merges.

    Args:
        clips: Token counts of every layer.
        plans: Of every merge that there is.
        frames: Frames of all videos.

    Returns:
        ``[clips, tokens]`` int64: the clips of all videos in the end, and for each the first
        layer's tokens of its frames, one frame behind the other.
    """
    places = torch.arange(clips[0].tokens_in).expand(frames, -1)
    for layer, counts in enumerate(clips):
        if counts.joined > 1:
            protected = counts.prefix // counts.joined
            places = joined_places(places, counts.tokens_in, counts.joined, protected)
        for plan in (plans.get(Across(layer)), plans.get(layer)):
            if plan is not None:
                places = composed(places.to(plan.keep.device), plan, drops=False)
    return places
