"""Can the log-size bias of proportional attention do without a mask?

A fused kernel that takes no mask would do if the bias came in as channels of queries and keys: a
constant c in the queries, log(size) / (scale c) in the keys, zeros up to the next multiple of 8.
Rounded to half precision that is one channel, or two: the rounded value and what rounding left.
Three questions, a kind of row each:

- exactness: the largest and the root-mean-square error of the output against attention in float64
  with the exact bias, sizes 1 to N, in PyTorch and, fp16, in ONNX Runtime, both on the CPU.
- fusion: the kernels that TensorRT-RTX chooses, read from the source that an engine brings along:
  whether attention is one kernel, what its two products sum in, and the head width it pads to.
- time: CPU seconds of ONNX Runtime on one core, from queries, keys, values and sizes to the output;
  rounds of all, each in an order drawn anew; ratios are medians of the per-round ratios.

    python -m benchmarks.attention [--repeats 80] [--no-write]     # on Linux
"""

from __future__ import annotations

import argparse
import math
import os
import re
import tempfile
import time
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import percentiles, write_rows
from tome_export.engine import EngineOptions, select
from tome_export.onnx.export import OPSET, TORCH_DTYPES
from tome_export.patch.attention import log_size_bias
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import BatchRange, Precision

Bias = Literal["none", "mask", "one channel", "two channels"]
BIASES: tuple[Bias, ...] = get_args(Bias)
Row = dict[str, Any]

TOKENS, HEADS, WIDTH = 197, 12, 64
BATCH = BatchRange(1, 8, 8)
KINDS = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}

KERNEL = re.compile(
    r"fmha::\w*Kernel_traits\w*<\s*fmha::(\w+)_traits,\s*fmha::(\w+)_traits,"
    r".*?(\d+), // padded headsize",
    re.DOTALL,
)
"""What a fused attention kernel in an engine says of itself: types of its sums, its head width."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=80)
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows = [*exactness_rows(), *fusion_rows(), *time_rows(arguments.repeats)]
    for row in rows:
        print("  ".join(f"{key} {_text(value)}" for key, value in row.items()))
    if not arguments.no_write:
        print(write_rows("attention", [{"benchmark": "attention", **row} for row in rows]))


def _text(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def channel_constant(width: int) -> float:
    """The queries' channel: the power of two next to 1 / scale, which every precision holds."""
    return 2.0 ** round(math.log2(width**0.5))


