"""Match nodes for plugins read the keys in the product they come from, where they lie in one."""

from __future__ import annotations

import re

import hf_models
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from timm.models import vision_transformer as vit
from towers import live

from tome_export.errors import InputError
from tome_export.merge import spec
from tome_export.onnx.export import OPSET, ExportOptions, onnx_from_model
from tome_export.onnx.functions import keys_attributes, match_function
from tome_export.onnx.plugin import merging_of, read_keys_from_products
from tome_export.onnx.twin import LEAD, twin_from_model
from tome_export.patch import patch
from tome_export.spec import BatchRange

AS_THEY_ARE = dict(spec.KEYS_ATTRIBUTES)

# What stands between x [batch, 9, 48] and the match -> where the keys are in the product, and which
# tensor that is.
CHAINS = {
    "split, as all families write it": (
        "q, k, v = Split <axis = 2, num_outputs = 3> (x) "
        "h = Reshape (k, heads) keys = Transpose <perm = [0, 2, 1, 3]> (h)",
        {"heads": 2, "width": 8, "offset": 16},
        "x",
    ),
    "all at once, as timm writes it": (
        "h = Reshape (x, packed) t = Transpose <perm = [2, 0, 3, 1, 4]> (h) "
        "q, k, v = Split <axis = 0, num_outputs = 3> (t) keys = Reshape (k, flat)",
        {"heads": 2, "width": 8, "offset": 16},
        "x",
    ),
    "a projection of the keys alone": (
        "h = Reshape (x, own) keys = Transpose <perm = [0, 2, 1, 3]> (h)",
        {"heads": 3, "width": 16, "offset": 0},
        "x",
    ),
    "a bias ahead of them": (
        "s = Add (x, x) q, k, v = Split <axis = -1, num_outputs = 3> (s) "
        "h = Reshape (k, heads) keys = Transpose <perm = [0, 2, 1, 3]> (h)",
        {"heads": 2, "width": 8, "offset": 16},
        "s",
    ),
    "uneven parts": (
        "q, k, v = Split <axis = 2> (x, parts) "
        "h = Reshape (k, heads) keys = Transpose <perm = [0, 2, 1, 3]> (h)",
        {"heads": 2, "width": 8, "offset": 5},
        "x",
    ),
    "a ready metric": ("keys = Relu (x)", {"heads": 1, "width": 48, "offset": 0}, "keys"),
    "a part as metric": (
        "q, keys, v = Split <axis = 2, num_outputs = 3> (x)",
        {"heads": 1, "width": 16, "offset": 16},
        "x",
    ),
    "a norm between": (
        "q, k, v = Split <axis = 2, num_outputs = 3> (x) "
        "h = Reshape (k, heads) t = Transpose <perm = [0, 2, 1, 3]> (h) keys = Tanh (t)",
        None,
        "keys",
    ),
    "parts of a head": (
        "h = Reshape (x, interleaved) t = Transpose <perm = [3, 0, 2, 1, 4]> (h) "
        "q, k, v = Split <axis = 0, num_outputs = 3> (t) keys = Reshape (k, flat)",
        None,
        "keys",
    ),
    "numbers of a head apart": (
        "q, k, v = Split <axis = 2, num_outputs = 3> (x) "
        "h = Reshape (k, inside) keys = Transpose <perm = [0, 3, 1, 2]> (h)",
        None,
        "keys",
    ),
    "no view at all": (
        "t = Transpose <perm = [0, 2, 1]> (x) keys = Reshape (t, copied)",
        None,
        "keys",
    ),
    "some of the tokens": (
        "a, b = Split <axis = 1> (x, tokens) h = Reshape (b, own) "
        "keys = Transpose <perm = [0, 2, 1, 3]> (h)",
        {"heads": 3, "width": 16, "offset": 0},
        "b",
    ),
}
SHAPES = {
    "heads": [0, -1, 2, 8],
    "packed": [0, 9, 3, 2, 8],
    "interleaved": [0, 9, 2, 3, 8],
    "flat": [-1, 2, 9, 8],
    "own": [0, -1, 3, 16],
    "inside": [0, 9, 8, 2],
    "copied": [0, 6, 9, 8],
    "parts": [5, 16, 27],
    "tokens": [1, 8],
}


