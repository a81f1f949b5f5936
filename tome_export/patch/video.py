"""What patched video towers have in common: frames as the batch, and clips of joined frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tome_export.errors import InputError
from tome_export.merge.macs import total_macs
from tome_export.merge.plan import Across, Step, StepPlans, step_layer
from tome_export.merge.schedule import ClipTokens, LayerTokens, clip_tokens
from tome_export.patch.base import MergedModel
from tome_export.patch.clips import ClipMerger, clip_places
from tome_export.patch.merger import Merger, MergeSettings, Tokens
from tome_export.spec import PatchGrid


class MergedVideo(MergedModel):
    """A video tower that merges inside frames and, where the schedule says so, across them.

    Raises:
        InputError: if the schedule does not fit the tower, or something is asked for that videos
            do not have.
    """

    takes_video = True
    clips: tuple[ClipTokens, ...]

    merger_class = ClipMerger

    def __init__(self, model: Any, settings: MergeSettings, prefix: int) -> None:
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
        sizes = model.sizes
        super().__init__(model, settings, sizes.depth, prefix + sizes.side**2, prefix)
        schedule = self.settings.schedule
        resolved = schedule.resolve(sizes.depth) if schedule else (0,) * sizes.depth
        merging = schedule.frames if schedule else None
        if merging is not None and schedule is not None and schedule.per_layer is not None:
            first = merging.layers[0]
            if any(schedule.per_layer[first:]):
                raise InputError(
                    f"schedule {schedule} has numbers behind layer {first - 1}; from layer {first} "
                    f"on, the first that joins frames, the proportions say how many tokens merge: "
                    f"give {first} numbers"
                )
        self.clips = clip_tokens(resolved, merging, model.frames, self.tower.tokens, prefix)
        self.layers = self.clips
        if merging is not None and merging.position:
            self._check_positions(merging.clips_entering(model.frames))

    def _check_positions(self, entering: Mapping[int, int]) -> None:
        have: Any = self.model.frame_positions
        for layer, clips in entering.items():
            found = have[str(layer)].shape[0] if str(layer) in have else None
            if found != clips:
                what = "none" if found is None else f"one of {found} clips"
                raise InputError(
                    f"layer {layer} joins {clips} clips with a frame position, and the tower has "
                    f"{what} for it; make it for these layers, or use --no-frame-position"
                )

    @property
    def class_token(self) -> bool:
        """Every frame has one."""
        return True

    @property
    def width(self) -> int:
        """C of the tokens between the blocks."""
        return int(self.sizes.width)

    @property
    def sizes(self) -> Any:
        """Sizes of the CLIP tower."""
        return self.model.sizes

    @property
    def frames(self) -> int:
        """Frames of one video."""
        return int(self.model.frames)  # type: ignore[arg-type]

    @property
    def input_size(self) -> tuple[int, ...]:
        """Frames, channels, height and width of one video."""
        return self.frames, 3, self.sizes.image, self.sizes.image

    @property
    def patch_grid(self) -> PatchGrid | None:
        """Where the patches lie in each frame."""
        sizes = self.sizes
        return PatchGrid(sizes.side, sizes.side, sizes.patch, sizes.patch)

    @property
    def merges(self) -> bool:
        """Whether any layer merges, inside clips or across them."""
        return any(layer.r or getattr(layer, "cross", 0) for layer in self.layers)

    @property
    def positions(self) -> Mapping[int, Tensor]:
        """The frame positions that the schedule uses, by layer."""
        merging = self.settings.schedule.frames if self.settings.schedule else None
        if merging is None or not merging.position:
            return {}
        have: Any = self.model.frame_positions
        return {layer: have[str(layer)] for layer in merging.layers}

    def macs(self, *, merged: bool = True) -> int:
        """Multiply-accumulates per video, with or without merging."""
        layers: Sequence[LayerTokens] = self.layers
        if not merged:
            layers = self.unmerged_layers
        return total_macs(self.block_costs, layers, self.fixed_macs(layers[-1].tokens_out))

    @property
    def unmerged_layers(self) -> tuple[LayerTokens, ...]:
        """Token counts of every layer without merging."""
        depth, tower = self.sizes.depth, self.tower
        return clip_tokens((0,) * depth, None, self.frames, tower.tokens, tower.prefix)

    def run(self, pixel_values: Tensor, merger: Merger) -> Tensor:
        """The forward pass to the features, handing each layer's tokens to ``merger``."""
        return self.finish(self.encode(pixel_values, merger), merger.inputs)

    @abstractmethod
    def finish(self, tokens: Tokens, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features ``[B, E]`` from the final tokens and the inputs besides the frames."""

    def head(self, tokens: Tokens) -> Tensor:
        """As ``finish``, of videos whose frames all count."""
        batch = tokens.x.shape[0] // self.clips[-1].clips
        ones = {name: tokens.x.new_ones(batch, *s) for name, s in self.extra_inputs.items()}
        return self.finish(tokens, ones)

    def neutral_inputs(self, count: int) -> dict[str, Tensor]:
        """Every frame counts."""
        return {name: torch.ones(count, *shape) for name, shape in self.extra_inputs.items()}

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every merge of the model as they happen."""
        found: list[Step] = []
        for layer, counts in enumerate(self.clips):
            found += [Across(layer)] * (counts.cross > 0) + [layer] * (counts.r > 0)
        return tuple(found)

    def prefix_at(self, step: Step) -> int:
        """Protected tokens of a clip in that layer."""
        return self.clips[step_layer(step)].prefix

    def sequences_at(self, step: Step) -> int:
        """Clips of one video in that layer."""
        return self.clips[step_layer(step)].clips

    def _source_map(self, output: Tensor, merger: Merger) -> Tensor:
        if merger.positions is None:
            return self.source_map_of({}, output.shape[0])
        return self._final_places(merger.positions)

    def source_map_of(self, plans: StepPlans, count: int) -> Tensor:
        """See ``MergedModel.source_map_of``; clips are joined between the plans."""
        return self._final_places(clip_places(self.clips, plans, count * self.frames))

    def _final_places(self, places: Tensor) -> Tensor:
        """``[B, F P]`` int32: the final token of each patch, clips one behind the other."""
        final, own = self.clips[-1], self.tower
        patches = places.reshape(-1, places.shape[1] // own.tokens, own.tokens)[
            :, :, own.prefix :
        ].flatten(1)
        each = (patches - final.prefix).reshape(-1, final.clips, patches.shape[1])
        clip = torch.arange(final.clips, device=places.device)[:, None]
        each = each + clip * (final.tokens_out - final.prefix)
        return each.flatten(1).to(torch.int32)
