"""Import this project from its checkout on a machine where it is not installed.

Its folders ``plugins``, ``models`` and ``cli`` are sub-packages of ``tome_export``, which only an
installation knows.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def make_importable() -> None:
    """Make ``tome_export`` and its sub-packages importable; does nothing where they are."""
    if importlib.util.find_spec("tome_export") is None:
        sys.path.insert(0, str(ROOT))
    if importlib.util.find_spec("tome_export.plugins") is None:
        import tome_export

        tome_export.__path__.append(str(ROOT))


make_importable()
