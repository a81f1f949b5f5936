"""What patched video towers have in common: frames as the batch, and clips of joined frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from tome_export.errors import InputError
from tome_export.merge.macs import BlockCost
from tome_export.merge.ops import match, merge
from tome_export.merge.plan import Across, StepPlans, compose_plans
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.patch.base import MergedModel, ModelLayout
from tome_export.patch.merger import LayerTrace, Merger, MergeSettings, Tokens
from tome_export.spec import PatchGrid
from tome_export.video.options import VideoSchedule, video_token_counts


class FrameMerger(Merger):
    """A merger that also joins neighbouring clips; a batch holds the clips of all its videos.

    The protected tokens of a joined clip are those of its parts, in order, at its front.

    Attributes:
        frame_positions: For layers with one, a vector per clip that enters, ``[clips, C]``.
    """

    frame_positions: Mapping[int, Tensor] = {}

    def ahead(self, tokens: Tokens, layer: int) -> Tokens:
        """Join clips, and merge across them by the hidden states.

        ``[B clips, N, C]`` become ``[B clips / joined, joined N - cross, C]``. The metric is what
        enters the block; the frame position is added between matching and averaging, and not where
        nothing is merged (TempMe, section 3.3 and its public code).
        """
        counts = self.layers[layer]
        if counts.joined == 1:
            return tokens
        parts, protected = counts.joined, self.prefix
        self.prefix *= parts
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
        vectors = self.frame_positions.get(layer)
        if vectors is not None:
            moved = tokens.x.reshape(-1, vectors.shape[0], *tokens.x.shape[1:]) + vectors[:, None]
            x = joined(moved.flatten(0, 1), parts, protected)
        x, size = merge(x, size, plan)
        if self.track:
            self.positions = compose_plans(self.positions, plan, drops=False)
        return Tokens(x, size)


class MergedVideo(MergedModel):
    """A video tower that merges inside frames and, where the schedule says so, across them.

    What videos do not have is refused with an ``InputError``, and so is a schedule that does not
    fit the tower.
    """

    takes_video = True
    merger_class = FrameMerger

    def __init__(
        self, model: Any, settings: MergeSettings, prefix: int, costs: Sequence[BlockCost]
    ) -> None:
        if settings.dense:
            raise InputError(
                "a video tower gives one feature for all its frames, so there are no dense "
                "outputs; leave --dense out"
            )
        if settings.entropy or settings.compressor is not None:
            option = "--entropy" if settings.entropy else "--compress"
            raise InputError(f"{option} is for images; a video tower does without it")
        if settings.reducer.name != "tome":
            raise InputError(
                f"reducer {settings.reducer.name} is for images; video towers merge with tome"
            )
        sizes, frames = model.sizes, int(model.frames)
        layout = ModelLayout(
            blocks=model.transformer.resblocks,
            costs=costs,
            width=int(sizes.width),
            input_size=(frames, 3, sizes.image, sizes.image),
            tokens=prefix + sizes.side**2,
            prefix=prefix,
            class_token=True,
            grid=PatchGrid(sizes.side, sizes.side, sizes.patch, sizes.patch),
            frames=frames,
        )
        super().__init__(model, settings, layout)

    def token_counts(self, schedule: Schedule) -> tuple[LayerTokens, ...]:
        """See ``MergedModel``; whatever joins frames has to fit the tower."""
        merging = schedule.frames if isinstance(schedule, VideoSchedule) else None
        if merging is not None and schedule.per_layer is not None:
            first = merging.layers[0]
            if any(schedule.per_layer[first:]):
                raise InputError(
                    f"schedule {schedule} has numbers behind layer {first - 1}; from layer {first} "
                    f"on, the first that joins frames, the proportions say how many tokens merge: "
                    f"give {first} numbers"
                )
        tower = self.tower
        counts = video_token_counts(
            schedule.resolve(tower.depth), merging, self.frames, tower.tokens, tower.prefix
        )
        if merging is not None and merging.position:
            self._check_positions(merging.clips_entering(self.frames))
        return counts

    def _check_positions(self, entering: Mapping[int, int]) -> None:
        have = self.model.frame_positions
        for layer, clips in entering.items():
            found = have[str(layer)].shape[0] if str(layer) in have else None
            if found != clips:
                what = "none" if found is None else f"one of {found} clips"
                raise InputError(
                    f"layer {layer} joins {clips} clips with a frame position, and the tower has "
                    f"{what} for it; make it for these layers, or use --no-frame-position"
                )

    def merger(self, *args: Any, **given: Any) -> Merger:
        """See ``MergedModel``; with the frame positions that the schedule uses."""
        merger = cast(FrameMerger, super().merger(*args, **given))
        schedule, have = self.settings.schedule, cast(Any, self.model.frame_positions)
        merging = schedule.frames if isinstance(schedule, VideoSchedule) else None
        if merging is not None and merging.position:
            merger.frame_positions = {layer: have[str(layer)] for layer in merging.layers}
        return merger

    def run(self, pixel_values: Tensor, merger: Merger) -> Tensor:
        """The forward pass to the features, handing each layer's tokens to ``merger``."""
        return self.finish(self.encode(pixel_values, merger), merger.inputs)

    @abstractmethod
    def finish(self, tokens: Tokens, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features ``[B, E]`` from the final tokens and the inputs besides the frames."""

    def head(self, tokens: Tokens) -> Tensor:
        """As ``finish``, of videos whose frames all count."""
        batch = tokens.x.shape[0] // self.layers[-1].sequences
        return self.finish(tokens, self.neutral_inputs(batch))

    def neutral_inputs(self, count: int) -> dict[str, Tensor]:
        """Every frame counts."""
        return {name: torch.ones(count, *shape) for name, shape in self.extra_inputs.items()}

    def _source_map(self, output: Tensor, merger: Merger) -> Tensor:
        if merger.positions is None:
            return self.source_map_of({}, output.shape[0]).to(output.device)
        return self._final_places(merger.positions)

    def source_map_of(self, plans: StepPlans, count: int) -> Tensor:
        """See ``MergedModel``; clips are joined between the plans."""
        places = places_after_joining(self.layers, self.prefix, plans, count * self.frames)
        return self._final_places(places)

    def _final_places(self, places: Tensor) -> Tensor:
        """``[B, F P]`` int32: the final token of each patch, clips one behind the other."""
        final, own = self.layers[-1], self.tower
        prefix = self.prefix * self.frames // final.sequences
        patches = places.reshape(-1, places.shape[1] // own.tokens, own.tokens)[
            :, :, own.prefix :
        ].flatten(1)
        each = (patches - prefix).reshape(-1, final.sequences, patches.shape[1])
        clip = torch.arange(final.sequences, device=places.device)[:, None]
        return (each + clip * (final.tokens_out - prefix)).flatten(1).to(torch.int32)


def joined(x: Tensor, parts: int, protected: int) -> Tensor:
    """Every ``parts`` neighbours as one sequence, the protected tokens of all of them first.

    ``x [S, N, C]``, with so many protected tokens at the front of each, to
    ``[S / parts, parts N, C]``.
    """
    x = x.reshape(-1, parts, *x.shape[1:])
    return torch.cat([x[:, :, :protected].flatten(1, 2), x[:, :, protected:].flatten(1, 2)], dim=1)


def joined_places(places: Tensor, tokens: int, parts: int, protected: int) -> Tensor:
    """Where the first layer's tokens are after ``joined``, ``[S / parts, parts M]``, part by part.

    ``places [S, M]`` int64 is where they were in their own sequences of N ``tokens``.
    """
    part = torch.arange(parts, device=places.device)[:, None]
    places = places.reshape(-1, parts, places.shape[1])
    front = places + part * protected
    rest = places + part * (tokens - protected) + (parts - 1) * protected
    return torch.where(places < protected, front, rest).flatten(1, 2)


def places_after_joining(
    layers: Sequence[LayerTokens], prefix: int, plans: StepPlans, frames: int
) -> Tensor:
    """Where every token of every frame ends, by joining and by the plans of all merges.

    Returns ``[clips, tokens]`` int64: the clips of all videos in the end, and for each the first
    layer's tokens of its frames, one frame behind the other.
    """
    places = torch.arange(layers[0].tokens_in).expand(frames, -1)
    for layer, counts in enumerate(layers):
        if counts.joined > 1:
            places = joined_places(places, counts.tokens_in, counts.joined, prefix)
            prefix *= counts.joined
        for plan in (plans.get(Across(layer)), plans.get(layer)):
            if plan is not None:
                places = compose_plans(places.to(plan.keep.device), plan, drops=False)
    return places
