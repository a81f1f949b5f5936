"""The schedule file: whole or not at all, and one line for whatever is wrong with it."""

from __future__ import annotations

import json
import os

import pytest

from tome_export.errors import InputError
from tome_export.tune.schedule_file import check_writable, read_schedule, write_schedule

GOOD = {"format": 1, "model": "vit_digits", "schedule": [3, 2, 0]}
AGAIN = "write it with 'tome-export tune'"

WRONG = {
    "cut short": ('{"format": 1, "mod', "is not valid JSON (Unterminated string"),
    "no object": ("[1]", f"is not a JSON object with a format; {AGAIN}"),
    "format": (
        json.dumps({**GOOD, "format": 2}),
        f"has format 2; this version reads format 1, {AGAIN}",
    ),
    "no format": ("{}", f"has format None; this version reads format 1, {AGAIN}"),
    "model": (json.dumps({**GOOD, "model": 3}), f"has model 3; expected a name, {AGAIN}"),
    "negative": (
        json.dumps({**GOOD, "schedule": [3, -2]}),
        f"has schedule [3, -2]; expected one whole number, 0 or more, per layer, {AGAIN}",
    ),
    "fraction": (json.dumps({**GOOD, "schedule": [1.5]}), "has schedule [1.5]; expected one whole"),
    "truth": (json.dumps({**GOOD, "schedule": [True]}), "has schedule [true]; expected one whole"),
    "empty": (json.dumps({**GOOD, "schedule": []}), "has schedule []; expected one whole number"),
    "tokens": (json.dumps({**GOOD, "tokens_in": "65"}), 'has tokens_in "65"; expected a whole'),
    "none": (json.dumps({"format": 1, "model": "m"}), "has schedule null; expected one whole"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_schedule_file(case, tmp_path):
    content, message = WRONG[case]
    path = tmp_path / "s.json"
    path.write_text(content)
    with pytest.raises(InputError) as error:
        read_schedule(path)
    assert str(error.value).startswith(f"schedule file {path} {message}")
    assert "\n" not in str(error.value)


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_schedule(tmp_path / "none.json")
    with pytest.raises(InputError, match=r"cannot be read \(Is a directory\)"):
        read_schedule(tmp_path)


def test_writes_whole_and_reads_back(tmp_path):
    path = tmp_path / "s.json"
    write_schedule(path, GOOD, force=False)
    found = read_schedule(path)
    assert (found.model, found.schedule) == ("vit_digits", (3, 2, 0))
    assert found.content == path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(InputError, match="exists; give another file, or --force"):
        write_schedule(path, GOOD, force=False)
    write_schedule(path, {**GOOD, "model": "other"}, force=True)
    assert read_schedule(path).model == "other"


def test_keeps_the_old_file_when_the_new_one_cannot_be_made(tmp_path):
    path = tmp_path / "s.json"
    write_schedule(path, GOOD, force=False)
    with pytest.raises(TypeError):
        write_schedule(path, {"format": object()}, force=True)
    assert read_schedule(path).model == "vit_digits"
    assert list(tmp_path.iterdir()) == [path]


def test_is_for_one_model(tmp_path):
    path = tmp_path / "s.json"
    write_schedule(path, GOOD, force=False)
    found = read_schedule(path)
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


def test_is_for_a_model_that_can_merge_as_many(tmp_path):
    path = tmp_path / "s.json"
    write_schedule(path, GOOD, force=False)
    found = read_schedule(path)
    assert (found.tokens_in, found.state_sha256, found.note("12")) == (None, None, None)
    found.check_tokens(9, [3, 2, 0])
    with pytest.raises(InputError) as error:
        found.check_tokens(9, [3, 1, 0])
    assert str(error.value) == (
        f"schedule file {path} merges 2 tokens in layer 1, where vit_digits can merge 1; tune it "
        "again, or give a list with --schedule, which is cut to what is possible"
    )


def test_tells_tokens_and_weights_of_the_search(tmp_path):
    path, weights = tmp_path / "s.json", {"weights": {"kind": "file"}}
    known = {"tokens_in": 65, "state_sha256": "ab"}
    written = write_schedule(path, {**GOOD, **weights}, force=False, **known)
    assert written == json.loads(path.read_text())
    assert written["weights"] == {"kind": "file", "state_sha256": "ab"}
    found = read_schedule(path)
    found.check_tokens(65, [3, 2, 0])
    with pytest.raises(InputError) as error:
        found.check_tokens(50, [3, 2, 0])
    assert str(error.value) == (
        f"schedule file {path} is for 65 tokens; vit_digits has 50 here, tune it again at this "
        "image size"
    )
    assert found.note("ab") is None
    assert found.note("cd") == (
        "s.json was found with other weights: its accuracy is not that of this model, tune again "
        "to know"
    )


def test_names_that_are_no_text(tmp_path):
    path = tmp_path / "s.json"
    write_schedule(path, {**GOOD, "data": {"source": "odd\udcff"}}, force=False)
    assert json.loads(path.read_text())["data"]["source"] == "odd\udcff"
    assert read_schedule(path).schedule == (3, 2, 0)


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(InputError, match="its folder does not exist; make it"):
        check_writable(tmp_path / "none" / "s.json", force=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a part of the path is a file"):
        check_writable(tmp_path / "file" / "s.json", force=False)
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        check_writable(tmp_path, force=True)
    if os.geteuid():
        tmp_path.chmod(0o555)
        with pytest.raises(InputError, match="permission is denied"):
            check_writable(tmp_path / "s.json", force=False)
