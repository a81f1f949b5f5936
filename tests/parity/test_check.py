"""The parity check passes what is right and catches, with the layer named, what is not."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from tome_export.cli.format import summary_lines
from tome_export.errors import ExportError, InputError
from tome_export.onnx import files
from tome_export.onnx.export import OPSET, ExportOptions, onnx_from_model
from tome_export.onnx.functions import inline, match_function
from tome_export.parity.compare import check_parity
from tome_export.patch import patch
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import BatchRange

BATCH = BatchRange(1, 4, 4)
SCHEDULE = [9, 9, 0, 9]
MODELS = {
    "test_vit": {},
    "test_vit2": {},
    "test_vit3": {},
    "deit_tiny_distilled_patch16_224": {"embed_dim": 64, "num_heads": 2},
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """``exported(make_vit, name, precision)``: the patched model and its file's content."""
    made = {}

    def get(make_vit, name="test_vit", precision="fp32", plugin=False, **kwargs):
        key = (name, precision, plugin, *kwargs.items())
        if key not in made:
            model = patch(make_vit(name, depth=4, **MODELS[name], **kwargs), SCHEDULE)
            path = tmp_path_factory.mktemp("parity") / "model.onnx"
            options = ExportOptions(precision=precision, batch=BATCH, plugin=plugin)
            onnx_from_model(model, path, options, "logits")
            made[key] = model, path.read_bytes()
        model, content = made[key]
        return model, onnx.load_from_string(content)

    return get


def check(model, proto, images, precision="fp32", **options):
    return check_parity(model, proto, images, precision, BATCH, **options)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_right_exports_pass(exported, make_vit, make_images, name, precision):
    model, proto = exported(make_vit, name, precision)
    report = check(model, proto, make_images(model, 6), precision)
    assert report.failures == ()
    assert report.passed
    assert report.defects == 0
    assert [layer.layer for layer in report.layers] == [0, 1, 3]
    prefix = model.prefix
    for layer, tokens in zip(report.layers, (model.layers[i] for i in (0, 1, 3)), strict=True):
        even = sum(t % 2 == 0 for t in range(prefix, tokens.tokens_in))
        assert layer.decisions == 6 * even
        assert layer.passed
        assert 0 < layer.score_error <= layer.score_error_allowed
    if precision == "fp32":
        assert report.disagreements == 0
        assert report.first_diverging_layer is None
        assert report.output.relative < 1e-5
        assert report.output.top1_agreement == 1.0
    assert report.led_output.cosine > {"fp32": 1 - 1e-9, "fp16": 0.9999, "bf16": 0.99}[precision]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_flips_of_rounding_are_explained_and_shown(exported, make_vit, make_images, precision):
    model, proto = exported(make_vit, "test_vit", precision)
    report = check(model, proto, make_images(model, 24), precision)
    assert report.passed, report.failures
    assert report.disagreements > 0
    assert report.first_diverging_layer is not None
    for layer in report.layers:
        assert layer.largest_margin <= layer.margin_bound
        assert len(layer.examples) == min(20, layer.disagreements)
        margins = [example.margin for example in layer.examples]
        assert margins == sorted(margins, reverse=True)
        assert margins[:1] == [layer.largest_margin][: len(margins)]
    # Shown, not hidden: free-running, a flip moves the output further than rounding does.
    assert report.output.max_abs >= report.led_output.max_abs


def test_report_is_json(exported, make_vit, make_images):
    model, proto = exported(make_vit, "test_vit", "bf16")
    report = check(model, proto, make_images(model, 8), "bf16")
    values = json.loads(json.dumps(report.model_dump(mode="json"), allow_nan=False))
    assert values["passed"] is True
    assert (
        values["disagreements"]
        == report.disagreements
        == sum(layer["disagreements"] for layer in values["layers"])
    )
    assert next(iter(values)) == "passed"
    example = next(e for layer in values["layers"] for e in layer["examples"])
    assert set(example) == {"image", "token", "kind", "margin"}


# --- seeded defects -------------------------------------------------------------------------


def rewrite(proto, name, old, new):
    """Replace one line of a function's text."""
    (function,) = (f for f in proto.functions if f.name == name)
    text = onnx.printer.to_text(function)
    assert text.count(old) == 1, (old, text)
    changed = onnx.parser.parse_function(text.replace(old, new))
    function.CopyFrom(changed)


