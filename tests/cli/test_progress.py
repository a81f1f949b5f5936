"""How long is left, from the steps seen so far."""

from __future__ import annotations

import contextlib
import io
import os
import pty
import re
import time
from types import SimpleNamespace

import pytest

from tome_export.cli import progress
from tome_export.cli.progress import Display, duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    # Of this module alone: whatever is imported meanwhile would keep a clock that stands.
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_the_rate_is_of_what_was_done_here(clock):
    stream = io.StringIO()
    with Display(stream, verbose=True, live=False) as shown:
        shown.stage("Classify")
        shown.step("images", 500, 1000)  # done before a restart, in no time
        clock[0] += 40
        shown.step("images", 600, 1000)
        clock[0] += 40
        shown.step("layers", 1, 4)
    assert stream.getvalue() == (
        "Classify\n  images: 500/1000\n  images: 600/1000, about 3 min left\n  layers: 1/4\n"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.4, "4 s"), (89, "89 s"), (95, "2 min"), (7260, "2 h 01 min")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_plain_output_tells_now_and_then(clock):
    stream = io.StringIO()
    with Display(stream, verbose=False, live=False) as shown:
        shown.stage("Classify")
        for done in range(1, 8):
            shown.step("images", done, 10)
            clock[0] += 12
    assert stream.getvalue() == (
        "Classify\n  images: 4/10, about 72 s left\n  images: 7/10, about 36 s left\n"
    )


def test_a_terminal_shows_steps_and_the_time_that_is_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    controller, terminal = pty.openpty()
    with os.fdopen(terminal, "w") as stream, Display(stream, verbose=False, live=True) as shown:
        shown.stage("Classify")
        for label in ("layers", "images"):
            for done in (1, 2, 3):
                shown.step(label, done, 10)
                time.sleep(0.15)
    written = b""
    with contextlib.suppress(OSError):  # Linux ends a terminal whose other side is closed with EIO
        while chunk := os.read(controller, 1 << 16):
            written += chunk
    os.close(controller)
    text = written.decode()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    assert "layers: 3/10" in text
    # A new label counts anew: seven steps of 0.15 s are left, not those of the layers.
    assert re.search(r"images: 3/10 +00:0[12]", text), text
    assert re.search(r"\u2713 Classify  \d\.\d s", text)
