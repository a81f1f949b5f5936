"""Records on disk survive whatever ends the process."""

from __future__ import annotations

import fcntl
import os
import time

import numpy as np
import pytest

from tome_export.errors import InputError
from tome_export.evaluation.journal import open_journal
from tome_export.evaluation.records import Record, Table

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
    np.testing.assert_array_equal(one.values["m"], other.values["m"])
    return True


def test_what_is_written_is_there_again(cache):
    records = [record(0), record(2, bad=(1,)), record(1, bad=(0, 1))]
    with open_journal(KEY) as journal:
        assert list(journal.records()) == []
        for one in records:
            journal.append(one)
    with open_journal({**KEY, "batch": 4}) as other:
        assert list(other.records()) == []
    with open_journal(KEY) as journal:
        found = list(journal.records())
        assert all(same(*pair) for pair in zip(found, records, strict=True))
        journal.remove()
    assert len(list(cache.iterdir())) == 1  # that of the other key


@pytest.mark.parametrize("cut", [1, 2, 30, 60])
def test_a_torn_record_is_done_again(cache, cut):
    with open_journal(KEY) as journal:
        journal.append(record(0))
        journal.append(record(1))
    (file,) = cache.glob("*/records")
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    with open_journal(KEY) as journal:
        assert [found.chunk for found in journal.records()] == [0]
        journal.append(record(1))
        assert [found.chunk for found in journal.records()] == [0, 1]
    assert file.read_bytes() == whole


def test_a_changed_record_and_all_behind_it_are_done_again(cache):
    with open_journal(KEY) as journal:
        for chunk in range(3):
            journal.append(record(chunk))
    (file,) = cache.glob("*/records")
    lines = file.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"chunk":1', b'"chunk":7')
    file.write_bytes(b"".join(lines))
    with open_journal(KEY) as journal:
        assert [found.chunk for found in journal.records()] == [0]
    assert file.read_bytes() == lines[0]


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
    ages = dict(zip(sorted(cache.iterdir()), (31 * day, 31 * day, 29 * day), strict=True))
    for folder, age in ages.items():
        for path in (folder / "records", folder):
            os.utime(path, (time.time() - age,) * 2)
    gone, opened, young = ages
    lock = os.open(opened, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    (cache / "note").touch()
    with open_journal(KEY):
        assert not gone.exists()
        assert opened.is_dir()
        assert young.is_dir()
    os.close(lock)
    # One that is taken up again is not abandoned.
    (ours,) = set(cache.glob("*/")) - set(ages)
    os.utime(ours / "records", (0, 0))
    os.utime(ours, (0, 0))
    with open_journal(KEY), open_journal({**KEY, "batch": 6}):
        assert ours.is_dir()


def test_restart_forgets():
    with open_journal(KEY) as journal:
        journal.append(record(0))
        journal.clear()
        assert list(journal.records()) == []


def test_a_table_is_the_same_in_any_order():
    records = [record(0), record(1, bad=(0,)), Record(2, ((0, "2/0", "spoilt"),), {})]
    tables = []
    for order in ((0, 1, 2), (2, 0, 1, 0)):
        table = Table(5, 2, ["m"], classes=True)
        for index in order:
            table.add(records[index])
        tables.append(table)
    for table in tables:
        assert table.images_done == 5
        assert table.readable.tolist() == [True, True, False, True, False]
        assert table.values("m").tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]
        assert table.unreadable() == [("1/0", "spoilt"), ("2/0", "spoilt")]


def test_a_table_counts_the_short_last_chunk():
    table = Table(5, 2, ["m"], classes=True)
    table.add(Record(2, ((0, "x", "spoilt"),), {}))
    assert table.images_done == 1
    table.add(record(0))
    assert table.images_done == 3
    table.require_images()


def test_no_image_that_can_be_read():
    table = Table(1, 2, ["m"], classes=True)
    table.add(Record(0, ((0, "x.png", "is no image"),), {}))
    with pytest.raises(
        InputError, match=r"^none of the 1 images could be read; the first is x.png"
    ):
        table.require_images()
