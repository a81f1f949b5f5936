"""What every patched model is: the untouched library model, run with merging between its layers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from tome_export.compressors.base import FinalTokens, check_compressor
from tome_export.errors import InputError
from tome_export.merge.entropy import size_entropy
from tome_export.merge.macs import BlockCost, total_macs
from tome_export.merge.plan import Step, StepPlans, source_map, unmerge
from tome_export.merge.schedule import LayerTokens
from tome_export.patch.checks import Zeros, check_undispatched, counted_macs
from tome_export.patch.merger import (
    LayerTrace,
    Merger,
    MergeSettings,
    Observer,
    Tokens,
    check_reducer,
)
from tome_export.reducers.base import ModelShape
from tome_export.spec import PatchGrid

_INNER = "model."
_LEARNED = ("reducer.", "compressor.")


class NoImageOutputError(InputError):
    """The model has no output for the whole image, only features of patches."""


class OutputChoice(NamedTuple):
    """What the output of a library model is taken for.

    Attributes:
        classifies: Whether it is class scores, and not features.
        why: What of the model's structure or configuration says so.
    """

    classifies: bool
    why: str


class MergedModel(nn.Module, ABC):
    """A library model together with its merging. The inner model is neither copied nor changed.

    Weights are shared with the inner model, and ``state_dict`` has the inner model's own keys,
    so checkpoints load into either. ``copy.deepcopy`` separates the two.

    Attributes:
        model: The library model, exactly as it was given.
        settings: How it merges.
        layers: Clamped token counts of each block.
        reducer: The reducer's learned part, or None.
        takes_video: Whether the first input is videos, ``[B, F, C, H, W]``.
        compressor: The compressor with its weights, or None.
    """

    takes_video = False

    merger_class: ClassVar[type[Merger]] = Merger
    """What removes tokens in a forward pass."""

    def __init__(
        self, model: nn.Module, settings: MergeSettings, depth: int, tokens: int, prefix: int
    ) -> None:
        super().__init__()
        self.model = model
        self.prefix = prefix
        self.tower = ModelShape(self.width, depth, tokens, prefix, settings.learned)
        check_reducer(settings, self.class_token)
        reducer = settings.reducer
        schedule = settings.schedule
        if schedule is not None and schedule.frames is not None and not self.takes_video:
            raise InputError(
                f"{schedule.frames}: that is for video towers, and this model takes images"
            )
        if schedule is None:
            schedule = reducer.counts(self.tower)
        self.settings = replace(settings, schedule=schedule)
        self.layers = reducer.layers(schedule, self.tower)
        self.reducer = reducer.module(self.tower) if self.merges else None
        self.compressor = self._compressor()
        self.training = model.training
        self.register_state_dict_post_hook(_drop_inner_prefix)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_add_inner_prefix)  # type: ignore[no-untyped-call]

    @property
    @abstractmethod
    def class_token(self) -> bool:
        """Whether one of the prefix tokens is a class token."""

    @property
    @abstractmethod
    def width(self) -> int:
        """C of the tokens between the blocks."""

    @property
    @abstractmethod
    def input_size(self) -> tuple[int, ...]:
        """Channels, height and width of one image, in pixels; of a video the frames come first."""

    @property
    def image_size(self) -> tuple[int, int, int]:
        """Channels, height and width of one image, or of one frame."""
        channels, height, width = self.input_size[-3:]
        return channels, height, width

    @property
    @abstractmethod
    def patch_grid(self) -> PatchGrid | None:
        """Where the patches lie in the image; None where a token is no rectangle of it."""

    @property
    @abstractmethod
    def block_costs(self) -> tuple[BlockCost, ...]:
        """Cost per token of each block."""

    @abstractmethod
    def fixed_macs(self, tokens: int) -> int:
        """MACs per image outside the blocks: patch embedding, pooling of ``tokens``, head."""

    @abstractmethod
    def encode(self, pixel_values: Tensor, merger: Merger) -> Tokens:
        """All blocks and what treats tokens alone after them, merging with ``merger``."""

    @abstractmethod
    def head(self, tokens: Tokens) -> Tensor:
        """The library model's own output from the final tokens."""

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
        return tuple(index for index, layer in enumerate(self.layers) if layer.r)

    def prefix_at(self, step: Step) -> int:  # noqa: ARG002
        """Protected tokens at the front of a sequence that one of the merges works on."""
        return self.prefix

    def sequences_at(self, step: Step) -> int:  # noqa: ARG002
        """Sequences of one image or video that one of the merges works on."""
        return 1

    @property
    def output_choice(self) -> OutputChoice:
        """What the model's own output is: one score per class, or features."""
        return OutputChoice(classifies=False, why="the model is a tower without a classifier")

    @property
    def gives_tokens(self) -> bool:
        """Whether the output is one feature vector per token or patch."""
        return self.settings.dense

    def token_features(self, tokens: Tokens) -> Tensor:
        """``[B, K, C]``, prefix tokens included: what dense outputs hold for each token."""
        return tokens.x

    def run(self, pixel_values: Tensor, merger: Merger) -> Tensor:
        """The forward pass to the main output, handing each layer's tokens to ``merger``."""
        tokens = self.encode(pixel_values, merger)
        if self.compressor is not None:
            return self._compressed(self.token_features(tokens), merger)
        if not self.settings.dense:
            return self.head(tokens)
        x = self.token_features(tokens)
        if merger.positions is not None:
            return unmerge(x, merger.positions[:, self.prefix :])
        return x[:, self.prefix :]

    def _compressor(self) -> nn.Module | None:
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

        def features(zeros: Zeros) -> None:
            x = zeros(1, self.prefix + 1, self.width)
            found.append(self.token_features(Tokens(x)).shape[-1])

        counted_macs(self.model, features)
        return found[0]

    def _compressed(self, x: Tensor, merger: Merger) -> Tensor:
        """The compressor's tokens, of those that are no prefix tokens."""
        size, places = merger.size, merger.positions
        assert self.compressor is not None and self.patch_grid is not None  # noqa: S101, PT018
        final = FinalTokens(
            x[:, self.prefix :],
            None if size is None else size[:, self.prefix :],
            None if places is None else places[:, self.prefix :] - self.prefix,
            self.patch_grid,
        )
        output: Tensor = self.compressor(final)
        return output

    def _compressor_macs(self, tokens: int) -> int:
        """MACs per image of the compressor, as torch counts them."""
        compressor, grid = self.compressor, self.patch_grid
        if compressor is None or grid is None:
            return 0
        unmerged = self.settings.unmerges
        count = grid.patches if unmerged else tokens - self.prefix

        def compress(zeros: Zeros) -> None:
            x = zeros(1, count, width)
            compressor(FinalTokens(x, None if unmerged else x[:, :, 0] + 1, None, grid))

        width = self._feature_width()
        return counted_macs(self.model, compress)

    @property
    def merges(self) -> bool:
        """Whether any layer merges."""
        return any(layer.r for layer in self.layers)

    @property
    def unmerged_layers(self) -> tuple[LayerTokens, ...]:
        """Token counts of every layer without merging."""
        first = self.layers[0].tokens_in if self.layers else 0
        return tuple(LayerTokens(first, 0, first) for _ in self.layers)

    def macs(self, *, merged: bool = True) -> int:
        """Multiply-accumulates per image or video, with or without merging."""
        layers = self.layers if merged else self.unmerged_layers
        final = layers[-1].tokens_out if layers else self.prefix
        reducer = self.settings.reducer
        learned = sum(reducer.macs(layer, self.tower) for layer in layers if layer.r)
        learned += self._compressor_macs(final)
        return learned + total_macs(self.block_costs, layers, self.fixed_macs(final))

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
        """A fresh merger.

        Args:
            forced: Plans to apply instead of the layers' own, by layer index.
            observe: Called with every layer that removes tokens.
            inputs: The model's inputs besides the images, by name.
            layers: Token counts other than the model's own.
        """
        return self.merger_class(
            self.layers if layers is None else layers,
            self.prefix,
            self.class_token,
            forced,
            observe,
            self.settings.unmerges or self.settings.source_map,
            self.settings.reducer,
            self.reducer,
            inputs,
        )

    def forward(self, pixel_values: Tensor, *extra: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Classify or embed images.

        Args:
            pixel_values: ``[B, C, H, W]``.
            extra: The other inputs, in the order of ``extra_inputs``.

        Returns:
            What the library model returns: ``[B, classes]`` or ``[B, features]``; dense models
            give ``[B, patches, features]``, compressed ones ``[B, tokens, features]``. With a
            source map also that, ``[B, patches]`` int32: the final token of each patch, counted
            behind the prefix tokens. With the entropy also that, ``[B]`` float32.

        Raises:
            InputError: if the image size is not the one the token counts were made for, or hooks
                move the inner model's weights between devices.
        """
        merger = self.merger(inputs=dict(zip(self.extra_inputs, extra, strict=True)))
        output = self.run(self._checked(pixel_values), merger)
        more = []
        if self.settings.source_map:
            more.append(self._source_map(output, merger))
        if self.settings.entropy:
            more.append(self.entropy(merger, output))
        return (output, *more) if more else output

    def entropy(self, merger: Merger, output: Tensor) -> Tensor:
        """Normalised token-size entropy of a pass that is over, ``[B]`` float32.

        Args:
            merger: Of the pass.
            output: What it gave, for batch and device.
        """
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
        """The source map that some plans make.

        Args:
            plans: Of every merge.
            count: Images.

        Returns:
            ``[count, patches]`` int32, as ``forward`` gives it.
        """
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
        """As ``forward``, with the keys and plan of every merging layer.

        Args:
            pixel_values: ``[B, C, H, W]``.
            forced: Plans to apply instead of the layers' own, by layer index.
            inputs: The other inputs by name.
        """
        trace: list[LayerTrace] = []
        return self.forward_observed(pixel_values, trace.append, forced, inputs), trace

    def forward_observed(
        self,
        pixel_values: Tensor,
        observe: Observer,
        forced: StepPlans | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """As ``forward_traced``, but each layer is handed out in turn and none is kept.

        Args:
            pixel_values: ``[B, C, H, W]``.
            observe: Called with every merging layer as it merges.
            forced: Plans to apply instead of the layers' own, by layer index.
            inputs: The other inputs by name.
        """
        return self.run(self._checked(pixel_values), self.merger(forced, observe, inputs))

    def _checked(self, pixel_values: Tensor) -> Tensor:
        check_undispatched(self.model)
        if tuple(pixel_values.shape[1:]) != self.input_size:
            what, axes = ("video", "frames, ") if self.takes_video else ("image", "")
            raise InputError(
                f"{what} shape is {tuple(pixel_values.shape[1:])}; this model's token counts are "
                f"fixed for {self.input_size} ({axes}channels, height, width)"
            )
        return pixel_values


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