def forget_sizes(proto):
    """The plain mean of tokens, whatever they stand for."""
    rewrite(proto, "TomeMerge", "own = Mul (x_keep, size_keep_c)", "own = Identity (x_keep)")
    rewrite(
        proto,
        "TomeMerge",
        "moved = MatMul (weights, x_src)",
        "hits = Cast <to: int = 1> (hit)\n   moved = MatMul (hits, x_src)",
    )
    rewrite(
        proto,
        "TomeMerge",
        "size_out_c = Unsqueeze (size_out, last)",
        "others = ReduceSum <keepdims: int = 1> (hits, last)\n"
        "   unit = CastLike (one, others)\n   size_out_c = Add (others, unit)",
    )


def drop_tokens(proto):
    """Merged tokens vanish instead of being averaged in."""
    rewrite(proto, "TomeMerge", "mean = Div (total, size_out_c)", "mean = Identity (x_keep)")


def take_the_maximum(proto):
    rewrite(
        proto,
        "TomeMerge",
        "mean = Div (total, size_out_c)",
        "average = Div (total, size_out_c)\n   mean = Max (average, x_keep)",
    )


def sizes_stay_one(proto):
    rewrite(
        proto,
        "TomeMerge",
        "size_out = Add (size_keep, received)",
        "size_out = Identity (size_keep)",
    )


def swap_the_last_pair(proto):
    """The pair of rank r merges instead of that of rank r - 1."""
    rewrite(
        proto,
        "TomeMatch",
        "values, merged = TopK <axis: int = 1, largest: int = 1, sorted: int = 1> (value, r_1)",
        "one_1 = Unsqueeze (one, begin)\n   r_next = Add (r_1, one_1)\n"
        "   values, best_rows = TopK <axis: int = 1, largest: int = 1, sorted: int = 1>"
        " (value, r_next)\n"
        "   ranks = Range (zero, r_, one)\n   r_less = Sub (r_, one)\n"
        "   is_last = Equal (ranks, r_less)\n   taken = Where (is_last, r_, ranks)\n"
        "   merged = Gather <axis: int = 1> (best_rows, taken)",
    )


def merge_the_worst(proto):
    rewrite(
        proto,
        "TomeMatch",
        "value = Where (row_protected, lowest, value_all)",
        "worst = Neg (value_all)\n   value = Where (row_protected, lowest, worst)",
    )


def merge_the_class_token(proto):
    rewrite(
        proto,
        "TomeMatch",
        "row_protected = Less (rows, pa)",
        "row_protected = Less (rows, zero)",
    )


def forget_to_normalise(proto):
    rewrite(proto, "TomeMatch", "scaled = Div (metric, norm_floor)", "scaled = Identity (metric)")


def round_scores(proto, kind):
    rewrite(
        proto,
        "TomeMatch",
        "scores = MatMul (a, b_t)",
        f"exact = MatMul (a, b_t)\n   short = Cast <to: int = {kind}> (exact)\n"
        "   scores = Cast <to: int = 1> (short)",
    )


def round_scores_to_eight_bits(proto):
    round_scores(proto, onnx.TensorProto.BFLOAT16)


def second_best_destination(proto):
    """Off by one column."""
    rewrite(
        proto,
        "TomeMatch",
        "dst64 = Add (dst_b, offset)",
        "beside = Sub (dst_b, one)\n   inside = Max (beside, zero)\n"
        "   dst64 = Add (inside, offset)",
    )


def break_stays_order(proto):
    """Tokens that stay in rank order although there is a class token."""
    (function,) = (f for f in proto.functions if f.name == "TomeMatch")
    function.CopyFrom(match_function(OPSET, class_token=False, plugin=True, product=True))


