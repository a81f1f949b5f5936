"""The first minutes on an NVIDIA GPU, in three steps: see README.md beside this file.

Runs from a checkout in which the project is not installed: ``plugins``, ``models`` and ``cli`` are
sub-packages of ``tome_export``, which only an installation knows.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def make_importable() -> None:
    """Make the sub-packages of ``tome_export`` importable; does nothing where they are."""
    if importlib.util.find_spec("tome_export.plugins") is None:
        import tome_export

        tome_export.__path__.append(str(ROOT))


make_importable()