def chain_model(*chains, class_token=1, batch="batch"):
    """A plugin model with a match at the end of each chain, every shape known."""
    body, outputs = "", []
    for index, chain in enumerate(chains):
        names = [f"{name}{index}" for name in spec.MATCH_OUTPUTS]
        renamed = re.sub(r"\b(keys|[abhkqstv])\b", rf"\g<1>{index}", chain)
        body += (
            f"{renamed} {', '.join(names)} = {spec.DOMAIN}.{spec.MATCH} "
            f"<r = 3, prefix = 1, class_token = {class_token}> (keys{index}) "
        )
        outputs += names
    shapes = ", ".join(
        f"int64[{len(shape)}] {name} = {{{', '.join(map(str, shape))}}}"
        for name, shape in SHAPES.items()
    )
    described = ", ".join(f"int32[{batch}, {name}_length] {name}" for name in outputs)
    text = f"g (float[{batch}, 9, 48] x) => ({described}) <{shapes}> {{ {body} }}"
    graph = onnx.parser.parse_graph(text)
    for index, node in enumerate(node for node in graph.node if node.domain == spec.DOMAIN):
        node.name = f"blocks.{index}.match"
    model = onnx.helper.make_model(
        graph,
        opset_imports=[
            onnx.helper.make_opsetid("", OPSET),
            onnx.helper.make_opsetid(spec.DOMAIN, spec.VERSION),
        ],
        functions=[match_function(OPSET, class_token=bool(class_token), plugin=True)],
        ir_version=11,
    )
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def rewritten(model):
    result = onnx.ModelProto()
    result.CopyFrom(model)
    read_keys_from_products(result, OPSET)
    onnx.checker.check_model(result, full_check=True)
    return result


def matches(model):
    return [node for node in model.graph.node if node.op_type == spec.MATCH]


def run(model, feed):
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


@pytest.mark.parametrize("class_token", [0, 1])
@pytest.mark.parametrize("case", CHAINS)
def test_chains(case, class_token):
    chain, where, source = CHAINS[case]
    before = chain_model(chain, class_token=class_token)
    after = rewritten(before)
    (match,) = matches(after)
    assert keys_attributes(match) == (where or AS_THEY_ARE)
    assert {a.name for a in match.attribute} >= set(AS_THEY_ARE)
    # Every score is exact, so that both bodies have to decide alike.
    columns = np.random.default_rng(3).choice([-1.0, 1.0], (3, 9, 48)).astype(np.float32)
    wanted, found = (run(model, {"x": columns}) for model in (before, after))
    for name, part in wanted.items():
        np.testing.assert_array_equal(found[name], part)
    assert match.input[0] == (source if source == "x" else f"{source}0")
    if where is None:
        assert list(after.graph.node)[:-1] == list(before.graph.node)[:-1]
        return
    # Nothing is left of the chain behind the product.
    makers = [node for node in before.graph.node if match.input[0] in node.output]
    assert list(after.graph.node)[:-1] == makers
    read = {name for node in makers for name in node.input}
    assert {tensor.name for tensor in after.graph.initializer} == read & set(SHAPES)
    view = merging_of(after).matches[0]
    tokens = 8 if case == "some of the tokens" else 9
    assert (view.tokens, view.width, view.offset) == (tokens, where["width"], where["offset"])
    assert view.strides == (tokens * 48, where["width"], 48)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("case", ["split, as all families write it", "parts of a head"])
def test_a_fixed_batch(case, batch):
    """One image has a stride to the next that means nothing."""
    chain, where, _ = CHAINS[case]
    (match,) = matches(rewritten(chain_model(chain, batch=batch)))
    assert keys_attributes(match) == (where or AS_THEY_ARE)


def test_a_mixed_graph_takes_all_keys_as_they_are():
    fitting, unfit = CHAINS["uneven parts"][0], CHAINS["a norm between"][0]
    for chains in ([fitting, unfit], [unfit, fitting]):
        before = chain_model(*chains)
        after = rewritten(before)
        assert [keys_attributes(node) for node in matches(after)] == [AS_THEY_ARE] * 2
        assert [node.input[0] for node in matches(after)] == ["keys0", "keys1"]
        assert after.functions == before.functions


def test_a_metric_and_keys_share_the_products_body():
    metric, keys = CHAINS["a ready metric"], CHAINS["uneven parts"]
    after = rewritten(chain_model(metric[0], keys[0]))
    assert [keys_attributes(node) for node in matches(after)] == [metric[1], keys[1]]
    columns = np.random.default_rng(1).standard_normal((2, 9, 48), dtype=np.float32)
    for index, (chain, *_) in enumerate((metric, keys)):
        expected = run(chain_model(chain), {"x": columns})
        found = run(after, {"x": columns})
        for name in spec.MATCH_OUTPUTS:
            np.testing.assert_array_equal(found[f"{name}{index}"], expected[f"{name}0"])


def test_what_others_read_of_a_chain_stays():
    chain, where, _ = CHAINS["split, as all families write it"]
    before = chain_model(chain)
    before.graph.node.append(onnx.helper.make_node("Abs", ["keys0"], ["attention"]))
    shape = ["batch", 2, 9, 8]
    before.graph.output.append(
        onnx.helper.make_tensor_value_info("attention", onnx.TensorProto.FLOAT, shape)
    )
    after = rewritten(before)
    assert keys_attributes(matches(after)[0]) == where
    kinds = [node.op_type for node in after.graph.node]
    assert kinds == ["Split", "Reshape", "Transpose", spec.MATCH, "Abs"]
    assert [tensor.name for tensor in after.graph.initializer] == ["heads"]


