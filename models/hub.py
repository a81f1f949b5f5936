"""Reaching pretrained weights: from the cache, or the hub if it answers, within a bound."""

from __future__ import annotations

import threading
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from tome_export.models.recipe import Recipe

ANSWER_S = 10.0
"""Seconds the hub has to answer, name lookup included."""

_FILES = ("model.safetensors", "pytorch_model.bin")


def pretrained_overlay(recipe: Recipe) -> dict[str, str] | None:
    """What to tell timm so that it finds the weights; asks the hub once if they are not cached.

    timm and huggingface_hub retry for most of a minute where there is no network, so one request
    is made first, in a thread that can be left behind when even the name lookup hangs.

    Args:
        recipe: A recipe of timm's.

    Returns:
        ``{"file": path}`` where the cache has them, so that no network is touched; else None.

    Raises:
        InputError: if the hub does not answer within ``ANSWER_S``, or has no such weights.
    """
    cached = recorded_file(recipe)
    if cached is not None:
        return {"file": str(cached)}
    cfg = _cfg(recipe)
    if cfg is None or not cfg.has_weights:
        raise InputError(
            f"timm has no pretrained weights for {recipe.name}; give a .safetensors or .pth "
            "file with --weights PATH, or try the toolchain with --weights random"
        )
    if cfg.hf_hub_id:
        ask(recipe, "the hub", lambda: _ask_hub(cfg))
    elif cfg.url:
        ask(recipe, str(cfg.url), lambda: ask_url(str(cfg.url)))
    return None


def recorded_file(recipe: Recipe) -> Path | None:
    """The recipe's weights file in the hub's cache on this machine, if it is there."""
    from huggingface_hub import try_to_load_from_cache

    cfg = _cfg(recipe)
    if cfg is None or not cfg.hf_hub_id:
        return None
    repository, _, revision = str(cfg.hf_hub_id).partition("@")
    for name in _names(cfg):
        found = try_to_load_from_cache(repository, name, revision=revision or None)
        if isinstance(found, str):
            return Path(found)
    return None


def _cfg(recipe: Recipe) -> Any:
    from timm import get_pretrained_cfg

    return get_pretrained_cfg(recipe.timm_name)


def _names(cfg: Any) -> tuple[str, ...]:
    return (str(cfg.hf_hub_filename),) if cfg.hf_hub_filename else _FILES


def _ask_hub(cfg: Any) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import EntryNotFoundError

    repository, _, revision = str(cfg.hf_hub_id).partition("@")
    # Any file of the repository will do: what is asked is whether it can be reached.
    url = hf_hub_url(repository, _names(cfg)[0], revision=revision or None)
    try:
        get_hf_file_metadata(url, timeout=ANSWER_S)
    except EntryNotFoundError:
        return


def ask_url(url: str) -> None:
    """Ask for the head of a file; raises what urllib raises if it is not there."""
    request = urllib.request.Request(url, method="HEAD")  # noqa: S310 (https, from a library)
    with urllib.request.urlopen(request, timeout=ANSWER_S):  # noqa: S310
        return


def ask(recipe: Recipe, where: str, question: Callable[[], None]) -> None:
    """Put one question to the network, in a thread that is left behind if it does not return.

    Args:
        recipe: Whose weights are wanted.
        where: Who is asked, for the message.
        question: Returns if the weights are there, and raises if they cannot be had.

    Raises:
        InputError: if it raises, or does not return within ``ANSWER_S`` and 2 seconds.
    """
    reason = answer(question)
    if not reason:
        return
    raise InputError(
        f"pretrained weights of {recipe.name} cannot be had from {where} ({reason}); give a "
        ".safetensors or .pth file downloaded elsewhere with --weights PATH, or try the toolchain "
        "with --weights random"
    )


def answer(question: Callable[[], None]) -> str:
    """Why a question to the network failed, in one line; empty if it did not.

    Args:
        question: Raises if it fails; run in a thread that is left behind if it does not return.
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
    if not failure:
        return ""
    text = str(failure[0]).strip()
    return text.splitlines()[0] if text else type(failure[0]).__name__
