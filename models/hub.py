"""Reaching weights and checkpoints: in the cache, or on the hub if it answers within a bound."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.weights.files import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from tome_export.models.recipe import Recipe

ANSWER_S = 10.0
"""Seconds the hub has to answer, name lookup included."""

_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_CONFIGS = ("config.json", *_PROCESSORS)
_WEIGHTS = {
    "model.safetensors": (),
    "model.safetensors.index.json": ("model-*.safetensors",),
    "pytorch_model.bin": (),
    "pytorch_model.bin.index.json": ("pytorch_model-*.bin",),
}
"""Weights by preference: a file, and the shards of an index."""


def answer(question: Callable[[], object]) -> str:
    """Why a question to the network failed, in one line; empty if it did not.

    The libraries retry for most of a minute where there is no network, so one request is made
    first, in a thread that can be left behind when even the name lookup hangs.
    """
    failure: list[BaseException] = []

    def run() -> None:
        try:
            question()
        except Exception as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True, name="ask-hub")
    thread.start()
    thread.join(ANSWER_S + 2)
    if thread.is_alive():
        return f"no answer in {ANSWER_S:.0f} s"
    return first_line(failure[0]) if failure else ""


def ask(recipe: Recipe, where: str, question: Callable[[], object]) -> None:
    """Ask the network for a recipe's weights; ``question`` raises if they cannot be had.

    Raises:
        InputError: if it raises, or does not return within ``ANSWER_S`` and 2 seconds.
    """
    if reason := answer(question):
        raise InputError(
            f"pretrained weights of {recipe.name} cannot be had from {where} ({reason}); give a "
            ".safetensors or .pth file downloaded elsewhere with --weights PATH, or try the "
            "toolchain with --weights random"
        )


def ask_url(url: str) -> None:
    """Ask for the head of a file; raises what urllib raises if it is not there."""
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 (https, from a library)
    with urllib.request.urlopen(request, timeout=ANSWER_S):  # noqa: S310
        return


def ask_hub(repository: str, name: str) -> None:
    """Ask whether ``owner/name`` or ``owner/name@revision`` can be reached; raises if not.

    Any file's name will do; whether it is there does not matter.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    try:
        url = hf_hub_url(repository, name, revision=revision or None)
        get_hf_file_metadata(url, timeout=ANSWER_S)
    except EntryNotFoundError:
        return


def cached_file(repository: str, names: Iterable[str]) -> Path | None:
    """The first of some files of ``owner/name`` or ``owner/name@revision`` in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    found = (try_to_load_from_cache(repository, n, revision=revision or None) for n in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def pretrained_overlay(recipe: Recipe) -> dict[str, str] | None:
    """What to tell timm so that it finds a recipe's weights; asks the hub if they are not cached.

    Returns:
        ``{"file": path}`` where the cache has them, so that no network is touched; else None.

    Raises:
        InputError: if the hub does not answer within ``ANSWER_S``, or has no such weights.
    """
    if (path := recorded_file(recipe)) is not None:
        return {"file": str(path)}
    cfg = _cfg(recipe)
    if cfg is None or not cfg.has_weights:
        raise InputError(
            f"timm has no pretrained weights for {recipe.name}; give a .safetensors or .pth "
            "file with --weights PATH, or try the toolchain with --weights random"
        )
    if cfg.hf_hub_id:
        ask(recipe, "the hub", lambda: ask_hub(str(cfg.hf_hub_id), _names(cfg)[0]))
    elif cfg.url:
        ask(recipe, str(cfg.url), lambda: ask_url(str(cfg.url)))
    return None


def recorded_file(recipe: Recipe) -> Path | None:
    """The weights file of a recipe of timm's in the hub's cache, if it is there."""
    cfg = _cfg(recipe)
    if cfg is None or not cfg.hf_hub_id:
        return None
    return cached_file(str(cfg.hf_hub_id), _names(cfg))


def _cfg(recipe: Recipe) -> Any:
    from timm import get_pretrained_cfg

    return get_pretrained_cfg(recipe.timm_name)


def _names(cfg: Any) -> tuple[str, ...]:
    named = cfg.hf_hub_filename
    return (str(named),) if named else ("model.safetensors", "pytorch_model.bin")


def described(name: str) -> Path:
    """A folder with the ``config.json`` of a Transformers checkpoint: a folder here, or the hub's.

    Raises:
        InputError: if there is neither.
    """
    from huggingface_hub.errors import HFValidationError

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
    try:
        cached = cached_file(name, _CONFIGS[:1])
    except HFValidationError:
        raise InputError(
            f"{name!r} is neither a folder here nor a name that the hub allows; expected "
            "hf:<folder> or hf:<owner>/<name>"
        ) from None
    if cached is None:
        return _download(name, _CONFIGS)
    # Whoever cached the model alone may have left out how its images are made.
    if cached_file(name, _PROCESSORS) is None:
        try:
            return _download(name, _CONFIGS)
        # Without a network it is said that they are missing.
        except InputError:
            return cached.parent
    return cached.parent


def snapshot(name: str) -> Path:
    """A folder with configuration and weights of a Transformers checkpoint, as ``described``.

    Raises:
        InputError: if there is none.
    """
    folder = described(name)
    if Path(name).expanduser().is_dir() or any((folder / file).is_file() for file in _WEIGHTS):
        return folder
    from huggingface_hub import list_repo_files

    there: list[str] = []
    _ask(name, lambda: there.extend(list_repo_files(name)))
    for file, shards in _WEIGHTS.items():
        if file in there:
            return _download(name, (*_CONFIGS, file, *shards))
    raise InputError(
        f"{name} on the hub has no weights of PyTorch; expected one of {', '.join(_WEIGHTS)}"
    )


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    _ask(name, lambda: ask_hub(name, _CONFIGS[0]))
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    # What happens to a download half-way comes as many classes, with the cause in the message.
    except (OSError, RuntimeError, ValueError) as error:
        raise _refused(name, first_line(error)) from None


def _ask(name: str, question: Callable[[], object]) -> None:
    if reason := answer(question):
        raise _refused(name, reason)


def _refused(name: str, reason: str) -> InputError:
    return InputError(
        f"{name} is no folder here, and cannot be had from the hub ({reason}); give the folder of "
        "a checkpoint downloaded elsewhere: hf:<folder>"
    )
