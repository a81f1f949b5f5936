"""What do pixels in uint8 save over float32 ones: in the graph alone, and over the wire?

The same model is built twice, ``--input float32`` and ``--input uint8``. ONNX Runtime alone runs
both, in one thread whose time of the processor is taken, and a third graph in which scale, mean and
std are folded into the convolution that cuts patches, so that nothing but a cast and the change of
the layout is left: what that saves is what folding is worth. Then one server has both models beside
each other under the load of perf_analyzer at concurrency 1, 4 and 16, one image a request, over
gRPC. All take turns; ratios to float32 are medians of the rounds' ratios. The second model is a
small one: with it, as on a GPU, the wire is a larger share.

    python -m benchmarks.raw_pixels --perf-analyzer TOOLS [--rounds 5] [--seconds 9] [--no-write]

What TOOLS is and how to get it: ``benchmarks/perf_analyzer.py``.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.harness import paired, percentiles, write_rows
from benchmarks.perf_analyzer import PerfAnalyzer
from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.data.images import load_inputs
from tome_export.data.samples import sample_paths
from tome_export.errors import TomeExportError
from tome_export.merge.schedule import Schedule
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.server import RunRequest, running
from tome_export.spec import BatchRange, InputForm

MODELS = {"timm:vit_small_patch16_224": 16, "timm:test_vit.r160_in1k": 9}
"""Model -> r."""

FORMS: tuple[InputForm, ...] = ("float32", "uint8")
FOLDED = "uint8, folded"
CONCURRENCIES = (1, 4, 16)
BATCHES = (1, 4)


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph of ``--input uint8`` whose convolution scales and normalises by its weights."""
    graph = model.graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    made = {node.input[0]: node for node in graph.node if node.op_type in ("Div", "Sub", "Conv")}
    names = ["pixel_values"]
    for node in graph.node:
        if node.op_type in ("Cast", "Transpose") and node.input[0] == names[-1]:
            names.append(node.output[0])
    chain, name = [], names[-1]
    while made[name].op_type != "Conv":
        chain.append(made[name])
        name = chain[-1].output[0]
    convolution = made[name]
    scale, mean, std = (numpy_helper.to_array(tensors[n.input[1]]).reshape(-1) for n in chain)
    weights, bias = (tensors[n] for n in convolution.input[1:])
    old = numpy_helper.to_array(weights).astype(np.float64)
    shift = (old * (mean / std)[:, None, None]).sum((1, 2, 3))
    offset = (numpy_helper.to_array(bias) - shift).astype(np.float32)
    new = (old / (scale * std)[:, None, None]).astype(np.float32)
    weights.CopyFrom(numpy_helper.from_array(new, weights.name))
    bias.CopyFrom(numpy_helper.from_array(offset, bias.name))
    convolution.input[0] = chain[0].input[0]
    for node in chain:
        graph.node.remove(node)
    return model


def graph_rows(artifacts: Mapping[str, Artifact], rounds: int) -> list[dict[str, Any]]:
    """ONNX Runtime alone on the photographs that come along, and how far the outputs differ."""
    import onnxruntime

    cpu = ["CPUExecutionProvider"]
    graphs: dict[str, Any] = {form: str(artifacts[form].model_path) for form in FORMS}
    graphs[FOLDED] = folded(onnx.load(graphs["uint8"])).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    sessions = {
        k: onnxruntime.InferenceSession(v, options, providers=cpu) for k, v in graphs.items()
    }
    rows = []
    for batch in BATCHES:
        paths = (sample_paths() * batch)[:batch]
        pixels = {k: load_inputs(artifacts[k.partition(",")[0]].manifest, paths) for k in sessions}
        runs = {k: partial(s.run, None, {"pixel_values": pixels[k]}) for k, s in sessions.items()}
        expected = runs["float32"]()[0]
        seconds = {k: np.asarray(v) for k, v in paired(runs, rounds, 3, time.process_time).items()}
        for kind, taken in seconds.items():
            found = runs[kind]()[0]
            difference = float(np.abs(found - expected).max() / np.abs(expected).max())
            rows.append(
                {
                    "part": "graph",
                    "input": kind,
                    "batch": batch,
                    "processor_ms": {k: 1e3 * v for k, v in percentiles(taken).items()},
                    "time_over_float32": float(np.median(taken / seconds["float32"])),
                    "relative_difference": difference,
                }
            )
    return rows


