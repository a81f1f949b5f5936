"""Parquet files, whose columns and classes are those that Hugging Face ``datasets`` describes.

The images are not read through its loaders: they give a data set either as a stream from its first
image on or after copying every image into a cache. So ``pyarrow`` reads row groups.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from tome_export.data.decode import reason_of
from tome_export.data.folders import some
from tome_export.data.labels import Classes
from tome_export.data.source import Source, printable
from tome_export.errors import InputError

LABELS = ("label", "labels")
"""Columns of a Parquet file that hold its labels."""


def parquet_source(text: str, paths: Sequence[Path], classes: Classes | None) -> Source:
    """The rows of Parquet files, of which footers and labels only are read."""
    source = Source("parquet", text, paths)
    labelled, notes, column = set[bool](), dict[str, None](), ""
    for number, path in enumerate(paths):
        with _parquet_file(path) as file:
            features = _features(file.schema_arrow, path)
            column = _image_column(features, column, path)
            before = len(source)
            groups = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            # An image is more than a byte: this many are not there, whatever the footer says.
            size = path.stat().st_size
            if min(groups, default=0) < 0 or sum(groups) > size:
                raise InputError(
                    f"{path} says that it has {sum(groups)} rows in {size} bytes, which are no "
                    "images; write it anew"
                )
            for group, rows in enumerate(groups):
                for row in range(rows):
                    source.add(f"row {len(source) - before}", number, group, row)
            if classes is not None:
                labels, note = _labels(file, features, path, classes)
                labelled.add(bool(labels))
                source.classes += labels
                notes |= {note: None} if note else {}
    source.read = partial(read_row, column)
    source.notes += notes
    if not len(source):
        raise InputError(f"no images in {text}; the Parquet files have no rows")
    if len(labelled) > 1:
        raise InputError(f"{text} has labels in some of its files only; label all or none")
    return source


def read_row(column: str, path: str, _name: str, group: int, row: int, shown: str) -> bytes:
    """The image in a row of a row group; see ``Reader``."""
    try:
        value = _images(path, group, column)[row].as_py()
    # Arrow raises errors of its own and of Python's, whichever part is damaged.
    except Exception as error:
        reason = reason_of(error)[:200]
        raise InputError(
            f"{shown} cannot be read from the shard ({reason}); copy it again"
        ) from None
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise InputError(f"{shown} holds no bytes; expected the image itself in the shard")
    return data


@lru_cache(maxsize=2)
def _images(path: str, group: int, column: str) -> Any:
    """The images of one row group; the last two are kept, since neighbours are wanted next."""
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column])[column]


@contextlib.contextmanager
def _parquet_file(path: Path) -> Iterator[Any]:
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except InputError:
        raise
    # Any part may be damaged, and Arrow raises errors of its own and of Python's.
    except Exception:
        raise InputError(f"{path} is not a whole Parquet file; copy it again") from None


def _features(schema: Any, path: Path) -> Any:
    """Columns as ``datasets`` wrote them: which hold images, and names of classes."""
    # Nothing is looked up anywhere; should the library want to, it is told not to.
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    from datasets import Features

    try:
        return Features.from_arrow_schema(schema)
    # It calls what the description names with what that gives.
    except Exception as error:
        reason = reason_of(error)[:200]
        raise InputError(
            f"{path} has a description by Hugging Face datasets that cannot be read ({reason}); "
            "write it anew"
        ) from None


def _image_column(features: Any, expected: str, path: Path) -> str:
    """That of the files before, else ``image``, else the only one of images."""
    from datasets import Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    column = expected or ("image" if "image" in features or len(images) != 1 else images[0])
    if column not in features:
        raise InputError(
            f"{path} has the columns {printable(some(list(features), 20))}; expected {column!r} "
            f"and {LABELS[0]!r}"
        )
    return column


def _labels(file: Any, features: Any, path: Path, classes: Classes) -> tuple[list[int], str]:
    """A file's labels, none where it has none, and how they were found or matched."""
    from datasets import ClassLabel, Image

    numbered = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    column = next((name for name in LABELS if name in features), None)
    column = column or (numbered[0] if len(numbered) == 1 else None)
    if column is None:
        others = [
            name
            for name, feature in features.items()
            if name != "image" and not isinstance(feature, Image)
        ]
        note = (
            f"no labels: they are read of the column {' or '.join(LABELS)}, or of the only one of "
            f"classes; not read are {printable(some(others))}"
        )
        return [], note if others else ""
    values = file.read(columns=[column])[column].to_pylist()
    # Hugging Face marks test images without a label with -1, pandas with a number that is none.
    if all(value in (None, -1) or value != value for value in values):
        return [], f"no labels: the column {printable(column)} is empty"
    names, note = getattr(features[column], "names", None), ""
    if column in numbered and names and classes.by_name:
        index, note = classes.indices([*map(str, names)], path.name)
        values = [v if v is None or not 0 <= v < len(index) else index[v] for v in values]
    return [classes.index(v, f"{path.name}:row {row}") for row, v in enumerate(values)], note
