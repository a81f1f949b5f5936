"""What every patched model is: the untouched library model, run with merging between its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tome_export.compressors.base import FinalTokens, check_compressor
from tome_export.errors import InputError
from tome_export.merge.entropy import size_entropy
from tome_export.merge.macs import BlockCost, total_macs
from tome_export.merge.plan import Across, Step, StepPlans, source_map, step_layer, unmerge
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.patch.attention import log_size_bias
from tome_export.patch.checks import MakeZeros, check_undispatched, count_macs
from tome_export.patch.heads import OutputChoice
from tome_export.patch.merger import (
    LayerTrace,
    Merger,
    MergeSettings,
    Observer,
    Tokens,
    check_reducer,
)
from tome_export.patch.pixels import DTYPES, normalised, pixel_shape
from tome_export.reducers.base import ModelShape
from tome_export.spec import PatchGrid

_INNER = "model."
_LEARNED = ("reducer.", "compressor.")


class NoImageOutputError(InputError):
    """The model has no output for the whole image, only features of patches."""


@dataclass(frozen=True)
class ModelLayout:
    """What merging needs to know of a library model, read from it once.

    Attributes:
        blocks: The transformer blocks in order.
        costs: MACs per token of each block.
        width: C of the tokens between the blocks.
        input_size: Channels, height and width of one image, in pixels; of a model that takes
            several frames their number comes first.
        tokens: Tokens N of one image or frame that enter the first block.
        prefix: How many of them are no patches; they come first and are protected.
        class_token: Whether one of the prefix tokens is a class token.
        grid: Where the patches lie in the image; None where a token is no rectangle of it.
        frames: Frames of one input, each a sequence of its own in front of the first block.
    """

    blocks: Sequence[nn.Module]
    costs: Sequence[BlockCost]
    width: int
    input_size: tuple[int, ...]
    tokens: int
    prefix: int
    class_token: bool
    grid: PatchGrid | None
    frames: int = 1


class MergedModel(nn.Module, ABC):
    """A library model together with its merging. The inner model is neither copied nor changed.

    Weights are shared with the inner model, and ``state_dict`` has the inner model's own keys,
    so checkpoints load into either. ``copy.deepcopy`` separates the two. The constructor of a
    family raises ``InputError`` for a part of the model that is not understood.

    Attributes:
        model: The library model, exactly as it was given.
        settings: How it merges.
        layers: Clamped token counts of each block.
        layout: What was read of the library model.
        blocks: See ``ModelLayout``, as for ``width``, ``input_size``, ``prefix``, ``class_token``,
            ``patch_grid``, ``frames`` and ``block_costs``.
        reducer: The reducer's learned part, or None.
        compressor: The compressor with its weights, or None.
    """

    library_classes: ClassVar[tuple[str, ...]] = ()
    """Full names of the library's classes that a family merges in: these, and no subclass."""

    backbone_classes: ClassVar[tuple[str, ...]] = ()
    """Full names of the classes that it merges in inside of a model with a head of its own; see
    ``patch.whole``."""

    map_name: str | None = None
    """What a model with a head of its own for the grid of patches calls its output; else None."""

    takes_video: ClassVar[bool] = False
    """Whether the first input is videos, ``[B, F, C, H, W]``."""

    merger_class: ClassVar[type[Merger]] = Merger
    """What removes tokens in a forward pass."""

    def __init__(self, model: nn.Module, settings: MergeSettings, layout: ModelLayout) -> None:
        super().__init__()
        self.model: Any = model
        self.layout = layout
        self.blocks: tuple[Any, ...] = tuple(layout.blocks)
        self.block_costs = tuple(layout.costs)
        self.width, self.input_size = layout.width, layout.input_size
        self.prefix, self.class_token = layout.prefix, layout.class_token
        self.patch_grid, self.frames = layout.grid, layout.frames
        self.tower = ModelShape(
            layout.width, len(self.blocks), layout.tokens, layout.prefix, settings.learned
        )
        check_reducer(settings, self.class_token)
        schedule = settings.schedule
        if schedule is None:
            schedule = settings.reducer.counts(self.tower)
        self.settings = replace(settings, schedule=schedule)
        self.layers = self.token_counts(schedule)
        self.reducer = settings.reducer.module(self.tower) if self.merges else None
        self.compressor = self._make_compressor()
        self.training = model.training
        self.register_state_dict_post_hook(_drop_inner_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_inner_prefix)  # type: ignore[no-untyped-call]

    def token_counts(self, schedule: Schedule) -> tuple[LayerTokens, ...]:
        """Clamped token counts of each block."""
        return self.settings.reducer.layers(schedule.of_one_frame(), self.tower)

    @property
    def pixel_shape(self) -> tuple[int, ...]:
        """Shape of the pixel values of one image or video, as they are handed over."""
        return pixel_shape(self.input_size, self.settings.preprocessing)

    @property
    def pixel_dtype(self) -> torch.dtype:
        """Type in which pixel values are handed over; a float32 may be narrower."""
        given = self.settings.preprocessing
        return DTYPES["float32" if given is None else given.pixel_dtype]

    @property
    def image_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, or of one frame."""
        channels, height, width = self.input_size[-3:]
        return channels, height, width

    def embed(self, pixel_values: Tensor) -> Tensor:
        """The tokens ``[B, N, C]`` that enter the first block."""
        raise NotImplementedError

    def run_block(
        self, block: Any, tokens: Tokens, bias: Tensor | None, merger: Merger, layer: int
    ) -> Tokens:
        """Run one block, calling ``merger(tokens, attended, layer)`` between its attention and MLP.

        Args:
            block: The library's module.
            tokens: ``[B, N, C]`` and their sizes.
            bias: What proportional attention adds to the logits, ``[B, 1, N, N]``; or None.
            merger: Removes tokens.
            layer: Index of the block.
        """
        raise NotImplementedError

    def final(self, x: Tensor) -> Tensor:
        """What treats every token alone behind the blocks, such as a norm."""
        return x

    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """Run everything in front of pooling and head, merging with ``merger``."""
        tokens = Tokens(self.embed(pixel_values))
        for layer, block in enumerate(self.blocks):
            tokens = merger.ahead(tokens, layer)
            tokens = self.run_block(block, tokens, self.size_bias(tokens), merger, layer)
            tokens = merger.behind(tokens, layer)
        return Tokens(self.final(tokens.x), tokens.size)

    def size_bias(self, tokens: Tokens, queries: int | None = None) -> Tensor | None:
        """The bias of proportional attention over tokens; None where there is none to add."""
        size = tokens.size if self.settings.prop_attn else None
        return log_size_bias(size, tokens.x.dtype, queries)

    def head(self, tokens: Tokens) -> Tensor:
        """The library model's own output from the final tokens."""
        raise NotImplementedError

    @abstractmethod
    def library(self, pixel_values: Tensor) -> Tensor:
        """What the library model itself gives for images, in this model's form of output.

        Where the model takes more inputs, it is given those of ``neutral_inputs``.
        """

    def neutral_inputs(self, count: int) -> dict[str, Tensor]:
        """The inputs besides the images, for that many images, where they say nothing."""
        return {name: torch.zeros(count, *shape) for name, shape in self.extra_inputs.items()}

    @property
    def steps(self) -> tuple[Step, ...]:
        """Every merge of the model as they happen."""
        found: list[Step] = []
        for layer, counts in enumerate(self.layers):
            found += [Across(layer)] * (counts.cross > 0) + [layer] * (counts.r > 0)
        return tuple(found)

    def prefix_at(self, step: Step) -> int:
        """Protected tokens at the front of a sequence that one of the merges works on."""
        return self.prefix * self.frames // self.sequences_at(step)

    def sequences_at(self, step: Step) -> int:
        """Sequences of one image or video that one of the merges works on."""
        return self.layers[step_layer(step)].sequences

    @property
    def output_choice(self) -> OutputChoice:
        """What the model's own output is: one score per class, or features."""
        return OutputChoice(classifies=False, why="the model is a tower without a classifier")

    @property
    def backbone(self) -> nn.Module:
        """The library's model whose tokens merge."""
        inner: nn.Module = self.model
        return inner

    @property
    def tracks(self) -> bool:
        """Whether a forward pass has to know where each patch is by now."""
        return self.settings.unmerges or self.settings.source_map

    @property
    def gives_tokens(self) -> bool:
        """Whether the output is one feature vector per token or patch."""
        return self.settings.dense

    def token_features(self, tokens: Tokens) -> Tensor:
        """``[B, K, C]``, prefix tokens included: what dense outputs hold for each token."""
        return tokens.x

    def run(self, pixel_values: Tensor, merger: Merger) -> Tensor:
        """The forward pass to the main output, merging with ``merger``."""
        tokens = self.encode(pixel_values, merger)
        if self.compressor is not None:
            return self._compress(self.token_features(tokens), merger.size, merger.positions)
        if not self.settings.dense:
            return self.head(tokens)
        x = self.token_features(tokens)
        if merger.positions is not None:
            return unmerge(x, merger.positions[:, self.prefix :])
        return x[:, self.prefix :]

    def _make_compressor(self) -> nn.Module | None:
        chosen = self.settings.compressor
        if chosen is None:
            return None
        grid = check_compressor(
            chosen,
            self.patch_grid,
            gives_tokens=self.gives_tokens,
            classifies=self.output_choice.classifies,
        )
        return chosen.module(self._feature_width(), grid)

    def _feature_width(self) -> int:
        """C of ``token_features``, found by running them without data."""
        found: list[int] = []

        def features(zeros: MakeZeros) -> None:
            x = zeros(1, self.prefix + 1, self.width)
            found.append(self.token_features(Tokens(x)).shape[-1])

        count_macs(self.model, features)
        return found[0]

    def _compress(self, x: Tensor, size: Tensor | None, places: Tensor | None) -> Tensor:
        """The compressor's tokens, of those that are no prefix tokens."""
        assert self.compressor is not None and self.patch_grid is not None  # noqa: S101, PT018
        final = FinalTokens(
            x[:, self.prefix :],
            None if size is None else size[:, self.prefix :],
            None if places is None else places[:, self.prefix :] - self.prefix,
            self.patch_grid,
        )
        output: Tensor = self.compressor(final)
        return output

    @property
    def merges(self) -> bool:
        """Whether any layer merges."""
        return bool(self.steps)

    @property
    def unmerged_layers(self) -> tuple[LayerTokens, ...]:
        """Token counts of every layer without merging."""
        tokens = self.tower.tokens
        return (LayerTokens(tokens, 0, tokens, sequences=self.frames),) * len(self.layers)

    def macs(self, *, merged: bool = True) -> int:
        """Multiply-accumulates per image or video, with or without merging."""
        layers = self.layers if merged else self.unmerged_layers
        final = layers[-1].tokens_out if layers else self.prefix
        reducer = self.settings.reducer
        learned = sum(reducer.macs(layer, self.tower) for layer in layers if layer.r)
        return learned + total_macs(self.block_costs, layers, self.fixed_macs(final))

    def fixed_macs(self, tokens: int) -> int:
        """MACs per image or video outside the blocks, as torch counts them."""
        grid = self.patch_grid

        def outside(zeros: MakeZeros) -> None:
            self.embed(zeros(1, *self.input_size))
            final = Tokens(zeros(1, tokens, self.width))
            if not self.settings.dense and self.compressor is None:
                self.head(final)
                return
            x = self.token_features(final)
            if self.compressor is None:
                return
            if self.settings.unmerges and grid is not None:
                self._compress(zeros(1, self.prefix + grid.patches, x.shape[-1]), None, None)
            else:
                self._compress(x, x[:, :, 0] + 1, None)

        return count_macs(self.model, outside)

    @property
    def extra_inputs(self) -> Mapping[str, tuple[int, ...]]:
        """Inputs besides the images: shape of each without the batch, float32."""
        return self.settings.reducer.inputs(self.tower) if self.merges else {}

    def merger(
        self,
        forced: StepPlans | None = None,
        observe: Observer | None = None,
        inputs: Mapping[str, Tensor] | None = None,
        layers: Sequence[LayerTokens] | None = None,
    ) -> Merger:
        """A fresh merger."""
        return self.merger_class(
            self.layers if layers is None else layers,
            self.prefix,
            self.class_token,
            self.settings.reducer,
            self.reducer,
            forced=forced,
            observe=observe,
            track=self.tracks,
            inputs=inputs,
        )

    def forward(self, pixel_values: Tensor, *extra: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Classify or embed images.

        Args:
            pixel_values: ``[B, C, H, W]``; of another form than ``float32`` as that has them.
            extra: The other inputs, in the order of ``extra_inputs``.

        Returns:
            What the library model returns: ``[B, classes]`` or ``[B, features]``; dense models
            give ``[B, patches, features]``, compressed ones ``[B, tokens, features]``. With a
            source map also that, ``[B, patches]`` int32: the final token of each patch, counted
            behind the prefix tokens. With the entropy also that, ``[B]`` float32.

        Raises:
            InputError: if dtype or image size are not those that the token counts were made for,
                or hooks move the inner model's weights between devices.
        """
        merger = self.merger(inputs=dict(zip(self.extra_inputs, extra, strict=True)))
        output = self.run(self.library_pixels(pixel_values), merger)
        more = []
        if self.settings.source_map:
            more.append(self._source_map(output, merger))
        if self.settings.entropy:
            more.append(self.entropy(merger, output))
        return (output, *more) if more else output

    def entropy(self, merger: Merger, output: Tensor) -> Tensor:
        """Normalised token-size entropy ``[B]`` float32 of a pass that gave ``output``."""
        if merger.size is None:
            return torch.ones(output.shape[0], dtype=torch.float32, device=output.device)
        patches = self.tower.tokens - self.prefix
        return size_entropy(merger.size, self.prefix, patches).to(torch.float32)

    def _source_map(self, output: Tensor, merger: Merger) -> Tensor:
        if merger.positions is None:
            count = self.layers[0].tokens_in - self.prefix if self.layers else 0
            patches = torch.arange(count, dtype=torch.int32, device=output.device)
            return patches.expand(output.shape[0], -1)
        return self._final_places(merger.positions)

    def source_map_of(self, plans: StepPlans, count: int) -> Tensor:
        """The source map that the plans of all merges make of ``count`` images; see ``forward``."""
        per_layer = [plans.get(layer) for layer in range(len(self.layers))]
        return self._final_places(source_map(per_layer, count, self.tower.tokens))

    def _final_places(self, places: Tensor) -> Tensor:
        places = places[:, self.prefix :]
        if self.settings.reducer.drops:
            return torch.where(places < 0, places, places - self.prefix).to(torch.int32)
        return (places - self.prefix).to(torch.int32)

    def forward_traced(
        self,
        pixel_values: Tensor,
        forced: StepPlans | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, list[LayerTrace]]:
        """As ``forward_observed``, and the keys and plan of every merging layer in a list."""
        trace: list[LayerTrace] = []
        return self.forward_observed(pixel_values, trace.append, forced, inputs), trace

    def forward_observed(
        self,
        pixel_values: Tensor,
        observe: Observer,
        forced: StepPlans | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As ``forward``, to the main output only; each layer is handed out and none is kept."""
        return self.run(self.library_pixels(pixel_values), self.merger(forced, observe, inputs))

    def library_pixels(self, pixel_values: Tensor) -> Tensor:
        """Pixel values in the model's form, checked, as the library model takes them."""
        check_undispatched(self.model)
        preprocessing = self.settings.preprocessing
        raw = self.pixel_dtype == torch.uint8
        if tuple(pixel_values.shape[1:]) != self.pixel_shape:
            what, axes = ("video", "frames, ") if self.takes_video else ("image", "")
            last = self.pixel_shape[-3:] != self.input_size[-3:]
            axes += "height, width, channels" if last else "channels, height, width"
            raise InputError(
                f"{what} shape is {tuple(pixel_values.shape[1:])}; this model's token counts are "
                f"fixed for {self.pixel_shape} ({axes})"
            )
        if raw != (pixel_values.dtype == torch.uint8):
            raise InputError(
                f"pixel values are {str(pixel_values.dtype).removeprefix('torch.')}; this model "
                f"takes {'uint8, 0 to 255' if raw else 'floating-point numbers, normalised'}"
            )
        if preprocessing is None or not raw:
            return pixel_values
        return normalised(pixel_values, preprocessing, next(self.model.parameters()).dtype)


def _drop_inner_prefix(
    _module: nn.Module, state: dict[str, Any], prefix: str, _metadata: dict[str, Any]
) -> None:
    inner = prefix + _INNER
    for key in [key for key in state if key.startswith(inner)]:
        state[prefix + key.removeprefix(inner)] = state.pop(key)


def _add_inner_prefix(
    _module: nn.Module, state: dict[str, Any], prefix: str, *_args: object
) -> None:
    inner = prefix + _INNER
    own = tuple(prefix + name for name in _LEARNED)
    for key in [key for key in state if key.startswith(prefix) and not key.startswith(own)]:
        state[inner + key.removeprefix(prefix)] = state.pop(key)