def wire_rows(
    artifacts: Mapping[str, Artifact], tool: PerfAnalyzer, folder: Path, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """Both models on one server under load."""
    for form, artifact in artifacts.items():
        serve(ServeRequest((artifact.path,), folder, ServeOptions(name=form)))
    images = {k: load_inputs(v.manifest, sample_paths()) for k, v in artifacts.items()}
    found: dict[tuple[int, str], list[Any]] = {}
    with running(RunRequest(folder, gpu=False)) as server:
        for number in range(rounds):
            # The second of two may meet a warmer machine: which it is changes every round.
            for concurrency in CONCURRENCIES:
                for form in FORMS[:: -1 if number % 2 else 1]:
                    load = tool.measure(server.grpc, form, concurrency, images[form], seconds)
                    found.setdefault((concurrency, form), []).append(load)
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
        stand_in = server.stand_in
    rows = []
    for (concurrency, form), loads in found.items():
        rates = np.array([load.images_per_second for load in loads])
        floats = np.array([one.images_per_second for one in found[concurrency, "float32"]])
        rows.append(
            {
                "part": "wire",
                "input": form,
                "concurrency": concurrency,
                "bytes": int(images[form][0].nbytes),
                "images_per_second": float(np.median(rates)),
                "latency_ms": {
                    p: float(np.median([load.latency_ms[p] for load in loads]))
                    for p in ("p50", "p95", "p99")
                },
                "throughput_over_float32": float(np.median(rates / floats)),
                "stand_in": stand_in,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--perf-analyzer", type=Path, metavar="TOOLS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=9.0, help="of one measurement")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for model, r in MODELS.items():
        with ExitStack() as stack:
            folder, tools = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in "12")
            try:
                tool = PerfAnalyzer(arguments.perf_analyzer, tools)
            except TomeExportError as error:
                print(f"Error: {error}", file=sys.stderr)
                return error.exit_code
            artifacts: dict[str, Artifact] = {
                form: build(
                    BuildRequest(
                        model,
                        folder / form,
                        Schedule.of(r),
                        weights="random",
                        engine="none",
                        batch=BatchRange(1, 4, max(BATCHES)),
                        check=False,
                        input=form,
                    )
                )
                for form in FORMS
            }
            load = os.getloadavg()[0]
            found = graph_rows(artifacts, 6 * arguments.rounds)
            found += wire_rows(
                artifacts, tool, folder / "models", arguments.rounds, arguments.seconds
            )
        common = {"benchmark": "raw_pixels", "model": model, "r": r, "load_average_before": load}
        rows += [common | row for row in found]
        for row in found:
            show(model, row)
        sys.stdout.flush()
    if not arguments.no_write:
        print(write_rows("raw_pixels", rows))
    return 0


def show(model: str, row: Mapping[str, Any]) -> None:
    if row["part"] == "graph":
        p50 = row["processor_ms"]["p50"]
        print(
            f"{model} alone, batch {row['batch']}, {row['input']}: {p50:.2f} ms, "
            f"{row['time_over_float32']:.3f} of float32's time, differs by "
            f"{row['relative_difference']:.1e}"
        )
        return
    p50 = row["latency_ms"]["p50"]
    print(
        f"{model} served{' (stand-in backend)' * row['stand_in']}, concurrency "
        f"{row['concurrency']}, {row['input']}: {row['images_per_second']:.1f} images/s, p50 "
        f"{p50:.1f} ms, {row['throughput_over_float32']:.3f} of float32's throughput"
    )


if __name__ == "__main__":
    sys.exit(main())
