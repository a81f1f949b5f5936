"""Tiny model repositories, written by hand, and servers that run them."""

from __future__ import annotations

import contextlib
import os
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
from manifests import engine_values, manifest, merging

from tome_export.artifact import write_manifest
from tome_export.artifact.bench import BENCH, Bench
from tome_export.artifact.environment import Environment
from tome_export.errors import MissingComponentError
from tome_export.serve.installation import Installation, find
from tome_export.serve.server import SHARED_MEMORY, RunningServer, RunRequest, running
from tome_export.spec import Preprocessing

IDENTITY = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        inputs = [pb_utils.get_input_tensor_by_name(r, "x").as_numpy() for r in requests]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("y", x)]) for x in inputs]
"""

LABELS = """
import io
import numpy as np
import triton_python_backend_utils as pb_utils
from PIL import Image

class TritonPythonModel:
    # Grey levels of the first pixel as scores of three classes.
    def execute(self, requests):
        return [self.answer(r) for r in requests]

    def answer(self, request):
        data = pb_utils.get_input_tensor_by_name(request, "image").as_numpy()
        images = [Image.open(io.BytesIO(x)).convert("RGB") for x in data.reshape(-1)]
        if any(image.size == (13, 13) for image in images):
            error = pb_utils.TritonError("13 x 13 is\\nno good size")
            return pb_utils.InferenceResponse(error=error)
        pixels = np.array([image.getpixel((0, 0)) for image in images], np.float32) / 255
        order = np.argsort(-pixels, axis=1, kind="stable").astype(np.int32)
        names = np.array(["röd", "green", "blue"], np.object_)[order]
        scores = np.take_along_axis(pixels, order, axis=1)
        tensors = {"label": np.vectorize(str.encode, otypes=[object])(names),
                   "score": scores, "index": order}
        return pb_utils.InferenceResponse([pb_utils.Tensor(n, t) for n, t in tensors.items()])
"""

FEATURES = """
import numpy as np
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        images = [pb_utils.get_input_tensor_by_name(r, "image").as_numpy() for r in requests]
        lengths = [np.vectorize(len)(i).astype(np.float32) for i in images]
        outputs = [np.concatenate([n, n + 1], axis=1) for n in lengths]
        return [pb_utils.InferenceResponse([pb_utils.Tensor("features", o)]) for o in outputs]
"""

REFUSES = """
import triton_python_backend_utils as pb_utils

class TritonPythonModel:
    def execute(self, requests):
        errors = [pb_utils.TritonError("not today") for _ in requests]
        return [pb_utils.InferenceResponse(error=error) for error in errors]
"""

IMAGE_INPUT = ("image", "STRING", [1])
LABEL_OUTPUTS = (("label", "STRING", [3]), ("score", "FP32", [3]), ("index", "INT32", [3]))

Tensor = tuple[str, str, list[int]]


def write_model(
    repository: Path, name: str, inputs: list[Tensor], outputs: list[Tensor], *, backend: str
) -> Path:
    """A model folder with its config; returns the empty version folder."""

    def tensors(kind: str, given: list[Tensor]) -> str:
        return "\n".join(
            f'{kind} {{ name: "{n}" data_type: TYPE_{t} dims: {dims} }}' for n, t, dims in given
        )

    version = repository / name / "1"
    version.mkdir(parents=True)
    (repository / name / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "{backend}"\nmax_batch_size: 8\n{tensors("input", inputs)}\n'
        f"{tensors('output', outputs)}\ninstance_group {{ kind: KIND_CPU count: 1 }}\n"
        "dynamic_batching { max_queue_delay_microseconds: 1000 }\n"
    )
    return version


def write_python(
    repository: Path, name: str, code: str, inputs: list[Tensor], outputs: list[Tensor]
) -> None:
    version = write_model(repository, name, inputs, outputs, backend="python")
    (version / "model.py").write_text(textwrap.dedent(code))


def write_identity(repository: Path, name: str = "identity", code: str = IDENTITY) -> None:
    write_python(repository, name, code, [("x", "FP32", [4])], [("y", "FP32", [4])])


def write_refusing(repository: Path, name: str) -> None:
    """A model of ``write_onnx``'s interface that answers every request with «not today»."""
    tensors = [("pixel_values", "FP32", [3, 8, 8])], [("logits", "FP32", [5])]
    write_python(repository, name, REFUSES, *tensors)


