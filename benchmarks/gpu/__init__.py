"""The first minutes on an NVIDIA GPU, in three steps: see README.md beside this file.

Runs from a checkout; the project need not be installed.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
