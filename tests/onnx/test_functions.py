"""The function bodies on ONNX Runtime against the torch operators."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from pairwise import pairwise

from tome_export.errors import ExportError
from tome_export.merge import spec
from tome_export.merge.ops import match, merge
from tome_export.merge.spec import clamp_r
from tome_export.onnx.export import OPSET
from tome_export.onnx.functions import functions_for, match_function, merge_function
from tome_export.spec import LOWERINGS

PREFIXES = [(0, False), (1, True), (2, True), (1, False), (4, False), (5, True)]
HALF = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}
KINDS = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}


def model_of(nodes, inputs, outputs, functions):
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(spec.DOMAIN, spec.VERSION)]
    model = helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


def load(model):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def value(name, kind, *shape):
    return helper.make_tensor_value_info(name, kind, shape)


def run_match(keys, r, prefix, class_token, fixed=True):
    """Keys ``[B, H, N, D]`` or a metric ``[B, N, D]``, with a dynamic batch."""
    model = match_model(keys, r, prefix, class_token, fixed)
    return load(model).run(None, {"keys": keys.numpy()})


def match_model(keys, r, prefix, class_token, fixed=True, **where):
    """With ``where`` the keys lie in a product, as the attributes of plugin nodes say."""
    heads, (tokens, width) = keys.shape[1:-2], keys.shape[-2:]
    node = helper.make_node(
        spec.MATCH,
        spec.MATCH_INPUTS,
        spec.MATCH_OUTPUTS,
        domain=spec.DOMAIN,
        r=r,
        prefix=prefix,
        class_token=int(class_token),
        **where,
    )
    kind = KINDS[keys.dtype]
    inputs = [value("keys", kind, "batch", *heads, tokens if fixed else "n", width)]
    outputs = [value(name, TensorProto.INT32, "batch", None) for name in spec.MATCH_OUTPUTS]
    in_product = bool(where)
    function = match_function(OPSET, class_token=class_token, plugin=in_product, product=in_product)
    return model_of([node], inputs, outputs, [function])


def exact_metric(batch, tokens, seed):
    """+-1 entries, 16 wide: every score is exact, most are tied."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.choice([-1.0, 1.0], size=(batch, tokens, 16)).astype(np.float32))


def spread_metric(batch, tokens, seed):
    return torch.from_numpy(
        np.random.default_rng(seed).standard_normal((batch, tokens, 24), dtype=np.float32)
    )


@pytest.mark.parametrize("make", [exact_metric, spread_metric])
@pytest.mark.parametrize(("prefix", "class_token"), PREFIXES)
def test_match_is_torchs(prefix, class_token, make):
    for tokens, wanted, batch in itertools.product((8, 9, 16, 17, 50), (1, 4, 1000), (1, 3)):
        r = clamp_r(tokens, wanted, prefix)
        if r == 0:
            continue
        metric = make(batch, tokens, seed=tokens + wanted)
        for ours, theirs in zip(
            match(metric, r, prefix, class_token),
            run_match(metric, r, prefix, class_token),
            strict=False,
        ):
            assert theirs.dtype == np.int32
            np.testing.assert_array_equal(theirs, ours.numpy())


@pytest.mark.parametrize(("tokens", "prefix"), [(2, 0), (3, 0), (3, 1), (4, 2), (7, 5), (8, 5)])
@pytest.mark.parametrize("class_token", [False, True])
def test_match_of_the_fewest_tokens_that_can_merge(tokens, prefix, class_token):
    metric = spread_metric(2, tokens, seed=tokens)
    for ours, theirs in zip(
        match(metric, 1, prefix, class_token),
        run_match(metric, 1, prefix, class_token),
        strict=False,
    ):
        np.testing.assert_array_equal(theirs, ours.numpy())


def test_match_body_takes_any_number_of_tokens():
    for tokens in (12, 13):
        metric = spread_metric(2, tokens, seed=tokens)
        ours, theirs = match(metric, 3, 1, True), run_match(metric, 3, 1, True, fixed=False)
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(b, a.numpy())


def every_tensor(keys, r, prefix, class_token):
    """Values of all tensors in the body by name, by ONNX's own evaluator."""
    model = onnx.inliner.inline_local_functions(match_model(keys, r, prefix, class_token))
    names = [name for node in model.graph.node for name in node.output]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    return dict(
        zip(names, ReferenceEvaluator(model).run(None, {"keys": keys.numpy()}), strict=True)
    )


@pytest.mark.parametrize("tokens", [12, 13])
@pytest.mark.parametrize(("prefix", "class_token"), PREFIXES)
def test_no_tensor_is_empty_and_onnxs_own_evaluator_agrees(prefix, class_token, tokens):
    """Where r takes all that it can; with 12 tokens and no prefix nothing of set A stays."""
    metric = exact_metric(2, tokens, seed=prefix)
    for r in (1, clamp_r(tokens, tokens, prefix)):
        found = every_tensor(metric, r, prefix, class_token)
        for name, ours in zip(
            spec.MATCH_OUTPUTS, match(metric, r, prefix, class_token), strict=True
        ):
            np.testing.assert_array_equal(found[name], ours.numpy())
        assert [name for name, tensor in found.items() if np.size(tensor) == 0] == []


