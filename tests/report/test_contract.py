"""Reports that cannot be shown: one line, compared whole."""

from __future__ import annotations

import json

import pytest
from results import REPORTS, bench_report, eval_report, schedule_report, tower_report

from tome_export.artifact.bench import Bench
from tome_export.artifact.evaluation import Evaluation
from tome_export.artifact.parity import ParityFile
from tome_export.artifact.schedule import ScheduleFile, read_search
from tome_export.errors import InputError


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


READERS = {
    "parity.json": ParityFile.read,
    "bench.json": Bench.read,
    "eval.json": Evaluation.read,
    "schedule.json": read_search,
}

AGAIN = {
    "parity.json": ParityFile.remedy,
    "bench.json": "run 'tome-export bench' of this version again",
    "eval.json": "run 'tome-export eval' of this version again",
    "schedule.json": ScheduleFile.remedy,
}

CASES = {
    "not json": (
        "bench.json",
        "{",
        "is not valid JSON (Expecting property name enclosed in double quotes: line 1 column 2 "
        "(char 1))",
    ),
    "no object": ("bench.json", [], "is [], expected an object"),
    "later format": (
        "schedule.json",
        {**schedule_report(), "format": 2},
        "has format 2, expected 1",
    ),
    "entry missing": (
        "bench.json",
        without(bench_report(), "rows", 1, "merged", "latency_ms", "p80"),
        "has no rows[1].merged.latency_ms.p80",
    ),
    "no list": (
        "eval.json",
        having(eval_report(), {}, "candidates"),
        "has candidates {}, expected a list",
    ),
    "text for a number": (
        "eval.json",
        having(eval_report(), "9", "candidates", 0, "macs"),
        "has candidates[0].macs '9', expected a whole number",
    ),
    "true for a number": (
        "schedule.json",
        having(schedule_report(), True, "front", 0, "macs"),
        "has front[0].macs True, expected a whole number",
    ),
    "not finite": (
        "bench.json",
        having(bench_report(), float("inf"), "macs_ratio"),
        "has macs_ratio inf, expected a finite number",
    ),
    "parity of another kind": ("parity.json", {"checks": [{}]}, "has no checks[0].passed"),
}


@pytest.mark.parametrize(("name", "content", "expected"), CASES.values(), ids=CASES)
def test_what_cannot_be_shown_is_refused(tmp_path, name, content, expected):
    file = tmp_path / name
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as caught:
        READERS[name](file)
    assert str(caught.value) == f"{file} {expected}; {AGAIN[name]}"


@pytest.mark.parametrize("name", REPORTS)
def test_more_entries_are_welcome_and_kept(tmp_path, name):
    file = tmp_path / name
    content = {**REPORTS[name](), "later": {"versions": ["say", "more"]}}
    file.write_text(json.dumps(content))
    found = READERS[name](file)
    assert found.later == {"versions": ["say", "more"]}
    assert json.loads(found.json_bytes())["later"] == found.later


def test_a_search_by_similarity_is_read_as_it_is_written(tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps(tower_report()))
    found = read_search(file)
    written, given = json.loads(found.json_bytes()), json.loads(file.read_text())
    assert written == {**given, "reducer": {"name": "tome", "options": {}}}
    assert [point.counted for point in found.front] == [p.similarity.mean for p in found.front]
    assert found.unmerged.counted == 1.0
    file.write_text(json.dumps(without(tower_report(), "front", 2, "similarity")))
    with pytest.raises(
        InputError, match=r"has front\[2\] .*, expected accuracy and correct, or simi"
    ):
        read_search(file)


def test_a_schedule_written_by_hand_has_no_search(tmp_path):
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"format": 1, "model": "vit_digits", "schedule": [1, 2]}))
    assert read_search(file) is None
