"""Whole models: what the exported file says, and that it computes what PyTorch computes."""

from __future__ import annotations

import gc
import getpass
import json
import re
import socket
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from tome_export.errors import ExportError, UsageError
from tome_export.merge import spec
from tome_export.onnx import files
from tome_export.onnx.emulate import emulate_bfloat16, uses_bfloat16
from tome_export.onnx.export import METADATA_PREFIX, ExportOptions, onnx_from_model
from tome_export.onnx.names import decision_of_tensor
from tome_export.patch import patch
from tome_export.spec import BatchRange

NARROW = {"embed_dim": 64, "num_heads": 2}
MODELS = {
    "class token": ("test_vit", {}),
    "registers, avg, LayerScale": ("test_vit2", {}),
    "map": ("test_vit3", {}),
    "RMSNorm": ("test_vit4", {}),
    "no prefix": ("test_vit", {"class_token": False, "global_pool": "avg"}),
    "differential attention": ("test_vit", {"attn_layer": "diff"}),
    "distilled": ("deit_tiny_distilled_patch16_224", NARROW),
    "odd tokens": ("test_vit", {"img_size": 72}),
}
BATCH = BatchRange(1, 4, 8)


def run(proto, images):
    if uses_bfloat16(proto):
        proto = emulate_bfloat16(proto)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    (output,) = session.run(None, {"pixel_values": images})
    assert output.dtype == np.float32
    return output


def relative_error(output, expected):
    return np.abs(output - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", MODELS)
def test_fp32_is_pytorch(export, make_vit, make_images, case):
    name, kwargs = MODELS[case]
    made = export(make_vit, name, [7, 0, 9], ExportOptions(batch=BATCH), **kwargs)
    for batch in (1, 3, 8):
        images = make_images(made.model, batch, seed=batch)
        with torch.no_grad():
            expected = made.model(torch.from_numpy(images)).numpy()
        assert relative_error(run(made.proto, images), expected) < 1e-5


@pytest.mark.parametrize("schedule", [0, 1000, (6, -1.0), (6, 1.0)])
@pytest.mark.parametrize("lowering", ["index_add", "matmul"])
def test_schedules_and_lowerings(export, make_vit, make_images, schedule, lowering):
    made = export(make_vit, "test_vit", schedule, ExportOptions(batch=BATCH, lowering=lowering))
    images = make_images(made.model, 2)
    with torch.no_grad():
        expected = made.model(torch.from_numpy(images)).numpy()
    assert relative_error(run(made.proto, images), expected) < 1e-5
    merging = sum(layer.r > 0 for layer in made.model.layers)
    totals = [n for n in made.proto.graph.node if n.name.endswith(".merge/total")]
    assert {n.op_type for n in totals} <= {"index_add": {"ScatterND"}, "matmul": {"Add"}}[lowering]
    assert len(totals) == merging


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("lowering", ["index_add", "matmul"])
def test_a_graph_without_plugins_has_standard_operators_only(export, make_vit, lowering, precision):
    options = ExportOptions(precision=precision, batch=BATCH, lowering=lowering)
    made = export(make_vit, "test_vit", [7, 0, 9], options)
    assert not made.proto.functions
    assert {node.domain for node in made.proto.graph.node} == {""}
    assert [(o.domain, o.version) for o in made.proto.opset_import] == [("", 23)]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("case", ["class token", "registers, avg, LayerScale", "map", "distilled"])
def test_half_precision_follows_pytorch_in_the_same_precision(
    export, make_vit, make_images, case, precision
):
    name, kwargs = MODELS[case]
    options = ExportOptions(precision=precision, batch=BATCH)
    # One merge, of which a flip moves little: parity proper is tested by decisions.
    made = export(make_vit, name, [3], options, **kwargs)
    images = make_images(made.model, 4)
    with torch.no_grad():
        expected = made.model(torch.from_numpy(images)).numpy()
    output = run(made.proto, images)
    assert relative_error(output, expected) < {"fp16": 0.02, "bf16": 0.15}[precision]
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    integers = {TensorProto.INT32, TensorProto.INT64}
    matrices = [t for t in made.proto.graph.initializer if len(t.dims) >= 2 and t.dims[0] > 1]
    assert {t.data_type for t in matrices} - integers == {kind}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_what_the_file_says(export, make_vit, precision):
    made = export(make_vit, "test_vit", 5, ExportOptions(precision=precision, batch=BATCH))
    proto, graph = made.proto, made.proto.graph
    (pixels,), (logits,) = graph.input, graph.output
    assert (pixels.name, logits.name) == ("pixel_values", "logits")
    for tensor, rest in ((pixels, [3, 64, 64]), (logits, [10])):
        dims = tensor.type.tensor_type.shape.dim
        assert dims[0].dim_param
        assert [d.dim_value for d in dims][1:] == rest
        assert tensor.type.tensor_type.elem_type == TensorProto.FLOAT
    assert {o.domain: o.version for o in proto.opset_import} == {"": 23}
    assert proto.producer_name == "tome-export"
    props = {p.key: json.loads(p.value) for p in proto.metadata_props}
    assert props == {
        METADATA_PREFIX + "schedule": "r=5 constant",
        METADATA_PREFIX + "counts": [1, 2],
    }
    onnx.checker.check_model(proto, full_check=True)
    assert made.files.nodes == len(graph.node)
    assert made.files.paths == (made.path,)


def test_decisions_carry_their_names_and_static_lengths(export, make_vit):
    made = export(make_vit, "test_vit", [7, 0, 9], ExportOptions(batch=BATCH))
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][1:]
        for v in made.proto.graph.value_info
    }
    makers = {name: node.name for node in made.proto.graph.node for name in node.output}
    for layer in (0, 2):
        tokens, name = made.model.layers[layer], f"blocks.{layer}"
        width = made.model.model.blocks[layer].attn.head_dim
        assert makers[f"{name}.metric"] == f"{name}.match/metric"
        assert shapes[f"{name}.metric"] == [tokens.tokens_in, width]
        for part, length in (("keep", tokens.tokens_out), ("src", tokens.r), ("dst", tokens.r)):
            assert makers[f"{name}.{part}"] == f"{name}.match/{part}"
            assert shapes[f"{name}.{part}"] == [length]
        assert makers[f"{name}.size"] == f"{name}.merge/size_out"
        assert shapes[f"{name}.size"] == [tokens.tokens_out]
    assert "blocks.1.keep" not in makers


