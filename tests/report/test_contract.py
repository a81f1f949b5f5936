"""Reports that cannot be shown: one line, compared whole."""

from __future__ import annotations

import json

import pytest

from tome_export.errors import InputError
from tome_export.report.contract import CONTRACTS, read_report

from .conftest import REPORTS, bench_report, eval_report, schedule_report


def without(report, *path):
    """The report with one entry gone."""
    *above, last = path
    inner = report
    for step in above:
        inner = inner[step]
    del inner[last]
    return report


def having(report, value, *path):
    """The report with another value at one place."""
    *above, last = path
    inner = report
    for step in above:
        inner = inner[step]
    inner[last] = value
    return report


AGAIN = "run 'tome-export {}' of this version again"

CASES = {
    "not json": (
        "bench.json",
        "{",
        "is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1))",
    ),
    "no object": ("bench.json", [], "has [], expected an object"),
    "later format": (
        "schedule.json",
        {**schedule_report(), "format": 2},
        "has format 2; this version reads format 1,",
    ),
    "entry missing": (
        "bench.json",
        without(bench_report(), "rows", 1, "merged", "latency_ms", "p80"),
        "has no rows[1].merged.latency_ms.p80",
    ),
    "no list": (
        "eval.json",
        having(eval_report(), {}, "candidates"),
        "has {} as candidates, expected a list",
    ),
    "text for a number": (
        "eval.json",
        having(eval_report(), "9", "candidates", 0, "macs"),
        "has '9' as candidates[0].macs, expected a finite number",
    ),
    "true for a number": (
        "schedule.json",
        having(schedule_report(), True, "front", 0, "macs"),
        "has True as front[0].macs, expected a finite number",
    ),
    "not finite": (
        "bench.json",
        having(bench_report(), float("inf"), "macs_ratio"),
        "has inf as macs_ratio, expected a finite number",
    ),
    "parity of another kind": ("parity.json", {"checks": [{}]}, "has no checks[0].passed"),
}


@pytest.mark.parametrize(("name", "content", "expected"), CASES.values(), ids=CASES)
def test_what_cannot_be_shown_is_refused(tmp_path, name, content, expected):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as caught:
        read_report(file)
    again = AGAIN.format(CONTRACTS[name][0])
    joint = " " if expected.endswith(",") else "; "
    assert str(caught.value) == f"{file} {expected}{joint}{again}"


@pytest.mark.parametrize("name", REPORTS)
def test_more_entries_are_welcome(tmp_path, name):
    file = tmp_path / name
    file.write_text(json.dumps({**REPORTS[name](), "later": {"versions": ["say", "more"]}}))
    assert read_report(file)["later"] == {"versions": ["say", "more"]}
