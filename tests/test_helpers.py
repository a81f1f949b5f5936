"""What the other tests rely on: traced graphs are shared by content, forks are like processes."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest
import torch
import traces

from tome_export.onnx import export
from tome_export.onnx.export import ExportOptions
from tome_export.patch import patch

SCALE = """
import torch

class Scale(torch.nn.Module):
    def forward(self, x):
        return {factor} * x
"""


@pytest.fixture
def traced(tmp_path):
    """``traced(model, options)``: whether that traced a graph, which is empty here."""
    seen = []

    def trace(*given):
        seen.append(given)
        return traces.onnx.ModelProto()

    def export_(model, options=ExportOptions()):  # noqa: B008
        before = len(seen)
        export._proto_from_model(model, options, ["logits"])
        return len(seen) > before

    with pytest.MonkeyPatch.context() as own:
        own.setattr(export, "_proto_from_model", trace)
        own.setattr(pytest.MonkeyPatch, "setattr", pytest.MonkeyPatch.setattr)
        with traces.shared_traces(tmp_path / "traces"):
            yield export_


def test_the_same_content_is_traced_once(traced, make_vit):
    assert traced(patch(make_vit(depth=1), 5))
    assert not traced(patch(make_vit(depth=1), 5))
    assert traced(patch(make_vit(depth=1), 4))
    assert traced(patch(make_vit(depth=2), 5))
    assert traced(patch(make_vit(depth=1, seed=1), 5))
    assert traced(patch(make_vit(depth=1), 5), ExportOptions(precision="fp16"))
    changed = patch(make_vit(depth=1), 5)
    with torch.no_grad():
        next(changed.parameters()).view(-1)[0] += 1e-6
    assert traced(changed)


def test_while_code_is_patched_nothing_is_shared(traced, make_vit, monkeypatch):
    assert traced(patch(make_vit(depth=1), 5))
    monkeypatch.setattr(torch, "bmm", torch.bmm)
    assert traced(patch(make_vit(depth=1), 5))
    monkeypatch.undo()
    assert not traced(patch(make_vit(depth=1), 5))


def test_code_that_a_test_wrote_has_no_key(tmp_path):
    spec = importlib.util.spec_from_file_location("scale", tmp_path / "scale.py")
    (tmp_path / "scale.py").write_text(SCALE.format(factor=2))
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(traces.sys.modules, "scale", module)
        spec.loader.exec_module(module)
        assert traces._key(torch.nn.ReLU()) is not None
        assert traces._key(module.Scale()) is None


def test_a_fork_is_like_a_process(fork_server, tmp_path):
    def start(code, *arguments, **environment):
        return fork_server.start(code, *arguments, cwd=tmp_path, env={**os.environ, **environment})

    said = "print(sys.argv, os.getcwd(), os.environ['X'], 'torch' in sys.modules)"
    process = start(
        f"import atexit, os, sys; atexit.register(print, 'bye'); {said}; "
        "print('err', file=sys.stderr); sys.exit(7)",
        "a",
        X="1",
    )
    out, err = process.communicate()
    assert (out, err) == (f"['-c', 'a'] {tmp_path} 1 True\nbye\n", "err\n")
    assert process.returncode == 7
    failing = start("1 / 0")
    assert failing.communicate()[1].endswith("ZeroDivisionError: division by zero\n")
    assert failing.returncode == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_fork_takes_signals(fork_server, tmp_path, number):
    code = "import time; print('ready', flush=True); time.sleep(60)"
    process = fork_server.start(code, cwd=tmp_path, env=dict(os.environ))
    assert process.stdout.readline() == "ready\n"
    assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == -number
    assert ("KeyboardInterrupt" in err) == (number == signal.SIGINT)
