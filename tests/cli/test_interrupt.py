"""Signals in the middle of a build, and builds that get in each other's way."""

from __future__ import annotations

import signal
import sys

import pytest

from tome_export.cli import signals
from tome_export.cli.main import main
from tome_export.cli.signals import Interrupted, interruptible, raise_if_interrupted

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")

BUILD = ("build", "vit_digits", "--r", "8", "-o", "out")

# Made by torch and by ONNX Runtime themselves, whatever uses them, and kept by them on purpose.
NOT_OURS = {"torchinductor_root", ".ses"}


def wait_for(process, stage):
    """Read progress until a stage begins."""
    for line in process.stderr:
        if line.startswith(stage):
            return
    pytest.fail(f"the build ended before {stage!r}")


def left_behind(folder):
    names = {p.name for p in (folder / "tmp").iterdir()}
    ours = {name for name in names if not name.startswith("torchinductor_")} - NOT_OURS
    return ours | {p.name for p in folder.iterdir()} - {"tmp"}


@pytest.mark.parametrize(
    ("stage", "number", "code", "line"),
    [
        ("Load", signal.SIGINT, 130, "Error: interrupted; nothing half-made was left behind\n"),
        ("Export", signal.SIGINT, 130, "Error: interrupted; nothing half-made was left behind\n"),
        ("Check", signal.SIGINT, 130, "Error: interrupted; nothing half-made was left behind\n"),
        ("Export", signal.SIGTERM, 143, "Error: terminated; nothing half-made was left behind\n"),
    ],
)
def test_a_signal_ends_the_build_and_leaves_nothing(start, tmp_path, stage, number, code, line):
    process = start(*BUILD, "--engine", "none")
    wait_for(process, stage)
    process.send_signal(number)
    process.send_signal(number)  # as an impatient user does
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert out == ""
    assert err.splitlines(keepends=True)[-1] == line
    assert "Traceback" not in err
    assert left_behind(tmp_path) == set()


def test_ctrl_c_during_the_engine_build(start, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    process = start(*BUILD, "--engine", "tensorrt-rtx", "--no-check")
    wait_for(process, "Build the tensorrt-rtx engine")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err == "Error: interrupted; nothing half-made was left behind\n"
    assert left_behind(tmp_path) == set()


def test_second_build_is_refused_and_the_leftovers_of_a_killed_one_are_cleared(cli, run, tmp_path):
    process = cli(*BUILD, "--engine", "none")
    wait_for(process, "Export")
    ran = run(*BUILD, "--engine", "none")
    assert ran.code == 3
    assert ran.error == (
        f"another build is writing {tmp_path / 'out'}; wait for it or give another directory"
    )
    process.kill()
    process.communicate()
    assert left_behind(tmp_path) == {".out.partial"}
    assert run(*BUILD, "--engine", "none", "--no-check").code == 0
    assert left_behind(tmp_path) == {"out"}


def test_of_two_builds_at_once_exactly_one_wins(cli, tmp_path):
    processes = [cli(*BUILD, "--engine", "none", "--no-check") for _ in range(2)]
    ended = [(p.communicate(timeout=90)[1], p.returncode) for p in processes]
    assert sorted(code for _, code in ended) == [0, 3]
    refused = next(err for err, code in ended if code == 3)
    output = tmp_path / "out"
    assert refused in (
        f"Error: another build is writing {output}; wait for it or give another directory\n",
        f"Error: {output} exists; give another directory, or --force to replace it\n",
    )
    assert left_behind(tmp_path) == {"out"}


def test_an_interrupt_that_a_library_swallowed_is_raised_again(monkeypatch):
    monkeypatch.setattr(signals, "GRACE_S", 600.0)  # a busy machine is slow
    with interruptible():
        raise_if_interrupted()
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted, match="interrupted"):
            raise_if_interrupted()
        signal.raise_signal(signal.SIGINT)  # within the time of grace: ignored
    with interruptible():
        raise_if_interrupted()


def test_an_error_that_a_library_made_of_an_interrupt_is_the_interrupt(monkeypatch, capsys):
    """As torch did, loading, in a build that was interrupted: exit code 1, «this is a bug»."""

    def swallow(*_):
        try:
            signal.raise_signal(signal.SIGINT)
        except Interrupted:
            raise ValueError("could not determine the shape") from None

    monkeypatch.setattr("tome_export.models.catalog.catalog", swallow)
    assert main(["models"]) == 130
    assert capsys.readouterr().err == "Error: interrupted; nothing half-made was left behind\n"


def test_handlers_are_put_back_and_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_reader_that_goes_away_is_no_error(start):
    process = start("models")
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
