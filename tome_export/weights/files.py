"""Weights files: their tensors, and what is worth knowing of them, or one clear line why not."""

from __future__ import annotations

import hashlib
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tome_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")

STORED = ("float32", "float64", "float16", "bfloat16")
"""Types that weights come in; anything else holds the codes of a quantisation."""

_NESTS = ("state_dict", "model")
# What DistributedDataParallel, torch.compile and common trainers put in front of every key.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_SHOWN = 3
_HALF = ("float16", "bfloat16")


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a checkpoint: .safetensors, or .pth/.pt/.bin holding tensors only; nothing else.

    A state dict inside ``{"model": ...}`` or ``{"state_dict": ...}`` is taken out, and a prefix
    that all keys share (``module.``, ``_orig_mod.``, ``model.``) dropped.

    Raises:
        InputError: if the file is missing, of another kind, damaged, holds Python objects or
            code, or has values that are not finite.
    """
    expected = f"a file ending in {', '.join(SUFFIXES)}"
    if path.is_dir():
        raise InputError(f"weights {path} is a folder; expected {expected}")
    if not path.is_file():
        raise InputError(
            f"weights file {path} does not exist; expected 'pretrained', 'random', or {expected}"
        )
    if path.suffix not in SUFFIXES:
        raise InputError(
            f"weights file {path} ends in {path.suffix or 'nothing'!r}; expected one of "
            f"{', '.join(SUFFIXES)}"
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_torch(path)
    state = _state_dict(content, path)
    check_finite(state, f"weights file {path} has")
    return state


def check_finite(state: Mapping[str, Tensor], who: str) -> None:
    """Refuse values that are not finite; ``who`` begins the message: ``weights file X has``."""
    broken = [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]
    if broken:
        raise InputError(f"{who} NaN or infinite values in {few(broken)}; expected finite weights")


def check_stored(state: Mapping[str, Tensor], who: str) -> None:
    """Refuse codes of a quantisation and values that are not finite; ``who``: ``weights of X``."""
    types = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
    coded = next((name for name, stored in types.items() if stored not in STORED), None)
    if coded is not None:
        raise InputError(
            f"{who} are stored as {types[coded]} in {coded}, which is not supported; expected "
            f"{', '.join(STORED[:-1])} or {STORED[-1]}, not quantised"
        )
    check_finite(state, f"{who} have")


def _read_safetensors(path: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"weights file {path} is not a whole safetensors file ({first_line(error)}); "
            "it is damaged or cut short, get it again"
        ) from None


def read_torch(path: Path, mmap: bool = False) -> object:
    """Read a file of ``torch.save``, in which there may be nothing but tensors and containers.

    With ``mmap``, tensors stay in the file until they are used.

    Raises:
        InputError: if the file is damaged, holds Python objects or code, or cannot be mapped.
    """
    import pickle
    import warnings

    import torch

    if _is_torchscript(path):
        raise InputError(
            f"weights file {path} is a TorchScript archive, which holds code and is not "
            "loaded; save the tensors of its state_dict() as .safetensors"
        )
    try:
        with warnings.catch_warnings():
            # It warns of pickle protocols other than its own, then reads or refuses the file.
            warnings.simplefilter("ignore", UserWarning)
            content: object = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            return content
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
            f"weights file {path} cannot be read ({first_line(error)}); "
            "it is damaged or cut short, get it again"
        ) from None


def _is_torchscript(path: Path) -> bool:
    """Whether a file is of ``torch.jit.save``, as OpenAI publishes CLIP."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except (zipfile.BadZipFile, OSError):
        return False


def _state_dict(content: object, path: Path) -> dict[str, Tensor]:
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


def check_fit(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], who: str, expected: str
) -> None:
    """Refuse tensors that are not exactly those of a module's state dict.

    Args:
        found: Tensors by name.
        wanted: The module's state dict.
        who: Begins the message, as in ``weights file X does not fit the model``.
        expected: Ends it, such as ``the checkpoint of this architecture``.

    Raises:
        InputError: naming the first few names or shapes that differ.
    """
    have, want = shapes_of(found), shapes_of(wanted)
    wrong = {k: (have[k], want[k]) for k in want if k in have and have[k] != want[k]}
    missing = [key for key in want if key not in have]
    unexpected = [key for key in have if key not in want]
    if text := misfit(missing, unexpected, wrong):
        raise InputError(f"{who}: {text}; expected {expected}")


def misfit(
    missing: Iterable[str],
    unexpected: Iterable[str],
    wrong: Mapping[str, tuple[Iterable[int], Iterable[int]]],
) -> str:
    """How tensors differ from those of a module, in words; empty if they do not.

    ``wrong`` has shapes as they are and as the module has them, by name.
    """
    names = (("missing", list(missing)), ("unexpected", list(unexpected)))
    if parts := [f"{len(keys)} {what} ({few(keys)})" for what, keys in names if keys]:
        return f"keys {' and '.join(parts)}"
    shapes = [f"{key}: got {list(a)} expected {list(b)}" for key, (a, b) in wrong.items()]
    return f"{len(shapes)} wrong shapes ({few(shapes, '; ')})" if shapes else ""


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name."""
    return {name: tuple(value.shape) for name, value in state.items()}


def few(items: list[str], separator: str = ", ") -> str:
    """The first few of a list, for a message."""
    more = f"{separator}…" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + more


def first_line(error: BaseException) -> str:
    """What an error says, in one line; the name of its class if it says nothing."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def stored_dtype(tensors: Iterable[Tensor]) -> str:
    """``float32``, ``float16`` or ``bfloat16``: the type that most of a checkpoint's values have.

    A checkpoint in half precision may keep a norm or a scale in float32, and one in float32 a
    table in half: a single tensor says nothing. Any other type counts as ``float32``.
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
