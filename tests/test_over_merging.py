"""The tables of docs/over-merging.md are those that scripts/over_merging.py makes."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STALE = "docs/over-merging.md is stale; run `python scripts/over_merging.py`"


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("over_merging")


def test_the_arithmetic(tables):
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.written(page, tables.ARITHMETIC, tables.arithmetic()) == page, STALE
    assert "exp(0.2734 log 197) = 4.24 effective tokens of 197" in page


def test_what_vit_digits_shows(tables, monkeypatch):
    monkeypatch.setattr(tables, "RS", (8,))
    (row,) = (line for line in tables.measured().splitlines() if line.startswith("| 8 |"))
    assert row in tables.PAGE.read_text(encoding="utf-8"), STALE


def test_a_page_without_marks_is_refused(tables):
    with pytest.raises(SystemExit, match="lacks the marks"):
        tables.written("nothing", tables.ARITHMETIC, "")
