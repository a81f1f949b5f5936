"""Decoding in processes: the same for any number of them, whatever the images do."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tome_export.data import decode as decoding
from tome_export.data.decode import DIED, Task, decoded_chunks, reason_of
from tome_export.data.source import Item
from tome_export.errors import ExportError, InputError
from tome_export.models.preprocess import load_images, pixels_from_bytes
from tome_export.models.samples import sample_paths
from tome_export.spec import Preprocessing

TINY = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear")
DECODE = partial(pixels_from_bytes, preprocessing=TINY)

# Defined in a module of its own, since a worker imports it by name.
DEADLY = """
import os
import numpy as np

def decode(data, name):
    if data == b"kill":
        os._exit(9)
    return np.full((1, 2, 2), len(data), np.float32)
"""


def tasks_of(paths, size=2):
    items = [Item(path.name, "folder", str(path)) for path in paths]
    return [Task(n, tuple(items[i : i + size])) for n, i in enumerate(range(0, len(items), size))]


@pytest.fixture
def spoiled(tmp_path):
    """A good image, half of one, text, nothing, a missing file, and another good one."""
    good = sample_paths()[0].read_bytes()
    contents = [good, good[: len(good) // 2], b"no image", b"", None, good]
    paths = [tmp_path / f"{n}.jpg" for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        if content is not None:
            path.write_bytes(content)
    return paths


def test_processes_change_nothing_and_bad_images_are_told(spoiled):
    tasks = tasks_of(spoiled)
    here = list(decoded_chunks(tasks, DECODE, 0))
    there = list(decoded_chunks(iter(tasks), DECODE, 2))
    for one, other in zip(here, there, strict=True):
        np.testing.assert_array_equal(one.pixels, other.pixels)
        assert (one.chunk, one.unreadable) == (other.chunk, other.unreadable)
    expected = load_images(spoiled[:1], TINY)
    np.testing.assert_array_equal(here[0].pixels, expected)
    np.testing.assert_array_equal(here[2].pixels, expected)
    assert len(here[1].pixels) == 0
    told = [entry for chunk in here for entry in chunk.unreadable]
    assert [(position, name) for position, name, _ in told] == [
        (1, "1.jpg"), (0, "2.jpg"), (1, "3.jpg"), (0, "4.jpg")
    ]  # fmt: skip
    assert told[0][2].startswith("cannot be decoded (")
    assert told[1][2] == (
        "is not an image that can be read; expected JPEG, PNG or another format of PIL"
    )
    assert told[3][2] == "No such file or directory"


def test_an_error_of_the_decoder_itself_is_one_bad_image():
    def decode(_data, _name):
        raise MemoryError("too large")

    task = Task(
        0,
        (
            Item("x", "folder", __file__),
            Item("y", "samples", pixels=np.ones((1, 2, 2), np.float32)),
        ),
    )
    (found,) = decoded_chunks([task], decode, 0)
    assert found.unreadable == ((0, "x", "MemoryError: too large"),)
    assert found.pixels.shape == (1, 1, 2, 2)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(5, "Input/output error"), "Input/output error"),
        (InputError("image a/b.png cannot be decoded (x\ny)"), "cannot be decoded (x y)"),
        (InputError("a/b.png is not an image"), "is not an image"),
        (ValueError("bad\r\n  \udcff"), "ValueError: bad \\xff"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_a_reason_is_one_line(error, reason):
    assert reason_of(error, "a/b.png") == reason


def test_an_image_that_kills_its_process_is_one_bad_image(tmp_path, monkeypatch):
    (tmp_path / "deadly_decoder.py").write_text(DEADLY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    import deadly_decoder

    paths = [tmp_path / str(n) for n in range(5)]
    for n, path in enumerate(paths):
        path.write_bytes(b"kill" if n == 2 else b"x" * (n + 1))
    found = list(decoded_chunks(tasks_of(paths), deadly_decoder.decode, 1))
    assert [(chunk.chunk, len(chunk.pixels)) for chunk in found] == [(0, 2), (1, 1), (2, 1)]
    assert found[1].pixels[0, 0, 0, 0] == 4
    assert [chunk.unreadable for chunk in found] == [(), ((0, "2", DIED),), ()]


def test_processes_that_cannot_be_started(monkeypatch, spoiled):
    monkeypatch.setattr(decoding, "_begin", os._exit)  # in the worker, called with the decoder
    with pytest.raises(ExportError, match="decode in this one with --workers 0"):
        list(decoded_chunks(tasks_of(spoiled[:1]), DECODE, 1))


def test_workers_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys, time, multiprocessing\n"
        "from functools import partial\n"
        "from tome_export.data.decode import Task, decoded_chunks\n"
        "from tome_export.data.source import Item\n"
        "if __name__ == '__main__':\n"
        "    tasks = [Task(0, (Item('x', 'folder', __file__),))] * 9\n"
        "    for _ in decoded_chunks(tasks, print, 1):\n"
        "        print(*[c.pid for c in multiprocessing.active_children()], flush=True)\n"
        "        time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    with parent:
        line = ""
        while not line.strip().isdigit():
            line = parent.stdout.readline()  # ``print`` is the decoder: the image comes first
        worker = int(line)
        parent.kill()
    for _ in range(200):
        if not alive(worker):
            break
        time.sleep(0.1)
    assert not alive(worker)


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_input_error_is_what_a_decoder_raises():
    with pytest.raises(InputError, match=r"^n is not an image"):
        DECODE(b"", "n")
