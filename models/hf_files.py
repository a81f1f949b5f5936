"""Files of a Transformers checkpoint: a folder, the hub's cache, or the hub if it answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tome_export.errors import InputError
from tome_export.models.hub import ANSWER_S, answer

_CONFIGS = ("config.json", "preprocessor_config.json")
_WEIGHTS = (
    ("model.safetensors", ()),
    ("model.safetensors.index.json", ("model-*.safetensors",)),
    ("pytorch_model.bin", ()),
    ("pytorch_model.bin.index.json", ("pytorch_model-*.bin",)),
)
"""Weights by preference: a file, and the shards of an index."""


def described(name: str) -> Path:
    """A folder with the ``config.json`` of a checkpoint.

    Args:
        name: A folder, or a name on the hub.

    Raises:
        InputError: if there is neither.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise InputError(f"{name} is a file; expected a checkpoint folder or a name on the hub")
    parts = name.split("/")
    if name.startswith((".", "/", "~")) or len(parts) > 2 or not all(parts):
        raise InputError(
            f"folder {name} does not exist; expected a checkpoint folder or a name on the hub"
        )
    _check_name(name)
    cached = _cached(name, _CONFIGS[0])
    return cached.parent if cached else _download(name, _CONFIGS)


def snapshot(name: str) -> Path:
    """A folder with configuration and weights of a checkpoint.

    Args:
        name: A folder, or a name on the hub.

    Raises:
        InputError: if there is neither.
    """
    folder = described(name)
    if Path(name).expanduser().is_dir() or any((folder / file).is_file() for file, _ in _WEIGHTS):
        return folder
    there = _files(name)
    for file, shards in _WEIGHTS:
        if file in there:
            return _download(name, (*_CONFIGS, file, *shards))
    raise InputError(
        f"{name} on the hub has no weights of PyTorch; expected one of "
        f"{', '.join(file for file, _ in _WEIGHTS)}"
    )


def _check_name(name: str) -> None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        raise InputError(
            f"{name!r} is neither a folder here nor a name that the hub allows; expected "
            "hf:<folder> or hf:<owner>/<name>"
        ) from None


def _cached(name: str, file: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file)
    return Path(found) if isinstance(found, str) else None


def _files(name: str) -> list[str]:
    from huggingface_hub import list_repo_files

    found: list[str] = []
    _ask(name, lambda: found.extend(list_repo_files(name)))
    return found


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, snapshot_download

    # One question within a bound first: the hub's own client retries for most of a minute.
    url = hf_hub_url(name, _CONFIGS[0])
    _ask(name, lambda: _head(get_hf_file_metadata, url))
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    # What happens to a download half-way comes as many classes, with the cause in the message.
    except (OSError, RuntimeError, ValueError) as error:
        raise _refused(name, str(error).strip() or type(error).__name__) from None


def _head(metadata: Any, url: str) -> None:
    metadata(url, timeout=ANSWER_S)


def _ask(name: str, question: Any) -> None:
    reason = answer(question)
    if reason:
        raise _refused(name, reason)


def _refused(name: str, reason: str) -> InputError:
    return InputError(
        f"{name} is no folder here, and cannot be had from the hub ({reason.splitlines()[0]}); "
        "give the folder of a checkpoint downloaded elsewhere: hf:<folder>"
    )
