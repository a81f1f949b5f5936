"""What does a match sort, and how long can sequences be?

Two questions about the operators that TomeMatch and TomeMerge are written in:

- CPU time of one match in ONNX Runtime with the order of the tokens that stay made in several
  ways: as shipped, by sorting all of set A twice, and by a scatter and a running sum. All in turn;
  ratios are medians of the per-round ratios over the two sorts.
- One match and one merge of 8,192 and 16,384 tokens: through ONNX Runtime's CPU against an oracle
  in NumPy, and through TensorRT-RTX's parser and builder, beside what ``engine.limits`` says.

    python -m benchmarks.long_sequences [--no-write]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from benchmarks.harness import paired, percentiles, write_rows
from tome_export.engine import EngineOptions, select
from tome_export.engine.limits import MergeCounts, refusal
from tome_export.errors import ExportError
from tome_export.merge import spec
from tome_export.onnx import functions
from tome_export.onnx.export import OPSET
from tome_export.onnx.functions import match_function, merge_function
from tome_export.spec import BatchRange, Lowering

Array = NDArray[Any]

WIDTH = 64
"""D of the metric and C of the tokens."""

TWO_SORTS = """
    ct = Constant <value_int: int = @class_token> ()
    by_position = Cast <to: int = 9> (ct)
    na_ = Unsqueeze (na, begin)
    values, rank = TopK <axis: int = 1, largest: int = 1, sorted: int = 1> (value, na_)
    big = Constant <value_float: float = 1048576.0> ()
    minus_big = Neg (big)
    minus_two_big = Add (minus_big, minus_big)
    rank_f = Cast <to: int = 1> (rank)
    place_f = Cast <to: int = 1> (rows)
    stay_key = Where (by_position, rank_f, place_f)
    protected_key = Add (rank_f, minus_big)
    merged_key = Add (place_f, minus_two_big)
    protected = Less (rank, pa)
    rest_key = Where (protected, protected_key, stay_key)
    is_merged = Less (rows, r_)
    key = Where (is_merged, merged_key, rest_key)
    sorted_key, permutation = TopK <axis: int = 1, largest: int = 0, sorted: int = 1> (key, na_)
    order = GatherElements <axis: int = 1> (rank, permutation)
    merged = Slice (order, begin, r_1, axis1)
    merged_32 = Cast <to: int = 6> (merged)
    ordered = Cast <to: int = 6> (order)
    a_shift = Sub (r_, pb)
    b_shift = Identity (r_)
"""
"""Rank, then keys that put the merged rows first, then the protected ones, then the rest."""

SCATTER = """
    values, merged = TopK <axis: int = 1, largest: int = 1, sorted: int = 1> (value, r_1)
    shape_a = Shape (value)
    shape_merged = Shape (merged)
    ones = Expand (one, shape_a)
    zeros = Expand (zero, shape_merged)
    stays = ScatterElements <axis: int = 1> (ones, merged, zeros)
    staying = CumSum (stays, one)
    place_staying = Sub (staying, one)
    gone_before = Sub (rows, staying)
    place_gone = Add (gone_before, left)
    is_staying = Cast <to: int = 9> (stays)
    place = Where (is_staying, place_staying, place_gone)
    all_rows = Expand (rows, shape_a)
    order = ScatterElements <axis: int = 1> (all_rows, place, all_rows)
    merged_32 = Cast <to: int = 6> (merged)
    ordered = Cast <to: int = 6> (order)
    a_shift = Neg (pb)
    b_shift = Identity (r_)
