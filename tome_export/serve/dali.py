"""The model that decodes images on a GPU, by the server's DALI backend.

Sources: the backend's ``model_provider.h`` (it runs ``dali.py`` of a version without
``model.dali``, and refuses paths of other characters than letters, digits, ``.``, ``_`` and ``/``)
and ``config_tools.cc`` (encoded files are UINT8 of any length, batched raggedly).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tome_export.errors import InputError
from tome_export.serve.config import ModelFolder, ServeOptions, config_from_values, python_folder
from tome_export.serve.names import IMAGE

if TYPE_CHECKING:
    from tome_export.artifact import Manifest

THREADS = 4
"""Threads of the CPU that read headers and what the GPU does not decode."""

RESIZES = ("crop", "squash")
FILTERS = ("bilinear", "bicubic")
"""Rules that DALI follows to rounding. Its «nearest» takes other pixels, and it lays no borders."""


_PATH = re.compile(r"[A-Za-z0-9._/]+")


def path_note(repository: Path) -> str:
    """What to say of a repository whose path the backend does not load from; empty of any other."""
    if _PATH.fullmatch(str(repository)):
        return ""
    return (
        f"DALI's backend loads from paths of letters, digits, ., _ and / only: {repository} has to "
        "be another where it is served"
    )


def dali_folder(
    manifest: Manifest,
    name: str,
    options: ServeOptions,
    max_batch: int,
    outputs: Sequence[Mapping[str, Any]],
) -> ModelFolder:
    """The model ``name``: ``image`` UINT8 ``[bytes]``, one whole file, to ``outputs``.

    Raises:
        InputError: if the model takes videos, or images as DALI does not make them.
    """
    recipe = manifest.preprocessing
    channels, _height, _width = recipe.input_size
    unlike = {
        "videos": manifest.video is not None,
        f"images of {channels} channels": channels != 3,
        f"images resized by the rule «{recipe.resize}»": recipe.resize not in RESIZES,
        f"images resized by the filter «{recipe.interpolation}»": recipe.interpolation
        not in FILTERS,
        "images with borders (crop_pct above 1)": recipe.crop_pct > 1,
    }
    if what := next((what for what, true in unlike.items() if true), None):
        raise InputError(
            f"the model takes {what}, which DALI does not make as the model expects it; serve it "
            "without --dali"
        )
    if not _PATH.fullmatch(name):
        raise InputError(
            f"the model would be called {name}; DALI's backend takes letters, digits, . and _, "
            "give such a --name"
        )
    config = config_from_values(
        name=name,
        backend="dali",
        max_batch_size=max_batch,
        input=[
            {"name": IMAGE, "data_type": "TYPE_UINT8", "dims": [-1], "allow_ragged_batch": True}
        ],
        output=outputs,
        instance_group=[{"kind": "KIND_GPU", "count": 1}],  # more take memory of the GPU anew
        dynamic_batching={},
    )
    settings = {**asdict(recipe), "max_batch": max_batch, "threads": THREADS, "device": "mixed"}
    folder = python_folder(config, "dali", "preprocessing.json", settings, options)
    # The backend looks for that name.
    files = {path.replace("/model.py", "/dali.py"): file for path, file in folder.files.items()}
    return ModelFolder(name, config, files)