def write_onnx(repository: Path, name: str = "small", dims: list[int] | None = None) -> Path:
    """``logits = pixel_values [B, 3, 8, 8] @ weights`` for the ONNX Runtime backend."""
    import onnx

    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((192, 5), dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixel_values"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("pixel_values", float32, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("logits", float32, ["batch", 5])],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    pixels = [("pixel_values", "FP32", dims or [3, 8, 8])]
    logits = [("logits", "FP32", [5])]
    version = write_model(repository, name, pixels, logits, backend="onnxruntime")
    onnx.save(model, version / "model.onnx")
    return version / "model.onnx"


def members(group: int) -> list[int]:
    """Processes of a group that run; ended ones wait for whoever collects them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            if not ended and os.getpgid(process.pid) == group:
                found.append(process.pid)
    return found


def naming(text: str) -> list[int]:
    """Processes other than this one whose command line has ``text`` in it."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and any(text in word for word in process.cmdline()):
                found.append(process.pid)
    return found


def own_memory() -> set[str]:
    """Shared memory of the servers that this process has started."""
    return {path.name for path in SHARED_MEMORY.glob(f"tome_export_{os.getpid()}_*")}


@pytest.fixture(scope="session")
def by_hand() -> SimpleNamespace:
    """The functions above, for tests."""
    return SimpleNamespace(
        write_model=write_model,
        write_python=write_python,
        write_identity=write_identity,
        write_refusing=write_refusing,
        write_onnx=write_onnx,
        write_artifact=write_artifact,
        members=members,
        naming=naming,
        own_memory=own_memory,
    )


def find_or_skip() -> Installation:
    try:
        return find()
    except MissingComponentError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def installation() -> Installation:
    """The server of this machine; the test is skipped where there is none."""
    return find_or_skip()


@pytest.fixture
def nothing_left() -> Iterator[Callable[[RunningServer], None]]:
    """Whatever the test did: no process, folder or shared memory of these servers is left."""
    before = own_memory()
    groups: list[int] = []
    folders: list[Path] = []

    def watch(server: RunningServer) -> None:
        groups.append(server.pid)
        folders.append(server.log_path.parent)
        assert naming(str(folders[-1])), "no watchdog"

    yield watch
    assert groups, "no server was watched"
    # What was killed is gone when the system has collected it.
    deadline = time.monotonic() + 10
    while any(members(group) for group in groups) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {group: members(group) for group in groups if members(group)} == {}
    # The server's own and the watchdog's command lines name its folder.
    assert [folder for folder in folders if folder.exists() or naming(str(folder))] == []
    assert own_memory() - before == set()


@pytest.fixture(scope="session")
def plain_server(tmp_path_factory) -> Iterator[tuple[RunningServer, Path]]:
    """A server of one ONNX model and an identity, and the ONNX file."""
    find_or_skip()
    repository = tmp_path_factory.mktemp("plain")
    model = write_onnx(repository)
    write_identity(repository)
    with running(RunRequest(repository)) as server:
        yield server, model
        server.stop(0)


@pytest.fixture(scope="session")
def image_server(tmp_path_factory) -> Iterator[RunningServer]:
    """A server of two pipelines: ``colour_pipeline`` gives labels, ``tower_pipeline`` features."""
    find_or_skip()
    repository = tmp_path_factory.mktemp("images")
    write_python(repository, "colour_pipeline", LABELS, [IMAGE_INPUT], list(LABEL_OUTPUTS))
    features = [("features", "FP32", [2])]
    write_python(repository, "tower_pipeline", FEATURES, [IMAGE_INPUT], features)
    write_identity(repository, "tower")
    with running(RunRequest(repository)) as server:
        yield server
        server.stop(0)


@pytest.fixture
def counts() -> Callable[[Any, str], Any]:
    """``counts(grpc, model)``: inferences (images) and executions (batches) of a model so far."""

    def count(grpc: Any, model: str) -> Any:
        # The server counts a request a moment after it has answered it.
        seen = None
        while True:
            stats = grpc.get_inference_statistics(model).model_stats[0]
            before, seen = seen, (stats.inference_count, stats.execution_count)
            if seen == before:
                return np.array(seen)
            time.sleep(0.2)

    return count


# Artifacts: real ones, of a model of one layer, so that they take milliseconds.


def write_artifact(folder: Path, **changes: object) -> Path:
    """An artifact of ``logits = pixel_values [B, 3, 8, 8] @ weights``.

    Keyword arguments: ``size`` (height and width), ``schedule``, ``r``, ``merge_op``,
    ``precision``, ``batch``, ``labels``, ``model``, ``attention``, ``seed`` and ``scale`` (of the
    weights), ``ms`` (measured latency, of any backend or by backend), and ``engines`` (name ->
    batch), whose files are no real engines and ``version_compatible`` or not.
    """
    import onnx

    batch = str(changes.get("batch", "1:4:8"))
    rows = batch.split(":")
    size = int(rows[-1]) if len({*rows}) == 1 else "batch"
    seed = int(changes.get("seed", 0))  # type: ignore[call-overload]
    shape = (3, *changes.get("size", (8, 8)))  # type: ignore[misc]
    count = int(np.prod(shape))
    weights = np.random.default_rng(seed).standard_normal((count, 5), dtype=np.float32)
    weights *= np.float32(changes.get("scale", 1))
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    precision = str(changes.get("precision", "fp32"))
    stored = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["pixel_values"], ["flat"]),
            helper.make_node("Cast", ["stored"], ["weights"], to=float32),
            helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
        ],
        "small",
        [helper.make_tensor_value_info("pixel_values", float32, [size, *shape])],
        [helper.make_tensor_value_info("logits", float32, [size, 5])],
        [helper.make_tensor("stored", stored.get(precision, float32), weights.shape, weights)],
    )
    folder.mkdir(parents=True)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    described = [
        {"name": "pixel_values", "dtype": "float32", "shape": [-1, *shape]},
        {"name": "logits", "dtype": "float32", "shape": [-1, 5]},
    ]
    if "ms" in changes:
        ms = changes["ms"]
        measured = Bench(
            latency_ms={"ort-cpu": ms, "tensorrt": ms} if isinstance(ms, int | float) else ms,
            environment=Environment(
                cpu="c",
                cores=1,
                gpu=None,
                driver=None,
                machine="m",
                python="3",
                versions={},
                date="",
            ),
            against="unmerged",
            macs_ratio=1.0,
            rounds=1,
            warmup=0,
            images="noise",
            notes=(),
            rows=(),
            profile=(),
        )
        (folder / BENCH).write_bytes(measured.json_bytes())
    engines = {}
    for name, profile in dict(changes.get("engines", {})).items():  # type: ignore[call-overload]
        file = "model.engine" if name == "tensorrt" else "model.rtx.engine"
        (folder / file).write_bytes(f"engine {seed}".encode())
        engines[name] = {
            **engine_values(file, name),
            "batch": profile,
            "version_compatible": bool(changes.get("version_compatible")),
            "inputs": described[:1],
            "outputs": described[1:],
        }
    plain = manifest()
    pixels, logits = ({**t, "shape": [size, *t["shape"][1:]]} for t in described)
    digests = {"state_sha256": f"0{changes.get('size', '')}", "common_sha256": "0"}
    weights = plain.model.weights.model_copy(update={"seed": seed, **digests})
    named = {"name": changes.get("model", "small"), "random_weights": True, "weights": weights}
    merge = {"schedule": "r=8 constant", "r": (8,), "merge_op": "matmul"}
    merge |= {name: changes[name] for name in merge if name in changes}
    merge["r"] = tuple(merge["r"])
    write_manifest(
        folder,
        manifest(
            model=plain.model.model_copy(update=named),
            merge=plain.merge.model_copy(update=merge),
            onnx=plain.onnx.model_copy(update={"attention": changes.get("attention", "parts")}),
            **merging(sum(merge["r"]) + 5, merge["r"]),
            precision=precision,
            batch=batch,
            input=pixels,
            inputs=[pixels],
            output=logits,
            outputs=[logits],
            preprocessing=Preprocessing(shape, (0.5,) * 3, (0.5,) * 3, 1.0, "bicubic"),
            labels=changes.get("labels"),
            engines=engines,
        ),
    )
    return folder


@pytest.fixture
def make_artifact(tmp_path) -> Callable[..., Path]:
    """See ``write_artifact``; each call makes another one."""
    made: list[Path] = []

    def make(**changes: object) -> Path:
        made.append(tmp_path / "artifacts" / str(len(made)))
        return write_artifact(made[-1], **changes)

    return make
