"""What a model takes, measured in a process of its own."""

from __future__ import annotations

import sys

import pytest

from tome_export.bench.environment import environment, nvidia_smi
from tome_export.bench.memory import forget_peak, measure, resident_bytes

BLOCK = 64 << 20
ENOUGH = """
import sys
from tome_export.bench.memory import report
print("a library's banner")
report(lambda: bytearray(b"x") * {size})
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """``module(text)``: its name, importable by the process that is started."""

    def write(text):
        (tmp_path / "taker.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return "taker"

    return write


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_is_what_the_work_takes(module):
    """What this process holds is not counted, as it would be with ``ru_maxrss``."""
    ballast = bytearray(b"x") * (4 * BLOCK)
    memory = measure(module(ENOUGH.format(size=BLOCK)), {}, gpu=False)
    assert memory.reason is None
    assert BLOCK <= memory.peak_bytes < 2 * BLOCK
    del ballast


@pytest.mark.skipif(nvidia_smi("--query-gpu=name") is not None, reason="there is a GPU")
def test_device_memory_that_nobody_tells_is_not_known(module):
    memory = measure(module(ENOUGH.format(size=1)), {}, gpu=True)
    assert memory.peak_bytes is None
    assert memory.reason.startswith("nvidia-smi does not show this process")


def test_a_process_that_fails_says_why(module):
    memory = measure(module("raise RuntimeError('no room')"), {}, gpu=False)
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


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_what_was_held_and_freed_before_is_not_counted(module):
    text = ENOUGH.format(size=BLOCK).replace(
        "report(", "x = bytearray(b'x') * (4 << 26); del x\nreport("
    )
    memory = measure(module(text), {}, gpu=False)
    assert BLOCK <= memory.peak_bytes < 2 * BLOCK


def test_a_process_that_says_much_or_never_ends(module):
    """Neither a full pipe nor a process that hangs holds the measurement up."""
    loud = "import sys; sys.stderr.write('x' * (1 << 20))\n" + ENOUGH.format(size=1)
    assert measure(module(loud), {}, gpu=False, timeout_s=60).reason is None


def test_a_process_that_never_answers(module):
    memory = measure(module("import time; time.sleep(60)"), {}, gpu=False, timeout_s=1)
    assert memory.peak_bytes is None
    assert memory.reason == "the process that measures memory did not end within 1 s"


def test_the_current_folder_is_not_imported_from(module, tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    (here / "inspect.py").write_text("raise RuntimeError('the wrong one')")
    monkeypatch.chdir(here)
    assert measure(module("import inspect\n" + ENOUGH.format(size=1)), {}, gpu=False).reason is None


def test_a_peak_that_cannot_be_forgotten(tmp_path):
    assert not forget_peak(tmp_path / "none")
