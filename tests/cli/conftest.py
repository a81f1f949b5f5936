"""The command line in this process, in a process of its own, and an artifact to try things on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forkserver import Forked

from tome_export.cli.main import main
from tome_export.merge.schedule import Schedule

ENTRY = "import sys; from tome_export.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Ran:
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which must be one JSON value and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of error that ends standard error."""
        lines = [line for line in self.err.splitlines() if line.startswith("Error: ")]
        assert len(lines) == 1, self.err
        assert self.err.endswith(lines[0] + "\n"), self.err
        assert "Traceback" not in self.err
        return lines[0].removeprefix("Error: ")


@pytest.fixture
def run(capfd, tmp_path, monkeypatch) -> Callable[..., Ran]:
    """Run the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return call


@pytest.fixture
def start(tmp_path) -> Callable[..., subprocess.Popen[str]]:
    """Start the command line as a new process, in an empty folder with its own temp.

    For what a fork would not show: signals, what is imported, the environment of libraries.
    """
    (tmp_path / "tmp").mkdir(exist_ok=True)
    started = []

    def call(*arguments: object, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", ENTRY, *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Shells start background jobs, and so perhaps this test, with Ctrl-C ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def cli(fork_server, tmp_path) -> Iterator[Callable[..., Forked]]:
    """``start`` without the seconds in which a new process imports torch."""
    (tmp_path / "tmp").mkdir(exist_ok=True)
    started = []

    def call(*arguments: object, **environment: str) -> Forked:
        own = {**os.environ, "TMPDIR": str(tmp_path / "tmp"), **environment}
        started.append(fork_server.start(ENTRY, *map(str, arguments), cwd=tmp_path, env=own))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(scope="session")
def built(built_artifact) -> Path:
    """An artifact of vit_digits, fp16, r = 8, without an engine; not to be changed."""
    return built_artifact(schedule=Schedule(8), precision="fp16").path


@pytest.fixture(scope="session")
def built_random(built_artifact) -> Path:
    """The same with random weights, fp32; not to be changed."""
    return built_artifact(schedule=Schedule(8), weights="random", seed=3).path


@pytest.fixture
def artifact(built, tmp_path) -> Path:
    """A copy of ``built`` that may be changed."""
    return Path(shutil.copytree(built, tmp_path / "artifact"))


@pytest.fixture
def mounted(tmp_path):
    """Mounts a small filesystem in memory; skips where that is not allowed."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    done = []

    def mount(options: str) -> Path:
        if shutil.which("mount") is None or os.geteuid() != 0:
            pytest.skip("mounting a filesystem needs root")
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("this machine does not let a filesystem be mounted")
        done.append(folder)
        return folder

    yield mount
    for _ in done:
        subprocess.run(["umount", str(folder)], check=True)