# Layers 0, 1 and 3 merge. A wrong match shows in its own layer, in every layer. A wrong merge of
# layer 0 shows first in the scores of layer 1 (the sizes that layer 0 starts from are all one).
DEFECTS = {
    forget_sizes: 3,
    drop_tokens: 1,
    take_the_maximum: 1,
    sizes_stay_one: 1,
    swap_the_last_pair: 0,
    merge_the_worst: 0,
    merge_the_class_token: 0,
    forget_to_normalise: 0,
    round_scores_to_eight_bits: 0,
    second_best_destination: 0,
    break_stays_order: 0,
}


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda f: f.__name__)
def test_wrong_functions_are_caught(exported, make_vit, make_images, defect, precision):
    model, proto = exported(make_vit, "test_vit", precision, plugin=True)
    defect(proto)
    inline(proto)
    report = check(model, proto, make_images(model, 24), precision)
    assert not report.passed
    assert report.failures[0].startswith(f"layer {DEFECTS[defect]}: "), report.failures
    failing = [layer.layer for layer in report.layers if not layer.passed]
    assert failing[0] == DEFECTS[defect]


def test_scores_of_ten_bits_are_caught(exported, make_vit, make_images):
    """What TF32 would do to the scores: few decisions turn, each a defect of its own layer."""
    model, proto = exported(make_vit, plugin=True)
    round_scores(proto, onnx.TensorProto.FLOAT16)
    inline(proto)
    report = check(model, proto, make_images(model, 24))
    assert not report.passed
    assert report.failures[0].startswith("layer 0: "), report.failures
    assert 0 < report.layers[0].op_defects < 0.02 * report.layers[0].decisions


def test_decisions_on_wrong_tokens_are_counted_as_defects(exported, make_vit, make_images):
    """The match is right, what it sees is not: margins show it, not the layer's own metric."""
    model, proto = exported(make_vit, plugin=True)
    drop_tokens(proto)
    inline(proto)
    report = check(model, proto, make_images(model, 6))
    first, second, third = report.layers
    assert (first.defects, first.disagreements) == (0, 0)
    for layer in (second, third):
        assert 0 < layer.defects <= layer.disagreements
        assert layer.op_defects == 0
        assert layer.largest_margin > layer.margin_bound
        message = f"layer {layer.layer}: {layer.defects} of {layer.decisions} merge decisions"
        assert any(failure.startswith(message) for failure in report.failures)
    assert report.first_diverging_layer == 1
    assert report.defects == second.defects + third.defects


def merged_sizes_log(proto, layer):
    """The node that takes the logarithm of the sizes that ``layer`` hands on."""
    sizes = f"blocks.{layer}.size"
    return next(n for n in proto.graph.node if n.op_type == "Log" and n.input[0] == sizes)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(("after", "shows"), [(0, "layer 3: "), (1, "layer 3: "), (3, None)])
def test_lost_log_size_bias(exported, make_vit, make_images, after, shows, precision):
    """The bias is lost for the attention behind layer ``after``."""
    model, proto = exported(make_vit, "test_vit", precision)
    if shows is None:
        # Behind the last layer no attention is left.
        with pytest.raises(StopIteration):
            merged_sizes_log(proto, after)
        return
    node = merged_sizes_log(proto, after)
    node.op_type = "Sub"
    node.input.append(node.input[0])
    report = check(model, proto, make_images(model, 4), precision)
    assert not report.passed
    assert report.failures[0].startswith(shows), report.failures


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("block", "shows"), [(0, 1), (1, 3), (2, 3), (3, None)])
def test_wrong_weight(exported, make_vit, make_images, block, shows, precision):
    """One MLP's matrix 20 % too large."""
    model, proto = exported(make_vit, "test_vit", precision)
    name = first_mlp_matrix(proto, block)
    (tensor,) = (t for t in proto.graph.initializer if t.name == name)
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array((values * 1.2).astype(values.dtype), tensor.name))
    report = check(model, proto, make_images(model, 4), precision)
    assert not report.passed
    wanted = "output error" if shows is None else f"layer {shows}: score error"
    assert any(failure.startswith(wanted) for failure in report.failures), report.failures
    layers = [layer.layer for layer in report.layers if not layer.passed]
    assert layers[:1] == ([] if shows is None else [shows])


def first_mlp_matrix(proto, block):
    """By order, because the exporter renames what it transposes: per block qkv, fc1 and fc2."""
    wide = {t.name for t in proto.graph.initializer if sorted(t.dims) == [64, 192]}
    read = dict.fromkeys(name for node in proto.graph.node for name in node.input if name in wide)
    assert len(read) == 3 * 4
    return list(read)[3 * block + 1]


