"""Write docs/runtimes.md's table: which runtimes take exported graphs and compute the same.

python scripts/runtimes.py

Needs the extras ``dev`` and ``rtx``, and Node with onnxruntime-web, which ``make test`` installs
beside the environment.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tome_export.engine import EngineOptions
from tome_export.engine.tensorrt_rtx import TensorRTRTX
from tome_export.merge.plan import step_name
from tome_export.models import resolve
from tome_export.onnx.export import ExportOptions, onnx_from_model
from tome_export.onnx.files import load
from tome_export.onnx.twin import LEAD, twin_from_model
from tome_export.patch import MergedModel, patch
from tome_export.runtime.registry import backend_of
from tome_export.runtime.runner import Runnable
from tome_export.spec import INPUT_NAME, LOGITS, SOURCE_MAP, BatchRange, Precision

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "runtimes.md"
TABLE = ("<!-- table by scripts/runtimes.py -->\n", "<!-- end of table -->")

MODEL, R, IMAGES = "vit_digits", 8, 4
PRECISIONS: tuple[Precision, ...] = ("fp32", "fp16")

TOLERANCE: Mapping[Precision, float] = {"fp32": 1e-5, "fp16": 1e-2}
"""Largest difference of a logit from PyTorch in fp32, as a share of the largest logit."""

NODE_PACKAGE = "onnxruntime-web"
NODE_FOLDER = Path(sys.prefix) / "share" / "tome-export" / NODE_PACKAGE / "node_modules"

Arrays = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """A model exported in one precision, and what PyTorch in fp32 makes of the same images.

    Attributes:
        precision: Of the graph.
        path: The graph as shipped.
        twin: The graph that shows its plans, deciding for itself.
        inputs: Of the graph.
        twin_inputs: Of the twin.
        expected: Logits, source map and every plan.
    """

    precision: Precision
    path: Path
    twin: Path
    inputs: Arrays
    twin_inputs: Arrays
    expected: Arrays


@dataclass(frozen=True)
class Runtime:
    """One row of the table.

    Attributes:
        name: As the page calls it.
        version: Of what runs, asked only where it is not missing.
        missing: Why it cannot be tried here; None if it can.
        run: Gives a graph's outputs; None where a graph can only be built here.
    """

    name: str
    version: Callable[[], str]
    missing: Callable[[], str | None]
    run: Callable[[Path, Arrays, Precision], Arrays] | None


def case_of(folder: Path, precision: Precision) -> Case:
    """Export the model and run PyTorch.

    Args:
        folder: For the two graphs.
        precision: Of the graphs.
    """
    import torch

    model = patch(resolve(MODEL).load().module, R, source_map=True).eval()
    path, twin_path = folder / f"{precision}.onnx", folder / f"{precision}.twin.onnx"
    options = ExportOptions(precision=precision, batch=BatchRange(1, IMAGES, IMAGES))
    onnx_from_model(model, path, options, [LOGITS, SOURCE_MAP])
    twin = twin_from_model(load(path))
    onnx.save(twin.model, twin_path)
    shape = (IMAGES, *model.input_size)
    images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    expected = _expected(model, torch.from_numpy(images))
    given = {
        name: np.zeros_like(expected[shown])
        for layer in twin.layers
        for name, shown in zip(layer.given, layer.chosen, strict=True)
    }
    inputs = {INPUT_NAME: images}
    lead = {LEAD: np.zeros((IMAGES, 1), bool)}
    return Case(precision, path, twin_path, inputs, inputs | lead | given, expected)


def _expected(model: MergedModel, images: Any) -> Arrays:
    import torch

    with torch.no_grad():
        found = dict(zip((LOGITS, SOURCE_MAP), map(np.asarray, model(images)), strict=True))
        _, trace = model.forward_traced(images)
    for layer in trace:
        for name, part in zip(layer.plan._fields, layer.plan, strict=True):
            found[f"{step_name(layer.layer)}.{name}"] = part.numpy()
    return found


def on_backend(name: str) -> Callable[[Path, Arrays, Precision], Arrays]:
    """Run a graph on one of the package's own backends."""

    def run(path: Path, inputs: Arrays, precision: Precision) -> Arrays:
        runnable = Runnable(label=path.name, precision=precision, output_name=LOGITS, graph=path)
        with backend_of(name).open(runnable) as runner:
            return runner.infer(inputs)

    return run


def on_reference(path: Path, inputs: Arrays, precision: Precision) -> Arrays:  # noqa: ARG001
    """Run a graph on ONNX's own evaluator, which is NumPy."""
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(load(path))
    return dict(zip(evaluator.output_names, evaluator.run(None, dict(inputs)), strict=True))