def test_a_model_without_match_is_left_alone():
    graph = onnx.parser.parse_graph("g (float[n] x) => (float[n] y) { y = Abs (x) }")
    model = onnx.helper.make_model(graph)
    assert rewritten(model) == model


def test_columns_that_the_product_lacks_are_refused():
    model = rewritten(chain_model(CHAINS["uneven parts"][0]))
    next(a for a in matches(model)[0].attribute if a.name == "offset").i = 33
    with pytest.raises(InputError) as refused:
        merging_of(model)
    assert str(refused.value) == (
        "blocks.0.match: the keys are 2 heads of 8 columns from column 33 on; expected them inside "
        "a product of 48 columns; rebuild the artifact"
    )


def torchvision_vit():
    from torchvision.models.vision_transformer import VisionTransformer

    return live(VisionTransformer(32, 8, 1, 2, 64, 128, num_classes=10))


def open_clip_vit():
    transformer = pytest.importorskip("open_clip.transformer", reason="open_clip is not installed")
    return live(transformer.VisionTransformer(32, 8, 64, 1, 2, 2, output_dim=32))


def half_normed(make_vit):
    """Keys are normed in the second of two layers only."""
    model = make_vit("test_vit", depth=2, qk_norm=True)
    model.blocks[0].attn.q_norm = model.blocks[0].attn.k_norm = torch.nn.Identity()
    return model


def timm_parallel(make_vit):
    return make_vit("test_vit", depth=1, block_fn=vit.ParallelScalingBlock)


# Model -> heads, width, offset, columns of the product; None where keys lie in none.
FAMILIES = {
    "timm": (lambda make: make("test_vit", depth=1), (2, 32, 64, 192)),
    "timm, parallel blocks": (timm_parallel, (2, 32, 256, 384)),
    "torchvision": (lambda _: torchvision_vit(), (2, 32, 64, 192)),
    "open_clip": (lambda _: open_clip_vit(), (2, 32, 64, 192)),
    "Transformers, CLIP": (lambda _: hf_models.make("CLIP", num_hidden_layers=1), (4, 8, 0, 32)),
    "timm, q/k norm in one layer": (half_normed, None),
    "EVA, rotary": (
        lambda make: make("eva02_tiny_patch14_224", small=False, depth=1, img_size=56),
        None,
    ),
}


def shapes_of(graph):
    return {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_families(make_vit, make_images, tmp_path, family):
    """Nothing stands between product and match; the twin shows the metric of the model's keys."""
    make, product = FAMILIES[family]
    model = patch(make(make_vit), 3)
    options = ExportOptions(plugin=True, batch=BatchRange(1, 2, 4))
    onnx_from_model(model, tmp_path / "model.onnx", options, "out")
    proto = onnx.load(tmp_path / "model.onnx")
    shapes = shapes_of(proto.graph)
    makers = {name: node for node in proto.graph.node for name in node.output}
    for node, layer in zip(matches(proto), model.layers, strict=True):
        where, shape = tuple(keys_attributes(node).values()), shapes[node.input[0]]
        if product is None:
            assert where == (0, 0, 0)
            assert len(shape) == 4
            continue
        assert where == product[:3]
        assert shape == [0, layer.tokens_in, product[3]]
        maker = makers[node.input[0]]
        # A product in 2D gets its tokens back without being moved.
        maker = makers[maker.input[0]] if maker.op_type == "Reshape" else maker
        assert maker.op_type in ("MatMul", "Gemm", "Add")
    twin = twin_from_model(proto)
    images = make_images(model, 2)
    with torch.no_grad():
        _, trace = model.forward_traced(torch.from_numpy(images))
    feed = {"pixel_values": images, LEAD: np.zeros((2, 1), bool)}
    for layer, step in zip(twin.layers, trace, strict=True):
        feed |= {
            name: np.zeros_like(part.numpy())
            for name, part in zip(layer.given, step.plan, strict=True)
        }
    shown = run(twin.model, feed)
    for layer, step in zip(twin.layers, trace, strict=True):
        metric = shown[layer.signals[0]]
        np.testing.assert_allclose(metric, step.metric.numpy(), rtol=1e-4, atol=1e-5)
        for name, part in zip(layer.chosen, step.plan, strict=True):
            np.testing.assert_array_equal(shown[name], part.numpy())


def test_with_external_data(make_vit, tmp_path):
    """As models of more than two gigabytes have."""
    model = patch(make_vit("test_vit", depth=1), 3)
    options, path = ExportOptions(plugin=True), tmp_path / "model.onnx"
    onnx_from_model(model, path, options, "out", external_data_bytes=1000)
    (match,) = matches(onnx.load(path))
    assert keys_attributes(match) == {"heads": 2, "width": 32, "offset": 64}
