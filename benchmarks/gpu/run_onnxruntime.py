"""What ONNX Runtime's CUDA provider makes of the fp16 graphs: parity by decisions, and speed."""

from __future__ import annotations

import collections
import ctypes
import site
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.gpu.graphs import BATCH, Form, GraphCase, Graphs
from benchmarks.gpu.parts import Context
from benchmarks.gpu.prepared import Prepared
from benchmarks.gpu.rows import attempt
from benchmarks.harness import paired, percentiles
from scripts.thin_onnxruntime_gpu import PROVIDER, linked_libraries
from tome_export.runtime import ort
from tome_export.spec import INPUT_NAME

if TYPE_CHECKING:
    import onnx

    from tome_export.artifact.parity import ParityReport

MODEL = "vit_b16"
CASES = tuple(GraphCase(r, form) for form in ("fused", "parts") for r in (0, 16, 13))
SPEED_BATCH = {"cuda": 64, "cpu": 8}
IMAGES = 4
OPENED_BY_NAME = "libcudnn.so.9"
"""What the provider opens itself for convolutions: where pip put it, it finds it once loaded."""


def fused(context: Context) -> None:
    """Emit r = 16 with the Attention operator."""
    emit_row(context, 16, "fused")


def in_parts(context: Context) -> None:
    """Emit r = 16 with attention in parts."""
    emit_row(context, 16, "parts")


def r_13(context: Context) -> None:
    """Emit r = 13, whose second layer but four has 132 tokens: no multiple of 8."""
    emit_row(context, 13, "parts")
    emit_row(context, 13, "fused")


def tf32(context: Context) -> None:
    """Emit r = 16 in parts with TF32 on: the provider's own default, and not the project's."""
    emit_row(context, 16, "parts", tf32=True)


def emit_row(context: Context, r: int, form: Form, tf32: bool = False) -> None:
    """A row of one graph against the unmerged one in the same form."""
    about = {"case": f"attention {form}", "r": r}
    about |= {"batch": SPEED_BATCH[context.device]}
    about |= {"use_tf32": tf32, "dtype": "float16"}
    attempt("end to end", about, measured, context, r, form, tf32)


def measured(context: Context, r: int, form: Form, tf32: bool) -> dict[str, Any]:
    """Parity and speed of one graph."""
    if context.device == "cuda":
        use_carried_onnxruntime(context.prepared)
    graphs = Graphs(context.prepared.graphs)
    merged, unmerged = (graphs.graph(GraphCase(count, form)) for count in (r, 0))
    images = _images(graphs, SPEED_BATCH[context.device])
    report = parity(graphs, r, merged, images[:IMAGES], context.device, tf32)
    runners = {"unmerged": unmerged, "merged": merged}
    opened = {n: BoundSession(graph, context.device, tf32) for n, graph in runners.items()}
    on_cpu = {n: runner.nodes_on_cpu() for n, runner in opened.items()}
    runs = {n: runner.bound(images) for n, runner in opened.items()}
    seconds = paired(runs, 20, warmup=5)
    model = graphs.model(r)
    ratio = model.macs(merged=False) / model.macs()
    speedup = float(np.median(seconds["unmerged"] / seconds["merged"]))
    return {
        "model": graphs.recipe.name,
        "passed": report.passed,
        "failures": list(report.failures),
        "decisions": report.decisions,
        "disagreements": report.disagreements,
        "defects": report.defects,
        "cosine": report.output.cosine,
        "led_relative_error": report.led_output.relative,
        "nodes_on_cpu": on_cpu,
        "onnxruntime": _version(),
        "seconds": {label: percentiles(values) for label, values in seconds.items()},
        "macs_ratio": ratio,
        "speedup": {"merged": speedup},
        "speedup_over_macs_ratio": {"merged": speedup / ratio},
    }


def use_carried_onnxruntime(prepared: Prepared) -> None:
    """Make this process import the ONNX Runtime that was brought, and load what it needs.

    Raises:
        RuntimeError: if another one is imported already.
        OSError: if a half of it, or a CUDA library, is not there.
    """
    prepared.join_onnxruntime()
    sys.path.insert(0, str(prepared.onnxruntime))
    load_cuda_libraries(prepared.onnxruntime / PROVIDER)
    import onnxruntime

    if not Path(onnxruntime.__file__).is_relative_to(prepared.onnxruntime):
        raise RuntimeError(
            f"onnxruntime comes from {onnxruntime.__file__}; expected {prepared.onnxruntime}"
        )


