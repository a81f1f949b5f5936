"""Every command takes every backend by the same name, and says the same of it."""

from __future__ import annotations

import pytest

from tome_export.runtime.registry import BACKENDS

COMMANDS = {
    "check": ("check", "{artifact}"),
    "bench": ("bench", "{artifact}"),
    "eval": ("eval", "{artifact}", "--data", "samples"),
    "cascade": (
        *("cascade", "{artifact}", "{artifact}", "--data", "samples"),
        *("--policy", "confidence", "--target-macs", "0.8"),
    ),
}

ABSENT = [
    name
    for name, backend in BACKENDS.items()
    if backend.opens == "graph" and backend.missing() is not None
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_backend_that_does_not_exist(command, run, built):
    ran = run(*(part.format(artifact=built) for part in COMMANDS[command]), "--backend", "cuda")
    assert ran.code == 2
    known = [name for name in BACKENDS if name != "torch" or command in ("bench", "eval")]
    assert ran.error == f"backend is 'cuda'; expected one of {', '.join(known)}"


@pytest.mark.parametrize("name", ABSENT)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_backend_that_is_not_here(command, name, run, built):
    ran = run(*(part.format(artifact=built) for part in COMMANDS[command]), "--backend", name)
    assert (ran.code, ran.error) == (4, BACKENDS[name].missing())


def test_openvino_from_check_to_eval(run, artifact):
    """The shipped graph and its twin, whose plans can be led: parity by decisions."""
    pytest.importorskip("openvino")
    ran = run("check", artifact, "--backend", "openvino", "--json")
    assert ran.code == 0, ran.err
    (report,) = ran.json["reports"]
    assert report["candidate"] == "onnx on OpenVINO CPU"
    assert report["passed"]
    assert report["decisions"] > 1000
    assert ran.json["accuracy"]["backend"] == "OpenVINO CPU"
    assert ran.json["accuracy"]["merged"] > 0.9
    quick = ("--rounds", "2", "--warmup", "0", "--batch", "2")
    ran = run("bench", artifact, "--backend", "openvino", *quick, "--json")
    assert ran.code == 0, ran.err
    (row,) = ran.json["rows"]
    assert row["backend"] == "openvino"
    assert row["merged"]["peak_memory_bytes"] > 1e6
    assert ran.json["notes"] == [
        "openvino computes float16 in float32: its times say nothing of float16 hardware",
        "openvino is not profiled: time per part of the model is measured with ort-cpu only",
    ]
    ran = run("eval", artifact, "--data", "samples", "--backend", "openvino", "--json")
    assert ran.code == 0, ran.err
    assert {one["backend"] for one in ran.json["candidates"]} == {"openvino", "torch"}