def on_web(path: Path, inputs: Arrays, precision: Precision) -> Arrays:  # noqa: ARG001
    """Run a graph on the browser's ONNX Runtime, WebAssembly, under Node."""
    request = {
        "model": str(path),
        "inputs": {
            name: {
                "type": str(array.dtype),
                "dims": array.shape,
                "data": base64.b64encode(array.tobytes()).decode(),
            }
            for name, array in inputs.items()
        },
    }
    done = subprocess.run(
        [_node_program(), str(Path(__file__).with_suffix(".mjs")), str(NODE_FOLDER)],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(done.stderr.strip()[-2000:])
    return {
        name: np.frombuffer(base64.b64decode(value["data"]), value["type"]).reshape(value["dims"])
        for name, value in json.loads(done.stdout)["outputs"].items()
    }


def _node_program() -> str:
    found = shutil.which("node")
    if found is None:
        raise SystemExit("Node is not installed")
    return found


def _node() -> str:
    found = subprocess.run(
        [_node_program(), "--version"], capture_output=True, text=True, check=True
    )
    package = json.loads((NODE_FOLDER / NODE_PACKAGE / "package.json").read_text())
    return f"{package['version']}, Node {found.stdout.strip().removeprefix('v')}"


def _missing_web() -> str | None:
    if shutil.which("node") is None:
        return "Node is not installed"
    if not (NODE_FOLDER / NODE_PACKAGE).is_dir():
        return f"{NODE_PACKAGE} is not in {NODE_FOLDER.parent}; `make test` installs it"
    return None


def _missing_rtx() -> str | None:
    found = importlib.util.find_spec("tensorrt_rtx")
    return None if found else "tensorrt_rtx is not installed: pip install tensorrt-rtx"


RUNTIMES = (
    Runtime(
        "ONNX Runtime, CPU",
        lambda: version("onnxruntime"),
        backend_of("ort-cpu").missing,
        on_backend("ort-cpu"),
    ),
    Runtime("onnx.reference, NumPy", lambda: version("onnx"), lambda: None, on_reference),
    Runtime(
        "OpenVINO, CPU",
        lambda: version("openvino"),
        backend_of("openvino").missing,
        on_backend("openvino"),
    ),
    Runtime("onnxruntime-web, WebAssembly", _node, _missing_web, on_web),
    Runtime(
        "TensorRT-RTX, parser and builder", lambda: version("tensorrt-rtx"), _missing_rtx, None
    ),
)


def verdict(runtime: Runtime, case: Case) -> str:
    """What a cell of the table says of one graph; an exception is the runtime's own refusal."""
    if runtime.run is None:
        backend = TensorRTRTX()
        options = EngineOptions(batch=BatchRange(1, IMAGES, IMAGES))
        backend.parse(case.twin)
        backend.build(case.path, options, case.path.with_suffix(".engine"))
        return "builds; runs on a GPU only"
    found = {
        **runtime.run(case.twin, case.twin_inputs, case.precision),
        **runtime.run(case.path, case.inputs, case.precision),
    }
    for name, expected in case.expected.items():
        if found[name].shape != expected.shape:
            return f"{name} has shape {found[name].shape}"
    decisions = [name for name in case.expected if name != LOGITS]
    wrong = [name for name in decisions if not np.array_equal(found[name], case.expected[name])]
    if wrong:
        return f"other plans: {', '.join(wrong)}"
    expected = case.expected[LOGITS]
    error = float(np.abs(found[LOGITS] - expected).max() / np.abs(expected).max())
    allowed = TOLERANCE[case.precision]
    if not error <= allowed:
        return f"same plans, off by {error:.1e}"
    return f"same plans, within {allowed:.0e}"


def row(runtime: Runtime, verdicts: Mapping[Precision, str]) -> str:
    """One line of the table."""
    cells = (runtime.name, runtime.version(), *(verdicts[p] for p in PRECISIONS))
    return f"| {' | '.join(cells)} |"


@contextlib.contextmanager
def cases() -> Iterator[dict[Precision, Case]]:
    """The model in every precision, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield {precision: case_of(Path(folder), precision) for precision in PRECISIONS}


def table() -> str:
    """Try everything.

    Raises:
        SystemExit: if a runtime is missing here.
    """
    header = ("runtime", "version", *PRECISIONS)
    lines = [f"| {' | '.join(header)} |", f"|{' --- |' * len(header)}"]
    with cases() as made:
        for runtime in RUNTIMES:
            if reason := runtime.missing():
                raise SystemExit(f"{runtime.name} is missing: {reason}")
            print(runtime.name, file=sys.stderr)
            lines.append(row(runtime, {p: verdict(runtime, case) for p, case in made.items()}))
    return "\n".join([*lines, "", f"Python {platform.python_version()}, {platform.machine()}.", ""])


def main() -> None:
    """Write the page."""
    made = table()
    page = PAGE.read_text(encoding="utf-8")
    begin, end = page.index(TABLE[0]) + len(TABLE[0]), page.index(TABLE[1])
    PAGE.write_text(page[:begin] + made + page[end:], encoding="utf-8")


if __name__ == "__main__":
    main()
