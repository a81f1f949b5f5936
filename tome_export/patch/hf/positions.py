"""Position embeddings of Transformers' models for images of another size.

The library interpolates them anew in every forward pass, from those of a square. Here it does so
once, and the result takes the place of the model's own.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import (
    Dinov2WithRegistersEmbeddings,
)

from tome_export.errors import InputError
from tome_export.patch.hf.base import pair

Size = tuple[int, int]
"""Height and width in pixels."""

Grid = tuple[int, int]
"""Rows and columns of patches."""


class FittedClip(CLIPVisionEmbeddings):
    """The library's embeddings, whose positions are those of images that are not square."""

    def interpolate_pos_encoding(self, _embeddings: Tensor, _height: int, _width: int) -> Tensor:
        """The positions as they are, ``[1, N, C]``."""
        return cast(Tensor, self.position_embedding(self.position_ids))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = True) -> Tensor:  # noqa: ARG002
        """As the library's, which takes images of any size where it is to interpolate."""
        return super().forward(pixel_values, interpolate_pos_encoding=True)


class FittedDinov2(Dinov2Embeddings):
    """As ``FittedClip``, of DINOv2."""

    def interpolate_pos_encoding(self, _embeddings: Tensor, _height: int, _width: int) -> Tensor:
        """The positions as they are, ``[1, N, C]``."""
        return cast(Tensor, self.position_embeddings)


class FittedDinov2WithRegisters(Dinov2WithRegistersEmbeddings):
    """As ``FittedClip``, of DINOv2 with registers."""

    def interpolate_pos_encoding(self, _embeddings: Tensor, _height: int, _width: int) -> Tensor:
        """The positions as they are, ``[1, N, C]``."""
        return cast(Tensor, self.position_embeddings)


_FITTED = {cls.__base__: cls for cls in (FittedClip, FittedDinov2, FittedDinov2WithRegisters)}


def _config_of(model: Any) -> Any:
    return getattr(model.config, "vision_config", model.config)


def embeddings_of(model: nn.Module) -> Any:
    """The module of a model that embeds patches and adds positions."""
    return next(part for part in model.modules() if hasattr(part, "interpolate_pos_encoding"))


def positions_of(model: nn.Module) -> Tensor:
    """Positions ``[N, C]`` of a model, those of prefix tokens in front."""
    embeddings = embeddings_of(model)
    table = getattr(embeddings, "position_embedding", None)
    found = embeddings.position_embeddings[0] if table is None else table.weight
    return cast(Tensor, found.detach())


def grid_of(model: nn.Module, size: Any = None) -> Grid:
    """Rows and columns of the patches of images of a size, by default the model's own."""
    config = _config_of(model)
    (height, width), (tall, wide) = pair(size or config.image_size), pair(config.patch_size)
    return height // tall, width // wide


def interpolated(model: nn.Module, positions: Tensor, before: Grid, size: Size) -> Tensor:
    """Positions ``[N, C]`` as the library interpolates them for images of a size.

    The model, whose own positions these become, is of no other use afterwards. The positions are
    for a grid of ``before``, which the library has to be a square.
    """
    if before[0] != before[1]:
        raise InputError(
            "positions are those of {}x{} patches, and Transformers resamples those of squares "
            "only; leave --image-size out".format(*before)
        )
    embeddings, wanted = embeddings_of(model), grid_of(model, size)
    _place(embeddings, positions)
    tokens = len(positions) - before[0] * before[1] + wanted[0] * wanted[1]
    like = positions.new_empty(1, tokens, positions.shape[1])
    with torch.no_grad():
        found = embeddings.interpolate_pos_encoding(like, *size)
    return cast(Tensor, found[0])


def fit(model: Any, positions: Tensor, size: Size) -> None:
    """Make a model one for images of a size, whose positions ``[N, C]`` are these."""
    embeddings = embeddings_of(model)
    _place(embeddings, positions)
    square = size[0] == size[1]
    side = size[0] if square else size
    # The library may have made the embeddings of a copy.
    for config in (_config_of(model), getattr(embeddings, "config", _config_of(model))):
        config.image_size = side
    if hasattr(embeddings, "patch_embeddings"):
        embeddings.image_size = embeddings.patch_embeddings.image_size = size
    else:
        embeddings.image_size = side
    if not square:
        embeddings.__class__ = _FITTED.get(type(embeddings), type(embeddings))


def resample(model: nn.Module, size: Size) -> None:
    """Make a model one for images of a size, its own positions interpolated."""
    positions = interpolated(model, positions_of(model), grid_of(model), size)
    fit(model, positions, size)


def _place(embeddings: Any, positions: Tensor) -> None:
    """Put other positions ``[N, C]`` into the library's embeddings."""
    if not hasattr(embeddings, "position_embedding"):
        embeddings.position_embeddings = nn.Parameter(positions[None])
        return
    count, width = positions.shape
    embeddings.position_embedding = nn.Embedding(count, width, _weight=positions)
    embeddings.num_positions = len(positions)
    ids = torch.arange(len(positions), device=positions.device).expand(1, -1)
    embeddings.register_buffer("position_ids", ids, persistent=False)