def test_plugin_nodes_carry_their_names_and_static_lengths(export, make_vit):
    made = export(make_vit, "test_vit", [7, 0, 9], ExportOptions(batch=BATCH, plugin=True))
    graph = made.proto.graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim][1:] for v in graph.value_info
    }
    for layer in (0, 2):
        tokens = made.model.layers[layer]
        (matched,) = [n for n in graph.node if n.name == f"blocks.{layer}.match"]
        (merged,) = [n for n in graph.node if n.name == f"blocks.{layer}.merge"]
        assert (matched.op_type, matched.domain) == ("TomeMatch", "tome_export")
        assert (merged.op_type, merged.domain) == ("TomeMerge", "tome_export")
        values = {a.name: a.i for a in matched.attribute}
        assert (values["r"], values["prefix"], values["class_token"]) == (tokens.r, 1, 1)
        names = [f"blocks.{layer}.{part}" for part in ("keep", "src", "dst")]
        assert list(matched.output) == names
        assert list(merged.input)[2:] == names
        assert shapes[names[0]] == [tokens.tokens_out]
        assert shapes[names[1]] == shapes[names[2]] == [tokens.r]
        attention = made.model.model.blocks[layer].attn
        product = [tokens.tokens_in, 3 * attention.num_heads * attention.head_dim]
        assert shapes[matched.input[0]] == product


