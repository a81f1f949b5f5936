"""Sessions of Ray: what they leave, and how failures are told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from types import ModuleType, SimpleNamespace

import pytest

from tome_export.errors import ExportError, InputError, MissingComponentError
from tome_export.evaluate import ray_cluster
from tome_export.evaluate.ray_cluster import RayWork, _portable, _told


def test_processes_that_use_the_folder_are_ended(tmp_path):
    folder = tmp_path / "session"
    folder.mkdir()
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    with (folder / "log").open("w") as log:
        named = subprocess.Popen([*sleep, f"--log={folder}/x"])
        writing = subprocess.Popen(sleep, stdout=log)
        other = subprocess.Popen([*sleep, f"{folder}-other/x"])
    assert {process.pid for process in ray_cluster._using(folder)} == {named.pid, writing.pid}
    started = time.monotonic()
    ray_cluster._end(folder)
    assert time.monotonic() - started < ray_cluster.END_S
    assert named.wait() == writing.wait() == -signal.SIGKILL
    assert other.poll() is None
    other.kill()
    other.wait()


def test_the_folder_has_a_short_path(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    deep = tmp_path / ("x" * ray_cluster.MAX_FOLDER)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with ray_cluster._folder() as folder:
        assert folder.is_dir()
        assert len(str(folder)) <= ray_cluster.MAX_FOLDER
    assert not folder.exists()
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with pytest.raises(MissingComponentError) as caught, ray_cluster._folder():
        pass
    assert str(caught.value).startswith(
        "Ray cannot be started here: no folder can be made in /nowhere (No such file or directory)"
    )


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("local", MissingComponentError, "Ray cannot be started here (ValueError: no room); run "
         "without --ray, or give a cluster's address"),
        ("1.2.3.4:5", InputError, "no Ray cluster can be reached at 1.2.3.4:5 (ValueError: no "
         "room); start one with 'ray start --head' and give its address, or use --ray local"),
    ],
)  # fmt: skip
def test_a_start_that_fails(monkeypatch, address, kind, message):
    def init(**_):
        raise ValueError("no\nroom")

    for name in ("RAY_ENABLE_AUTO_CONNECT", "RAY_AUTH_TOKEN"):
        monkeypatch.setenv(name, "x")
    fake = ModuleType("ray")
    fake.init, fake._private = init, SimpleNamespace(services=None)
    monkeypatch.setitem(sys.modules, "ray", fake)
    (told,) = ray_cluster._drive(RayWork([], print, print, None), address, {})
    assert (type(told), str(told)) == (kind, message)


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
from tome_export.evaluate.ray_cluster import RayWork, ray_records
from tome_export.evaluate.records import Classifier

task = Task(0, (Item("x", np.zeros((1, 2, 2), np.float32)),))
classifier = Classifier(1, "y", "softmax", "")
for _ in range(2):  # the second finds what the first left in this process
    try:
        work = RayWork([task], print, deadly_opener.dies, classifier)
        list(ray_records(work, "local", 1))
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
        env={
            **os.environ,
            "PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}",
            "HOME": str(home),
        },
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
