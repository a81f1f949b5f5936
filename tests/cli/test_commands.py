"""What each command prints, for people and as JSON."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import pty
import shutil
import subprocess
import sys

import pytest

from tome_export.artifact.manifest import read_manifest
from tome_export.cli import format as text
from tome_export.data.images import BUILD_COUNT
from tome_export.engine import BUILDERS
from tome_export.models import RECIPES

ENTRY = "import sys; from tome_export.cli.main import main; sys.exit(main())"


def test_build_prints_what_the_manifest_holds(run, tmp_path):
    ran = run("build", "vit_digits", "--r", "8", "--fp16", "-o", "out", "--engine", "none")
    assert ran.code == 0
    assert ran.err == (
        f"Load vit_digits\nExport to ONNX, fp16\nCheck parity on {BUILD_COUNT} images\n"
        "Write the artifact\n"
    )
    lines = ran.out.splitlines()
    assert lines[0].startswith("Model      vit_digits: ")
    assert lines[1] == "Weights    bundled: vit_digits.safetensors"
    assert lines[2] == "Output     logits [10], softmax: the model has a head of 10 outputs"
    assert lines[4] == "Merge op   matmul"
    assert lines[8] == "layer  tokens in  r  tokens out  MACs unmerged  MACs merged"
    assert lines[9] == "    0         65  8          57         3.74 M       3.47 M"
    assert lines[14] == "    5         25  8          17         3.74 M       1.05 M"
    assert lines[15] == "MACs per image: 22.48 M unmerged, 13.46 M merged, ratio 1.67"
    assert "Engine: none; no engine, as asked" in lines
    assert "Parity passed: onnx on ONNX Runtime CPU, fp16, " in ran.out
    assert lines[-1] == f"Artifact: {tmp_path / 'out'}"


def test_build_as_json(run, tmp_path):
    options = ("--engine", "none", "--no-check", "--batch", "4", "--no-prop-attn", "--json")
    ran = run("build", "vit_digits", "--schedule", "decreasing", "-o", "out", *options)
    assert ran.code == 0
    assert ran.json["artifact"] == str(tmp_path / "out")
    manifest = ran.json["manifest"]
    assert manifest == json.loads((tmp_path / "out" / "build.json").read_text())
    assert manifest["merge"]["schedule"] == "r=8 decreasing"  # r is the recommended one
    assert manifest["merge"]["prop_attn"] is False
    assert manifest["batch"] == "4:4:4"
    assert manifest["parity"] is None


def test_verbose_shows_what_happens_within_a_stage(run):
    ran = run("build", "vit_digits", "--no-check", "--engine", "none", "-o", "out", "-v")
    assert "Load vit_digits\n  weights: bundled, vit_digits.safetensors\n" in ran.err


def test_check_passes_and_reports_accuracy(run, artifact):
    ran = run("check", artifact)
    assert ran.code == 0
    assert "Top-1 on 450 labelled test images: unmerged 100 % (PyTorch fp32), merged" in ran.out
    assert "\nlayer  decisions  differ  defects" in ran.out
    assert ran.out.endswith(f"\nPassed: {artifact}\n")


def test_check_as_json(run, artifact):
    found = run("check", artifact, "--backend", "ort-cpu", "--json").json
    assert found["passed"] is True
    assert found["random_weights"] is False
    assert found["accuracy"]["images"] == 450
    assert len(found["reports"][0]["layers"]) == 6
    assert found["unrecorded"] is None


def test_check_on_the_users_images(run, artifact, tmp_path):
    from tome_export.data.samples import sample_paths

    (tmp_path / "mine").mkdir()
    for path in sample_paths()[:3]:
        (tmp_path / "mine" / path.name).write_bytes(path.read_bytes())
    found = run("check", artifact, "--images", "mine", "--json").json
    assert found["passed"] is True
    assert found["accuracy"] is None
    assert found["reports"][0]["images"] == 3


def spoil(artifact):
    """Make one weight of block 2 wrong and the manifest agree with it."""
    import numpy as np
    import onnx
    from onnx import numpy_helper

    path = artifact / "model.onnx"
    model = onnx.load(path)
    width = next(
        tensor
        for tensor in model.graph.initializer
        if "blocks.2" in tensor.name and "norm1.weight" in tensor.name
    )
    values = numpy_helper.to_array(width).copy()
    values[::2] *= np.asarray(3, values.dtype)
    width.CopyFrom(numpy_helper.from_array(values, width.name))
    onnx.save(model, path)
    manifest = json.loads((artifact / "build.json").read_text())
    content = path.read_bytes()
    record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest["files"]["model.onnx"] = record
    (artifact / "build.json").write_text(json.dumps(manifest))


def test_check_of_a_wrong_model_names_the_first_failing_layer(run, artifact):
    spoil(artifact)
    ran = run("check", artifact)
    assert ran.code == 5
    assert ran.error.startswith("parity failed for onnx on ONNX Runtime CPU in fp16: layer 2: ")
    assert ran.out.endswith(f"FAILED: {artifact}\n")
    ran = run("check", artifact, "--json")
    assert ran.code == 5
    found = ran.json
    assert found["error"]["type"] == "ParityFailedError"
    assert found["error"]["exit_code"] == 5
    assert found["passed"] is False
    assert found["reports"][0]["failures"][0].startswith("layer 2: ")
    # The failure is recorded too, so that nobody takes the artifact for a good one.
    assert json.loads((artifact / "build.json").read_text())["parity"]["passed"] is False


def test_a_build_whose_parity_fails_prints_the_report_and_keeps_nothing(run, monkeypatch, tmp_path):
    from tome_export.parity import compare

    monkeypatch.setattr(compare, "check_parity", functools.partial(compare.check_parity, k=0.0))
    arguments = ("build", "vit_digits", "--fp16", "--r", "8", "--engine", "none", "-o", "out")
    ran = run(*arguments, "--json")
    assert ran.code == 5
    assert ran.json["error"]["type"] == "ParityFailedError"
    assert ran.json["report"]["passed"] is False
    assert ran.json["error"]["message"] == ran.error
    ran = run(*arguments)
    assert ran.code == 5
    assert ran.out.startswith("Parity FAILED: onnx on ONNX Runtime CPU, fp16, ")
    assert list(tmp_path.iterdir()) == []


OVERFLOWING = """
import torch
from tome_export.models import RECIPES

