"""What a model takes, measured in a process of its own."""

from __future__ import annotations

import importlib
import sys
import time
import zlib

import pytest

from tome_export.bench.memory import forget_peak, measure, resident_bytes
from tome_export.runtime.environment import environment, nvidia_smi

BLOCK = 64 << 20
ENOUGH = """
import sys
print("a library's banner")
def prepare():
    return lambda: bytearray(b"x") * {size}
"""


FAILS = """
def prepare():
    raise RuntimeError('no room')
"""
HELD = """
enough = prepare
def prepare():
    x = bytearray(b"x") * (4 << 26)
    del x
    return enough()
"""


@pytest.fixture
def taker(tmp_path, monkeypatch):
    """``taker(text)``: the function ``prepare`` of a module, importable by another process."""

    def write(text):
        name = f"taker_{len(text)}_{zlib.crc32(text.encode())}"
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(name).prepare

    return write


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_is_what_the_work_takes(taker):
    """What this process holds is not counted, as it would be with ``ru_maxrss``."""
    ballast = bytearray(b"x") * (4 * BLOCK)
    memory = measure(taker(ENOUGH.format(size=BLOCK)), (), gpu=False)
    assert memory.reason is None
    assert BLOCK <= memory.peak_bytes < 2 * BLOCK
    del ballast


@pytest.mark.skipif(nvidia_smi("--query-gpu=name") is not None, reason="there is a GPU")
def test_device_memory_that_nobody_tells_is_not_known(taker):
    memory = measure(taker(ENOUGH.format(size=1)), (), gpu=True)
    assert memory.peak_bytes is None
    assert memory.reason.startswith("nvidia-smi does not show this process")


def test_a_process_that_fails_says_why(taker):
    memory = measure(taker(FAILS), (), gpu=False)
    assert memory.peak_bytes is None
    assert memory.reason == "the process that measures memory failed: RuntimeError: no room"


def test_reading_the_status(tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t    1024 kB\n")
    assert resident_bytes("VmHWM", status) == 2048 * 1024
    assert resident_bytes("VmRSS", status) == 1024 * 1024
    assert resident_bytes("VmPeak", status) is None
    assert resident_bytes("VmRSS", tmp_path / "none") is None


def test_the_environment():
    found = environment()
    assert found.cores >= 1
    assert {"torch", "onnx", "numpy", "tome-export"} <= set(found.versions)
    assert found.date.endswith("+00:00")


def test_of_two_versions_the_one_that_is_imported_counts(tmp_path, monkeypatch):
    (tmp_path / "timm-0.0.1.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: timm\nVersion: 0.0.1\n"
    (tmp_path / "timm-0.0.1.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(tmp_path)
    assert environment().versions["timm"] == "0.0.1"


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_was_held_and_freed_before_is_not_counted(taker):
    text = ENOUGH.format(size=BLOCK) + HELD
    memory = measure(taker(text), (), gpu=False)
    assert BLOCK <= memory.peak_bytes < 2 * BLOCK


def test_a_process_that_says_much_or_never_ends(taker):
    """Neither a full pipe nor a process that hangs holds the measurement up."""
    loud = ENOUGH.format(size="sys.stderr.write('x' * (1 << 20))")
    assert measure(taker(loud), (), gpu=False, timeout_s=60).reason is None


def test_a_process_that_never_answers():
    memory = measure(time.sleep, (60,), gpu=False, timeout_s=1)
    assert memory.peak_bytes is None
    assert memory.reason == "the process that measures memory did not end within 1 s"


def test_the_current_folder_is_not_imported_from(taker, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    prepare = taker("import inspect\n" + ENOUGH.format(size=1))
    (here / "inspect.py").write_text("raise RuntimeError('the wrong one')")
    (here / "pickle.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(here)
    assert measure(prepare, (), gpu=False).reason is None


def test_a_peak_that_cannot_be_forgotten(tmp_path):
    assert not forget_peak(tmp_path / "none")
