"""Learned parts of reducers: weights of a file, of the model's own file, or random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.weights.files import check_finite, read_checkpoint

RANDOM = "random"
"""What an option ``weights`` is for random weights, always the same ones."""

SEED = 0
"""Of random weights."""


def absolute(weights: str | None) -> str | None:
    """A ``weights`` option whose path holds from any current folder."""
    if weights is None or weights == RANDOM:
        return weights
    return str(Path(weights).expanduser().resolve())


def random_module(make: Callable[[], nn.Module], seed: int = SEED) -> nn.Module:
    """A module with random weights, which leaves torch's own generator as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return frozen(make())


def state_of_file(weights: str) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        InputError: if it cannot be read.
    """
    return read_checkpoint(Path(weights)).state


def filled(module: nn.Module, state: Mapping[str, Tensor], where: str, reducer: str) -> nn.Module:
    """A module with given weights.

    Args:
        module: Changed in place.
        state: Its weights by key.
        where: What holds them, for messages.
        reducer: Name of the reducer, for messages.

    Raises:
        InputError: naming the first key that is missing, of another shape, or too many.
    """
    wanted = {key: list(value.shape) for key, value in module.state_dict().items()}
    found = {key: list(value.shape) for key, value in state.items()}
    if wanted != found:
        key = min(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        got, expected = (shapes.get(key) or "missing" for shapes in (found, wanted))
        raise InputError(
            f"{where} does not fit reducer {reducer} on this model: {key} is {got}; expected "
            f"{'nothing of that name' if expected == 'missing' else expected}"
        )
    check_finite(state, f"{where} has")
    module.load_state_dict(state)
    return frozen(module)


def frozen(module: nn.Module) -> nn.Module:
    """The module as every later stage expects it: float32, eval mode, without gradients."""
    return module.float().eval().requires_grad_(False)
