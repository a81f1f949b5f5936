"""Tensors of a Transformers checkpoint into a module: all of them, of its shapes, and finite."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from tome_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

STORED = ("float32", "float64", "float16", "bfloat16")
"""Types that weights come in; anything else holds the codes of a quantisation."""


def fill(
    module: nn.Module,
    state: State,
    names: Mapping[str, str],
    source: str,
    optional: Collection[str] = (),
) -> str:
    """Put a checkpoint's tensors in place of a module's, which may have no memory yet.

    Args:
        module: Changed in place; its parameters are float32 afterwards.
        state: By the checkpoint's names; emptied, so that each original is freed.
        names: The module's name of each tensor by the checkpoint's.
        source: Where the tensors come from, for messages.
        optional: Names of the checkpoint's that may be missing.

    Returns:
        The type that the tensors are stored in, as ``WeightsInfo`` has it.

    Raises:
        InputError: if tensors are missing or there is no place for them, or one has another
            shape, another type than ``STORED``, or values that are not finite.
    """
    types = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
    coded = next((name for name, stored in types.items() if stored not in STORED), None)
    if coded is not None:
        raise InputError(
            f"weights of {source} are stored as {types[coded]} in {coded}, which is not supported; "
            f"expected {', '.join(STORED[:-1])} or {STORED[-1]}, not quantised"
        )
    missing = [name for name in names if name not in state and name not in optional]
    unexpected = [name for name in state if name not in names]
    if missing or unexpected:
        found = [("missing", missing), ("unexpected", unexpected)]
        text = " and ".join(f"{len(n)} {what} ({n[0]}, …)" for what, n in found if n)
        raise InputError(
            f"weights of {source} do not fit its config.json: {text}; expected the whole "
            "checkpoint of this architecture"
        )
    wanted = module.state_dict()
    found_names = [name for name in names if name in state]
    for name in found_names:
        shape = wanted[names[name]].shape
        if state[name].shape != shape:
            raise InputError(
                f"weights of {source} do not fit its config.json: {name} has shape "
                f"{list(state[name].shape)}; expected {list(shape)}"
            )
    ready: State = {}
    for name in found_names:
        # In float32 before they are in place: one tensor at a time.
        ready[names[name]] = value = state.pop(name).float()
        if not value.isfinite().all():
            raise InputError(
                f"weights of {source} have NaN or infinite values in {name}; expected finite "
                "weights"
            )
    module.load_state_dict(ready, strict=not optional, assign=True)
    stored = set(types.values())
    return next((name for name in ("float32", "bfloat16", "float16") if name in stored), "float32")