def folded(q: Tensor, k: Tensor, size: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[B, H, N, D + 8]`` whose product has the bias in it.

    Args:
        q: ``[B, H, N, D]``, in any precision.
        k: The same.
        size: ``[B, N]`` float32.
        parts: Channels that the bias takes, 1 or 2.
    """
    width = q.shape[-1]
    constant = channel_constant(width)
    rest = size.log() * (width**0.5 / constant)
    extra_q, extra_k = (x.new_zeros(*x.shape[:-1], 8) for x in (q, k))
    for channel in range(parts):
        value = rest.to(k.dtype)
        rest = rest - value.float()
        extra_q[..., channel] = constant
        extra_k[..., channel] = value[:, None]
    return torch.cat([q, extra_q], dim=-1), torch.cat([k, extra_k], dim=-1)


def exactness_rows() -> list[Row]:
    """Every bias against float64, on the same rounded queries, keys and values."""
    generator = torch.Generator().manual_seed(0)
    shape = (2, HEADS, TOKENS, WIDTH)
    size = torch.stack([torch.randperm(TOKENS, generator=generator) + 1.0 for _ in range(shape[0])])
    drawn = [torch.randn(shape, generator=generator) for _ in "qkv"]
    rows = []
    for precision in ("fp16", "bf16"):
        dtype = TORCH_DTYPES[precision]
        q, k, v = (x.to(dtype) for x in drawn)
        bias = size.double().log()[:, None, None, :].expand(-1, -1, TOKENS, -1)
        exact = functional.scaled_dot_product_attention(
            q.double(), k.double(), v.double(), attn_mask=bias
        )
        for form in BIASES[1:]:
            outputs = {"PyTorch": _torch_output(form, q, k, v, size)}
            if precision == "fp16":  # ONNX Runtime's CPU has no bfloat16
                outputs["ONNX Runtime"] = _onnxruntime_output(form, precision, q, k, v, size)
            for library, output in outputs.items():
                error = (output - exact).abs()
                rows.append(
                    {
                        "question": "exactness",
                        "precision": precision,
                        "bias": form,
                        "library": library,
                        "largest_error": float(error.max()),
                        "rms_error": float(error.square().mean().sqrt()),
                    }
                )
    return rows


def _torch_output(form: Bias, q: Tensor, k: Tensor, v: Tensor, size: Tensor) -> Tensor:
    scale = WIDTH**-0.5
    if form == "mask":
        mask = log_size_bias(size, q.dtype)
        return functional.scaled_dot_product_attention(q, k, v, mask, scale=scale).double()
    q, k = folded(q, k, size, 1 if form == "one channel" else 2)
    return functional.scaled_dot_product_attention(q, k, v, scale=scale).double()


def _onnxruntime_output(form: Bias, precision: Precision, *tensors: Tensor) -> Tensor:
    inputs = {name: x.float().numpy() for name, x in zip("qkvs", tensors, strict=True)}
    with OrtRunner(attention_graph(form, precision)) as runner:
        return torch.from_numpy(runner.infer(inputs)["y"]).double()


def attention_graph(
    bias: Bias,
    precision: Precision,
    *,
    width: int = WIDTH,
    equal_widths: bool = False,
    fp32_sums: bool = False,
) -> onnx.ModelProto:
    """Attention from float32 ``q``, ``k``, ``v`` ``[B, H, N, D]`` and ``s`` ``[B, N]`` to ``y``.

    Args:
        bias: How log(s) goes in.
        precision: That attention is computed in.
        width: D.
        equal_widths: Pad values to the width of the keys, as TensorRT wants it.
        fp32_sums: Cast to float32 around the operator, as ``--attention fused-fp32`` does.
    """
    kind = KINDS[precision]
    nodes: list[onnx.NodeProto] = []
    constants: list[onnx.TensorProto] = []

    def add(operator: str, *inputs: str, **attributes: Any) -> str:
        output = f"{operator.lower()}{len(nodes)}"
        nodes.append(helper.make_node(operator, inputs, [output], name=output, **attributes))
        return output

    def constant(values: Any, of: int) -> str:
        array = np.asarray(values)
        name = f"constant{len(constants)}"
        constants.append(helper.make_tensor(name, of, array.shape, array.ravel().tolist()))
        return name

    def ints(*values: int) -> str:
        return constant(values, TensorProto.INT64)

    q, k, v = (add("Cast", name, to=kind) for name in "qkv")
    log = add("Log", "s")
    mask: tuple[str, ...] = ()
    if bias == "mask":
        rows = add("Unsqueeze", add("Cast", log, to=kind), ints(1, 2))
        mask = (add("Expand", rows, ints(1, 1, TOKENS, 1)),)
    elif bias != "none":
        multiplier = channel_constant(width)
        rest = add("Mul", log, constant(width**0.5 / multiplier, TensorProto.FLOAT))
        parts = 1 if bias == "one channel" else 2
        columns = []
        for _ in range(parts):
            rounded = add("Cast", rest, to=kind)
            rest = add("Sub", rest, add("Cast", rounded, to=TensorProto.FLOAT))
            columns.append(add("Unsqueeze", rounded, ints(1, 3)))
        padding = ints(0, 0, 0, 0, 0, 0, 0, 8 - parts)
        extra = add("Pad", add("Concat", *columns, axis=3), padding)
        extra = add("Expand", extra, ints(1, HEADS, 1, 1))
        channels = constant([multiplier] * parts + [0.0] * (8 - parts), kind)
        q = add("Concat", q, add("Expand", channels, add("Shape", extra)), axis=3)
        k = add("Concat", k, extra, axis=3)
        if equal_widths:
            v = add("Pad", v, ints(0, 0, 0, 0, 0, 0, 0, 8))
    if fp32_sums:
        q, k, v = (add("Cast", x, to=TensorProto.FLOAT) for x in (q, k, v))
    y = add("Attention", q, k, v, *mask, scale=width**-0.5)
    if fp32_sums:
        y = add("Cast", y, to=kind)
    if equal_widths:
        y = add("Slice", y, ints(0), ints(width), ints(3))
    nodes.append(helper.make_node("Cast", [y], ["y"], name="out", to=TensorProto.FLOAT))

    def value(name: str, *dims: int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *dims])

    whole = (HEADS, TOKENS, width)
    graph = helper.make_graph(
        nodes,
        "attention",
        [*(value(name, *whole) for name in "qkv"), value("s", TOKENS)],
        [value("y", *whole)],
        constants,
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model


def fusion_rows() -> list[Row]:
    """What TensorRT-RTX makes of every bias; empty where it is not installed."""
    backend = select("auto").builder
    if backend is None or backend.name != "tensorrt-rtx":
        return []
    rows = []
    for width in (32, 64, 72, 80):
        for fp32_sums in (False, True):
            for form in ("none", "mask", "two channels"):
                model = attention_graph(
                    form, "fp16", width=width, equal_widths=True, fp32_sums=fp32_sums
                )
                with tempfile.TemporaryDirectory() as folder:
                    path, engine = Path(folder) / "model.onnx", Path(folder) / "engine"
                    onnx.save(model, path)
                    info = backend.build(path, EngineOptions(batch=BATCH), engine)
                    kernels = KERNEL.findall(engine.read_bytes().decode("latin1"))
                rows.append(
                    {
                        "question": "fusion",
                        "tensorrt_rtx": info.version,
                        "width": width,
                        "cast_up": fp32_sums,
                        "bias": form,
                        "fused_kernels": len(kernels),
                        "sums": [list(kernel[:2]) for kernel in kernels],
                        "kernel_width": [int(kernel[2]) for kernel in kernels],
                    }
                )
    return rows


def time_rows(repeats: int) -> list[Row]:
    """Every bias in ONNX Runtime on the CPU.

    On one core no thread spins while it waits, so that CPU time is work, whoever else is working.
    Forwards and backwards, as ``paired`` goes, what comes first and last would seem slower.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rng = np.random.default_rng(0)
    shape = (BATCH.opt, HEADS, TOKENS, WIDTH)
    inputs = {name: rng.standard_normal(shape, dtype=np.float32) for name in "qkv"}
    inputs["s"] = rng.integers(1, TOKENS, shape[::2], endpoint=True).astype(np.float32)
    rows = []
    for precision in ("fp32", "fp16"):
        # One channel is exact where keys are float32.
        forms = [form for form in BIASES if precision == "fp16" or form != "two channels"]
        runners = {form: OrtRunner(attention_graph(form, precision)) for form in forms}
        for runner in runners.values():
            runner.infer(inputs)
        seconds = {form: np.zeros(repeats) for form in forms}
        for index in range(repeats):
            for form in rng.permutation(forms):
                start = time.process_time()
                runners[form].infer(inputs)
                seconds[form][index] = time.process_time() - start
        rows.append(
            {
                "question": "time",
                "library": "ONNX Runtime",
                "precision": precision,
                "batch": BATCH.opt,
                "repeats": repeats,
                "cpu_seconds": {form: percentiles(values) for form, values in seconds.items()},
                "over_mask": {
                    form: float(np.median(values / seconds["mask"]))
                    for form, values in seconds.items()
                },
            }
        )
    return rows


if __name__ == "__main__":
    main()
