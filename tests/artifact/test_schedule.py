"""The schedule file: what a build takes, what ``tune`` writes, and one line for what is neither."""

from __future__ import annotations

import json

import pytest

from tome_export.artifact.schedule import ScheduleFile, read_search
from tome_export.errors import InputError

GOOD = {"format": 1, "model": "vit_digits", "schedule": [3, 2, 0]}
COUNTS = "expected one whole number, 0 or more, per layer"

WRONG = {
    "cut short": ('{"format": 1, "mod', "is not valid JSON (Unterminated string starting at"),
    "no object": ("[1]", "is [1], expected an object"),
    "format": (json.dumps({**GOOD, "format": 2}), "has format 2, expected 1"),
    "no format": ("{}", "has no format"),
    "model": (json.dumps({**GOOD, "model": 3}), "has model 3, expected text"),
    "negative": (
        json.dumps({**GOOD, "schedule": [3, -2]}),
        "has schedule[1] -2, expected a number, 0 or more",
    ),
    "fraction": (
        json.dumps({**GOOD, "schedule": [1.5]}),
        "has schedule[0] 1.5, expected a whole number",
    ),
    "truth": (
        json.dumps({**GOOD, "schedule": [True]}),
        "has schedule[0] True, expected a whole number",
    ),
    "empty": (json.dumps({**GOOD, "schedule": []}), f"has schedule [], {COUNTS}"),
    "tokens": (
        json.dumps({**GOOD, "tokens_in": "65"}),
        "has tokens_in '65', expected a whole number",
    ),
    "none": (json.dumps({"format": 1, "model": "m"}), "has no schedule"),
}


@pytest.fixture
def file_of(tmp_path):
    """``file_of(values)``: a schedule file with more than what every one has."""

    def write(**more):
        path = tmp_path / "s.json"
        path.write_text(json.dumps({**GOOD, **more}))
        return path

    return write


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_schedule_file(case, tmp_path):
    content, message = WRONG[case]
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        ScheduleFile.read(path)
    assert str(error.value).startswith(f"{path} {message}")
    assert str(error.value).endswith("; write it with 'tome-export tune'")
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read \(No such file or directory\); write it"):
        ScheduleFile.read(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        ScheduleFile.read(tmp_path)


def test_a_file_by_hand_has_no_search_and_keeps_its_notes(file_of):
    path = file_of(note={"by": "me"})
    assert read_search(path) is None
    found = ScheduleFile.read(path)
    assert (found.model, found.schedule) == ("vit_digits", (3, 2, 0))
    assert (found.tokens_in, found.weights, found.reducer) == (None, None, None)
    assert json.loads(found.json_bytes()) == json.loads(path.read_text())


def test_a_search_is_read_whole_or_not_at_all(file_of):
    with pytest.raises(InputError, match=r"s.json has no tokens_in; write it with 'tome-export tu"):
        read_search(file_of(front=[]))


def test_is_for_one_model(file_of):
    found = ScheduleFile.read(path := file_of())
    found.check_model("vit_digits")
    found.check_depth(3)
    with pytest.raises(InputError) as error:
        found.check_model("vit_b16")
    assert str(error.value) == (
        f"schedule file {path} is for vit_digits, not for vit_b16; tune vit_b16, or give the "
        "numbers themselves: --schedule 3,2,0"
    )
    with pytest.raises(InputError) as error:
        found.check_depth(6)
    assert str(error.value) == (
        f"schedule file {path} has 3 layers; vit_digits has 6, tune it again"
    )


def test_is_for_a_model_that_can_merge_as_many(file_of):
    found = ScheduleFile.read(path := file_of())
    found.check_tokens(9, [3, 2, 0])
    with pytest.raises(InputError) as error:
        found.check_tokens(9, [3, 1, 0])
    assert str(error.value) == (
        f"schedule file {path} merges 2 tokens in layer 1, where vit_digits can merge 1; tune it "
        "again, or give a list with --schedule, which is cut to what is possible"
    )


def test_is_for_the_tokens_of_the_search(file_of):
    found = ScheduleFile.read(path := file_of(tokens_in=65))
    found.check_tokens(65, [3, 2, 0])
    with pytest.raises(InputError) as error:
        found.check_tokens(50, [3, 2, 0])
    assert str(error.value) == (
        f"schedule file {path} is for 65 tokens; vit_digits has 50 here, tune it again at this "
        "image size"
    )


def test_tells_of_other_weights_than_those_of_the_search(file_of):
    assert ScheduleFile.read(file_of()).note("12") is None
    found = ScheduleFile.read(file_of(weights={"state_sha256": "ab"}))
    assert found.note("ab") is None
    assert found.note("cd") == (
        "s.json was found with other weights: its accuracy is not that of this model, tune again "
        "to know"
    )


def test_is_for_one_reducer_wherever_its_weights_are(file_of):
    def reducer(weights, features=64):
        return {"name": "dtem", "options": {"weights": weights, "features": features}}

    ScheduleFile.read(file_of()).check_reducer(reducer("/a/m.pt"))
    found = ScheduleFile.read(path := file_of(reducer=reducer("/a/m.pt")))
    found.check_reducer(reducer("/b/m.pt"))
    with pytest.raises(InputError) as error:
        found.check_reducer(reducer("/a/m.pt", features=32))
    assert str(error.value) == (
        f'schedule file {path} is for --reducer dtem with options {{"weights": "/a/m.pt", '
        '"features": 64}; give the same here, or the numbers themselves: --schedule 3,2,0'
    )
