"""A checkpoint of timm's or its authors' layout to a state dict that fits timm's model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.weights.files import check_fit, shapes_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]


def fit(module: nn.Module, state: State, path: Path, architecture: str) -> tuple[State, str]:
    """A state dict with exactly the module's keys and shapes.

    If the keys or shapes differ, timm's own filter for the architecture converts original
    checkpoints (DeiT, DeiT III, DINOv2 and others) and resamples the position embedding.

    Args:
        module: The model to load into.
        state: What the file holds.
        path: The file, for messages.
        architecture: timm's name of the architecture; empty if it is not timm's.

    Returns:
        The state dict, and a remark for the manifest where something was resampled, else "".

    Raises:
        InputError: if they still differ, naming the first few keys or shapes.
    """
    wanted = module.state_dict()
    shapes, found = shapes_of(wanted), shapes_of(state)
    converted = _timm_filter(module, state, architecture) if found != shapes else None
    if converted is not None and shapes_of(converted) == shapes:
        before, after = found.get("pos_embed"), shapes.get("pos_embed")
        side = shapes.get("patch_embed.proj.weight", ())
        # timm would also resample the patches' kernel, which makes another model of it.
        if found.get("patch_embed.proj.weight", side)[2:] == side[2:]:
            # One token of difference is the class token, stored apart by models with registers.
            same = not before or not after or before[1] - after[1] in (0, 1)
            return converted, "" if same else f"position embedding resampled {before} -> {after}"
    closest = state
    if converted is not None and len(converted.keys() ^ wanted) < len(state.keys() ^ wanted):
        closest = state if shapes_of(converted) == shapes else converted
    check_fit(
        closest,
        wanted,
        f"weights file {path} does not fit the model",
        "the checkpoint of this architecture",
    )
    return state, ""


def _timm_filter(module: nn.Module, state: State, architecture: str) -> State | None:
    """The state after timm's filter; None if there is none or it cannot make sense of it."""
    if not architecture:
        return None
    from timm.models import deit, model_entrypoint, vision_transformer

    source = model_entrypoint(architecture).__module__
    if source == deit.__name__:
        convert: Any = partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True)
    elif source == vision_transformer.__name__:
        convert = vision_transformer.checkpoint_filter_fn
    else:
        return None
    try:
        converted: State = convert(dict(state), module)
    # A filter meets foreign files here; its failure means only that it cannot help, and the
    # difference of the file itself is what the user is told.
    except (KeyError, RuntimeError, AttributeError, ValueError, IndexError, AssertionError):
        return None
    return converted
