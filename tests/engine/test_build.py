"""The shared build path, run for real with TensorRT-RTX: it needs no GPU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tome_export.engine import EngineOptions, gpu
from tome_export.engine.tensorrt_rtx import TensorRTRTX
from tome_export.errors import ExportError, InputError, MissingComponentError, UsageError
from tome_export.progress import Silent
from tome_export.runtime.registry import BACKENDS
from tome_export.runtime.runner import EngineFile, Runnable
from tome_export.spec import BatchRange, TensorInfo

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")

OPTIONS = EngineOptions(batch=BatchRange(1, 4, 8))
needs_no_gpu = pytest.mark.skipif(bool(gpu.detect().gpus), reason="describes a machine without GPU")


def no_leftovers(folder: Path) -> bool:
    return not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_build_writes_engine_and_describes_it(save_vit, tmp_path, capfd, precision):
    output = tmp_path / "model.rtx.engine"
    info = TensorRTRTX().build(save_vit(precision=precision), OPTIONS, output)
    assert info.size_bytes == output.stat().st_size > 100_000
    assert info.inputs == (TensorInfo("pixel_values", (-1, 17, 64), "float32"),)
    assert info.outputs == (TensorInfo("logits", (-1, 17, 64), "float32"),)
    assert (info.backend, info.file) == ("tensorrt-rtx", "model.rtx.engine")
    assert info.batch == OPTIONS.batch
    assert info.network_layers > 10
    assert info.version_compatible is False
    assert any(note.startswith("attention layers: 2,") for note in info.notes)
    assert info.model_dump(mode="json")["batch"] == "1:4:8"
    assert no_leftovers(tmp_path)
    assert capfd.readouterr() == ("", "")


def test_same_model_gives_same_bytes(save_vit, tmp_path):
    model = save_vit()
    digests = set()
    for name in ("first.engine", "second.engine"):
        TensorRTRTX().build(model, OPTIONS, tmp_path / name)
        digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert len(digests) == 1


def test_external_data_is_found_beside_the_model(save_vit, tmp_path):
    model = save_vit(external_data=True)
    assert (tmp_path / "model.onnx.data").stat().st_size > 40_000
    info = TensorRTRTX().build(model, OPTIONS, tmp_path / "model.rtx.engine")
    assert info.size_bytes > 100_000
    (tmp_path / "model.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"cannot read the model: .*model\.onnx\.data"):
        TensorRTRTX().parse(model)


@pytest.mark.parametrize(
    ("operator", "reason"),
    [("ScatterElements", "Unsupported reduction type"), ("ScatterND", "with reduction is not")],
)
def test_parser_errors_name_node_operator_and_way_out(save_scatter, tmp_path, operator, reason):
    model, output = save_scatter(operator), tmp_path / "model.rtx.engine"
    message = rf"node adds \[{operator}\]: .*{reason}.*; try --merge-op matmul"
    with pytest.raises(ExportError, match=message) as parsing:
        TensorRTRTX().parse(model)
    assert "\n" not in str(parsing.value)
    with pytest.raises(ExportError, match=message):
        TensorRTRTX().build(model, OPTIONS, output)
    assert not output.exists()


def test_builder_failure_keeps_the_engine_that_was_there(save_vit, tmp_path):
    output = tmp_path / "model.rtx.engine"
    output.write_bytes(b"before")
    options = EngineOptions(batch=OPTIONS.batch, workspace_bytes=1)
    with pytest.raises(ExportError, match=r"could not build model\.onnx: .*workspace") as failure:
        TensorRTRTX().build(save_vit(), options, output)
    assert "\n" not in str(failure.value)
    assert output.read_bytes() == b"before"
    assert no_leftovers(tmp_path)


@pytest.mark.parametrize("content", [b"hello world" * 10, b""], ids=["noise", "empty"])
def test_file_without_a_graph_is_refused(tmp_path, content):
    model = tmp_path / "model.onnx"
    model.write_bytes(content)
    with pytest.raises((InputError, ExportError), match=r"model\.onnx"):
        TensorRTRTX().parse(model)


def test_missing_model_and_missing_folder_are_named(save_vit, tmp_path):
    with pytest.raises(InputError, match="no ONNX model at"):
        TensorRTRTX().parse(tmp_path / "nothing.onnx")
    with pytest.raises(ExportError, match="no folder"):
        TensorRTRTX().build(save_vit(), OPTIONS, tmp_path / "missing" / "model.rtx.engine")


def test_fixed_batch_builds_and_another_range_is_refused(save_vit, tmp_path):
    model, output = save_vit(batch=4), tmp_path / "model.rtx.engine"
    info = TensorRTRTX().build(model, EngineOptions(batch=BatchRange(4, 4, 4)), output)
    assert info.inputs[0].shape == (4, 17, 64)
    for batch in (BatchRange(1, 4, 8), BatchRange(2, 2, 2), BatchRange(4, 8, 8)):
        with pytest.raises(InputError, match="fixed batch of 4"):
            TensorRTRTX().build(model, EngineOptions(batch=batch), output)


def test_options_take_effect_or_are_noted(save_vit, tmp_path):
    model, cache = save_vit(), tmp_path / "timing.cache"
    options = EngineOptions(
        batch=OPTIONS.batch,
        workspace_bytes=1 << 30,
        optimization_level=5,
        timing_cache=cache,
        hardware_compatible=True,
    )
    info = TensorRTRTX().build(model, options, tmp_path / "model.rtx.engine")
    assert any("portable" in note for note in info.notes)
    assert any("timing cache was not used" in note for note in info.notes)
    assert not cache.exists()
    targets = EngineOptions(batch=OPTIONS.batch, compute_capabilities=("7.5",))
    turing = TensorRTRTX().build(model, targets, tmp_path / "turing.engine")
    assert turing.targets == ("7.5",)
    assert turing.size_bytes != info.size_bytes


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"version_compatible": True}, UsageError, "version-compatible"),
        ({"compute_capabilities": ("9.9",)}, UsageError, r"9\.9; .* builds for 7\.5, 8\.0"),
        pytest.param(
            {"compute_capabilities": ("current",)},
            MissingComponentError,
            "current GPU",
            marks=needs_no_gpu,
        ),
        pytest.param(
            {"strip_weights": True},
            MissingComponentError,
            "builds only where there is a GPU: .*; leave --strip-weights out",
            marks=needs_no_gpu,
        ),
    ],
)
def test_options_it_cannot_honour_are_refused(save_vit, tmp_path, options, error, message):
    output = tmp_path / "model.rtx.engine"
    with pytest.raises(error, match=message):
        TensorRTRTX().build(save_vit(), EngineOptions(**options), output)
    assert not output.exists()


@pytest.mark.parametrize(
    "options",
    [{"workspace_bytes": 0}, {"optimization_level": 6}, {"compute_capabilities": ("sm_80",)}],
)
def test_option_out_of_range(options):
    with pytest.raises(UsageError):
        EngineOptions(**options)


def test_progress_reports_outer_phases_and_its_failure_ends_the_build(save_vit, tmp_path):
    class Heard(Silent):
        def __init__(self):
            self.phases, self.steps = [], []

        def detail(self, text):
            self.phases.append(text)

        def step(self, label, done, total):
            self.steps.append((label, done, total))

    heard = Heard()
    model, output = save_vit(), tmp_path / "model.rtx.engine"
    TensorRTRTX().build(model, OPTIONS, output, heard)
    assert heard.phases[0] == "Building engine"
    done, total = heard.steps[0][1:]
    assert heard.steps[0][0] == "Building engine"
    assert done == 1 <= total
    output.unlink()

    class Closed(Silent):
        def detail(self, text):
            raise OSError(f"terminal closed at {text}")

    with pytest.raises(OSError, match="terminal closed at Building engine"):
        TensorRTRTX().build(model, OPTIONS, output, Closed())
    assert not output.exists()


def runnable(engine):
    engines = {"tensorrt-rtx": EngineFile(engine)}
    return Runnable(label="it", precision="fp32", output_name="logits", engines=engines)


@needs_no_gpu
def test_runner_without_gpu_says_why(save_vit, tmp_path):
    output = tmp_path / "model.rtx.engine"
    info = TensorRTRTX().build(save_vit(), OPTIONS, output)
    assert info.layers is None
    assert any("needs a GPU" in note for note in info.notes)
    with pytest.raises(MissingComponentError, match="needs an NVIDIA GPU to run an engine"):
        BACKENDS["tensorrt-rtx"].open(runnable(output)).__enter__()


@pytest.mark.gpu
@pytest.mark.skipif(not gpu.detect().gpus, reason="needs an NVIDIA GPU")
def test_engine_computes_what_onnxruntime_computes(save_vit, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model, output = save_vit(precision="fp32"), tmp_path / "model.rtx.engine"
    options = EngineOptions(batch=OPTIONS.batch, compute_capabilities=("current",))
    TensorRTRTX().build(model, options, output)
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(1)
    with BACKENDS["tensorrt-rtx"].open(runnable(output)) as runner:
        for batch in (1, 8):
            feed = {"pixel_values": rng.standard_normal((batch, 17, 64), dtype=np.float32)}
            expected = session.run(None, feed)[0]
            np.testing.assert_allclose(runner.infer(feed)["logits"], expected, atol=1e-4)
        with pytest.raises(InputError, match="pixel_values"):
            runner.infer({"pixel_values": np.zeros((9, 17, 64), np.float32)})
