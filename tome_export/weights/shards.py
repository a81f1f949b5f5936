"""Some tensors of a checkpoint folder: only what is asked for is read from its files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

FILES = ("model.safetensors", "pytorch_model.bin", "mm_projector.bin")
"""Weights files by preference; each but the last may be sharded, with an index beside it."""

Rename = Callable[[str], "str | None"]


def tensors_from_folder(folder: Path, rename: Rename) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The tensors whose names are wanted, by their new names; and the files that they were in.

    Of a sharded checkpoint only the shards that hold such tensors are opened, and have to exist.
    Nothing else is read into memory.
    """
    state: dict[str, Tensor] = {}
    names: list[str] = []
    for path, known in _files(folder, rename):
        wanted = {}
        with _opened(path) as (keys, get):
            for key in keys if known is None else known:
                new = rename(key)
                if new is not None:
                    wanted[new] = get(key)
        if wanted:
            names.append(path.name)
        state |= wanted
    return state, tuple(names)


def _files(folder: Path, rename: Rename) -> Iterator[tuple[Path, list[str] | None]]:
    """Each file to open, with the tensors to take from it; None if only the file knows them."""
    for name in FILES:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            yield folder / name, None
            return
        if index.is_file():
            break
    else:
        raise InputError(
            f"folder {folder} has no weights; expected {', '.join(FILES[:2])}, or the index of a "
            "sharded one beside its shards"
        )
    shards: dict[str, list[str]] = {}
    for key, shard in _weight_map(index).items():
        if rename(key) is not None:
            shards.setdefault(shard, []).append(key)
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise InputError(
            f"index {index} names {missing[0]}, which is not there ({len(missing)} of the "
            f"{len(shards)} shards needed are missing); download the whole checkpoint"
        )
    for shard, keys in shards.items():
        yield folder / shard, keys


def _weight_map(index: Path) -> dict[str, str]:
    try:
        found: Any = json.loads(index.read_text(encoding="utf-8"))
        weight_map = dict(found["weight_map"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(
            f"index {index} is not one of a sharded checkpoint; expected JSON with a weight_map"
        ) from None
    broken = [shard for shard in weight_map.values() if shard != Path(str(shard)).name]
    if broken:
        raise InputError(
            f"index {index} names {broken[0]!r}, which is no file beside it; expected file names"
        )
    return weight_map


@contextmanager
def _opened(path: Path) -> Iterator[tuple[list[str], Callable[[str], Tensor]]]:
    """The names of a file's tensors, and how to get one; a tensor that is not asked for stays."""
    from tome_export.weights.files import checkpoint_from_content, read_torch

    if path.suffix != ".safetensors":
        tensors = checkpoint_from_content(read_torch(path, mmap=True), path).state
        # Clones, because the map holds the whole file open, and its pages count as memory.
        try:
            yield list(tensors), lambda key: tensors[key].clone()
        except KeyError as error:
            raise InputError(
                f"weights file {path} has no tensor {error}, which its index puts there; "
                "download the whole checkpoint"
            ) from None
        return
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as opened:
            yield list(opened.keys()), opened.get_tensor
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"weights file {path} is not a whole safetensors file, or not that of its index "
            f"({reason}); it is damaged or cut short, get it again"
        ) from None
