"""docs/schemas are those of the models, and what commands write conforms to them."""

from __future__ import annotations

import json
from pathlib import Path
from runpy import run_path

import jsonschema
import pytest
from results import REPORTS, tower_report

from tome_export.artifact.bench import Bench
from tome_export.artifact.evaluation import Evaluation
from tome_export.artifact.schedule import read_search
from tome_export.build import BuildRequest, build
from tome_export.merge.schedule import Schedule

ROOT = Path(__file__).parents[2]
SCHEMAS = ROOT / "docs" / "schemas"
READERS = {"bench.json": Bench.read, "eval.json": Evaluation.read, "schedule.json": read_search}


def validator(name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((SCHEMAS / name.replace(".json", ".schema.json")).read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def test_they_are_those_of_the_models():
    written = run_path(str(ROOT / "scripts" / "schemas.py"))["files"]()
    assert {path.name for path in written} == {path.name for path in SCHEMAS.iterdir()}
    for path, text in written.items():
        assert path.read_text() == text, f"python scripts/schemas.py writes another {path.name}"


def test_what_a_build_writes_conforms(tmp_path):
    request = BuildRequest("vit_digits", tmp_path / "out", schedule=Schedule(8), engine="none")
    folder = build(request).path
    for name in ("build.json", "parity.json"):
        values = json.loads((folder / name).read_text())
        validator(name).validate(values)
        del values["checks" if name == "parity.json" else "merge"]
        assert not validator(name).is_valid(values)


@pytest.mark.parametrize(("name", "made"), [*REPORTS.items(), ("schedule.json", tower_report)])
def test_what_other_commands_write_conforms(tmp_path, name, made):
    file = tmp_path / name
    file.write_text(json.dumps(made()))
    validator(name).validate(json.loads(READERS[name](file).json_bytes()))


def test_a_schedule_written_by_hand_conforms():
    by_hand = {"format": 1, "model": "vit_digits", "schedule": [8, 4, 2]}
    schema = validator("schedule.json")
    schema.validate(by_hand)
    assert not schema.is_valid({**by_hand, "schedule": "8,4,2"})