"""
"""By position: a mark for every merged row, a running sum, and every row put in its place."""


def exact_metric(tokens: int, seed: int = 0) -> Array:
    """``[1, N, 64]`` of +-1: every cosine is exact in float32, and most are tied."""
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], size=(1, tokens, WIDTH))
    return signs.astype(np.float32)


def exact_plan(metric: Array, r: int, prefix: int, class_token: bool) -> tuple[Array, ...]:
    """``keep``, ``src`` and ``dst`` of one image by the definition (ToMe, section 3.1).

    Args:
        metric: ``[N, D]`` of +-1, whose products are whole numbers.
        r: Tokens to merge.
        prefix: Protected tokens.
        class_token: Whether kept tokens are in order of position.
    """
    places = np.arange(len(metric))
    a, b = (places[(places % 2 == odd) & (places >= prefix)] for odd in (0, 1))
    scores = metric[a] @ metric[b].T
    best = scores.argmax(axis=1)
    order = np.argsort(-scores.max(axis=1), kind="stable")
    merged, rest = order[:r], order[r:]
    keep = np.concatenate([places[:prefix], a[np.sort(rest) if class_token else rest], b])
    output = np.zeros_like(places)
    output[keep] = np.arange(len(keep))
    return keep, a[merged], output[b[best[merged]]]


def exact_merge(x: Array, size: Array, plan: tuple[Array, ...]) -> tuple[Array, Array]:
    """The weighted mean in float64, ``[K, C]``, and sizes ``[K]``, of one image."""
    keep, src, dst = plan
    weighted = x.astype(np.float64) * size[:, None]
    total, sizes = weighted[keep], size[keep].astype(np.float64)
    np.add.at(total, dst, weighted[src])
    np.add.at(sizes, dst, size[src])
    return total / sizes[:, None], sizes


def model_of(
    tokens: int, r: int, class_token: bool, lowering: Lowering | None = None, order: str = ""
) -> onnx.ModelProto:
    """A graph of one match, and of one merge with a lowering; the batch is dynamic.

    Args:
        tokens: N, one of them protected with a class token.
        r: Tokens to merge.
        class_token: Whether kept tokens are in order of position.
        lowering: Of the merge; None for no merge.
        order: How the body orders what stays; empty for as it is shipped.
    """
    used = [match_function(OPSET, class_token=class_token)]
    if order:
        text = functions._MATCH.replace("METRIC", functions._METRIC_FROM_KEYS)
        used = [functions._parse(text.replace("ORDER", order), OPSET)]
    attributes: dict[str, Any] = {
        "r": r,
        "prefix": int(class_token),
        "class_token": int(class_token),
    }
    nodes = [
        helper.make_node(
            spec.MATCH, ["metric"], spec.MATCH_OUTPUTS, domain=spec.DOMAIN, **attributes
        )
    ]
    value, kept = helper.make_tensor_value_info, tokens - r
    inputs = [value("metric", TensorProto.FLOAT, ["batch", tokens, WIDTH])]
    outputs = [
        value(output, TensorProto.INT32, ["batch", length])
        for output, length in zip(spec.MATCH_OUTPUTS, (kept, r, r), strict=True)
    ]
    if lowering is not None:
        results = ["x_out", "size_out"]
        nodes.append(helper.make_node(spec.MERGE, spec.MERGE_INPUTS, results, domain=spec.DOMAIN))
        used.append(merge_function(lowering, OPSET))
        inputs.append(value("x", TensorProto.FLOAT, ["batch", tokens, WIDTH]))
        inputs.append(value("size", TensorProto.FLOAT, ["batch", tokens]))
        outputs.append(value("x_out", TensorProto.FLOAT, ["batch", kept, WIDTH]))
        outputs.append(value("size_out", TensorProto.FLOAT, ["batch", kept]))
    graph = helper.make_graph(nodes, "g", inputs, outputs)
    opsets = [helper.make_opsetid(*pair) for pair in (("", OPSET), (spec.DOMAIN, spec.VERSION))]
    return helper.make_model(graph, opset_imports=opsets, functions=used, ir_version=11)


def session(model: onnx.ModelProto) -> Any:
    """The model on one thread of the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def measure_orders(tokens: int, r: int, class_token: bool, rounds: int) -> dict[str, Any]:
    """Time of one match by each way to order what stays, whose plans are first found the same."""
    orders = {"two sorts": TWO_SORTS, "as shipped": ""}
    if class_token:
        orders["scatter"] = SCATTER
    feed = {"metric": exact_metric(tokens)}
    wanted = exact_plan(feed["metric"][0], r, int(class_token), class_token)
    runs = {}
    for name, order in orders.items():
        loaded = session(model_of(tokens, r, class_token, order=order))
        for ours, theirs in zip(loaded.run(None, feed), wanted, strict=True):
            np.testing.assert_array_equal(ours[0], theirs)
        runs[name] = lambda loaded=loaded: loaded.run(None, feed)
    # Of the one thread, so that what else the machine does is not counted.
    seconds = paired(runs, rounds, clock=time.process_time)
    return {
        "benchmark": "long_sequences",
        "part": "order",
        "tokens": tokens,
        "r": r,
        "class_token": class_token,
        "cpu_ms": {name: percentiles(1e3 * times) for name, times in seconds.items()},
        "over_two_sorts": {
            name: percentiles(times / seconds["two sorts"]) for name, times in seconds.items()
        },
    }


