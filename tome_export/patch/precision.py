"""A model in another precision, without its weights ever being held twice in the first."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def copy_with_dtype(model: Model, dtype: torch.dtype) -> Model:
    """A copy whose floating-point parameters and buffers have another dtype.

    Each is converted by itself; ``deepcopy`` and then ``to`` would hold a second copy in between.
    """
    made: dict[int, Any] = {}
    for tensor in _floating(model):
        converted = tensor.detach().to(dtype, copy=True)
        if isinstance(tensor, nn.Parameter):
            converted = nn.Parameter(converted, requires_grad=tensor.requires_grad)
        made[id(tensor)] = converted
    return copy.deepcopy(model, made)


def copy_sharing_weights(model: Model) -> Model:
    """A copy of the modules, whose parameters and buffers are those of the model."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def floats_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """An input of a model in its dtype; pixels in uint8 stay as they are, the model casts them."""
    return x.to(dtype) if x.is_floating_point() else x


@contextlib.contextmanager
def in_float64(model: nn.Module) -> Iterator[None]:
    """The model itself in float64 for a while, which changes no value: it is exact both ways.

    A copy would take twice the memory of the model beside it.
    """
    before = [(tensor, tensor.dtype) for tensor in _floating(model)]
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.to(torch.float64)
        yield
    finally:
        for tensor, dtype in before:
            tensor.data = tensor.data.to(dtype)


def free_weights(model: nn.Module) -> None:
    """Free what a model that is no longer used holds, whoever else still holds the model."""
    for tensor in _floating(model):
        tensor.data = tensor.data.new_empty(0)


def _floating(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
