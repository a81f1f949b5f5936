"""Files written whole, and what is said before where they cannot be."""

from __future__ import annotations

import os

import pytest

from tome_export.artifact.files import check_new_file
from tome_export.errors import InputError


def test_where_nothing_can_be_written(tmp_path):
    with pytest.raises(InputError, match="its folder does not exist; make it"):
        check_new_file(tmp_path / "none" / "s.json", force=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="a part of the path is a file"):
        check_new_file(tmp_path / "file" / "s.json", force=False)
    with pytest.raises(InputError, match="is a folder; give the name of a file"):
        check_new_file(tmp_path, force=True)
    if os.geteuid():
        tmp_path.chmod(0o555)
        with pytest.raises(InputError, match="permission is denied"):
            check_new_file(tmp_path / "s.json", force=False)


def test_a_file_that_is_there_is_replaced_by_force_only(tmp_path):
    (tmp_path / "s.json").write_text("mine")
    with pytest.raises(InputError, match=r"s\.json exists; give another file, or --force to repl"):
        check_new_file(tmp_path / "s.json", force=False)
    check_new_file(tmp_path / "s.json", force=True)
    check_new_file(tmp_path / "new.json", force=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"s.json": "mine"}


def test_what_is_no_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"pipe is a device, pipe or socket; give the name of a"):
        check_new_file(tmp_path / "pipe", force=True)
