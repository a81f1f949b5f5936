"""Every node's time lands in a layer and group, for every structure of model."""

from __future__ import annotations

import re
from collections import Counter

import hf_models
import onnx
import pytest

from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.onnx.names import GROUPS, NodePlace, place_finder, place_of_scope, places
from tome_export.patch import patch
from tome_export.runtime.ort import OrtRunner
from tome_export.runtime.profile import profile_from_events, profile_in_turn, profile_onnx
from tome_export.spec import BatchRange

NARROW = {"embed_dim": 64, "num_heads": 2}


def block(name):
    import timm.models.vision_transformer as vit

    return {"block_fn": getattr(vit, name)}


CASES = {
    "class token, fp32": ("test_vit", {}, [5, 0, 4], "fp32"),
    "class token, fp16": ("test_vit", {}, [5, 0, 4], "fp16"),
    "r = 0": ("test_vit", {}, 0, "fp32"),
    "average pooling": ("test_vit", {"class_token": False, "global_pool": "avg"}, 5, "fp32"),
    "attention pooling": ("test_vit3", {}, 5, "fp16"),
    "distilled": ("deit_tiny_distilled_patch16_224", NARROW, 5, "fp32"),
    "post-norm": ("test_vit", "ResPostBlock", 5, "fp32"),
    "parallel branches": ("test_vit", "ParallelThingsBlock", 5, "fp32"),
    "parallel": ("test_vit", "ParallelScalingBlock", 5, "fp16"),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``made(make_vit, case)``: the patched model and its file; the same case exports once."""
    kept = {}

    def get(make_vit, case):
        if case not in kept:
            name, more, schedule, precision = CASES[case]
            more = block(more) if isinstance(more, str) else more
            model = patch(make_vit(name, **{"depth": 3, **more}), schedule)
            path = tmp_path_factory.mktemp("profile") / "model.onnx"
            options = ExportOptions(precision=precision, batch=BatchRange(1, 2, 4))
            onnx_from_model(model, path, options, "logits")
            kept[case] = model, path
        return kept[case]

    return get


@pytest.mark.parametrize("case", CASES)
def test_all_time_is_attributed(made, make_vit, make_images, case):
    model, path = made(make_vit, case)
    profile = profile_onnx(path, make_images(model, 2), runs=2)
    assert profile.runs == 2
    assert profile.entry().attributed_share == 1.0
    assert sum(profile.groups_ms.values()) == pytest.approx(profile.total_ms)
    assert 0 < profile.total_ms < profile.run_ms
    assert set(profile.groups_ms) <= set(GROUPS)
    assert len(profile.layers_ms) == 3
    joint = case == "parallel"
    for layer, found in zip(model.layers, profile.layers_ms, strict=True):
        assert ("match" in found) == ("merge" in found) == (layer.r > 0)
        assert {"attention", "attention+mlp" if joint else "mlp", "norm"} <= set(found)
        assert "head" not in found
        assert "embedding" not in found
    assert {"embedding", "head"} <= set(profile.groups_ms)


@pytest.mark.parametrize("case", CASES)
def test_nodes_are_named_by_their_module(made, make_vit, case):
    """Names alone tell the place, each is there once, and no initial name of torch is left."""
    _, path = made(make_vit, case)
    graph = onnx.load(path).graph
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert not [name for name in names if name.startswith("node_")]
    for node, place in zip(graph.node, places(graph), strict=True):
        scope = node.name.rpartition("/")[0]
        assert place_of_scope(scope) == place, node.name
    if case == "class token, fp32":
        assert {"blocks.1.attn.qkv/Gemm", "blocks.0.match/scores", "patch_embed.proj/Conv"} <= set(
            names
        )
        softmax = [node.name for node in graph.node if node.op_type == "Softmax"]
        assert softmax == [f"blocks.{layer}.attn/Softmax" for layer in range(3)]


def test_a_graph_for_plugins_is_profiled_as_well(make_vit, make_images, tmp_path):
    """Its functions are put in their place, under the names that other graphs have."""
    model = patch(make_vit("test_vit", depth=2), [5, 0])
    options = ExportOptions(batch=BatchRange(1, 2, 4), plugin=True)
    onnx_from_model(model, tmp_path / "model.onnx", options, "logits")
    profile = profile_onnx(tmp_path / "model.onnx", make_images(model, 2), runs=1)
    assert profile.entry().attributed_share == 1.0
    assert ["match" in layer and "merge" in layer for layer in profile.layers_ms] == [True, False]


def test_what_a_runtime_makes_of_nodes_is_found_by_their_names():
    text = """g (float[2, 4] x) => (float[2, 4] logits) <float[4, 4] w = {W}> {
        ["blocks.1.mlp/MatMul"] h = MatMul (x, w)
        ["blocks.11.attn/MatMul"] k = MatMul (h, w)
        ["blocks.1.mlp/MatMul_1"] logits = MatMul (k, w)
    }""".replace("W", ", ".join(["0"] * 16))
    find = place_finder(onnx.parser.parse_graph(text))
    assert find("blocks.1.mlp/MatMul/MatmulTransposeFusion/") == NodePlace(1, "mlp")
    assert find("InsertedPrecisionFreeCast_blocks.11.attn/MatMul") == NodePlace(11, "attention")
    assert find("InsertedPrecisionFreeCast_w") == NodePlace(1, "mlp")
    assert find("ReorderOutput") is None


def event(name, ts, dur, operator="MatMul", index="0"):
    return {
        "cat": "Node",
        "name": f"{name}_kernel_time",
        "ts": ts,
        "dur": dur,
        "args": {"op_name": operator, "node_index": index},
    }


def run_event(ts, dur):
    return {"cat": "Session", "name": "model_run", "ts": ts, "dur": dur, "args": {}}


def find(name):
    scope = re.search(r"(blocks\.\d+\.\w+|head)/", name)
    return place_of_scope(scope[1]) if scope else None


def test_reading_events():
    """The first run is left out; what has no name goes with its neighbour."""
    mlp, head = "blocks.1.mlp/MatMul", "head/Gemm"
    events = [run_event(0, 900), event(mlp, 10, 800)]
    for start, factor in ((1000, 1), (2000, 5), (3000, 3)):
        events += [
            run_event(start, 100 * factor),
            event(f"{mlp}/MatmulTransposeFusion/", start + 1, 40 * factor),
            event("ReorderOutput", start + 2, 10 * factor, "ReorderOutput", "1"),
            event(f"InsertedCast_{head}", start + 3, 20 * factor, "Cast", "2"),
        ]
    profile = profile_from_events(events, find)
    assert profile.runs == 3
    assert profile.run_ms == pytest.approx(0.3)
    assert profile.groups_ms == pytest.approx({"mlp": 0.15, "head": 0.06})
    assert profile.layers_ms == [{}, {"mlp": pytest.approx(0.15)}]
    assert profile.nodes == 3
    more = [event("x", start, 30, "X", "3") for start in (1000, 2000, 3000)]
    found = profile_from_events([*events, *more], find).entry()
    assert found.attributed_share == pytest.approx(0.875)


def test_a_node_that_was_slowed_in_one_run_counts_as_in_the_others():
    """Each run has another node held up, as by another program; no run is free of it."""
    labels = [f"blocks.{layer}.mlp/MatMul" for layer in range(5)]
    events = [run_event(0, 900), event(labels[0], 10, 800)]
    for run in range(5):
        start = 1000 * (run + 1)
        events.append(run_event(start, 900))
        for layer, label in enumerate(labels):
            dur = 500 if layer == run else 10
            events.append(event(label, start + layer, dur, index=str(layer)))
    profile = profile_from_events(events, find)
    assert profile.layers_ms == [{"mlp": pytest.approx(0.01)}] * 5


def test_models_are_profiled_in_turn(made, make_vit, make_images, monkeypatch):
    model, first = made(make_vit, "class token, fp32")
    _, second = made(make_vit, "r = 0")
    called = []
    infer = OrtRunner.infer

    def noted(self, inputs):
        called.append(self)
        return infer(self, inputs)

    monkeypatch.setattr(OrtRunner, "infer", noted)
    found = profile_in_turn({"a": first, "b": second}, make_images(model, 2), runs=3)
    assert called == 4 * called[:2]
    assert called[0] is not called[1]
    assert "match" in found["a"].groups_ms
    assert "match" not in found["b"].groups_ms
    assert found["a"].runs == found["b"].runs == 3


FAMILIES = {
    "CLIP": lambda: hf_models.make("CLIP, projection"),
    "SigLIP": lambda: hf_models.make("SigLIP"),
    "DeiT": lambda: hf_models.make("DeiT, teacher"),
    "DINOv2": lambda: hf_models.make("registers"),
    "torchvision": lambda: torchvision_vit(),
    "open_clip": lambda: open_clip_vit(),
    "EVA": lambda: eva(),
}


def torchvision_vit():
    from torchvision.models import VisionTransformer

    return VisionTransformer(32, 4, 3, 4, 32, 64, num_classes=7)


def open_clip_vit():
    pytest.importorskip("open_clip")
    from open_clip.transformer import VisionTransformer

    sizes = {"image_size": 32, "patch_size": 4, "width": 32, "layers": 3, "heads": 4}
    return VisionTransformer(**sizes, mlp_ratio=2, ls_init_value=0.1, output_dim=16)


def eva():
    import timm

    return timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=3)


@pytest.mark.parametrize("family", FAMILIES)
def test_heavy_nodes_of_every_library_are_in_their_group(family, tmp_path):
    """Each block has the same matrix products and convolutions in the same groups."""
    model = patch(FAMILIES[family]().eval(), [5, 0, 4])
    options = ExportOptions(batch=BatchRange(1, 2, 4))
    onnx_from_model(model, tmp_path / "model.onnx", options, "features")
    graph = onnx.load(tmp_path / "model.onnx").graph
    heavy = ("MatMul", "Gemm", "Softmax", "Conv")
    found = Counter(
        (place.layer, place.group)
        for node, place in zip(graph.node, places(graph), strict=True)
        if node.op_type in heavy and place.group not in ("match", "merge")
    )
    blocks = [
        {group: count for (block, group), count in found.items() if block == layer}
        for layer in range(3)
    ]
    assert blocks[0] == blocks[1] == blocks[2]
    assert set(blocks[0]) == {"attention", "mlp"}
    assert blocks[0]["attention"] in (5, 7)  # q, k, v as one product or three
    assert found[None, "embedding"] >= 1
    assert found[None, "other"] == 0
