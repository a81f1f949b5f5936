"""What is refused before an engine is built, and that TensorRT-RTX's builder agrees."""

from __future__ import annotations

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch.utils._python_dispatch import TorchDispatchMode

from tome_export.engine import EngineOptions, select
from tome_export.engine.limits import (
    ONE_HOT_MAX_BYTES,
    TOPK_MAX,
    MergeCounts,
    merges_of,
    refusal,
)
from tome_export.errors import ExportError
from tome_export.merge import spec
from tome_export.merge.schedule import LayerTokens
from tome_export.models import RECIPES
from tome_export.onnx.export import OPSET
from tome_export.onnx.functions import match_function
from tome_export.patch import patch
from tome_export.reducers import reducer_class
from tome_export.spec import BatchRange
from tome_export.video.options import FrameMerging, video_token_counts

BACKENDS = ("tensorrt", "tensorrt-rtx")


def one(tokens, r, prefix=1):
    return [MergeCounts("blocks.0", tokens, r, prefix)]


# Tokens, r and whether there is a class token, on both sides of the limit of TopK.
SORTS = [
    (7700, TOPK_MAX, True, True),
    (7702, TOPK_MAX + 1, True, False),
    (2 * TOPK_MAX, 16, False, True),
    (2 * TOPK_MAX + 1, 16, False, False),
    (16384, 16, True, True),
]


@pytest.mark.parametrize(("tokens", "r", "class_token", "fits"), SORTS)
def test_a_match_sorts_at_most_what_topk_gives(tokens, r, class_token, fits):
    for backend in BACKENDS:
        found = refusal(backend, one(tokens, r), class_token=class_token)
        assert (found is None) == fits, found
    plugged = [
        refusal(backend, one(tokens, r), class_token=class_token, plugin=True)
        for backend in BACKENDS
    ]
    assert plugged == [None, found]


@pytest.mark.parametrize(("tokens", "r", "class_token", "fits"), SORTS)
def test_tensorrt_rtx_refuses_the_same_sorts(tmp_path, tokens, r, class_token, fits):
    """Its parser takes every one; 16,384 tokens with a class token sort only the 16 that merge."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    attributes = {"r": r, "prefix": int(class_token), "class_token": int(class_token)}
    node = helper.make_node(
        spec.MATCH, ["metric"], spec.MATCH_OUTPUTS, domain=spec.DOMAIN, **attributes
    )
    value = helper.make_tensor_value_info
    lengths = zip(spec.MATCH_OUTPUTS, (tokens - r, r, r), strict=True)
    graph = helper.make_graph(
        [node],
        "g",
        [value("metric", TensorProto.FLOAT, ["batch", tokens, 8])],
        [value(name, TensorProto.INT32, ["batch", length]) for name, length in lengths],
    )
    opsets = [helper.make_opsetid(*pair) for pair in (("", OPSET), (spec.DOMAIN, spec.VERSION))]
    functions = [match_function(OPSET, class_token=class_token)]
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=11), path
    )
    backend = select("tensorrt-rtx").builder
    backend.parse(path)
    options = EngineOptions(batch=BatchRange(1, 2, 4))
    if fits:
        assert backend.build(path, options, tmp_path / "model.engine").size_bytes > 50_000
    else:
        with pytest.raises(ExportError, match=rf"K exceeds the maximum value allowed \({TOPK_MAX}"):
            backend.build(path, options, tmp_path / "model.engine")


def test_the_one_hot_matrix_has_a_limit():
    at_it, above = one(10240, 2048), one(10240, 2049)
    assert at_it[0].one_hot_bytes == ONE_HOT_MAX_BYTES == 4 * 2048 * 8192
    for backend in BACKENDS:
        assert refusal(backend, at_it, class_token=True) is None
        assert "matrix of 64.0 MiB per image" in refusal(backend, above, class_token=True)
    assert refusal("tensorrt", above, class_token=True, plugin=True) is None
    assert refusal("tensorrt-rtx", above, class_token=True, plugin=True) is not None


def test_a_reducer_that_ranks_its_patches_sorts_all_of_them():
    for plugin in (False, True):
        for backend in BACKENDS:
            asked = {"class_token": True, "scored": True, "plugin": plugin}
            assert refusal(backend, one(TOPK_MAX + 1, 16), **asked) is None
            found = refusal(backend, one(TOPK_MAX + 2, 16), **asked)
            assert "sorts all its patches by one TopK of 3,841" in found


@pytest.mark.parametrize(
    ("tokens", "r", "class_token", "expected"),
    [
        (
            16384,
            4096,
            True,
            "blocks.0 merges r = 4,096 of 16,384 tokens and sorts the merged ones by one TopK of "
            "4,096; TensorRT takes at most 3,840: use a smaller r, or --engine none",
        ),
        (
            8192,
            16,
            False,
            "blocks.0 merges r = 16 of 8,192 tokens and sorts half of them, having no class token, "
            "by one TopK of 4,096; TensorRT takes at most 3,840: use fewer tokens, or --engine "
            "none",
        ),
        (
            16384,
            3840,
            True,
            "blocks.0 merges r = 3,840 of 16,384 tokens by a matrix of 183.8 MiB per image; "
            "expected at most 64.0 MiB for TensorRT: use a smaller r, or --engine none with "
            "--merge-op index_add",
        ),
    ],
)
def test_a_refusal_says_what_was_got_and_what_to_do(tokens, r, class_token, expected):
    assert refusal("tensorrt", one(tokens, r), class_token=class_token) == expected


def test_the_first_merge_that_is_too_long_is_named():
    layers = [LayerTokens(9000, 0, 9000), LayerTokens(9000, 8, 8992)]
    merges = merges_of(layers, 1)
    assert merges == [MergeCounts("blocks.1", 9000, 8, 1)]
    assert refusal("tensorrt", merges, class_token=False).startswith("blocks.1 merges r = 8 of")


def test_merges_across_clips_are_counted_per_clip():
    merging = FrameMerging((1,), (2,), (50, 50), False)
    layers = video_token_counts((4, 0, 0), merging, 4, 17, 1)
    found = merges_of(layers, 1)
    inside, across = layers[0], layers[1]
    joined = 2 * across.tokens_in
    assert found[:3] == [
        MergeCounts("blocks.0", 17, inside.r, 1, 4),
        MergeCounts("blocks.1.across", joined, across.cross, 2, 2),
        MergeCounts("blocks.1", joined - across.cross, across.r, 2, 2),
    ]
    assert found[0].one_hot_bytes == 4 * 4 * 13 * 4


class SortLengths(TorchDispatchMode):
    """Lengths of all sorts; the export writes each as one TopK of the same length."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.sort.stable:
            self.found.append(args[0].shape[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["pitome", "topk", "evit", "kth", "random"])
def test_reducers_that_score_sort_no_more_than_is_counted(name):
    """Those with fixed sets sort fewer than all patches."""
    reducer = reducer_class(name)()
    assert reducer.scored
    schedule = None if reducer.own_counts else [6, 5]
    model = patch(RECIPES["vit_digits"].load().module, schedule, reducer=reducer).eval()
    counts = [merge.sorted_by_scores for merge in merges_of(model.layers, 1)]
    with torch.inference_mode(), SortLengths() as sorts:
        model(torch.zeros(1, *model.input_size))
    assert len(sorts.found) >= len(counts)
    assert (max(sorts.found) == max(counts)) == (name not in ("kth", "random"))
    assert max(sorts.found) <= max(counts)