def parity(
    graphs: Graphs,
    r: int,
    graph: onnx.ModelProto,
    images: np.ndarray[Any, Any],
    device: ort.Provider,
    tf32: bool,
) -> ParityReport:
    """The project's own check against PyTorch."""
    from tome_export.parity.compare import check_parity

    return check_parity(
        graphs.model(r),
        graph,
        images,
        "fp16",
        BATCH,
        runner_factory=lambda model: BoundSession(model, device, tf32),
        candidate=f"onnx on ONNX Runtime {device}",
    )


def _images(graphs: Graphs, count: int) -> np.ndarray[Any, Any]:
    from tome_export.data.samples import sample_pixels

    found = sample_pixels(graphs.recipe, min(count, 6))
    return np.ascontiguousarray(np.resize(found, (count, *found.shape[1:])))


def _version() -> str:
    import onnxruntime

    return str(onnxruntime.__version__)


def providers(device: ort.Provider, tf32: bool) -> list[tuple[str, dict[str, str]]]:
    """The project's own providers and options; TF32, if asked for, is all that deviates from them.

    Args:
        device: Of the first provider.
        tf32: Whether fp32 products may be rounded to TF32 on a GPU: the provider's own default.
    """
    found = ort.providers(device)
    if tf32 and device == "cuda":
        found[0][1]["use_tf32"] = "1"
    return found


class BoundSession:
    """A graph in ONNX Runtime, for inputs that lie on the device and nodes counted by provider.

    What the CUDA provider has no kernel for runs on the CPU.

    Args:
        model: The graph, or its file.
        device: ``cuda`` or ``cpu``.
        tf32: As in ``providers``.

    Raises:
        RuntimeError: if the device's provider did not start.
    """

    def __init__(self, model: onnx.ModelProto | Path, device: ort.Provider, tf32: bool) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        wanted = providers(device, tf32)
        source = model if isinstance(model, Path) else model.SerializeToString()
        self._session = onnxruntime.InferenceSession(source, options, providers=wanted)
        first, _ = wanted[0]
        if self._session.get_providers()[0] != first:
            raise RuntimeError(f"{first} did not start; ONNX Runtime took the CPU instead")
        self._device = device
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __enter__(self) -> BoundSession:
        return self

    def __exit__(self, *_: object) -> None:
        del self._session

    def nodes_on_cpu(self) -> dict[str, int]:
        """How many nodes of each operator run on the CPU."""
        found: collections.Counter[str] = collections.Counter()
        for graph in self._session.get_provider_graph_assignment_info():
            if graph.ep_name == "CPUExecutionProvider":
                found.update(node.op_type for node in graph.get_nodes())
        return dict(found)

    def infer(self, inputs: Any) -> dict[str, Any]:
        """Run one batch of numpy arrays."""
        results = self._session.run(None, dict(inputs))
        return dict(zip(self._outputs, results, strict=True))

    def bound(self, images: np.ndarray[Any, Any]) -> Callable[[], object]:
        """A run on images that lie on the device, whose results stay there."""
        import onnxruntime

        value = onnxruntime.OrtValue.ortvalue_from_numpy(images, self._device, 0)
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(INPUT_NAME, value)
        for name in self._outputs:
            binding.bind_output(name, self._device)

        def run() -> None:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run


def load_cuda_libraries(provider: Path) -> None:
    """Load the CUDA libraries that the provider is linked with.

    Raises:
        OSError: if one is nowhere.
    """
    for library in cuda_libraries(provider):
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)


def cuda_libraries(provider: Path) -> list[str]:
    """CUDA libraries that the provider needs, wherever pip put them.

    Args:
        provider: The library; what it needs is read from it.

    Returns:
        Their paths; plain names of those that only the system's loader may know.
    """
    linked = [name for name in linked_libraries(provider.read_bytes()) if name.startswith("libcu")]
    found = []
    for name in (*linked, OPENED_BY_NAME):
        folders = map(Path, (*site.getsitepackages(), *sys.path))
        paths = [path for folder in folders for path in folder.glob(f"nvidia/*/lib/{name}")]
        if paths or name in linked:
            found.append(str(paths[0]) if paths else name)
    return found
