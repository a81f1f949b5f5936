"""What the runtimes of this machine make of the exported models; each where it is installed.

TensorRT: build the plugin engine, check parity, run it in a fresh process without registration.
ONNX Runtime's CUDA provider: parity and speed of the fp16 graph without plugins. TensorRT-RTX:
whether this GPU takes its portable engine, and parity if so.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gpu_checkout import ROOT
from gpu_rows import Row, attempt
from harness import paired, percentiles

from tome_export.spec import INPUT_NAME, BatchRange

if TYPE_CHECKING:
    import onnx

PART = "runtimes"
MODEL, R = "vit_digits", 8
CUDA = "CUDAExecutionProvider"
SPEED_MODEL, SPEED_R, SPEED_BATCH, IMAGES = "vit_b16", 16, 32, 4
_CLI = (
    "import sys; sys.path.insert(0, {folder!r}); import gpu_checkout; "
    "from tome_export.cli.main import main; sys.exit(main())"
)
_TAIL = 2000
PARITY_FAILED = 5
"""Exit status of ``tome-export`` that is a wrong result, and no refusal."""


def main(quick: bool) -> None:
    """Emit a row per step of every runtime, or why it was skipped."""
    attempt(PART, "tensorrt", {}, tensorrt_rows)
    attempt(PART, "onnxruntime", {}, onnxruntime_rows, quick)
    attempt(PART, "tensorrt-rtx", {}, tensorrt_rtx_rows)


def tensorrt_rows() -> list[Row]:
    """Build, check and deserialise the plugin engine of a small artifact; run the marked tests."""
    if not _can_import("tensorrt"):
        return [{"skipped": "tensorrt is not installed"}]
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        build = ["build", MODEL, "--r", str(R), "--fp16", "--merge-op", "plugin"]
        built = command([*build, "--engine", "tensorrt", "--output", str(artifact), "--json"])
        rows.append({"case": "build", "model": MODEL, **built})
        if not built["passed"]:
            return rows
        check = ["check", str(artifact), "--backend", "tensorrt", "--json"]
        rows.append({"case": "check", "model": MODEL, **command(check)})
        rows.append({"case": "fresh process", "model": MODEL, **fresh_engine(artifact)})
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "tensorrt", str(ROOT / "tests")]
    return [*rows, {"case": "pytest -m tensorrt", **_finished(tests, 240)}]


def fresh_engine(artifact: Path) -> dict[str, Any]:
    """Run the engine where nothing is registered, and compare with ONNX Runtime on the CPU."""
    pixels, output = artifact.parent / "pixels.npy", artifact.parent / "output.npy"
    images = _images(MODEL, 4)
    np.save(pixels, images)
    script = Path(__file__).with_name("gpu_fresh_engine.py")
    files = [str(artifact / "model.engine"), str(pixels), str(output)]
    ran = _finished([sys.executable, str(script), *files], 120)
    if not ran["passed"] or not _can_import("onnxruntime"):
        return ran
    import onnx

    from tome_export.runtime import ort

    runner = ort.OrtRunner(onnx.load(artifact / "model.onnx"))
    (expected,) = runner.infer({INPUT_NAME: images}).values()
    found = np.load(output)
    same = bool((found.argmax(1) == expected.argmax(1)).all())
    difference = float(np.abs(found - expected.astype(np.float32)).max())
    passed = same and bool(np.isfinite(found).all())
    return ran | {"max_abs_to_onnxruntime": difference, "same_classes": same, "passed": passed}


def tensorrt_rtx_rows() -> list[Row]:
    """Whether this GPU takes the engine that is built without one; a refusal is a result."""
    if not _can_import("tensorrt_rtx"):
        return [{"skipped": "tensorrt_rtx is not installed"}]
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        build = ["build", MODEL, "--r", str(R), "--fp16", "--engine", "tensorrt-rtx"]
        built = command([*build, "--output", str(artifact), "--json"])
        rows: list[Row] = [{"case": "build", "model": MODEL, **built}]
        if not built["passed"]:
            return rows
        checked = command(["check", str(artifact), "--backend", "tensorrt-rtx", "--json"])
        taken = checked.pop("passed")
        if checked.get("status") == PARITY_FAILED:
            checked["passed"] = False
        return [*rows, {"case": "check", "model": MODEL, "taken": taken, **checked}]


def onnxruntime_rows(quick: bool) -> list[Row]:
    """Parity and speed of plugin-free graphs on the CUDA provider."""
    if not _can_import("onnxruntime"):
        return [{"skipped": "onnxruntime is not installed"}]
    import onnxruntime

    if CUDA not in onnxruntime.get_available_providers():
        return [{"skipped": f"this onnxruntime has no {CUDA}"}]
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()
    name = MODEL if quick else SPEED_MODEL
    r = R if quick else SPEED_R
    for form in ("fused", "decomposed"):
        about: Row = {"case": f"{form} attention", "model": name}
        attempt(PART, "onnxruntime", about, onnxruntime_row, name, r, form, CUDA)
    return []


def onnxruntime_row(
    name: str, r: int, form: Any, provider: str, depth: int | None = None, batch: int = SPEED_BATCH
) -> dict[str, Any]:
    """Parity of the merged fp16 graph, and its speed against the unmerged one.

    Args:
        name: Of the recipe; random weights unless it brings its own.
        r: Tokens to merge.
        form: Of the attention, as in ``ExportOptions``.
        provider: Of ONNX Runtime.
        depth: Layers, if not all.
        batch: Images per run when timing.
    """
    import onnx

    from tome_export.models import resolve
    from tome_export.onnx.build import onnx_from_model
    from tome_export.onnx.export import ExportOptions
    from tome_export.parity.check import check_parity
    from tome_export.patch import patch

    recipe = resolve(name)
    weights = "pretrained" if recipe.bundled else "random"
    module = recipe.load(weights=weights, depth=depth).module
    models = {"merged": patch(module, r), "unmerged": patch(module, 0)}
    options = ExportOptions(
        precision="fp16", batch=BatchRange(1, min(8, batch), batch), attention=form
    )
    runs: dict[str, Callable[[], object]] = {}
    images = _images(name, batch)
    with tempfile.TemporaryDirectory() as folder:
        exported = {}
        for label, model in models.items():
            path = Path(folder) / f"{label}.onnx"
            onnx_from_model(model, path, options, recipe.output_name)
            exported[label] = onnx.load(path)
    report = check_parity(
        models["merged"],
        exported["merged"],
        images[:IMAGES],
        "fp16",
        options.batch,
        runner_factory=lambda graph: OrtRunner(graph, provider),
        candidate=f"onnx on ONNX Runtime {provider}",
    )
    for label, graph in exported.items():
        runs[label] = OrtRunner(graph, provider).bound(images)
    seconds = paired(runs, 20, warmup=5)
    ratio = models["merged"].macs(merged=False) / models["merged"].macs()
    speedup = float(np.median(seconds["unmerged"] / seconds["merged"]))
    return {
        "r": r,
        "batch": batch,
        "passed": report.passed,
        "failures": list(report.failures),
        "decisions": report.decisions,
        "disagreements": report.disagreements,
        "defects": report.defects,
        "cosine": report.output.cosine,
        "led_relative_error": report.led_output.relative,
        "seconds": {label: percentiles(values) for label, values in seconds.items()},
        "macs_ratio": ratio,
        "speedup": {"merged": speedup},
        "speedup_over_macs_ratio": {"merged": speedup / ratio},
    }


class OrtRunner:
    """ONNX Runtime on one provider; what that has no kernel for runs on the CPU."""

    def __init__(self, model: onnx.ModelProto, provider: str) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=list(dict.fromkeys([provider, "CPUExecutionProvider"])),
        )
        if self._session.get_providers()[0] != provider:
            raise RuntimeError(f"{provider} did not start; ONNX Runtime took the CPU instead")
        self._device = "cuda" if provider == CUDA else "cpu"
        self._outputs = [value.name for value in self._session.get_outputs()]

    def __enter__(self) -> OrtRunner:
        return self

    def __exit__(self, *_: object) -> None:
        del self._session

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


def _images(name: str, count: int) -> np.ndarray[Any, Any]:
    from tome_export.models import resolve
    from tome_export.models.samples import sample_pixels

    recipe = resolve(name)
    found = sample_pixels(recipe, min(count, 6))
    return np.ascontiguousarray(np.resize(found, (count, *found.shape[1:])))


def command(arguments: list[str]) -> dict[str, Any]:
    """Run ``tome-export`` with arguments; see ``_finished``."""
    code = _CLI.format(folder=str(Path(__file__).parent))
    return _finished([sys.executable, "-c", code, *arguments], 300)


def _finished(line: list[str], limit_s: float) -> dict[str, Any]:
    """Exit status, whether that is 0, parity reports, and the end of what a failure said."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"passed": False, "said": f"not done after {limit_s:.0f} s"}
    found: dict[str, Any] = {"passed": done.returncode == 0, "status": done.returncode}
    reports = reports_in(done.stdout)
    if reports:
        found["reports"] = reports
    if done.returncode != 0:
        found["said"] = (done.stdout[-_TAIL:] + done.stderr[-_TAIL:]).strip()
    return found


def reports_in(output: str) -> list[dict[str, Any]]:
    """The parity reports in what ``tome-export check --json`` printed, without their layers."""
    try:
        result = json.loads(output)
    except ValueError:
        return []
    reports = result.get("reports", []) if isinstance(result, dict) else []
    return [{key: value for key, value in r.items() if key != "layers"} for r in reports]


def _can_import(name: str) -> bool:
    return importlib.util.find_spec(name) is not None
