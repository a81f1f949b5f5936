"""What holds for every command: start-up time, streams, JSON, and unexpected failures."""

from __future__ import annotations

import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tome_export.cli import models
from tome_export.cli.main import COMMANDS, cli
from tome_export.cli.options import HEADINGS
from tome_export.cli.output import Terminal, quiet

HEAVY = (
    "pydantic",
    "torch",
    "numpy",
    "onnx",
    "onnxruntime",
    "timm",
    "rich",
    "tensorrt",
    "tensorrt_rtx",
)

ENTRY = "import sys; from tome_export.cli.main import main; sys.exit(main())"


def processor_seconds() -> float:
    """Of all processes that have ended: another load of the machine does not count."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_is_fast_and_imports_nothing_heavy():
    script = f"""
import sys
from tome_export.cli.main import main
for command in ([], {", ".join(repr([c]) for c in COMMANDS)}):
    assert main([*command, "--help"]) == 0
print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr == "[]\n"
    seconds = []
    for _ in range(15):
        begin = processor_seconds()
        subprocess.run([sys.executable, "-c", ENTRY, "--help"], capture_output=True, check=True)
        seconds.append(processor_seconds() - begin)
    assert statistics.median(seconds) < 0.3


def test_help_names_every_command_and_exit_code(run):
    ran = run("--help")
    assert ran.code == 0
    assert ran.err == ""
    for name in (
        *COMMANDS,
        "0  done",
        "2  usage",
        "3  bad input",
        "4  a needed",
        "5  parity",
        "129, 1",
        "141  ",
    ):
        assert f"  {name}" in ran.out


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_options_by_heading_and_an_example_that_parses(run, name):
    command = cli.get_command(None, name)
    text = run(name, "--help").out
    found = re.findall(r"^(?!Usage)(\w[^\n]*):$", text, re.MULTILINE)
    assert found == [*(heading for heading in HEADINGS if heading in found), "Example"]
    assert "Output" in found
    listed = re.findall(
        r"^  (?:-\w, )?(--[\w-]+)", text[text.index(f"{found[0]}:") :], re.MULTILINE
    )
    options = [one for one in command.params if isinstance(one, click.Option)]
    assert sorted(listed) == sorted(["--help", *(one.opts[-1] for one in options)])
    program, given, *arguments = shlex.split(command.example)
    assert (program, given) == ("tome-export", name)
    assert text.endswith(f"Example:\n  {command.example}\n")
    command.make_context(name, arguments, obj=Terminal())


def test_no_command_shows_the_help_and_is_a_usage_error(run):
    ran = run()
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("Usage: tome-export [OPTIONS] COMMAND")
    assert json.loads(run("--json").out)["error"]["exit_code"] == 2


def test_engine_needs_no_torch(artifact):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    script = f"""
import sys
sys.modules["torch"] = None
sys.modules["timm"] = None
from tome_export.cli.main import main
sys.exit(main(["engine", {str(artifact)!r}, "--engine", "tensorrt-rtx"]))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stderr == "Verify the artifact\nBuild the tensorrt-rtx engine\n"
    assert (artifact / "model.rtx.engine").is_file()


class Boom:
    """Stands where a library has a bug."""

    def __call__(self, *_):
        raise ZeroDivisionError("division by\nzero")


def test_an_unexpected_failure_is_one_line(run, monkeypatch):
    monkeypatch.setattr(models, "table", Boom())
    message = (
        "ZeroDivisionError: division by zero; this is a bug, run with --debug for the traceback"
    )
    ran = run("models")
    assert (ran.code, ran.out) == (1, "")
    assert ran.error == message
    ran = run("models", "--json")
    failure = {"type": "ZeroDivisionError", "message": message, "exit_code": 1}
    assert ran.json == {"error": failure}


@pytest.mark.parametrize("arguments", [("--debug", "models"), ("models", "--debug")])
def test_debug_shows_the_traceback(run, monkeypatch, arguments):
    monkeypatch.setattr(models, "table", Boom())
    ran = run(*arguments)
    assert ran.code == 1
    assert ran.err.startswith("Traceback (most recent call last):\n")


NOISY = """
import ctypes, logging, os, sys, warnings

def noisy():
    print("python on stdout")
    print("python on stderr", file=sys.stderr)
    os.write(1, b"descriptor 1\\n")
    os.write(2, b"descriptor 2\\n")
    ctypes.CDLL(None).puts(b"buffered by C")
    warnings.warn("a warning")
    logging.getLogger("torch").error("a log line")
    raise LookupError("no model today")
"""


def test_the_noise_of_others_stays_off_both_streams(cli, tmp_path):
    (tmp_path / "noisy.py").write_text(NOISY)
    process = cli("build", "noisy:noisy", "--json")
    out, err = process.communicate(timeout=60)
    assert json.loads(out)["error"]["type"] == "InputError"
    assert err == f"Error: {json.loads(out)['error']['message']}\n"
    process = cli("build", "noisy:noisy", "--json", "--debug")
    out, err = process.communicate(timeout=60)
    assert json.loads(out)["error"]["exit_code"] == 3
    for line in ("python on stdout", "python on stderr", "descriptor 1", "descriptor 2"):
        assert line in err
    assert "a warning" in err
    assert "a log line" in err


def test_quiet_puts_everything_back(capfd):
    print("before")
    with quiet(debug=False) as own:
        print("within")
        own.write("ours\n")
    print("after")
    captured = capfd.readouterr()
    assert captured.out == "before\nafter\n"
    assert captured.err == "ours\n"


def test_a_full_standard_output_is_one_line():
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-c", ENTRY, "models"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 3
    assert ran.stderr == (
        "Error: cannot read or write: No space left on device; free space or choose another place\n"
    )
