"""Records on disk survive whatever ends the process."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tome_export.errors import InputError
from tome_export.evaluate.journal import Journal, open_journal
from tome_export.evaluate.records import Record, RecordTable

KEY = {"model": "a", "batch": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tome-export" / "eval"


def record(chunk, bad=()):
    values = np.arange(5 * (2 - len(bad)), dtype=np.int32).reshape(-1, 5) + chunk
    return Record(chunk, tuple((p, f"{chunk}/{p}", "spoilt") for p in bad), {"m": values})


def same(one, other):
    assert (one.chunk, one.unreadable) == (other.chunk, other.unreadable)
    assert list(one.values) == list(other.values)
    for run, values in one.values.items():
        np.testing.assert_array_equal(values, other.values[run])
    return True


def test_what_is_written_is_there_again(cache):
    records = [record(0), record(2, bad=(1,)), Record(1, ((0, "x", "spoilt"),), {})]
    with open_journal(KEY) as journal:
        assert journal.records() == []
        for one in records:
            journal.append(one)
    with open_journal({**KEY, "batch": 4}) as other:
        assert other.records() == []
    with open_journal(KEY) as journal:
        assert all(same(*pair) for pair in zip(journal.records(), records, strict=True))
        journal.remove()
    assert len(list(cache.iterdir())) == 1  # that of the other key


KILLED = """
import os, sys
import numpy as np
from tome_export.evaluate.journal import Journal, open_journal
from tome_export.evaluate.records import Record

with open_journal({"model": "a", "batch": 2}) as journal:
    for chunk in range(50):
        journal.append(Record(chunk, (), {"m": np.full((2, 5), chunk, np.int32)}))
    # In the middle of a write: the last record is in the file in part.
    journal._stream.write('\\n[50,[],{"m":[[1,2')
    journal._stream.flush()
    os.kill(os.getpid(), 9)
"""


def test_a_kill_in_the_middle_of_a_write_costs_no_finished_record(cache):
    ran = subprocess.run([sys.executable, "-c", KILLED], timeout=120)
    assert ran.returncode == -9
    with open_journal(KEY) as journal:
        journal.append(record(50))
        found = journal.records()
        assert [one.chunk for one in found] == list(range(51))
        assert same(found.pop(), record(50))
        assert all((one.values["m"] == one.chunk).all() for one in found)
        journal.remove()
    assert list(cache.iterdir()) == []


ROWS = {
    "no number": '["x",[],{}]',
    "a chunk too many": '[99,[],{"m":[[1],[1]]}]',
    "another run": '[0,[],{"q":[[1],[1]]}]',
    "one row for two images": '[0,[],{"m":[[1]]}]',
    "text": '[0,[],{"m":[["a"],["b"]]}]',
    "no table": '[0,[],{"m":null}]',
    "an image that is not there": '[0,[[-5,"n","r"]],{"m":[[1],[1]]}]',
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_row_that_is_no_record_of_this_evaluation_is_done_again(cache, row):
    with open_journal(KEY) as journal:
        journal.append(record(1))
    (file,) = cache.glob("*.jsonl")
    file.write_text(row)
    table = RecordTable(4, 2)
    with open_journal(KEY) as journal:
        assert [one for one in journal.records() if table.takes(one, ["m"])] == []


def test_a_damaged_line_is_done_again(cache):
    with open_journal(KEY) as journal:
        for chunk in range(200):
            journal.append(record(chunk))
    (file,) = cache.glob("*.jsonl")
    lines = file.read_bytes().split(b"\n")
    lines[4] = b"[" * 5000
    lines[8] = b"\xa5" * len(lines[8])
    file.write_bytes(b"\n".join(lines))
    with open_journal(KEY) as journal:
        assert [one.chunk for one in journal.records()] == [
            chunk for chunk in range(200) if chunk not in (3, 7)
        ]


def test_a_full_disk():
    with open_journal(KEY) as journal:
        journal._stream.close()
        journal._stream = Path("/dev/full").open("w")  # noqa: SIM115 (the journal closes it)
        with pytest.raises(InputError, match=r"jsonl \(No space left on device\); free some"):
            journal.append(record(0))


def test_cosines_come_back_to_the_last_digit():
    values = np.array([[1 / 3], [np.nextafter(1, 0)], [np.nan]])
    with open_journal(KEY) as journal:
        journal.append(Record(0, (), {"m": values}))
        (found,) = journal.records()
    np.testing.assert_array_equal(found.values["m"], values)


def test_two_runs_at_once(cache):
    with open_journal(KEY), pytest.raises(InputError) as caught, open_journal(KEY):
        pass
    assert str(caught.value) == (
        "the same evaluation is running already; wait for it to end, or stop it"
    )
    with open_journal(KEY):
        pass
    assert cache.is_dir()


def test_what_was_abandoned_is_deleted_and_what_is_open_stays(cache):
    keys = [{**KEY, "batch": n} for n in (3, 4, 5)]
    for key in keys:
        with open_journal(key) as journal:
            journal.append(record(0))
    day = 86400
    gone, opened, young = sorted(cache.iterdir())
    with contextlib.closing(Journal(opened)):
        for file, age in ((gone, 31 * day), (opened, 31 * day), (young, 29 * day)):
            os.utime(file, (time.time() - age,) * 2)
        (cache / "note").touch()
        with open_journal(KEY):
            assert not gone.exists()
            assert opened.exists()
            assert young.exists()
    # One that is taken up again is not abandoned.
    (ours,) = set(cache.glob("*.jsonl")) - {gone, opened, young}
    os.utime(ours, (0, 0))
    with open_journal(KEY), open_journal({**KEY, "batch": 6}):
        assert ours.exists()


def test_restart_forgets():
    with open_journal(KEY) as journal:
        journal.append(record(0))
        journal.clear()
        assert journal.records() == []


def test_a_table_is_the_same_in_any_order():
    records = [record(0), record(1, bad=(0,)), Record(2, ((0, "2/0", "spoilt"),), {})]
    tables = []
    for order in ((0, 1, 2), (2, 0, 1, 0)):
        table = RecordTable(5, 2)
        for index in order:
            table.add(records[index])
        tables.append(table)
    for table in tables:
        assert table.images_done == 5
        assert table.readable.tolist() == [True, True, False, True, False]
        assert table.values("m").tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]
        assert table.unreadable() == [("1/0", "spoilt"), ("2/0", "spoilt")]


def test_a_table_counts_the_short_last_chunk():
    table = RecordTable(5, 2)
    table.add(Record(2, ((0, "x", "spoilt"),), {}))
    assert table.images_done == 1
    table.add(record(0))
    assert table.images_done == 3
    table.require_images()


def test_no_image_that_can_be_read():
    table = RecordTable(1, 2)
    table.add(Record(0, ((0, "x.png", "is no image"),), {}))
    with pytest.raises(
        InputError, match=r"^none of the 1 images could be read; the first is x.png"
    ):
        table.require_images()