@pytest.mark.parametrize(
    ("precision", "attention", "fused"),
    [
        ("fp32", "auto", False),
        ("fp16", "auto", True),
        ("bf16", "auto", True),
        ("fp32", "fused", True),
        ("fp16", "fused-fp32", True),
        ("fp16", "parts", False),
    ],
)
def test_attention_form(export, make_vit, make_images, precision, attention, fused):
    options = ExportOptions(precision=precision, batch=BATCH, attention=attention)
    made = export(make_vit, "test_vit", 5, options)
    count = sum(node.op_type == "Attention" for node in made.proto.graph.node)
    assert count == (3 if fused else 0)
    images = make_images(made.model, 2)
    if precision == "fp32":
        with torch.no_grad():
            expected = made.model(torch.from_numpy(images)).numpy()
        assert relative_error(run(made.proto, images), expected) < 1e-5


@pytest.mark.parametrize(("precision", "adds"), [("fp32", False), ("fp16", True)])
def test_size_bias_in_parts(export, make_vit, make_images, precision, adds):
    """In fp32 no Add goes over all logits; in half precision one does, which holds log(size)."""
    options = ExportOptions(precision=precision, batch=BATCH, attention="parts")
    made = export(make_vit, "test_vit", 5, options)
    makers = {name: node.op_type for node in made.proto.graph.node for name in node.output}
    logits = [makers[n.input[0]] for n in made.proto.graph.node if n.op_type == "Softmax"]
    assert logits == ["MatMul", *["Add" if adds else "MatMul"] * 2]  # the first has no sizes yet
    images = make_images(made.model, 3)
    with torch.no_grad():
        expected = made.model(torch.from_numpy(images)).numpy()
    assert relative_error(run(made.proto, images), expected) < (1e-2 if adds else 1e-6)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_nothing_is_computed_of_weights_alone(tmp_path, capfd, precision):
    """Of queries, keys and values that are projections of their own, as in Transformers."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=24, patch_size=4
    )
    model = patch(transformers.Dinov2Model(config).eval(), 4)
    options = ExportOptions(precision=precision, batch=BATCH)
    onnx_from_model(model, tmp_path / "model.onnx", options, "features")
    graph = onnx.load(tmp_path / "model.onnx").graph
    weights = {tensor.name for tensor in graph.initializer}
    constant = [n.name for n in graph.node if n.input and weights.issuperset(n.input)]
    assert constant == []
    assert "WARNING" not in capfd.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_keys_reach_the_match_in_the_models_precision(export, make_vit, precision):
    """One body serves every layer; the mean over heads is inside."""
    options = ExportOptions(precision=precision, batch=BATCH, plugin=True)
    made = export(make_vit, "test_vit", [7, 0, 9], options)
    kinds = {v.name: v.type.tensor_type.elem_type for v in made.proto.graph.value_info}
    expected = {
        "fp32": TensorProto.FLOAT,
        "fp16": TensorProto.FLOAT16,
        "bf16": TensorProto.BFLOAT16,
    }[precision]
    taken = [n.input[0] for n in made.proto.graph.node if n.op_type == spec.MATCH]
    assert [kinds[name] for name in taken] == [expected] * 2
    assert [f.name for f in made.proto.functions] == ["TomeMatch", "TomeMerge"]
    assert not any(n.op_type == "ReduceMean" for n in made.proto.graph.node)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_plugin_nodes_run_as_plain_ones_do(export, make_vit, make_images, name, precision):
    plain = export(make_vit, name, [7, 0, 9], ExportOptions(precision=precision, batch=BATCH))
    options = ExportOptions(precision=precision, batch=BATCH, plugin=True)
    made = export(make_vit, name, [7, 0, 9], options)
    images = make_images(made.model, 3)
    np.testing.assert_array_equal(run(made.proto, images), run(plain.proto, images))
    marks = {"plugin_namespace": b"tome_export", "plugin_version": b"1", "aot": 1}
    for node in made.proto.graph.node:
        values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == spec.MATCH:
            r = made.model.layers[int(node.name.split(".")[1])].r
            class_token = int(made.model.class_token)
            own = {"r": r, "prefix": made.model.prefix, "class_token": class_token}
            # In the QKV product the keys stand behind the queries, which are as many.
            attn = made.model.model.blocks[0].attn
            columns = attn.num_heads * attn.head_dim
            own |= {"heads": attn.num_heads, "width": attn.head_dim, "offset": columns}
            assert values == marks | own
        elif node.op_type == spec.MERGE:
            assert values == marks
        else:
            assert not marks.keys() & values.keys()
    (matmul,) = (f for f in made.proto.functions if f.name == spec.MERGE)
    assert "MatMul" in {node.op_type for node in matmul.node}


def test_plugin_nodes_with_a_body_that_tensorrt_refuses_are_refused():
    with pytest.raises(UsageError, match="lowering index_add; expected matmul"):
        ExportOptions(lowering="index_add", plugin=True)


def test_static_batch(export, make_vit, make_images):
    made = export(make_vit, "test_vit", 5, ExportOptions(batch=BatchRange(3, 3, 3)))
    for tensor in (*made.proto.graph.input, *made.proto.graph.output):
        assert tensor.type.tensor_type.shape.dim[0].dim_value == 3
    images = make_images(made.model, 3)
    with torch.no_grad():
        expected = made.model(torch.from_numpy(images)).numpy()
    assert relative_error(run(made.proto, images), expected) < 1e-5


@pytest.mark.parametrize("batch", [BatchRange(1, 1, 1), BatchRange(1, 1, 2), BatchRange(2, 4, 4)])
def test_edges_of_the_batch_range(export, make_vit, make_images, batch):
    made = export(make_vit, "test_vit", 5, ExportOptions(batch=batch))
    for size in {batch.min, batch.max}:
        images = make_images(made.model, size)
        with torch.no_grad():
            expected = made.model(torch.from_numpy(images)).numpy()
        assert relative_error(run(made.proto, images), expected) < 1e-5


def test_features_of_a_tower(export, make_vit):
    made = export(
        make_vit, "test_vit2", 5, ExportOptions(batch=BATCH), output="features", num_classes=0
    )
    (features,) = made.proto.graph.output
    assert features.name == "features"
    assert features.type.tensor_type.shape.dim[1].dim_value == 64


def test_external_data(export, make_vit, make_images, tmp_path):
    small = export(make_vit, "test_vit", 5, ExportOptions(batch=BATCH))
    path = tmp_path / "model.onnx"
    options = ExportOptions(batch=BATCH)
    written = onnx_from_model(small.model, path, options, "logits", external_data_bytes=100_000)
    assert written.paths == (path, tmp_path / "model.onnx.data")
    assert sorted(tmp_path.iterdir()) == sorted(written.paths)
    assert path.stat().st_size < written.paths[1].stat().st_size
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = make_images(small.model, 2)
    output = session.run(None, {"pixel_values": images})[0]
    np.testing.assert_allclose(output, run(small.proto, images), rtol=1e-4, atol=1e-5)
    names = {n.name for n in onnx.load(path, load_external_data=False).graph.node}
    assert names == {n.name for n in small.proto.graph.node}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_file_says_nothing_about_the_machine(export, make_vit, precision):
    options = ExportOptions(precision=precision, batch=BATCH)
    made = export(make_vit, "test_vit", 5, options)
    proto = onnx.load(made.path, load_external_data=False)
    del proto.graph.initializer[:]
    content = proto.SerializeToString()
    for trace in (
        "site-packages",
        ".py",
        'File "',
        str(Path.home()),
        str(Path.cwd()),
        tempfile.gettempdir(),
    ):
        assert trace.encode() not in content, trace
    for trace in (getpass.getuser(), socket.gethostname()):
        assert not re.search(rb"[/@]" + re.escape(trace.encode()), content), trace
    for node in proto.graph.node:
        assert not node.metadata_props
        assert not node.doc_string


def test_export_is_quiet_and_leaves_the_model_alone(make_vit, tmp_path, capfd):
    model = make_vit(depth=2)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    merged = patch(model, 3)
    options = ExportOptions(precision="fp16", batch=BATCH)
    onnx_from_model(merged, tmp_path / "model.onnx", options, "logits")
    assert capfd.readouterr() == ("", "")
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training


def test_export_is_reproducible(make_vit, tmp_path):
    for name in ("a.onnx", "b.onnx"):
        merged = patch(make_vit(depth=1), 3)
        onnx_from_model(merged, tmp_path / name, ExportOptions(batch=BATCH), "logits")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_other_weights_or_merging_give_other_tensor_names(make_vit, tmp_path):
    """ONNX Runtime's cache of TensorRT engines knows a model by its tensors' names alone."""

    def names(seed: int, r: int) -> frozenset[str]:
        path = tmp_path / "model.onnx"
        onnx_from_model(patch(make_vit(seed=seed), r), path, ExportOptions(), "logits")
        nodes = onnx.load(path).graph.node
        return frozenset(name for node in nodes for name in node.output)

    assert names(0, 4) == names(0, 4)
    assert len({names(0, 4), names(1, 4), names(0, 3)}) == 3


def test_what_torch_cannot_trace_is_one_line(make_vit, tmp_path):
    model = make_vit(depth=1)

    def act(x):
        if x.sum() > 0:
            return x
        return -x

    merged = patch(model, 3)
    model.blocks[0].mlp.act.forward = act
    with pytest.raises(ExportError, match="torch could not export the model to ONNX") as error:
        onnx_from_model(merged, tmp_path / "m.onnx", ExportOptions(batch=BATCH), "logits")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_check_accepts_what_was_written(export, make_vit):
    files.check(export(make_vit, "test_vit", 5, ExportOptions(batch=BATCH)).path)


def test_large_models_are_simplified_too(export, make_vit, tmp_path, monkeypatch):
    """Large weights stay out of onnxsim's hands; what needs their values is not rewritten."""
    from tome_export.onnx import export as exporting

    whole = export(make_vit, "test_vit", [7, 0, 9], ExportOptions())
    monkeypatch.setattr(files, "LARGE_BYTES", 0)
    monkeypatch.setattr(exporting.files, "HEAVY_BYTES", 1 << 10)
    onnx_from_model(whole.model, tmp_path / "model.onnx", ExportOptions(), "logits")
    light = onnx.load(tmp_path / "model.onnx")
    for part in ("input", "output"):
        names = [[value.name for value in getattr(m.graph, part)] for m in (whole.proto, light)]
        assert names[0] == names[1], part
    shown = [
        {name for node in m.graph.node for name in node.output if decision_of_tensor(name)}
        for m in (whole.proto, light)
    ]
    assert shown[0] == shown[1] != set()
    pixels = np.random.default_rng(0).standard_normal((2, *whole.model.input_size), np.float32)
    first, second = (
        onnxruntime.InferenceSession(m.SerializeToString(), providers=["CPUExecutionProvider"]).run(
            None, {"pixel_values": pixels}
        )[0]
        for m in (whole.proto, light)
    )
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-5 * np.abs(first).max())


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_an_export_holds_no_weights(make_vit, tmp_path, precision, dtype):
    """Rules of rewriting live as long as the process, and keep the graph that they saw last."""
    model = patch(make_vit(embed_dim=88, num_heads=2, num_classes=13), 2)
    onnx_from_model(model, tmp_path / "model.onnx", ExportOptions(precision), "logits")
    gc.collect()
    tensors = [t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter)]
    own = {id(weight) for weight in model.parameters()}
    wide = {tuple(weight.shape) for weight in model.parameters() if weight.ndim > 1}
    held = [tuple(t.shape) for t in tensors if t.dtype == dtype and id(t) not in own]
    assert [shape for shape in held if shape in wide] == []
