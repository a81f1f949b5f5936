"""Sessions of Ray: signals, what they leave, and how failures are told."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.evaluate import ray_session as sessions
from tome_export.evaluate.ray_data import _portable, _told
from tome_export.evaluate.ray_session import Signals


class Ended(BaseException):
    """What a handler of the command line raises."""


@pytest.fixture
def handled():
    """Handlers as the command line has them; afterwards those that were."""

    def end(number, _frame):
        raise Ended(number)

    before = {number: signal.signal(number, end) for number in sessions.SIGNALS}
    yield end
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", sessions.SIGNALS)
def test_what_a_handler_raises_passes_code_that_only_knows_ctrl_c(handled, number):
    signals = Signals()
    signals.take()
    # A loop in C++ takes a Ctrl-C for itself, to end at its own time.
    with pytest.raises(Ended), signals.inside(), contextlib.suppress(KeyboardInterrupt):
        signal.raise_signal(number)
    with pytest.raises(Ended):  # between calls of Ray it is raised as it is
        signal.raise_signal(number)
    signals.restore()
    assert signal.getsignal(number) is handled


def test_a_handler_that_ray_puts_in_place_of_ours(handled):
    signals = Signals()
    signals.take()

    def start():
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Ended), signals.inside():
        start()
    signals.restore()
    assert signal.getsignal(signal.SIGTERM) is handled


def test_signals_that_nobody_handles_stay_so():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        signals = Signals()
        signals.take()
        with signals.inside():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        signals.restore()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_processes_that_use_the_folder_are_ended(tmp_path):
    folder = tmp_path / "session"
    folder.mkdir()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (folder / "log").open("w") as log:
        named = subprocess.Popen([*sleep, f"--log={folder}/x"])
        writing = subprocess.Popen(sleep, stdout=log)
        other = subprocess.Popen([*sleep, f"{folder}-other/x"])
    assert {process.pid for process in sessions._using(folder)} == {named.pid, writing.pid}
    started = time.monotonic()
    sessions._end(folder)
    assert time.monotonic() - started < sessions.END_S
    assert named.wait() == writing.wait() == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()


def test_the_folder_has_a_short_path(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    deep = tmp_path / ("x" * sessions.MAX_FOLDER)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with sessions._folder() as folder:
        assert folder.is_dir()
        assert len(str(folder)) <= sessions.MAX_FOLDER
    assert not folder.exists()
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with pytest.raises(MissingComponentError) as caught, sessions._folder():
        pass
    assert str(caught.value).startswith(
        "Ray cannot be started here: no folder can be made in /nowhere (No such file or directory)"
    )


def test_a_start_that_fails():
    def init():
        raise ValueError("no\nroom")

    with pytest.raises(MissingComponentError) as here:
        sessions._start(init, "local")
    assert str(here.value) == (
        "Ray cannot be started here (ValueError: no room); run without --ray, or give a cluster's "
        "address"
    )
    with pytest.raises(InputError) as there:
        sessions._start(init, "1.2.3.4:5")
    assert str(there.value).startswith(
        "no Ray cluster can be reached at 1.2.3.4:5 (ValueError: no room); start one"
    )


AGAIN = "; run the same command again to go on from here, or without --ray"
LACKS = "lacks a package (ModuleNotFoundError: No module named 'x'); install the same tome-export"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("The actor died.\nIts node is gone.", ExportError,
         f"Ray could not go on (The actor died.){AGAIN}"),
        ("Task failed\n  Traceback:\n    File\nray.exceptions.OutOfMemoryError: killed\nsee docs",
         ExportError, f"Ray could not go on (ray.exceptions.OutOfMemoryError: killed){AGAIN}"),
        ("ModuleNotFoundError: No module named 'x'\nhints", MissingComponentError,
         f"a machine of the Ray cluster {LACKS} on all machines"),
        ("", ExportError, f"Ray could not go on (RuntimeError){AGAIN}"),
    ],
)  # fmt: skip
def test_failures_of_ray_are_one_line(text, kind, message):
    found = _told(RuntimeError(text))
    assert (type(found), str(found)) == (kind, message)


def test_failures_on_another_machine_are_one_line():
    assert str(_portable(InputError("as it is"))) == "as it is"
    found = _portable(ModuleNotFoundError("No module named 'x'"))
    assert isinstance(found, MissingComponentError)
    assert f"{LACKS} on all machines" in str(found)
    found = _portable(ValueError("two\nlines"))
    assert isinstance(found, ExportError)
    assert "failed (ValueError: two lines); look there, or run without --ray" in str(found)


# Defined in a module of its own, since an actor imports it by name.
DEADLY = """
import contextlib, os

@contextlib.contextmanager
def dies():
    os._exit(9)
    yield {}
"""

SCRIPT = """
import os
import numpy as np
import deadly_opener
from tome_export.data.decode import Task
from tome_export.data.source import Item
from tome_export.errors import TomeExportError
from tome_export.evaluate.ray_data import ray_records
from tome_export.evaluate.records import Classifier

task = Task(0, (Item("x", "samples", pixels=np.zeros((1, 2, 2), np.float32)),))
classifier = Classifier(1, "y", "softmax", "")
for _ in range(2):  # the second finds what the first left in this process
    try:
        list(ray_records([task], print, deadly_opener.dies, classifier, "local", 1))
    except TomeExportError as error:
        print("told:", type(error).__name__, error)
print("left:", [name for name in os.environ if name.startswith("RAY_AUTH")])
"""


@pytest.mark.slow
def test_an_actor_that_dies(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "deadly_opener.py").write_text(DEADLY)
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    ran = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    told = [line for line in ran.stdout.splitlines() if line.startswith("told: ")]
    assert len(told) == 2
    for line in told:
        assert line.startswith("told: ExportError Ray could not go on (The actor ")
        assert line.endswith(AGAIN)
    assert "left: []" in ran.stdout.splitlines()
    assert list(home.glob(".ray*")) == []
