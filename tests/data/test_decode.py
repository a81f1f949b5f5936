"""Decoding ahead: the same for any number of workers, whatever the images do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tome_export.data import preprocess
from tome_export.data.decode import Task, decoded_chunks, reason_of
from tome_export.data.image_folder import read_file
from tome_export.data.preprocess import load_images, pixels_from_bytes
from tome_export.data.samples import sample_paths
from tome_export.data.source import Item
from tome_export.errors import ExportError, InputError
from tome_export.spec import Preprocessing

TINY = Preprocessing((3, 8, 8), (0.5,) * 3, (0.5,) * 3, 1.0, "bilinear")
DECODE = partial(pixels_from_bytes, preprocessing=TINY)


def reader(path):
    return partial(read_file, str(path.parent), path.name, 0, 0)


def tasks_of(paths, size=2):
    items = [Item(path.name, reader(path)) for path in paths]
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


def test_workers_change_nothing_and_bad_images_are_told(spoiled):
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
        "is not a JPEG, PNG, WEBP, GIF, BMP, PPM or TIFF file (it begins with b'no image'); give "
        "one whole"
    )
    assert told[3][2] == "No such file or directory"


def test_an_error_of_the_decoder_itself_is_one_bad_image():
    def decode(_data, _name):
        raise MemoryError("too large")

    task = Task(
        0,
        (
            Item("x", reader(Path(__file__))),
            Item("y", np.ones((1, 2, 2), np.float32)),
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


def test_a_file_too_large_is_not_read(tmp_path):
    path = tmp_path / "sparse.png"
    with path.open("wb") as stream:
        stream.truncate(1 << 40)
    (found,) = decoded_chunks(tasks_of([path]), DECODE, 0)
    assert (
        found.unreadable[0][2] == "has 1099512 MB; at most 268 MB are accepted, give a smaller one"
    )


@pytest.mark.parametrize("workers", [0, 1])
def test_processes_that_cannot_be_started_end_the_run(monkeypatch, spoiled, workers):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    monkeypatch.setattr(preprocess, "_own", threading.local())
    with pytest.raises(ExportError, match=r"cannot be started with /nowhere/python \(No such file"):
        list(decoded_chunks(tasks_of(spoiled[:1]), DECODE, workers))


def test_processes_end_when_their_parent_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import time\n"
        "from tome_export.data import preprocess\n"
        "from tome_export.data.samples import sample_paths\n"
        "preprocess.read_image(sample_paths()[0])\n"
        "print(preprocess._own.decoder.start()[1].pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True
    ) as parent:
        worker = int(parent.stdout.readline())
        assert alive(worker)
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


def test_a_process_that_something_else_ended_loses_no_image():
    expected = load_images(sample_paths()[:1], TINY)
    os.kill(preprocess._own.decoder.start()[1].pid, signal.SIGKILL)
    np.testing.assert_array_equal(load_images(sample_paths()[:1], TINY), expected)


def test_input_error_is_what_a_decoder_raises():
    with pytest.raises(InputError, match=r"^image n is empty"):
        DECODE(b"", "n")