def test_nan_is_caught(exported, make_vit, make_images):
    model, proto = exported(make_vit)
    tensor = next(t for t in proto.graph.initializer if list(t.dims) == [64])
    values = numpy_helper.to_array(tensor).copy()
    values[0] = np.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    report = check(model, proto, make_images(model, 2))
    assert not report.passed
    json.dumps(report.model_dump(mode="json"), allow_nan=False)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_keys_that_are_not_finite_fail_although_the_plan_is_well_formed(
    exported, make_vit, make_images, value
):
    """One token's keys, as the match of the last layer alone sees them: the output is finite."""
    model, proto = exported(make_vit, plugin=True)
    (node,) = (n for n in proto.graph.node if n.name == "blocks.3.match")
    factor = np.ones((1, model.layers[3].tokens_in, 1), np.float32)  # of the QKV product
    factor[0, 7] = value
    proto.graph.initializer.append(numpy_helper.from_array(factor, "factor"))
    position = list(proto.graph.node).index(node)
    broken = helper.make_node("Mul", [node.input[0], "factor"], ["broken"])
    keys = next(v for v in proto.graph.value_info if v.name == node.input[0])
    value_info = onnx.ValueInfoProto()
    value_info.CopyFrom(keys)
    value_info.name = "broken"
    proto.graph.value_info.append(value_info)
    node.input[0] = "broken"
    proto.graph.node.insert(position, broken)
    inline(proto)
    report = check(model, proto, make_images(model, 3))
    assert not report.passed
    assert math.isfinite(report.output.max_abs)
    assert [layer.layer for layer in report.layers if not layer.passed] == [3]
    assert report.layers[-1].op_defects > 0
    json.dumps(report.model_dump(mode="json"), allow_nan=False)


def test_unsound_plans_are_reported_as_json_too(exported, make_vit, make_images):
    model, proto = exported(make_vit, plugin=True)
    merge_the_class_token(proto)
    inline(proto)
    report = check(model, proto, make_images(model, 24))
    assert any(math.isinf(layer.largest_margin) for layer in report.layers)
    values = json.loads(json.dumps(report.model_dump(mode="json"), allow_nan=False))
    assert values["passed"] is False


def test_defect_of_the_shipped_graph_that_the_twin_lacks(exported, make_vit, make_images):
    """A runtime may treat the two graphs differently: then the twin proves nothing."""
    model, proto = exported(make_vit)

    class Biased(OrtRunner):
        def infer(self, inputs):
            results = super().infer(inputs)
            if set(results) == {"logits"}:
                results["logits"] = results["logits"] + 0.01
            return results

    report = check(model, proto, make_images(model, 3), runner_factory=Biased)
    assert report.failures
    assert all("instrumented twin" in failure for failure in report.failures)


class Shifted(OrtRunner):
    """Gives another source map where the graph is the shipped one, or its twin."""

    twin = False

    def infer(self, inputs):
        results = super().infer(inputs)
        if (len(results) > 2) == self.twin:
            results["source_map"] = results["source_map"] ^ 1
        return results


class ShiftedTwin(Shifted):
    twin = True


class Short(OrtRunner):
    """Leaves the last patch out of the shipped map."""

    def infer(self, inputs):
        results = super().infer(inputs)
        if len(results) == 2:
            results["source_map"] = results["source_map"][:, :-1]
        return results


class Without(OrtRunner):
    """Has no source map in the shipped graph."""

    def infer(self, inputs):
        results = super().infer(inputs)
        if len(results) == 2:
            del results["source_map"]
        return results


def test_source_map_of_shipped_graph_and_twin_are_checked(make_vit, make_images, tmp_path):
    model = patch(make_vit(depth=2), [9, 9], source_map=True)
    path = tmp_path / "model.onnx"
    onnx_from_model(model, path, ExportOptions(batch=BATCH), ["features", "source_map"])
    images = make_images(model, 3)
    for runner in (Shifted, ShiftedTwin, Short, Without):
        report = check(model, path, images, runner_factory=runner)
        assert report.source_map_defects == 3
        assert report.failures == (
            "the source map of 3 of 3 images does not follow from their merge plans",
        )
    report = check(model, path, images)
    assert (report.source_map_defects, report.failures) == (0, ())
    # Which of the features is the largest says nothing.
    assert report.output.top1_agreement is report.led_output.top1_agreement is None
    summary = "\n".join(summary_lines(report.summary()))
    assert "top-1" not in summary
    assert "cosine 1.0000000, output error" in summary


