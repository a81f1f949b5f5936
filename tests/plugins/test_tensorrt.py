"""The contract with TensorRT, against its real Python layer and plugin registry; no GPU needed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from tome_export.merge import spec
from tome_export.onnx import translation
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract

HERE = Path(__file__).parent
UNAVAILABLE = "ShimUnavailable: "
CASES = ("digits", "fp32", "bf16", "distilled")


@pytest.fixture(scope="module", params=CASES)
def probed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What ``tensorrt_probe`` says of an artifact, and the artifact."""
    folder = tmp_path_factory.mktemp("shim")
    artifact = folder / "artifact"
    make = digits_artifact if request.param == "digits" else small_artifact
    layers = make(artifact, request.param)
    done = subprocess.run(
        [sys.executable, HERE / "tensorrt_probe.py", folder, artifact],
        capture_output=True,
        text=True,
        check=False,
    )
    if UNAVAILABLE in done.stderr:
        pytest.skip(done.stderr.rpartition(UNAVAILABLE)[2].strip())
    assert done.returncode == 0, done.stderr
    # TensorRT prints a line of its own before ours.
    found = json.loads(done.stdout.splitlines()[-1])
    return Probed(artifact, layers, found["nodes"], found["refused"])


@dataclass(frozen=True)
class Probed:
    """An artifact's folder, its merging layers, and what the probe found."""

    artifact: Path
    layers: list[Any]
    nodes: list[dict[str, Any]]
    refused: dict[str, str]


def digits_artifact(path: Path, _: str) -> list[Any]:
    """The whole way: what ``tome-export build vit_digits --merge-op plugin`` writes."""
    from tome_export.build import BuildRequest, build
    from tome_export.merge.schedule import LayerTokens, Schedule

    request = BuildRequest(
        "vit_digits", path, Schedule(8), "fp16", merge_op="plugin", engine="none", check=False
    )
    layers = build(request).manifest.layers
    return [LayerTokens(layer.tokens_in, layer.r, layer.tokens_out) for layer in layers]


def small_artifact(path: Path, case: str) -> list[Any]:
    """Model and kernels of a small model, for two architectures."""
    import timm
    import torch

    from tome_export.engine.build import compile_kernels
    from tome_export.onnx.export import ExportOptions, onnx_from_model
    from tome_export.onnx.plugin import merging_of
    from tome_export.patch import patch
    from tome_export.progress import Silent

    torch.manual_seed(0)
    if case == "distilled":
        vit: Any = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, depth=3)
    else:
        # Keys that are normed lie in no product.
        vit = timm.create_model("test_vit", img_size=64, qk_norm=case == "bf16")
    model = patch(vit, 3).eval()
    path.mkdir()
    precision = case if case in ("fp32", "bf16") else "fp16"
    options = ExportOptions(precision=precision, plugin=True)
    onnx_from_model(model, path / "model.onnx", options, "logits")
    merging = merging_of(onnx.load(path / "model.onnx"))
    compile_kernels(merging, [(8, 0), (9, 0)], path, Silent())
    return [layer for layer in model.layers if layer.r]


def nodes_of(probed: Probed, op: str) -> list[dict[str, Any]]:
    return [node for node in probed.nodes if node["op"] == op]


def test_every_node_of_the_model_becomes_a_plugin(probed):
    assert len(probed.layers) >= 2
    assert [n["op"] for n in probed.nodes] == ["TomeMatch", "TomeMerge"] * len(probed.layers)


def test_the_creators_declare_exactly_the_operators_attributes(probed):
    for node in nodes_of(probed, "TomeMatch"):
        declared = [*translation._SIGNATURES[spec.MATCH].attributes, *dict(spec.KEYS_ATTRIBUTES)]
        assert node["creator_fields"] == declared
    for node in nodes_of(probed, "TomeMerge"):
        assert node["creator_fields"] == []


def test_both_layouts_are_among_the_cases(probed, request):
    forms = {
        (len(node["inputs"][0][1]), node["attributes"]["heads"] > 0)
        for node in nodes_of(probed, "TomeMatch")
    }
    as_they_are = request.node.callspec.params["probed"] == "bf16"
    assert forms == {(4, False) if as_they_are else (3, True)}


