"""How long is left, from the steps seen so far."""

from __future__ import annotations

import io

import pytest

from tome_export.cli import progress
from tome_export.cli.progress import Plain, duration


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_rate_is_of_what_was_done_here(clock):
    stream = io.StringIO()
    with Plain(stream, verbose=True) as shown:
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
    with Plain(stream, verbose=False) as shown:
        shown.stage("Classify")
        for done in range(1, 8):
            shown.step("images", done, 10)
            clock[0] += 12
    assert stream.getvalue() == (
        "Classify\n  images: 4/10, about 72 s left\n  images: 7/10, about 36 s left\n"
    )
