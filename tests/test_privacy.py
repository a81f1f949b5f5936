"""No command and nothing that it starts looks up a name, or connects to another machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

SOURCE = Path(__file__).parent / "helpers" / "network.c"

COMMANDS = """
import json, sys
from tome_export.cli.main import main
if __name__ == "__main__":
    sys.exit(json.dumps([c for c in json.loads(sys.argv[1]) if main(c)]).strip("[]") or None)
"""

SILENCED = """
import os, sys
import tome_export
wanted = {"ORT_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
print({name: os.environ[name] for name in wanted} == wanted)
"""


@pytest.fixture(scope="module")
def hook(tmp_path_factory):
    """A library to preload, which sees what Python, C++ and Rust ask of the network alike."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    library = tmp_path_factory.mktemp("hook") / "network.so"
    flags = ["-shared", "-fPIC", "-O1", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, "-o", library, SOURCE, "-ldl"], check=True)
    return library


@pytest.fixture
def observe(hook, tmp_path):
    """Run Python code in a home of its own; gives its exit, its look-ups, and what it left there.

    Libraries are as silent on a machine for continuous integration as they should be everywhere.
    """
    home, log = tmp_path / "home", tmp_path / "log"
    home.mkdir()
    drop = ("CI", "TF_BUILD", "GITHUB_ACTIONS", "JENKINS_URL", "XDG_CACHE_HOME", "DO_NOT_TRACK")
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in drop and not name.startswith(("ORT_", "HF_", "RAY_"))
    }
    own = {"HOME": str(home), "LD_PRELOAD": str(hook), "NETWORK_LOG": str(log)}

    def call(code, *arguments, **environment):
        ran = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=tmp_path,
            env={**kept, **own, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        lines = log.read_text().splitlines() if log.exists() else []
        left = [p.relative_to(home).as_posix() for p in home.rglob("*") if p.is_file()]
        return ran, lines, left

    return call


def test_the_hook_sees_python_and_c(observe):
    code = """
import ctypes, contextlib, socket
with contextlib.suppress(OSError):
    socket.getaddrinfo("example.com", 80)
with contextlib.suppress(OSError):
    socket.create_connection(("192.0.2.1", 80), 1)
ctypes.CDLL(None).gethostbyname(b"example.org")
socket.getaddrinfo("localhost", 80)
"""
    _, lines, _ = observe(code)
    calls = [line.split(" by ")[0] for line in lines]
    assert calls == [
        "getaddrinfo example.com",
        "connect 192.0.2.1",
        "gethostbyname example.org",
    ]


def test_what_is_silenced_would_be_seen(observe):
    """ONNX Runtime from 1.29 on leaves an identifier as soon as it is imported."""
    import onnxruntime

    if tuple(map(int, onnxruntime.__version__.split(".")[:2])) < (1, 29):
        pytest.skip("this ONNX Runtime does not report")
    _, _, left = observe("import onnxruntime")
    assert any("deviceid" in name for name in left)
    _, lines, left = observe("import openvino")
    assert any("google-analytics" in line for line in lines)


def test_the_choice_of_a_user_stands(observe):
    ran, _, _ = observe(SILENCED)
    assert ran.stdout == "True\n"
    ran, _, _ = observe(SILENCED, ORT_DISABLE_TELEMETRY="")
    assert ran.stdout == "True\n"
    ran, _, _ = observe(SILENCED, ORT_DISABLE_TELEMETRY="0")
    assert ran.stdout == "False\n"


def test_openvino_reports_for_who_has_opted_in(observe, tmp_path):
    code = "from tome_export.runtime.registry import backend_of as b; b('openvino').missing()"
    _, lines, left = observe(code)
    assert (lines, left) == ([], [])
    (tmp_path / "home/intel").mkdir()
    (tmp_path / "home/intel/openvino_telemetry").write_text("1")
    _, lines, _ = observe(code)
    assert any("google-analytics" in line for line in lines)


@pytest.mark.slow
def test_no_command_reaches_out(observe, digit_members, tmp_path):
    pytest.importorskip("transformers")
    from hf_models import make

    for r in (8, 32):
        shutil.copytree(digit_members[r], tmp_path / f"r{r}")
    (tmp_path / "data/3").mkdir(parents=True)
    for index in range(3):
        Image.new("L", (32, 32), 80 * index).save(tmp_path / f"data/3/{index}.png")
    make("ViT, classifier").save_pretrained(tmp_path / "vit")
    build = ("--engine", "none", "--no-check", "-o")
    limit = ("--limit", "40", "--time-limit", "1")
    commands = [
        ("build", "vit_digits", "--r", "4", "--engine", "none", "-o", "a"),
        ("build", "hf:vit", "--r", "2", *build, "b"),
        ("build", "timm:test_vit", "--weights", "random", "--r", "2", *build, "c"),
        ("check", "r8", "--backend", "openvino"),
        ("bench", "r8", "--rounds", "1", "--warmup", "0", "--batch", "1"),
        ("eval", "r8", "--data", "data", "--workers", "1"),
        *([("eval", "r8", "--data", "data", "--ray", "local")] if find_spec("ray") else []),
        ("tune", "vit_digits", "--target-macs", "80%", *limit),
        ("cascade", "r32", "r8", "--data", "samples", "--target-macs", "60%", "--limit", "40"),
        ("predict", "r8", "data/3/0.png"),
        ("inspect", "r8", "data/3/0.png"),
        ("report", "r8"),
        ("serve", "r8", "--repository", "models", "--preprocess"),
        ("models",),
        ("doctor",),
    ]
    ran, lines, left = observe(COMMANDS, json.dumps(commands))
    assert ran.returncode == 0, ran.stderr
    assert lines == []
    own = ("tome-export", "matplotlib")  # our journals, and a list of fonts
    assert [name for name in left if not any(part in name for part in own)] == []