def run_onnxruntime(tokens: int, r: int, class_token: bool, lowering: Lowering) -> dict[str, Any]:
    """One match and one merge against the oracle."""
    rng = np.random.default_rng(tokens + r)
    feed = {
        "metric": exact_metric(tokens),
        "x": rng.standard_normal((1, tokens, WIDTH), dtype=np.float32),
        "size": rng.integers(1, 60, (1, tokens)).astype(np.float32),
    }
    plan = exact_plan(feed["metric"][0], r, int(class_token), class_token)
    x, sizes = exact_merge(feed["x"][0], feed["size"][0], plan)
    loaded = session(model_of(tokens, r, class_token, lowering))
    started = time.perf_counter()
    *theirs, merged, merged_size = (part[0] for part in loaded.run(None, feed))
    return {
        "ms": 1e3 * (time.perf_counter() - started),
        "same_plan": all(map(np.array_equal, plan, theirs)),
        "same_sizes": bool(np.array_equal(sizes, merged_size)),
        "largest_error": float(np.abs(merged - x).max()),
    }


def run_tensorrt_rtx(tokens: int, r: int, class_token: bool) -> dict[str, Any]:
    """Parsing and building, and why not where it is refused."""
    backend = select("tensorrt-rtx").builder
    if backend is None:
        raise AssertionError("a backend asked for by name is there or refused")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(model_of(tokens, r, class_token, "matmul"), path)
        started = time.perf_counter()
        backend.parse(path)
        parsed = time.perf_counter()
        refused = None
        try:
            options = EngineOptions(batch=BatchRange(1, 4, 8))
            backend.build(path, options, Path(folder) / backend.file_name)
        except ExportError as error:
            refused = str(error)
        built = time.perf_counter()
    return {"parse_s": parsed - started, "build_s": built - parsed, "refused": refused}


def try_path(tokens: int, r: int, class_token: bool) -> dict[str, Any]:
    """One match and one merge through every path that needs no GPU."""
    counts = MergeCounts("blocks.0", tokens, r, int(class_token))
    lowerings: tuple[Lowering, ...] = ("matmul", "index_add")
    return {
        "benchmark": "long_sequences",
        "part": "path",
        "tokens": tokens,
        "r": r,
        "class_token": class_token,
        "sorted": counts.sorted_by_match(class_token),
        "one_hot_bytes": counts.one_hot_bytes,
        "limit": refusal("tensorrt-rtx", [counts], class_token=class_token),
        "onnxruntime": {
            lowering: run_onnxruntime(tokens, r, class_token, lowering) for lowering in lowerings
        },
        "tensorrt_rtx": run_tensorrt_rtx(tokens, r, class_token),
    }


ROUNDS = {197: 200, 577: 60, 1025: 30, 4096: 11, 16384: 7}
"""Rounds by N."""

PATHS = [(8192, 16), (8192, 2048), (8192, 4000), (16384, 16), (16384, 1024), (16384, 3840)]
"""N and r of the paths tried."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = []
    for tokens, rounds in ROUNDS.items():
        for r in (8, tokens // 16, tokens // 8, tokens // 4):
            for class_token in (True, False):
                rows.append(measure_orders(tokens, r, class_token, rounds))
                ratios = {k: round(v["p50"], 3) for k, v in rows[-1]["over_two_sorts"].items()}
                ms = rows[-1]["cpu_ms"]["two sorts"]["p50"]
                order = "position" if class_token else "rank"
                print(f"N {tokens} r {r} by {order}: two sorts {ms:.3f} ms, {ratios}", flush=True)
    for tokens, r in PATHS:
        for class_token in (True, False):
            rows.append(try_path(tokens, r, class_token))
            print(rows[-1], flush=True)
    if not arguments.no_write:
        print(write_rows("long_sequences", rows))


if __name__ == "__main__":
    main()
