"""Learned parts of reducers and compressors: weights of a file, or random ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.weights.files import check_finite, read_checkpoint

RANDOM = "random"
"""What an option ``weights`` is for random weights, always the same ones."""


def absolute(weights: str | None) -> str | None:
    """A ``weights`` option whose path holds from any current folder."""
    if weights is None or weights == RANDOM:
        return weights
    return str(Path(weights).expanduser().resolve())


def random_module(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A module with random weights, which leaves torch's own generator as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return frozen(make())


def state_of_file(weights: str) -> dict[str, Tensor]:
    """The tensors of a file."""
    return read_checkpoint(Path(weights)).state


def first_misfit(
    module: nn.Module, state: Mapping[str, Tensor]
) -> tuple[str, list[int] | None, list[int] | None] | None:
    """The first key that does not fit, its shape in the state and in the module; None if all do."""
    wanted = {key: list(value.shape) for key, value in module.state_dict().items()}
    found = {key: list(value.shape) for key, value in state.items()}
    keys = sorted(wanted.keys() | found.keys())
    wrong = next((key for key in keys if wanted.get(key) != found.get(key)), None)
    return None if wrong is None else (wrong, found.get(wrong), wanted.get(wrong))


def filled(module: nn.Module, state: Mapping[str, Tensor], where: str, reducer: str) -> nn.Module:
    """A module with given weights."""
    if misfit := first_misfit(module, state):
        key, got, expected = misfit
        raise InputError(
            f"{where} does not fit reducer {reducer} on this model: {key} is {got or 'missing'}; "
            f"expected {expected or 'nothing of that name'}"
        )
    check_finite(state, f"{where} has")
    module.load_state_dict(state)
    return frozen(module)


def frozen(module: nn.Module) -> nn.Module:
    """The module as every later stage expects it: float32, eval mode, without gradients."""
    return module.float().eval().requires_grad_(False)