@pytest.mark.parametrize("tokens", [20, 21])
def test_match_sorts_only_what_its_order_needs(tokens):
    """By position the r that merge; by rank set A, once. TensorRT's TopK ends at 3,840."""
    metric = spread_metric(1, tokens, seed=0)
    for class_token, expected in ((True, [4]), (False, [(tokens + 1) // 2])):
        model = onnx.inliner.inline_local_functions(match_model(metric, 4, 1, class_token))
        sorts = [node.output[0] for node in model.graph.node if node.op_type == "TopK"]
        tensors = every_tensor(metric, 4, 1, class_token)
        assert [tensors[name].shape[1] for name in sorts] == expected


def test_a_graph_has_one_order():
    def node(class_token):
        attributes = {"r": 1, "prefix": 1, "class_token": class_token}
        return helper.make_node(
            spec.MATCH, spec.MATCH_INPUTS, spec.MATCH_OUTPUTS, domain=spec.DOMAIN, **attributes
        )

    for class_token in (0, 1):
        (function,) = functions_for([node(class_token)] * 2, "matmul", OPSET)
        assert function == match_function(OPSET, class_token=bool(class_token))
    with pytest.raises(ExportError, match="class_token 0 and 1; expected one for all"):
        functions_for([node(0), node(1)], "matmul", OPSET)


def test_zero_and_duplicate_tokens():
    metric = torch.zeros(2, 12, 16)
    metric[1] = exact_metric(1, 1, seed=0).expand(1, 12, 16)
    for class_token in (False, True):
        for a, b in zip(
            match(metric, 3, 1, class_token), run_match(metric, 3, 1, class_token), strict=True
        ):
            np.testing.assert_array_equal(b, a.numpy())


@pairwise("order, heads, dtype", PREFIXES, (1, 2, 12), KINDS)
def test_match_of_keys_is_torchs(order, heads, dtype):
    prefix, class_token = order
    for tokens, batch, fixed in ((9, 1, True), (16, 3, False), (50, 2, True)):
        rng = np.random.default_rng(tokens + heads)
        keys = torch.from_numpy(rng.standard_normal((batch, heads, tokens, 16))).to(dtype)
        r = clamp_r(tokens, 4, prefix)
        theirs = run_match(keys, r, prefix, class_token, fixed)
        for a, b in zip(match(keys, r, prefix, class_token), theirs, strict=True):
            np.testing.assert_array_equal(b, a.numpy())


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize(("prefix", "class_token"), PREFIXES)
def test_keys_in_a_product_match_as_they_do_outside(prefix, class_token, dtype):
    """Columns ahead and behind are NaN. All sums are exact, so that their order does not matter."""
    for heads, tokens, offset, fixed in ((1, 9, 0, True), (3, 17, 5, False), (4, 16, 64, True)):
        mean = exact_metric(2, tokens, seed=heads)
        apart = torch.tensor([0.0, 0.5, -0.5, 0.0])[:heads, None, None]
        keys = (mean[:, None] + apart).to(dtype)
        product = torch.full((2, tokens, offset + heads * 16 + 3), torch.nan, dtype=dtype)
        product[..., offset : offset + heads * 16] = keys.transpose(1, 2).flatten(2)
        r = clamp_r(tokens, 5, prefix)
        where = {"heads": heads, "width": 16, "offset": offset}
        model = match_model(product, r, prefix, class_token, fixed, **where)
        found = load(model).run(None, {"keys": product.numpy()})
        for a, b in zip(found, run_match(keys, r, prefix, class_token), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**64, 1.8e19])
def test_tokens_that_are_not_finite_score_zero(bad, dtype):
    """As in torch, wherever they stand; 1.8e19 has a direction still in fp32."""
    tokens = 17
    for spot in ([8], [9], [0], range(0, tokens, 2), range(1, tokens, 2), range(tokens)):
        keys = exact_metric(4, tokens, seed=5).view(2, 2, tokens, 16).clone()
        keys[:, 1] = keys[:, 0]
        keys[0, :, list(spot), 3] = bad
        keys = keys.to(dtype)
        for class_token in (False, True):
            theirs = run_match(keys, 4, 1, class_token)
            for a, b in zip(match(keys, 4, 1, class_token), theirs, strict=True):
                np.testing.assert_array_equal(b, a.numpy())


def test_mean_over_heads_is_fp32_for_half_keys():
    """Two tokens of B point apart only where 1024.5 is not rounded to fp16.

    By ONNX's own evaluator: ONNX Runtime's CPU takes means in fp32 whatever the graph says.
    """
    keys = torch.zeros(1, 2, 4, 2)
    keys[0, :, 0] = torch.tensor([[2048.0, 2048.0], [0.0, 1.0]])
    keys[0, :, 1] = torch.tensor([[2048.0, 2048.0], [1.0, 0.0]])
    keys[0, :, 3] = torch.tensor([[2048.0, 2048.0], [0.0, 1.0]])
    keys[0, :, 2] = torch.tensor([[1.0, -1.0], [0.0, 0.0]])
    keys = keys.half()
    evaluator = ReferenceEvaluator(match_model(keys, 1, 0, False))
    keep, src, dst = evaluator.run(None, {"keys": keys.numpy()})
    assert (src.tolist(), keep.tolist(), dst.tolist()) == ([[0]], [[2, 1, 3]], [[2]])


@cache
def merge_session(lowering, precision, width):
    node = helper.make_node(
        spec.MERGE, spec.MERGE_INPUTS, ["x_out", "size_out"], domain=spec.DOMAIN
    )
    kind = HALF[precision]
    inputs = [value("x", kind, "b", "n", width), value("size", TensorProto.FLOAT, "b", "n")]
    inputs += [value("keep", TensorProto.INT32, "b", "k")]
    inputs += [value(name, TensorProto.INT32, "b", "r") for name in ("src", "dst")]
    outputs = [
        value("x_out", kind, "b", "k", width),
        value("size_out", TensorProto.FLOAT, "b", "k"),
    ]
    return load(model_of([node], inputs, outputs, [merge_function(lowering, OPSET)]))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_merge_is_torchs(lowering, precision):
    dtype = {"fp32": torch.float32, "fp16": torch.float16}[precision]
    for (prefix, class_token), tokens, batch in itertools.product(PREFIXES, (9, 16, 33), (1, 3)):
        rng = np.random.default_rng(tokens + prefix)
        metric = exact_metric(batch, tokens, seed=tokens)
        metric[:, 1::2] = metric[:, 1:2] if prefix < 2 else metric[:, 1::2]
        plan = match(metric, clamp_r(tokens, 6, prefix), prefix, class_token)
        x = torch.from_numpy(rng.standard_normal((batch, tokens, 5))).to(dtype)
        size = torch.from_numpy(rng.integers(1, 60, (batch, tokens))).float()
        expected, sizes = merge(x, size, plan)
        feed = dict(
            zip(spec.MERGE_INPUTS, (part.numpy() for part in (x, size, *plan)), strict=True)
        )
        merged, merged_size = merge_session(lowering, precision, 5).run(None, feed)
        np.testing.assert_array_equal(merged_size, sizes.numpy())
        assert merged.dtype == x.numpy().dtype
        tolerance = 2e-6 if precision == "fp32" else 1e-3
        np.testing.assert_allclose(merged, expected.numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_merge_sums_are_fp32_for_fp16_tokens(lowering):
    """2048 + 1 is 2048 in fp16."""
    tokens = 18
    keep = np.array([[0, *range(1, tokens, 2)]], np.int32)
    src = np.array([[*range(2, tokens, 2)]], np.int32)
    x = np.ones((1, tokens, 1), np.float16)
    size = np.ones((1, tokens), np.float32)
    x[0, 1], size[0, 1] = 3.0, 4096.0
    feed = {"x": x, "size": size, "keep": keep, "src": src, "dst": np.ones_like(src)}
    merged, sizes = merge_session(lowering, "fp16", 1).run(None, feed)
    assert sizes[0, 1] == 4104.0
    assert merged[0, 1, 0] == np.float16((3 * 4096 + 8) / 4104)


def test_bodies_hold_standard_operators_only():
    matches = [match_function(OPSET, class_token=by_position) for by_position in (True, False)]
    for function in (*matches, *(merge_function(lo, OPSET) for lo in LOWERINGS)):
        assert {node.domain for node in function.node} <= {""}
        assert function.domain == spec.DOMAIN
    plain, marked = matches[0], match_function(OPSET, class_token=True, plugin=True)
    assert list(plain.node) == list(marked.node)
    assert list(plain.attribute) == list(marked.attribute) == ["r", "prefix", "class_token"]
    declared = merge_function("matmul", OPSET, plugin=True).attribute_proto
    for attributes, own in ((marked.attribute_proto, spec.KEYS_ATTRIBUTES), (declared, ())):
        values = {a.name: helper.get_attribute_value(a) for a in attributes}
        marks = {"plugin_namespace": b"tome_export", "plugin_version": b"1", "aot": 1}
        assert values == {**dict(own), **marks}
    assert not plain.attribute_proto
    used = {node.op_type for node in merge_function("matmul", OPSET).node}
    assert not any("Scatter" in name for name in used), "TensorRT's parser refuses scatter-add"
