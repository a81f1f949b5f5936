"""Names in a repository: of models, and of the tensors and parameters that clients ask for."""

from __future__ import annotations

import re

from tome_export.artifact import Manifest
from tome_export.errors import UsageError

PREPROCESS, POSTPROCESS, PIPELINE = "_preprocess", "_postprocess", "_pipeline"
"""Added to the name of a model of pixels for the models around it; the last is the ensemble."""

ROUTER, CASCADE = "_router", "_cascade"
"""Added to what the names of several models have in common, for the model that chooses one."""

FIXED = "_fixed"
"""Added to the name of a model of one batch size: users call the model without it, which fills
batches up to that size."""

RESERVED = (PREPROCESS, POSTPROCESS, PIPELINE, ROUTER, CASCADE, FIXED)

IMAGE, VIDEO = "image", "video"
"""Inputs of a model that takes encoded images (JPEG or PNG files) or video files: BYTES."""

ROUTES = "routes"
"""Parameter of a router's config: names of the models behind it, with commas, for clients."""

MAX_NAME = 128
"""Longest name of a model: names of the models around it, and of files, are longer."""


def name_end(manifest: Manifest, *, sized: bool = False) -> str:
    """``_r<r>``, with r as the schedule has it; ``_448x224_r<r>`` where there are several sizes."""
    schedule, _, frames = manifest.merge.schedule.partition("; ")
    merged = re.fullmatch(r"r=(\d+) (.+)", schedule)
    if merged is None:
        r = schedule.replace(",", "-")
    else:
        r = merged[1] if merged[2] == "constant" else f"{merged[1]}-{merged[2]}"
    r = f"{r}-across" if frames else r
    size = f"_{manifest.preprocessing.image_size}" if sized else ""
    return f"{size}_r{plain_name(r)}"


def plain_name(text: str) -> str:
    """A name that the server takes, made of any text."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", text).lstrip(".") or "model"


def check_name(name: str) -> None:
    """Raise ``UsageError`` unless a model may have the name."""
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
        raise UsageError(
            f"model name is {name!r}; expected letters, digits, _, - and ., such as vit_b16_r8"
        )
    if len(name) > MAX_NAME:
        raise UsageError(
            f"model name has {len(name)} characters; expected {MAX_NAME} or fewer, give a shorter "
            "one with --name"
        )


def check_chosen_name(name: str) -> None:
    """Raise ``UsageError`` unless a user may choose the name: some endings are ours to add."""
    check_name(name)
    end = next((end for end in RESERVED if name.endswith(end)), None)
    if end is not None:
        raise UsageError(
            f"model name is {name!r}; names that end in {end} are given to models made around a "
            f"model, choose one such as {name.removesuffix(end) or 'vit_b16'}"
        )
