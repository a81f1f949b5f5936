"""What outlives this process to tidy up after it; with a real server in test_server.py."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tome_export.serve.process import GroupProcess, Watchdog

# Two processes that SIGTERM does not end, as a server that hangs would be.
STUBBORN = "trap '' TERM; echo ready; sleep 60 & wait; sleep 60"


@pytest.fixture
def places(tmp_path):
    folder = tmp_path / "a folder"
    (folder / "backends").mkdir(parents=True)
    (folder / "log").touch()
    for name in ("memory_1_a", "memory_1_b", "memory_2_a"):
        (tmp_path / name).touch()
    return folder, tmp_path / "memory_1_"


@pytest.fixture
def group(by_hand):
    process = subprocess.Popen(
        ["sh", "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"ready\n"
    yield process.pid
    if by_hand.members(process.pid):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def lost(watchdog):
    """End the pipe as the end of this process would, and wait for the watchdog's."""
    watchdog._process.stdin.close()
    watchdog._process.wait(20)


def test_ends_a_group_that_hangs_and_removes_what_was_its_own(places, group, by_hand):
    folder, memory = places
    watchdog = Watchdog(folder, memory, seconds=1)
    watchdog.guard(group)
    assert by_hand.members(group)
    lost(watchdog)
    assert by_hand.members(group) == []
    assert [path.name for path in folder.parent.iterdir()] == ["memory_2_a"]


def test_leaves_a_group_alone_that_it_was_told_to_forget(places, group, by_hand):
    watchdog = Watchdog(*places, seconds=1)
    watchdog.guard(group)
    watchdog.release()
    lost(watchdog)
    assert by_hand.members(group)


def test_ends_without_a_trace(places, group, by_hand):
    folder, memory = places
    watchdog = Watchdog(folder, memory, seconds=1)
    watchdog.guard(group)
    watchdog.end()
    assert by_hand.naming(str(folder)) == []
    assert by_hand.members(group)
    assert (folder / "log").exists()


class Recorder(Watchdog):
    """Notes what it is told, and whether the group's number is still taken then."""

    def __init__(self, *args: object) -> None:
        super().__init__(*args)  # type: ignore[arg-type]
        self.told: list[tuple[str, bool]] = []

    def guard(self, group: int) -> None:
        self.group = group
        self.told.append(("guard", Path(f"/proc/{group}").exists()))
        super().guard(group)

    def release(self) -> None:
        self.told.append(("release", Path(f"/proc/{self.group}").exists()))
        super().release()


def test_a_group_is_forgotten_before_its_number_is_free(places, tmp_path):
    watchdog = Recorder(*places, 1)
    process = GroupProcess(tmp_path / "log", places[1], watchdog)
    for _ in range(2):
        process.launch(["sleep", "60"], {"PATH": os.environ["PATH"]})
        process.stop(0)
    watchdog.end()
    assert watchdog.told == [("guard", True), ("release", True)] * 2