def test_output_types_and_shapes_with_any_batch_or_one(probed, request):
    size = probed.nodes[0]["inputs"][0][1][0]
    assert (size > 0) == (request.node.callspec.params["probed"] == "digits")
    batch = "batch" if size < 0 else str(size)
    for node, layer in zip(nodes_of(probed, "TomeMatch"), probed.layers, strict=True):
        r, kept = str(layer.r), str(layer.tokens_out)
        assert node["outputs"] == [["INT32", [batch, length]] for length in (kept, r, r)]
        assert node["attributes"]["r"] == layer.r
    for node, layer in zip(nodes_of(probed, "TomeMerge"), probed.layers, strict=True):
        kept, (dtype, shape) = str(layer.tokens_out), node["inputs"][0]
        width = str(shape[2])
        assert node["outputs"] == [[dtype, [batch, kept, width]], ["FLOAT", [batch, kept]]]


def test_the_kernel_handed_over_is_the_compiled_ptx_for_the_gpu(probed):
    for node in probed.nodes:
        ((name, target),) = node["kernel"]
        assert target == "sm_90a"
        assert (probed.artifact / "plugins" / f"{name}.{target}.ptx").is_file()


def test_the_launch_is_that_of_the_kernel_tests(probed):
    """``plugins.torch_ops``, which the kernel tests call, starts kernels by the same contract."""
    names = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16"}
    for node in probed.nodes:
        dtype, shape = node["inputs"][0]
        batch, *inner = (3 if size < 0 else size for size in shape)
        if node["op"] == "TomeMatch":
            where = [node["attributes"][key] for key, _ in spec.KEYS_ATTRIBUTES]
            heads, tokens, width, *lie = spec.keys_view(inner, *where)
            options = [node["attributes"][key] for key in ("r", "prefix", "class_token")]
            launch = match_contract.launch(batch, heads, tokens, width, *options, *lie)
            variant = match_contract.variant(tokens, width, names[dtype], *lie)
        else:
            tokens, width = inner
            launch = merge_contract.launch(batch, tokens, node["inputs"][3][1][1])
            variant = merge_contract.variant(width, names[dtype])
        assert tuple(node["grid"]) == launch.grid
        assert tuple(node["scalars"]) == launch.scalars
        assert set(node["scalar_dtypes"]) == {"SymInt32"}
        assert node["kernel"][0][0] == variant.name
        assert node["launch"]["block_x"] == str(32 * variant.num_warps)
        assert (node["launch"]["block_y"], node["launch"]["block_z"]) == ("1", "1")
        assert ("batch" in node["launch"]["grid_x"]) == (node["inputs"][0][1][0] < 0)
        assert (node["launch"]["grid_y"], node["launch"]["grid_z"]) == ("1", "1")


def test_the_kernels_started_like_that_give_the_references_results(probed):
    started = [node for node in probed.nodes if node["error"] is not None]
    assert len(started) == 4
    for node in started:
        # Values are below 5; sums are fp32 and rounded once.
        allowed = {"FLOAT": 2e-6, "HALF": 2e-3, "BF16": 2e-2}[node["inputs"][0][0]]
        assert node["error"] <= (0 if node["op"] == "TomeMatch" else allowed), node


def test_registration_refuses_old_versions_and_gpus_without_a_kernel(probed):
    index = json.loads((probed.artifact / "plugins" / "kernels.json").read_text())
    have = ", ".join(b["compute_capability"] for b in index["kernels"][0]["binaries"])
    match = nodes_of(probed, "TomeMatch")[0]
    shape, where = match["inputs"][0][1], match["attributes"]
    assert probed.refused.pop("heads") == (
        f"the keys are 1000 heads of {where['width']} columns from column {where['offset']} on; "
        f"expected them inside a product of {shape[2]} columns"
        if len(shape) == 3
        else f"the product has shape [B, {', '.join(map(str, shape[1:]))}]; expected 3D"
    )
    assert probed.refused == {
        "old": "MissingComponentError: TensorRT 10.12.0.36 is installed; the plugins of this "
        "artifact need 10.13 or later: pip install --upgrade tensorrt, or rebuild the artifact "
        "with --merge-op matmul",
        "turing": "InputError: the artifact's TomeMatch kernel was compiled for compute "
        f"capabilities {have}; the engine is for 7.5: rebuild the artifact with "
        "--compute-capability 7.5, or with --merge-op matmul",
    }
