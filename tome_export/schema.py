"""What ``build.json`` must hold: checked once, when it is read, so that no reader has to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tome_export.errors import InputError
from tome_export.spec import ATTENTION_FORMS, PRECISIONS, BatchRange

FORMAT = 1
"""Version of ``build.json``; raised when a reader of the old form would misread the new."""

MANIFEST = "build.json"
MODEL = "model.onnx"

RESULTS = {
    "parity.json": "check",
    "bench.json": "bench",
    "eval.json": "eval",
    "report.html": "report",
}
"""What was found out about a model, which is usable without -> the command that finds it."""


@dataclass(frozen=True)
class Each:
    """An object with free names, whose values all have one shape."""

    of: Any


@dataclass(frozen=True)
class OneOf:
    """One of these strings."""

    words: tuple[str, ...]


@dataclass(frozen=True)
class OrNull:
    """A value of this shape, or null."""

    of: Any


class Batch:
    """A batch range as text."""


NUMBER = int | float

SHAPE: dict[str, Any] = {
    "model": {
        "name": str,
        "description": str,
        "random_weights": bool,
        "weights": {"kind": str, "source": str, "seed": OrNull(int), "state_sha256": str},
    },
    "merge": {
        "schedule": str,
        "r": [int],
        "prop_attn": bool,
        "prefix": int,
        "class_token": bool,
        "scored": bool,
        "merge_op": str,
    },
    "tokens": [int],
    "layers": [{"tokens_in": int, "r": int}],
    "onnx": {"attention": OneOf(ATTENTION_FORMS)},
    "precision": OneOf(PRECISIONS),
    "batch": Batch,
    "preprocessing": {
        "input_size": [int],
        "mean": [NUMBER],
        "std": [NUMBER],
        "crop_pct": NUMBER,
        "interpolation": str,
    },
    "output": {"name": str},
    "engines": Each(
        {
            "file": str,
            "version": str,
            "batch": Batch,
            "targets": [str],
            "build_seconds": NUMBER,
            "notes": [str],
        }
    ),
    "engine_note": str,
    "files": Each({"bytes": int, "sha256": str}),
}
"""Everything that later commands read; further entries are free."""

_NAMES = {
    str: "text",
    bool: "true or false",
    int: "a whole number",
    NUMBER: "a number",
    Batch: "a batch range such as 1:8:32",
}


def load_manifest(path: Path) -> dict[str, Any]:
    """Read the ``build.json`` of a directory, of whatever format.

    Raises:
        InputError: unless it is a JSON object with the number of a format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise InputError(
            f"{path} is not an artifact: it has no {MANIFEST}; give the directory that "
            "'tome-export build' wrote"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON ({error}); rebuild the artifact") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(found, bool) or not isinstance(found, int):
        raise InputError(
            f"{file} has format {found!r}; this version reads format {FORMAT}, rebuild the artifact"
        )
    return dict(manifest)


def read_manifest(path: Path) -> dict[str, Any]:
    """Read and check the ``build.json`` of a directory.

    Raises:
        InputError: if it is none, of another format, or edited into something unusable.
    """
    manifest, file = load_manifest(path), path / MANIFEST
    if manifest["format"] != FORMAT:
        raise InputError(
            f"{file} has format {manifest['format']}; this version reads format {FORMAT}, rebuild "
            "the artifact"
        )
    if not isinstance(manifest.get("files"), dict):
        raise InputError(f"{file} lists no files; rebuild the artifact")
    wrong = next(_wrong(manifest, SHAPE, ""), None) or next(_unsound(manifest), None)
    if wrong:
        raise InputError(f"{file} {wrong}; rebuild the artifact or copy it again")
    return manifest


def _wrong(value: Any, shape: Any, where: str) -> Iterator[str]:
    """What in a value is not of a shape."""
    kind = dict if isinstance(shape, dict | Each) else list if isinstance(shape, list) else None
    if kind is not None and not isinstance(value, kind):
        yield f"has {where} {_short(value)}, expected {_expected(shape)}"
    elif isinstance(shape, dict):
        for name, inner in shape.items():
            inside = f"{where}.{name}" if where else name
            if name not in value:
                yield f"has no {inside}"
            else:
                yield from _wrong(value[name], inner, inside)
    elif isinstance(shape, Each | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        of = shape.of if isinstance(shape, Each) else shape[0]
        for name, item in items:
            yield from _wrong(item, of, f"{where}[{name!r}]")
    elif isinstance(shape, OrNull):
        if value is not None:
            yield from _wrong(value, shape.of, where)
    elif isinstance(shape, OneOf):
        if value not in shape.words:
            yield f"has {where} {_short(value)}, expected one of {', '.join(shape.words)}"
    elif not _is(value, shape):
        yield f"has {where} {_short(value)}, expected {_expected(shape)}"


def _expected(shape: Any) -> str:
    """A shape in words."""
    if isinstance(shape, list):
        return f"a list, each entry {_expected(shape[0])}"
    return "an object" if isinstance(shape, dict | Each) else _NAMES[shape]


def _is(value: Any, shape: Any) -> bool:
    if shape is Batch:
        try:
            return isinstance(value, str) and bool(BatchRange.parse(value))
        except InputError:
            return False
    # In Python true and false are whole numbers too.
    return isinstance(value, shape) and (shape is bool or not isinstance(value, bool))


def _unsound(manifest: dict[str, Any]) -> Iterator[str]:
    """What the types cannot say."""
    files = manifest["files"]
    for name in files:
        # A name that leads elsewhere would let a manifest point at any file of the machine.
        plain = PurePosixPath(name)
        parts = set(plain.parts)
        if name != str(plain) or parts & {"..", "/", MANIFEST} or not parts or "\0" in name:
            yield f"lists the file {_short(name)}, expected a plain name or one in a folder"
    if MODEL not in files:
        yield f"does not list {MODEL}"
    for name, engine in manifest["engines"].items():
        if engine["file"] not in files:
            yield f"does not list {_short(engine['file'])}, the file of its {name} engine"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
