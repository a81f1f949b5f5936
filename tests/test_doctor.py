"""Doctor tells what is missing and what is broken, and never fails itself."""

from __future__ import annotations

import sys

import pytest

from tome_export import doctor
from tome_export.runtime.registry import BACKENDS


def found(findings, name):
    return next(finding for finding in findings if finding.name == name)


def test_everything_is_looked_at():
    findings = doctor.survey()
    names = [finding.name for finding in findings]
    assert len(names) == len(set(names))
    for name in ("torch", "timm", "onnxruntime", "Triton language", "GPU", "disk", "memory"):
        assert name in names
    for backend in ("tensorrt", "tensorrt-rtx"):
        for verb in ("build", "run"):
            assert f"{backend}: {verb} engines" in names
    for backend in ("ort-cpu", "ort-cuda", "ort-rtx", "openvino"):
        run, reason = found(findings, f"{backend}: run models"), BACKENDS[backend].missing()
        assert run.ok == (reason is None)
        assert reason is None or reason in (f"{run.found}; {run.fix}", run.found)
    for finding in findings:
        assert "\n" not in finding.found + finding.fix
        assert finding.ok == (finding.fix == "")


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxsim", None)
    finding = found(doctor.survey(), "onnxsim")
    assert not finding.ok
    assert finding.fix.endswith("pip install onnxsim")


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("import no_such_part", "repair: pip install broken"),
        ("raise RuntimeError('operator torchvision::nms\\ndoes not exist')", "repair: "),
    ],
)
def test_a_broken_package(monkeypatch, tmp_path, line, fix):
    (tmp_path / "broken_for_doctor.py").write_text(line + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    finding = doctor._package("broken_for_doctor", "pip install broken")
    assert not finding.ok
    assert finding.found.startswith("installed, but does not load: ")
    assert "\n" not in finding.found
    assert finding.fix.startswith(fix)


def test_a_package_that_is_not_there():
    finding = doctor._package("no_such_package_at_all", "pip install it")
    assert (finding.ok, finding.found, finding.fix) == (False, "not installed", "pip install it")


def test_too_little_room_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "ROOM_BYTES", 1 << 60)
    findings = doctor.survey()
    assert not found(findings, "disk").ok
    assert found(findings, "memory").fix.startswith("close programs")
