"""Weights files to a state dict that fits a model, or one clear line why not."""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

    State = dict[str, Tensor]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_NESTS = ("state_dict", "model")
# What DistributedDataParallel, torch.compile and common trainers put in front of every key.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 3
_HALF = ("float16", "bfloat16")


def read_state(path: Path) -> State:
    """Read a checkpoint: .safetensors, or .pth/.pt/.bin holding tensors only; nothing else.

    A state dict inside ``{"model": ...}`` or ``{"state_dict": ...}`` is taken out, and a prefix
    that all keys share (``module.``, ``_orig_mod.``, ``model.``) dropped.

    Args:
        path: The file.

    Raises:
        InputError: if the file is missing, of another kind, damaged, holds Python objects, or
            has values that are not finite.
    """
    if path.is_dir():
        raise InputError(
            f"weights {path} is a folder; expected a file ending in {', '.join(SUFFIXES)}"
        )
    if not path.is_file():
        raise InputError(
            f"weights file {path} does not exist; expected 'pretrained', 'random', or a file "
            f"ending in {', '.join(SUFFIXES)}"
        )
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"weights file {path} ends in {path.suffix or 'nothing'!r}; expected one of "
            f"{', '.join(SUFFIXES)}"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    state = _state_dict(content, path)
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise InputError(
            f"weights file {path} has NaN or infinite values in {_list(broken)}; "
            "expected finite weights"
        )
    return state


def read_eager(path: Path) -> State:
    """As ``read_state``, with a line of its own for TorchScript, as OpenAI publishes CLIP.

    Raises:
        InputError: as ``read_state``, and if the file holds code.
    """
    if path.is_file() and path.suffix == ".pt" and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
        if scripted:
            raise InputError(
                f"weights file {path} is a TorchScript archive, which holds code and is not "
                "loaded; save the tensors of its state_dict() as .safetensors"
            )
    return read_state(path)


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"weights file {path} is not a whole safetensors file ({_first_line(error)}); "
            "it is damaged or cut short, get it again"
        ) from None


def read_torch(path: Path, mmap: bool = False) -> object:
    """Read a file of ``torch.save``, in which there may be nothing but tensors and containers.

    Args:
        path: The file.
        mmap: Leave tensors in the file until they are used.

    Raises:
        InputError: if the file is damaged, holds Python objects, or cannot be mapped.
    """
    import pickle
    import warnings

    import torch

    try:
        with warnings.catch_warnings():
            # It warns of pickle protocols other than its own, then reads or refuses the file.
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            raise InputError(
                f"weights file {path} holds Python objects, which could run code and are not "
                "loaded; save the state_dict alone, or as .safetensors"
            ) from None
        raise InputError(
            f"weights file {path} is not a PyTorch checkpoint of tensors; save the state_dict "
            "with torch.save, or as .safetensors"
        ) from None
    # Cut-short archives surface as any of these from torch's reader.
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        if "mmap can only be used" in str(error):
            raise InputError(
                f"weights file {path} is in PyTorch's format of before 1.6, which can only be read "
                "whole; save it again with torch.save, or as .safetensors"
            ) from None
        raise InputError(
            f"weights file {path} cannot be read ({_first_line(error)}); "
            "it is damaged or cut short, get it again"
        ) from None


def _state_dict(content: object, path: Path) -> State:
    import torch

    for nest in _NESTS:
        if isinstance(content, Mapping) and isinstance(content.get(nest), Mapping):
            content = content[nest]
    if not isinstance(content, Mapping) or not content:
        kind = type(content).__name__ if not isinstance(content, Mapping) else "empty dict"
        raise InputError(f"weights file {path} holds a {kind}; expected a state_dict of tensors")
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise InputError(
                f"weights file {path} holds a {type(value).__name__} under {key!r}; "
                "expected a state_dict of tensors"
            )
        state[key] = value
    while prefix := next((p for p in _PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


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
    wanted = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    if _shapes(state) == wanted:
        return state, ""
    converted = _timm_filter(module, state, architecture)
    if converted is not None and _shapes(converted) == wanted:
        before = _shapes(state).get("pos_embed")
        after = wanted.get("pos_embed")
        side = wanted.get("patch_embed.proj.weight", ())
        # timm would also resample the patches' kernel, which makes another model of it.
        if _shapes(state).get("patch_embed.proj.weight", side)[2:] == side[2:]:
            # One token of difference is the class token, stored apart by models with registers.
            same = not before or not after or before[1] - after[1] in (0, 1)
            return converted, "" if same else f"position embedding resampled {before} -> {after}"
    raise InputError(_difference(_closest(wanted, state, converted), wanted, path))


def _shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


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


def _closest(wanted: Mapping[str, object], state: State, converted: State | None) -> State:
    if converted is None:
        return state
    return converted if len(converted.keys() ^ wanted) < len(state.keys() ^ wanted) else state


def _difference(state: State, wanted: dict[str, tuple[int, ...]], path: Path) -> str:
    have = _shapes(state)
    missing = [key for key in wanted if key not in have]
    unexpected = [key for key in have if key not in wanted]
    parts = []
    if missing:
        parts.append(f"{len(missing)} missing ({_list(missing)})")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_list(unexpected)})")
    if parts:
        return (
            f"weights file {path} does not fit the model: keys {' and '.join(parts)}; "
            "expected the checkpoint of this architecture"
        )
    wrong = [
        f"{key}: got {list(have[key])} expected {list(shape)}"
        for key, shape in wanted.items()
        if have[key] != shape
    ]
    return (
        f"weights file {path} does not fit the model: {len(wrong)} wrong shapes "
        f"({_list(wrong, '; ')}); expected the checkpoint of this architecture"
    )


def _list(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}…" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def stored_dtype(tensors: Iterable[Tensor]) -> str:
    """The type that most of a checkpoint's values are stored in.

    A checkpoint in half precision may keep a norm or a scale in float32, and one in float32 a
    table in half: a single tensor says nothing.

    Args:
        tensors: Those that the model takes, as they are in the file.

    Returns:
        ``float32``, ``float16`` or ``bfloat16``; any other type counts as ``float32``.
    """
    values: Counter[str] = Counter({"float32": 0})
    for tensor in tensors:
        if tensor.is_floating_point():
            name = str(tensor.dtype).removeprefix("torch.")
            values[name if name in _HALF else "float32"] += tensor.numel()
    return max(values, key=lambda name: values[name])


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
