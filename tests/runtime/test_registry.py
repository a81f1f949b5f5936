"""Every backend: found by its name, and giving what PyTorch gives where it can run."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnx
import pytest

from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.patch import patch
from tome_export.runtime.registry import BACKENDS, backend_of, require, usual_backends
from tome_export.runtime.runner import Runnable, infer_in_batches
from tome_export.spec import BatchRange

ABLE = [name for name, backend in BACKENDS.items() if backend.missing() is None]


@pytest.fixture(scope="module", params=["fp32", "fp16", "bf16"])
def runnable(request, make_vit, tmp_path_factory):
    """A small merged model in a precision, as graph and as module."""
    folder = tmp_path_factory.mktemp(request.param)
    model = patch(make_vit(), Schedule(4)).eval()
    options = ExportOptions(precision=request.param, batch=BatchRange(1, 4, 4))
    onnx_from_model(model, folder / "model.onnx", options, ["logits"])
    return Runnable(
        label="small",
        precision=request.param,
        output_name="logits",
        graph=folder / "model.onnx",
        module=model,
    )


@pytest.fixture
def pixels():
    return np.random.default_rng(0).standard_normal((6, 3, 64, 64)).astype(np.float32)


@pytest.mark.parametrize("name", [name for name in ABLE if BACKENDS[name].opens != "engine"])
def test_it_computes_what_pytorch_computes(name, runnable):
    """In its own precision: half has 11 bits, bfloat16 8; and whatever else runs meanwhile."""
    import torch

    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((6, 3, 64, 64), dtype=np.float32)
    with torch.inference_mode():
        expected = runnable.module(torch.from_numpy(pixels)).numpy()
    with BACKENDS[name].open(runnable) as runner:
        found = infer_in_batches(runner, {"pixel_values": pixels}, len(pixels), 4)["logits"]
        first = runner.infer({"pixel_values": pixels[:4]})["logits"]
        runner.infer({"pixel_values": pixels[2:]})
    assert (found.shape, found.dtype) == (expected.shape, np.float32)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    assert error < {"fp32": 1e-5, "fp16": 0.02, "bf16": 0.2}[runnable.precision]
    np.testing.assert_array_equal(first, found[:4])


@pytest.mark.parametrize("name", [name for name in ABLE if BACKENDS[name].opens == "graph"])
def test_a_graph_in_memory_is_its_file(name, runnable):
    pixels = np.random.default_rng(1).standard_normal((2, 3, 64, 64), dtype=np.float32)
    found = []
    for one in (runnable, replace(runnable, graph=onnx.load(runnable.graph))):
        with BACKENDS[name].open(one) as runner:
            found.append(runner.infer({"pixel_values": pixels})["logits"])
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("name", ABLE)
def test_what_it_opens_may_be_missing(name):
    nothing = Runnable(label="nothing", precision="fp32", output_name="logits")
    with pytest.raises(InputError, match=r"^nothing has no "), BACKENDS[name].open(nothing):
        pass


@pytest.mark.parametrize("name", sorted(set(BACKENDS) - set(ABLE)))
def test_what_cannot_run_says_so_in_one_line(name):
    reason = BACKENDS[name].missing()
    assert reason
    assert "\n" not in reason
    with pytest.raises(MissingComponentError) as raised:
        require([name])
    assert str(raised.value) == reason


def test_names():
    assert [backend_of(name).name for name in BACKENDS] == list(BACKENDS)
    with pytest.raises(UsageError, match=r"^backend is 'cuda'; expected one of ort-cpu, ort-cuda"):
        backend_of("cuda")
    with pytest.raises(UsageError, match=r"^backend ort-cpu is named twice; name each once$"):
        require(["ort-cpu", "ort-cpu"])


def test_what_runs_where_nothing_is_named():
    names, skipped = usual_backends(["tensorrt-rtx"])
    reason = BACKENDS["tensorrt-rtx"].missing()
    assert names == (("ort-cpu",) if reason else ("ort-cpu", "tensorrt-rtx"))
    assert skipped == ({"tensorrt-rtx": reason} if reason else {})
    assert usual_backends([]) == (("ort-cpu",), {})


def test_names_cost_no_heavy_import():
    code = (
        "import sys; from tome_export.runtime import registry; "
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', "
        "'polygraphy'}; print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


GRAPHS = [name for name in ABLE if BACKENDS[name].opens == "graph"]
WRONG_NAMES = {"another": ("pixels",), "none": (), "one too many": ("pixel_values", "query")}


@pytest.mark.parametrize("names", WRONG_NAMES.values(), ids=WRONG_NAMES)
@pytest.mark.parametrize("name", GRAPHS)
def test_inputs_of_other_names_are_refused(name, runnable, pixels, names):
    """Also after a run: what is missing is not that of the run before."""
    with BACKENDS[name].open(runnable) as runner:
        runner.infer({"pixel_values": pixels[:4]})
        with pytest.raises(InputError, match="inputs"):
            runner.infer(dict.fromkeys(names, pixels[:4]))
