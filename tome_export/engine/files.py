"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tome_export.errors import ExportError


def write_atomically(path: Path, content: Any) -> None:
    """Write bytes (any buffer) to a sibling of ``path`` and rename it into place.

    Raises:
        ExportError: if the folder is missing or read-only, or the disk is full.
    """
    sibling = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            sibling.write_bytes(content)
            sibling.replace(path)
        finally:
            sibling.unlink(missing_ok=True)
    except OSError as error:
        reason = error.strerror or error
        raise ExportError(
            f"cannot write {path}: {reason}; free space or choose another folder"
        ) from error
