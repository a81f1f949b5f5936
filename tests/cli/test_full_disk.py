"""What cannot be written down is printed all the same: full disks and streams, limits of files."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys

import pytest

ENTRY = "import sys; from tome_export.cli.main import main; sys.exit(main())"

UNDER_A_LIMIT = """
import contextlib, io, json, resource, sys
from tome_export.cli.main import main

def run(command):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(command)
    return [code, out.getvalue(), err.getvalue()]

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, 400))
    print(json.dumps([run(command) for command in json.loads(sys.argv[1])]))
"""

TOO_LARGE = "a file would be larger than may be written here; raise the limit (ulimit -f) or give"
"""What is said of EFBIG: Python ignores the signal that comes with it, SIGXFSZ."""


def test_a_limit_of_file_sizes(digit_members, tmp_path):
    artifact = shutil.copytree(digit_members[8], tmp_path / "a")
    before = {path.name: path.read_bytes() for path in artifact.iterdir()}
    low = str(digit_members[32])
    lost = f"the result was not recorded: cannot write {artifact}: {TOO_LARGE} another directory"
    file = f"the result was not recorded: cannot write {{}}: {TOO_LARGE} another file"
    commands = {
        ("check", "a"): (lost, "Passed: "),
        ("eval", "a", "--data", "samples", "--limit", "8", "--against", "none"): (lost, "8 images"),
        ("tune", "vit_digits", "--target-macs", "80%", "--limit", "40", "--time-limit", "1"): (
            file.format("schedule.json"),
            "schedules were searched",
        ),
        ("cascade", low, "a", "--data", "samples", "--target-macs", "60%", "--limit", "40"): (
            file.format("cascade.html"),
            "MACs on average",
        ),
        ("report", "a", "--samples", "0"): (
            f"cannot write {artifact}: {TOO_LARGE} another directory",
            "",
        ),
        ("serve", "a", "--repository", "m"): (
            f"cannot write {tmp_path / 'm'}: {TOO_LARGE} another directory",
            "",
        ),
        ("build", "vit_digits", "--engine", "none", "--no-check", "-o", "b"): (
            f"cannot write {tmp_path / 'b'}: {TOO_LARGE} another directory",
            "",
        ),
    }
    script = [sys.executable, "-c", UNDER_A_LIMIT, json.dumps([*commands])]
    # Python would keep what fits of its bytecode, for all to trip over.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        script, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    answers = json.loads(done.stdout)
    for (command, (error, shown)), (code, out, err) in zip(commands.items(), answers, strict=True):
        assert (code, err.splitlines()[-1]) == (3, f"Error: {error}"), (command, err)
        assert shown in out, command
    assert {path.name: path.read_bytes() for path in artifact.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"a"}


def test_a_search_whose_file_does_not_fit(run, mounted):
    disk = mounted("size=16k")
    with contextlib.suppress(OSError), (disk / "full").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    tune = ("tune", "vit_digits", "--target-macs", "80%", "--limit", "40", "--time-limit", "1")
    ran = run(*tune, "-o", disk / "s.json", "--json")
    reason = f"cannot write {disk / 's.json'}: no space is left on the device; free some or give"
    assert (ran.code, ran.error) == (3, f"the result was not recorded: {reason} another file")
    assert ran.json["unrecorded"] == f"{reason} another file"
    assert len(ran.json["schedule"]) == 6
    assert [path.name for path in disk.iterdir()] == ["full"]


@pytest.mark.parametrize("more", [(), ("--json",)])
@pytest.mark.parametrize("command", [("models",), ("build", "nothing")])
@pytest.mark.parametrize("full", ["stdout", "stderr", "both"])
def test_full_streams(full, command, more):
    with open("/dev/full", "w") as device:  # noqa: PTH123
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        streams |= dict.fromkeys(streams if full == "both" else [full], device)
        line = [sys.executable, "-c", ENTRY, *command, *more]
        ran = subprocess.run(line, **streams, text=True, check=False)
    assert ran.returncode == (0 if command == ("models",) and full == "stderr" else 3)
    if full == "stdout":
        assert ran.stderr.splitlines()[-1].startswith("Error: ")
        assert "Traceback" not in ran.stderr
    elif full == "stderr" and more:
        assert json.loads(ran.stdout)
