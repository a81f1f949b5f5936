"""Parquet shards as Hugging Face writes them: columns ``image`` and ``label``."""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tome_export.errors import InputError, MissingComponentError
from tome_export.evaluation.source import Classes, Kind, Labels, printable, stamp

IMAGE, LABEL = "image", "label"


@dataclass(frozen=True)
class ParquetItem:
    """A row of a Parquet file."""

    name: str
    path: str
    group: int
    row: int

    def load(self) -> bytes:
        """See ``Item``."""
        value = _images(self.path, self.group)[self.row].as_py()
        data = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(data, bytes):
            raise InputError(f"{self.name} holds no bytes; expected the image itself in the shard")
        return data


@dataclass(frozen=True)
class ParquetSource:
    """Rows of Parquet files; see ``Source``. ``ends`` are those of the row groups."""

    text: str
    roots: tuple[Path, ...]
    groups: tuple[tuple[int, int], ...]
    ends: tuple[int, ...]
    labels: Labels | None
    digest: str
    notes: tuple[str, ...] = ()
    kind: Kind = "parquet"

    def __len__(self) -> int:
        return self.ends[-1]

    def item(self, index: int) -> ParquetItem:
        """See ``Source``."""
        at = bisect.bisect_right(self.ends, index)
        shard, group = self.groups[at]
        first = next(i for i, (s, _) in enumerate(self.groups) if s == shard)
        of_file = index - (self.ends[first - 1] if first else 0)
        path = self.roots[shard]
        row = index - (self.ends[at - 1] if at else 0)
        return ParquetItem(printable(f"{path.name}:row {of_file}"), str(path), group, row)


def parquet_source(text: str, paths: Sequence[Path], classes: Classes | None) -> ParquetSource:
    """List the rows of Parquet files, reading their footers and labels only.

    Args:
        text: What the user gave.
        paths: Files with a column ``image``: bytes, or a struct with ``bytes``.
        classes: Of the model; None for a model without classes.

    Raises:
        InputError: if a file is no Parquet file, has no such column or no row, or a label is none
            of the model's.
        MissingComponentError: if pyarrow is not installed.
    """
    pyarrow, parquet = _pyarrow()
    groups: list[tuple[int, int]] = []
    ends: list[int] = []
    parts: list[Labels | None] = []
    digest = hashlib.sha256()
    for number, path in enumerate(paths):
        digest.update(os.fsencode(f"{path.absolute()}\0{stamp(path)}\0"))
        try:
            file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError):
            raise InputError(f"{path} is not a whole Parquet file; copy it again") from None
        with file:
            columns = file.schema_arrow.names
            if IMAGE not in columns:
                raise InputError(
                    f"{path} has the columns {', '.join(columns)}; expected {IMAGE!r} and {LABEL!r}"
                )
            for group in range(file.num_row_groups):
                groups.append((number, group))
                rows = file.metadata.row_group(group).num_rows
                ends.append((ends[-1] if ends else 0) + rows)
            if classes is not None:
                labelled = LABEL in columns
                column = file.read(columns=[LABEL])[LABEL].to_pylist() if labelled else None
                parts.append(_labels(column, path, classes))
    if not ends or not ends[-1]:
        raise InputError(f"no images in {text}; the Parquet files have no rows")
    known = [part for part in parts if part is not None]
    if known and len(known) != len(parts):
        raise InputError(f"{text} has labels in some of its files only; label all or none")
    return ParquetSource(
        text,
        tuple(path.absolute() for path in paths),
        tuple(groups),
        tuple(ends),
        np.concatenate(known) if known else None,
        digest.hexdigest(),
    )


def _labels(column: list[Any] | None, path: Path, classes: Classes) -> Labels | None:
    # Hugging Face marks test images without a label with -1.
    if column is None or all(value in (None, -1) for value in column):
        return None
    where = f"{path.name}:row"
    values = [classes.index(value, f"{where} {row}") for row, value in enumerate(column)]
    return np.asarray(values, dtype=np.int32)


@lru_cache(maxsize=1)
def _images(path: str, group: int) -> Any:
    """The images of one row group: neighbours are wanted next, so the last group is kept."""
    _, parquet = _pyarrow()
    with parquet.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[IMAGE])[IMAGE]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingComponentError(
            "pyarrow is not installed, which reads Parquet files; install tome-export[parquet]"
        ) from None
    return pyarrow, parquet
