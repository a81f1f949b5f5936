"""What a build writes is true: tokens, MACs, digests, names, parity."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file

from tome_export.artifact import Artifact
from tome_export.artifact.manifest import Tensor
from tome_export.build import BuildRequest, build
from tome_export.build.engine import EngineRequest, add_engine
from tome_export.data.samples import sample_pixels
from tome_export.engine import EngineOptions
from tome_export.errors import InputError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.models import RECIPES
from tome_export.models.facts import DATA
from tome_export.parity.main import CheckRequest, check
from tome_export.patch import patch
from tome_export.patch.describe import state_sha256
from tome_export.spec import BatchRange


class Heard:
    """Progress that remembers the stages."""

    def __init__(self) -> None:
        self.stages: list[str] = []

    def stage(self, title: str) -> None:
        self.stages.append(title)

    def detail(self, text: str) -> None:
        assert "\n" not in text

    def step(self, label: str, done: int, total: int) -> None:
        assert 0 <= done <= total, label


def digits(output: Path, **options: object) -> BuildRequest:
    return BuildRequest("vit_digits", output, **{"engine": "none", **options})


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "digits"
    return build(digits(output, schedule=Schedule(8, -1.0), precision="fp16"))


def test_manifest_tells_the_token_counts_and_macs(built):
    model = patch(RECIPES["vit_digits"].load().module, Schedule(8, -1.0))
    manifest = built.manifest
    assert manifest.tokens_in == 65
    assert manifest.tokens == tuple(layer.tokens_out for layer in model.layers)
    assert manifest.merge.r == (16, 12, 9, 6, 3, 0)
    assert manifest.tokens == (49, 37, 28, 22, 19, 19)
    assert manifest.macs.merged == model.macs()
    assert manifest.macs.unmerged == model.macs(merged=False)
    blocks = sum(layer.macs_unmerged - layer.macs for layer in manifest.layers)
    assert blocks == manifest.macs.unmerged - manifest.macs.merged


def test_manifest_tells_the_digest_of_every_other_file(built):
    files = {path.name: path for path in built.path.iterdir() if path.name != "build.json"}
    assert set(files) == set(built.manifest.files) == {"model.onnx", "parity.json"}
    for name, path in files.items():
        content = path.read_bytes()
        record = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert built.manifest.files[name].model_dump() == record


def test_manifest_tells_names_shapes_and_preprocessing(built):
    session = onnxruntime.InferenceSession(built.model_path, providers=["CPUExecutionProvider"])
    (given,), (found,) = session.get_inputs(), session.get_outputs()
    manifest = built.manifest
    assert manifest.input == Tensor(name=given.name, dtype="float32", shape=tuple(given.shape))
    assert manifest.output == Tensor(name=found.name, dtype="float32", shape=tuple(found.shape))
    assert (given.name, found.name) == ("pixel_values", "logits")
    assert given.type == found.type == "tensor(float)"
    assert manifest.labels == tuple("0123456789")
    assert manifest.preprocessing == RECIPES["vit_digits"].preprocessing
    pixels = sample_pixels(RECIPES["vit_digits"], 3)
    assert session.run(None, {"pixel_values": pixels})[0].shape == (3, 10)


def test_manifest_tells_weights_and_parity(built):
    weights = built.manifest.model.weights
    assert (weights.kind, built.manifest.model.random_weights) == ("bundled", False)
    content = (DATA / "vit_digits.safetensors").read_bytes()
    assert weights.sha256 == hashlib.sha256(content).hexdigest()
    parity = json.loads((built.path / "parity.json").read_text())["checks"][0]
    summary = built.manifest.parity.model_dump(mode="json")
    assert summary == {key: parity[key] for key in summary}
    assert summary["passed"] is True
    assert summary["precision"] == "fp16"
    assert summary["output"]["cosine"] >= 0.999
    assert len(parity["layers"]) == 5  # the last layer merges nothing


def test_the_model_describes_itself(built):
    props = {p.key: p.value for p in onnx.load(built.model_path).metadata_props}
    merge = json.loads(props["tome_export.merge"])
    assert merge == built.manifest.merge.model_dump(mode="json")


def test_a_checked_artifact_is_still_verified(built):
    heard = Heard()
    result = check(CheckRequest(built.path), heard)
    assert result.passed
    assert result.skipped == {}
    assert result.accuracy["images"] == 450
    assert result.accuracy["merged"] > 0.97
    assert Artifact.open(built.path).manifest == result.artifact.manifest
    assert heard.stages[0] == "Verify the artifact"


def test_engine_is_added_and_the_artifact_still_verified(built, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    copy = Path(shutil.copytree(built.path, tmp_path / "copy"))
    before = Artifact.open(copy).manifest
    request = EngineRequest(copy, "tensorrt-rtx", EngineOptions(), BatchRange(1, 2, 4))
    done = add_engine(request)
    engine = done.manifest.engines["tensorrt-rtx"]
    assert engine.batch == BatchRange(1, 2, 4)
    assert engine.size_bytes == (copy / "model.rtx.engine").stat().st_size
    assert Artifact.open(copy).manifest == done.manifest
    assert done.manifest.parity == before.parity


def test_weights_from_a_file_are_asked_for_again(tmp_path, monkeypatch):
    state = load_file(DATA / "vit_digits.safetensors")
    save_file(state, tmp_path / "mine.safetensors")
    request = digits(tmp_path / "out", weights=str(tmp_path / "mine.safetensors"), check=False)
    made = build(request)
    assert made.manifest.model.weights.kind == "file"
    assert made.manifest.parity is None
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(InputError, match=r"weights file mine\.safetensors, which is not in the"):
        check(CheckRequest(made.path))
    result = check(CheckRequest(made.path, weights=str(tmp_path / "mine.safetensors")))
    assert result.passed
    assert result.artifact.manifest.parity.passed is True
    state["norm.bias"] = state["norm.bias"] + torch.ones(64)
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="are not those of the build"):
        check(CheckRequest(made.path, weights=str(tmp_path / "other.safetensors")))


def test_the_same_seed_gives_the_same_random_weights(tmp_path):
    options = {"weights": "random", "check": False, "schedule": Schedule(2)}
    first, second = (
        build(digits(tmp_path / f"{seed}", seed=seed, **options)).manifest.model.weights
        for seed in (7, 8)
    )
    again = RECIPES["vit_digits"].load("random", seed=7).module
    assert first.state_sha256 == state_sha256(patch(again, 0)) != second.state_sha256
    assert (first.seed, second.seed) == (7, 8)


def test_index_add_runs_on_onnxruntime_and_says_why_no_engine(tmp_path):
    request = digits(tmp_path / "out", merge_op="index_add", engine="auto", precision="fp16")
    made = build(request)
    assert made.manifest.merge.merge_op == "index_add"
    assert made.manifest.engines == {}
    assert made.manifest.parity.passed is True
    with pytest.raises(InputError, match="index_add, which TensorRT's parser refuses; rebuild it"):
        add_engine(EngineRequest(made.path))
    operators = {node.op_type for node in onnx.load(made.model_path).graph.node}
    assert operators & {"ScatterND", "ScatterElements"}


def test_static_batch(tmp_path):
    made = build(digits(tmp_path / "out", batch=BatchRange(3, 3, 3), check=False))
    assert made.manifest.input.shape[0] == 3
    session = onnxruntime.InferenceSession(made.model_path, providers=["CPUExecutionProvider"])
    pixels = np.zeros((3, 1, 32, 32), np.float32)
    assert session.run(None, {"pixel_values": pixels})[0].shape == (3, 10)


def test_refusals_come_before_any_work(tmp_path):
    heard = Heard()
    pascal = EngineOptions(compute_capabilities=("6.1",))
    with pytest.raises(UsageError, match=r"compiled for 7\.5, 8\.0"):
        build(digits(tmp_path / "out", merge_op="plugin", engine_options=pascal), heard)
    with pytest.raises(UsageError):
        build(digits(tmp_path / "out", engine="tensorflow"), heard)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="exists"):
        build(digits(tmp_path / "out"), heard)
    assert heard.stages == []
