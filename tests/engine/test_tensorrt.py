"""The plugin engine on TensorRT itself: ``pytest -m tensorrt`` on a machine with both."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from tome_export.build import BuildRequest, build
from tome_export.engine import BUILDERS
from tome_export.merge.schedule import Schedule
from tome_export.parity.main import CheckRequest, check
from tome_export.progress import Silent
from tome_export.runtime.model import model_from_artifact, open_runner
from tome_export.spec import BatchRange

TENSORRT = next(backend for backend in BUILDERS if backend.name == "tensorrt")
READY = TENSORRT.can_build()

pytestmark = [
    pytest.mark.tensorrt,
    pytest.mark.gpu,
    pytest.mark.skipif(not READY.available, reason=READY.reason),
]

FRESH = """
import sys
from pathlib import Path

import numpy as np

from tome_export.artifact import Artifact
from tome_export.runtime.model import open_runner, model_from_artifact
from tome_export.progress import Silent

folder, pixels, output = (Path(argument) for argument in sys.argv[1:])
with open_runner("tensorrt", model_from_artifact(Artifact.open(folder), "it"), Silent()) as runner:
    np.save(output, runner.infer({"pixel_values": np.load(pixels)})["logits"])
loaded = [name for name in sys.modules if name.startswith(("tome_export.plugins", "triton"))]
assert loaded == [], loaded
"""


@pytest.fixture(scope="module", params=["fp16", "fp32", "bf16"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    output = tmp_path_factory.mktemp("tensorrt") / "digits"
    return build(
        BuildRequest(
            "vit_digits",
            output,
            schedule=Schedule(8),
            precision=request.param,
            merge_op="plugin",
            engine="tensorrt",
        )
    )


def test_the_engine_holds_every_plugin(built):
    engine = built.manifest.engines["tensorrt"]
    assert engine.plugin_layers == 12
    assert engine.layers


def test_parity_of_the_engine(built):
    result = check(CheckRequest(built.path, backends=("tensorrt",)))
    assert result.passed, [report.failures for report in result.reports]
    assert result.reports[0].candidate == "model.engine on tensorrt"


def test_it_runs_in_a_fresh_process_without_registration(built, tmp_path):
    pixels = np.random.default_rng(0).standard_normal((8, 1, 32, 32)).astype(np.float32)
    np.save(tmp_path / "pixels.npy", pixels)
    arguments = [built.path, tmp_path / "pixels.npy", tmp_path / "logits.npy"]
    subprocess.run([sys.executable, "-c", FRESH, *arguments], check=True)
    with open_runner("tensorrt", model_from_artifact(built, "it"), Silent()) as runner:
        here = runner.infer({"pixel_values": pixels})["logits"]
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), here)


def test_auto_chooses_the_plugin_here(tmp_path):
    batch = BatchRange(8, 8, 8)
    request = BuildRequest(
        "vit_digits", tmp_path / "x", Schedule(8), "fp16", batch=batch, check=False
    )
    assert build(request).manifest.merge.merge_op == "plugin"
