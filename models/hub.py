"""Reaching weights and checkpoints: in the cache, or on the hub if it answers within a bound."""

from __future__ import annotations

import threading
import urllib.request
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

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


def failure_of(question: Callable[[], object]) -> str:
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


def check_url(recipe: Recipe, url: str) -> None:
    """Raise an ``InputError`` unless the file of a recipe's weights answers in time."""
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 (https, from a library)
    ask = partial(urllib.request.urlopen, request, timeout=ANSWER_S)
    _refuse(recipe, url, failure_of(lambda: ask().close()))


def check_hub(recipe: Recipe, repository: str, name: str) -> None:
    """Raise an ``InputError`` unless the hub answers in time; any file of a repository will do."""
    _refuse(recipe, "the hub", failure_of(lambda: _ask_hub(repository, name)))


def _refuse(recipe: Recipe, where: str, reason: str) -> None:
    if reason:
        raise InputError(
            f"pretrained weights of {recipe.name} cannot be had from {where} ({reason}); give a "
            ".safetensors or .pth file downloaded elsewhere with --weights PATH, or try the "
            "toolchain with --weights random"
        )


def loading_failed(recipe: Recipe, error: Exception, file: str) -> InputError:
    """What is said where a library's download broke off: it comes as many classes of error."""
    return InputError(
        f"pretrained weights of {recipe.name} could not be loaded ({first_line(error)}); give "
        f"{file} with --weights PATH, or try the toolchain with --weights random"
    )


def _ask_hub(repository: str, name: str) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = repository.partition("@")
    try:
        url = hf_hub_url(repository, name, revision=revision or None)
        get_hf_file_metadata(url, timeout=ANSWER_S)
    except EntryNotFoundError:  # whether that file is there does not matter
        return


def cached_file(repository: str, names: Iterable[str]) -> Path | None:
    """The first of some files of ``owner/name[@revision]`` that is in the hub's cache."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = repository.partition("@")
    found = (try_to_load_from_cache(repository, n, revision=revision or None) for n in names)
    return next((Path(path) for path in found if isinstance(path, str)), None)


def config_folder(name: str) -> Path:
    """A folder with the ``config.json`` of a Transformers checkpoint: one here, or the hub's."""
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
    # Whoever cached the model alone may have left out how its images are made.
    if cached is not None and cached_file(name, _PROCESSORS) is not None:
        return cached.parent
    try:
        return _download(name, _CONFIGS)
    except InputError:
        # Without a network it is said that they are missing.
        if cached is not None:
            return cached.parent
        raise


def weights_folder(name: str) -> Path:
    """As ``config_folder``, with weights: they are downloaded where they are not here."""
    folder = config_folder(name)
    if Path(name).expanduser().is_dir() or any((folder / file).is_file() for file in _WEIGHTS):
        return folder
    from huggingface_hub import list_repo_files

    there: list[str] = []
    if reason := failure_of(lambda: there.extend(list_repo_files(name))):
        raise _no_checkpoint(name, reason)
    for file, shards in _WEIGHTS.items():
        if file in there:
            return _download(name, (*_CONFIGS, file, *shards))
    raise InputError(
        f"{name} on the hub has no weights of PyTorch; expected one of {', '.join(_WEIGHTS)}"
    )


def _download(name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    if reason := failure_of(lambda: _ask_hub(name, _CONFIGS[0])):
        raise _no_checkpoint(name, reason)
    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, RuntimeError, ValueError) as error:
        raise _no_checkpoint(name, first_line(error)) from None


def _no_checkpoint(name: str, reason: str) -> InputError:
    return InputError(
        f"{name} is no folder here, and cannot be had from the hub ({reason}); give the folder of "
        "a checkpoint downloaded elsewhere: hf:<folder>"
    )