def test_wrong_reference_precision_is_not_forgiven(exported, make_vit, make_images):
    """A bf16 graph held to fp32's error."""
    model, proto = exported(make_vit, "test_vit", "bf16")
    assert not check(model, proto, make_images(model, 4), "fp32").passed


@pytest.mark.parametrize("count", [1, 4, 5, 9])
def test_any_number_of_images(exported, make_vit, make_images, count):
    model, proto = exported(make_vit)
    report = check(model, proto, make_images(model, count))
    assert report.passed
    assert report.images == count


def test_images_are_not_mixed_up(exported, make_vit, make_images):
    """Nine images in batches of four, the last batch padded: each against its own reference."""
    model, proto = exported(make_vit)
    images = make_images(model, 9)
    order = []

    class Recorder(OrtRunner):
        def infer(self, inputs):
            order.append(len(inputs["pixel_values"]))
            return super().infer(inputs)

    assert check(model, proto, images, runner_factory=Recorder).passed
    assert set(order) == {4}


def test_no_images_are_refused(exported, make_vit):
    model, proto = exported(make_vit)
    with pytest.raises(InputError, match="no image to check parity on"):
        check(model, proto, np.zeros((0, 3, 64, 64), np.float32))


def test_unmerged_model(make_vit, make_images, tmp_path):
    model = patch(make_vit(depth=1), 0)
    path = tmp_path / "model.onnx"
    onnx_from_model(model, path, ExportOptions(precision="fp16", batch=BATCH), "logits")
    report = check(model, onnx.load(path), make_images(model, 2), "fp16")
    assert report.passed, report.failures
    assert report.layers == ()


def test_external_data_goes_through_the_whole_check(exported, make_vit, make_images, monkeypatch):
    """As above 2 GB: the shipped graph and its twin are each loaded from a file."""
    model, proto = exported(make_vit)
    monkeypatch.setattr(files, "EXTERNAL_DATA_BYTES", 10_000)
    assert check(model, proto, make_images(model, 2)).passed


def test_a_runtime_that_refuses_is_one_error(exported, make_vit, make_images):
    model, proto = exported(make_vit)
    proto.graph.node.append(helper.make_node("Nonsense", ["pixel_values"], ["nothing"]))
    with pytest.raises(ExportError, match=r"onnxruntime .* cannot load the model"):
        check(model, proto, make_images(model, 1))


def test_output_that_overflows_fp16_fails_and_says_so(make_vit, make_images, tmp_path):
    """An infinite yardstick allows nothing."""
    vit = make_vit("test_vit", depth=2)
    with torch.no_grad():
        vit.head.bias.fill_(70_000.0)
    model = patch(vit, 9)
    path = tmp_path / "model.onnx"
    onnx_from_model(model, path, ExportOptions(precision="fp16", batch=BATCH), "logits")
    report = check(model, onnx.load(path), make_images(model, 2), "fp16")
    assert not report.passed
    assert report.failures[0].startswith(
        "PyTorch itself gives infinite or undefined output in fp16"
    )
    json.loads(json.dumps(report.model_dump(mode="json"), allow_nan=False))


def test_weights_in_a_file_of_their_own_are_not_held_beside_the_model(
    make_vit, make_images, tmp_path
):
    """A ViT-giant's graph is 4.5 GB: both graphs run from files, and the twin's is gone then."""
    model = patch(make_vit("test_vit", depth=2), 5)
    path = tmp_path / "model.onnx"
    onnx_from_model(model, path, ExportOptions(batch=BATCH), "logits", external_data_bytes=1 << 10)
    opened = []

    def runner(runnable):
        opened.append(runnable)
        return OrtRunner(runnable)

    report = check_parity(model, path, make_images(model, 2), "fp32", BATCH, runner_factory=runner)
    assert report.passed, report.failures
    assert opened == [path, tmp_path / "model.onnx.twin"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
