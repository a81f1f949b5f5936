"""Ctrl-C while the builder, which is C++, is at work."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from tome_export.engine.interrupt import run_interruptibly

SCRIPT = """
import sys
from pathlib import Path
from tome_export.engine import EngineOptions
from tome_export.engine.tensorrt_rtx import TensorRTRTX
from tome_export.progress import Silent
class Shown(Silent):
    def step(self, label, done, total):
        print(label, flush=True)
model, output = map(Path, sys.argv[1:])
try:
    TensorRTRTX().build(model, EngineOptions(), output, Shown())
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends a POSIX signal")
def test_ctrl_c_ends_the_build_and_leaves_nothing(save_vit, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = save_vit(depth=8, width=768)
    output = tmp_path / "model.rtx.engine"
    before = {path.name for path in tmp_path.iterdir()}
    command = [sys.executable, "-c", SCRIPT, model, output]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "Building engine\n"
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        out, err = process.communicate(timeout=60)
    assert time.monotonic() - sent < 5
    assert (process.returncode, out.splitlines()[-1], err) == (130, "interrupted", "")
    assert {path.name for path in tmp_path.iterdir()} == before


def test_result_and_exception_come_through():
    assert run_interruptibly(lambda: 3, threading.Event()) == 3
    with pytest.raises(ZeroDivisionError):
        run_interruptibly(lambda: 1 // 0, threading.Event())


def test_interrupt_sets_the_flag_and_waits_for_the_call():
    for _ in range(20):  # the signal also falls into the start of the thread
        cancel, ended = threading.Event(), threading.Event()

        def call(cancel: threading.Event = cancel, ended: threading.Event = ended) -> None:
            signal.raise_signal(signal.SIGINT)
            assert cancel.wait(10)
            ended.set()

        with pytest.raises(KeyboardInterrupt):
            run_interruptibly(call, cancel)
        assert ended.is_set()