def make():
    module = RECIPES["vit_digits"].load().module
    with torch.no_grad():
        module.head.bias[0] = 70000  # more than fp16 can hold
    return module, RECIPES["vit_digits"].preprocessing
"""


def test_results_that_are_not_finite_are_a_parity_failure(run, monkeypatch, tmp_path):
    (tmp_path / "overflowing.py").write_text(OVERFLOWING)
    monkeypatch.syspath_prepend(str(tmp_path))
    arguments = ("build", "overflowing:make", "--fp16", "--r", "8", "--engine", "none", "-o", "out")
    ran = run(*arguments)
    assert ran.code == 5
    assert ran.error.startswith("parity failed for onnx on ONNX Runtime CPU in fp16: ")
    assert "output error on the reference's plans not finite of " in ran.out
    assert not (tmp_path / "out").exists()


def test_a_report_that_cannot_be_shown_does_not_hide_the_failure(run, artifact, monkeypatch):
    spoil(artifact)
    monkeypatch.setattr(text, "table", None)
    ran = run("check", artifact)
    assert ran.code == 5
    assert ran.error.startswith("parity failed for onnx on ONNX Runtime CPU in fp16: layer 2: ")
    assert "The report cannot be shown: TypeError: " in ran.err


def test_engine_adds_an_engine(run, artifact):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    ran = run("engine", artifact, "--engine", "tensorrt-rtx", "--batch", "1:2:4", "--json")
    assert ran.code == 0
    assert ran.json["engines"]["tensorrt-rtx"]["batch"] == "1:2:4"
    assert ran.json["random_weights"] is False
    ran = run("engine", artifact, "--engine", "tensorrt-rtx", "--workspace", "1GiB")
    assert ran.out.startswith("Engine: model.rtx.engine, tensorrt-rtx ")
    assert sorted(p.name for p in artifact.iterdir()) == [
        "build.json",
        "model.onnx",
        "model.rtx.engine",
        "parity.json",
    ]


def test_random_weights_are_said_everywhere(run, built_random, tmp_path):
    artifact = shutil.copytree(built_random, tmp_path / "artifact")
    manifest = read_manifest(artifact)
    assert manifest.model.random_weights is True
    assert text.artifact_lines(manifest, artifact)[0] == text.RANDOM
    assert text.RANDOM.startswith("RANDOM WEIGHTS")
    ran = run("check", artifact)
    assert ran.code == 0
    assert ran.out.splitlines()[0] == text.RANDOM
    assert run("check", artifact, "--json").json["random_weights"] is True
    if any(backend.can_build().available for backend in BUILDERS):
        assert run("engine", artifact).out.splitlines()[0] == text.RANDOM
        assert run("engine", artifact, "--json").json["random_weights"] is True


def test_models_lists_every_recipe(run):
    ran = run("models")
    assert (ran.code, ran.err) == (0, "")
    first = [line.split()[0] for line in ran.out.splitlines()[1 : 1 + len(RECIPES)]]
    assert first == list(RECIPES)
    listed = run("models", "--json").json["models"]
    assert [model["name"] for model in listed] == list(RECIPES)


def test_models_imports_no_torch():
    script = (
        "import sys; from tome_export.cli.main import main; main(['models', '--json']); "
        "main(['models', 'vit_b16']); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)


def test_models_describes_one(run):
    ran = run("models", "vit_b16")
    assert "r           13 (ToMe README, ViT-B/16; 16 halves the MACs)\n" in ran.out
    found = run("models", "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", "--json").json
    assert found["tokens"] == 197
    assert found["layers"][0] == {
        "tokens_in": 197,
        "r": 13,
        "tokens_out": 184,
        "behind_block": False,
    }
    video = run("models", "clip4clip_b32", "--json").json["layers"]
    assert list(video[0])[4:] == ["clips", "joined", "cross", "prefix"]
    assert all(layer["prefix"] == 1 for layer in video)
    ran = run("models", "nothing_like_it")
    assert ran.code == 3
    assert ran.error.startswith("unknown model 'nothing_like_it'; expected a recipe that ")


def test_doctor(run):
    ran = run("doctor")
    assert ran.code == 0
    assert ran.out.splitlines()[0].split() == ["here", "found"]
    found = {f["name"]: f for f in run("doctor", "--json").json["findings"]}
    assert found["torch"]["ok"] is True
    assert "CPUExecutionProvider" in found["onnxruntime"]["found"]
    for finding in found.values():
        assert finding["ok"] or finding["fix"], finding


def test_progress_on_a_terminal(artifact):
    """Stages, their times and a spinner; the cursor is shown again; results stay apart."""
    controller, terminal = pty.openpty()
    command = [sys.executable, "-c", ENTRY, "check", str(artifact)]
    environment = {**os.environ, "TERM": "xterm-256color"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=terminal, env=environment
    ) as process:
        os.close(terminal)
        shown = b""
        try:
            while chunk := os.read(controller, 1 << 16):
                shown += chunk
        except OSError:  # Linux ends a terminal whose other side is closed with EIO
            pass
        out = process.stdout.read()
    os.close(controller)
    assert process.returncode == 0
    assert "✓ Verify the artifact  0." in shown.decode()
    assert "✓ Check parity on " in shown.decode()
    assert shown.rfind(b"\x1b[?25h") > shown.rfind(b"\x1b[?25l") >= 0
    assert b"\x1b" not in out
    assert out.endswith(f"Passed: {artifact}\n".encode())


def test_a_plugin_build_names_the_gpus_and_sums_up_its_folder(run):
    options = ("--engine", "none", "--no-check", "--fp16", "--compute-capability", "9.0")
    ran = run("build", "vit_digits", "-o", "out", "--merge-op", "plugin", *options)
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert "Merge op   plugin, kernels for compute capability 9.0" in lines
    assert [line.split()[0] for line in lines if line.startswith("plugins/")] == ["plugins/"]
