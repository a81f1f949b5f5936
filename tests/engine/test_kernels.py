"""``--merge-op plugin``: what the artifact holds, what runs it, and what is refused."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import triton
from manifests import manifest

from tome_export.artifact import Artifact
from tome_export.build import BuildRequest, build
from tome_export.build.engine import EngineRequest, add_engine
from tome_export.engine import BUILDERS, EngineOptions, Selection, gpu
from tome_export.engine import build as kernels
from tome_export.errors import ExportError, InputError, MissingComponentError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.onnx.plugin import merging_of
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.store import KernelStore
from tome_export.progress import Silent
from tome_export.spec import BatchRange

# The function of that name is in the way of the module.
BUILD = sys.modules["tome_export.build.main"]
FORM = sys.modules["tome_export.build.form"]
TENSORRT, RTX = BUILDERS
H200 = gpu.GpuReport((gpu.Gpu(0, "NVIDIA H200", (9, 0), 150 << 30),), "NVIDIA H200")
FIXED = BatchRange(2, 2, 2)
NO_KERNEL = "use --merge-op matmul, which needs no kernel"


def digits(output: Any, **options: Any) -> BuildRequest:
    fixed = {"schedule": Schedule(8), "precision": "fp16", "merge_op": "plugin", "engine": "none"}
    return BuildRequest("vit_digits", output, **{**fixed, **options})


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return build(digits(tmp_path_factory.mktemp("plugin") / "digits"))


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the kernels' stage see another machine's GPU."""

    def see(report: gpu.GpuReport) -> None:
        monkeypatch.setattr(gpu, "detect", lambda: report)

    return see


def test_the_artifact_holds_nodes_for_the_plugin_and_kernels_for_six_gpus(built):
    model = onnx.load(built.model_path)
    nodes = [node for node in model.graph.node if node.domain == "tome_export"]
    assert [node.op_type for node in nodes] == ["TomeMatch", "TomeMerge"] * 6
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_namespace"] == b"tome_export"
        assert attributes["plugin_version"] == b"1"
        assert attributes["aot"] == 1
    store = KernelStore.read(built.path / "plugins")
    assert [kernel.variant.op for kernel in store.kernels.values()] == ["TomeMatch", "TomeMerge"]
    for kernel in store.kernels.values():
        capabilities = [binary.compute_capability for binary in kernel.binaries]
        assert capabilities == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0"]
    assert built.manifest.merge.merge_op == "plugin"
    files = {f"plugins/{path.name}" for path in (built.path / "plugins").iterdir()}
    assert files | {"model.onnx", "parity.json"} == set(built.manifest.files)
    assert Artifact.open(built.path).manifest == built.manifest


def test_onnx_runtime_runs_it_with_parity(built, tmp_path):
    assert built.manifest.parity.passed
    assert built.manifest.parity.decisions == 528
    fixed = built.manifest.batch
    plain = build(digits(tmp_path / "plain", merge_op="matmul", batch=fixed, check=False))
    images = np.random.default_rng(0).standard_normal((8, 1, 32, 32)).astype(np.float32)
    images = images.reshape(fixed.max, *built.manifest.preprocessing.input_size)
    outputs = [
        onnxruntime.InferenceSession(artifact.model_path, providers=["CPUExecutionProvider"]).run(
            None, {"pixel_values": images}
        )[0]
        for artifact in (built, plain)
    ]
    np.testing.assert_array_equal(*outputs)


def test_tensorrt_rtx_takes_the_function_bodies(built, tmp_path):
    copy = tmp_path / "digits"
    shutil.copytree(built.path, copy)
    changed = add_engine(EngineRequest(copy, engine="tensorrt-rtx"))
    engine = changed.manifest.engines["tensorrt-rtx"]
    assert engine.plugin_layers == 0
    assert "plugins/kernels.json" in changed.manifest.files


def test_a_damaged_kernel_is_found(built, tmp_path):
    copy = tmp_path / "digits"
    shutil.copytree(built.path, copy)
    path = next((copy / "plugins").glob("*.ptx"))
    path.write_text(path.read_text().replace("ret;", "nop;"))
    with pytest.raises(InputError, match=r"\.ptx (does not match the sha256|has \d+ bytes)"):
        add_engine(EngineRequest(copy, engine="tensorrt-rtx"))


def test_it_is_replaced_whole_and_notes_in_its_folder_are_spared(built, tmp_path):
    copy = tmp_path / "digits"
    shutil.copytree(built.path, copy)
    (copy / "plugins" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"holds what is not of the artifact \(plugins\)"):
        build(digits(copy, force=True, check=False))
    (copy / "plugins" / "notes.txt").unlink()
    replaced = build(digits(copy, force=True, merge_op="matmul", check=False))
    assert sorted(path.name for path in copy.iterdir()) == ["build.json", "model.onnx"]
    assert replaced.manifest.merge.merge_op == "matmul"


def test_kernels_are_compiled_for_the_gpus_asked_for(tmp_path):
    options = EngineOptions(compute_capabilities=("9.0", "8.9", "9.0"))
    artifact = build(digits(tmp_path / "two", engine_options=options, check=False))
    assert artifact.manifest.plugins.compute_capabilities == ("8.9", "9.0")
    index = json.loads((artifact.path / "plugins" / "kernels.json").read_text())
    targets = [b["target"] for kernel in index["kernels"] for b in kernel["binaries"]]
    assert targets == ["sm_89", "sm_90a"] * 2


@pytest.mark.parametrize(
    ("capability", "message"),
    [
        (
            "6.1",
            "compute capability is 6.1; the plugin's kernels can be compiled for 7.5, 8.0, 8.6, "
            "8.7, 8.9, 9.0, 10.0, 10.3, 12.0, 12.1: choose among these, or use --merge-op matmul",
        ),
        (
            "current",
            "kernels for the current GPU were asked for, but no GPU here; name its compute "
            "capability instead, such as 8.9",
        ),
    ],
)
def test_gpus_that_cannot_be_compiled_for(tmp_path, on, capability, message):
    on(gpu.GpuReport((), "no GPU here"))
    options = EngineOptions(compute_capabilities=(capability,))
    with pytest.raises(UsageError) as refused:
        build(digits(tmp_path / "x", engine_options=options))
    assert str(refused.value) == message
    assert list(tmp_path.iterdir()) == []


def test_the_gpu_of_this_machine_is_added_for_tensorrt(on):
    on(gpu.GpuReport((gpu.Gpu(0, "Orin", (8, 7), 32 << 30),), "Orin"))
    assert (8, 7) in kernels.capabilities_of((), TENSORRT)
    assert (8, 7) not in kernels.capabilities_of((), RTX)
    assert kernels.capabilities_of(("current",), None) == ((8, 7),)


LIMITS = {
    "tokens": (
        match_contract,
        "MAX_TOKENS",
        64,
        "a layer has 65 tokens; the TomeMatch kernel takes at most 64",
    ),
    "head width": (
        match_contract,
        "MAX_WIDTH",
        8,
        "heads are 16 wide; the TomeMatch kernel takes at most 8",
    ),
    "width": (
        merge_contract,
        "MAX_WIDTH",
        32,
        "tokens are 64 wide; the TomeMerge kernel takes at most 32",
    ),
}


@pytest.mark.parametrize("case", LIMITS)
def test_the_kernels_limits(built, monkeypatch, case):
    layers = merging_of(onnx.load(built.model_path))
    assert kernels.refusal(layers) is None
    module, name, limit, reason = LIMITS[case]
    monkeypatch.setattr(module, name, limit)
    assert kernels.refusal(layers) == reason


def test_a_model_beyond_the_kernels_limits_is_refused(tmp_path, monkeypatch):
    module, name, limit, reason = LIMITS["tokens"]
    monkeypatch.setattr(module, name, limit)
    with pytest.raises(InputError) as refused:
        build(digits(tmp_path / "x"))
    assert str(refused.value) == f"{reason}; {NO_KERNEL}"
    assert list(tmp_path.iterdir()) == []


def test_auto_falls_back_to_plain_operators_beyond_the_limits(tmp_path, monkeypatch, on):
    on(H200)
    monkeypatch.setattr(match_contract, "MAX_TOKENS", 64)
    monkeypatch.setattr(FORM, "takes_plugins", lambda _: True)
    artifact = build(digits(tmp_path / "x", merge_op="auto", batch=FIXED, check=False))
    assert artifact.manifest.merge.note == f"no plugin: {LIMITS['tokens'][3]}; {NO_KERNEL}"
    assert artifact.manifest.merge.merge_op == "matmul"
    assert sorted(path.name for path in artifact.path.iterdir()) == ["build.json", "model.onnx"]
    model = onnx.load(artifact.model_path)
    assert {node.domain for node in model.graph.node} == {""}
    assert not model.functions


def test_auto_takes_the_plugin_for_tensorrt_only(on):
    on(H200)
    assert kernels.takes_plugins(TENSORRT)
    assert not kernels.takes_plugins(RTX)
    assert not kernels.takes_plugins(None)
    on(gpu.GpuReport((gpu.Gpu(0, "Tesla V100", (7, 0), 16 << 30),), "Tesla V100"))
    assert not kernels.takes_plugins(TENSORRT)


COMPILERS = {
    "none": (
        lambda patch: patch.setitem(sys.modules, "triton", None),
        "the Triton language compiles the plugin's kernels and is not installed: pip install "
        "'triton>=3.6', or use --merge-op matmul",
    ),
    "old": (
        lambda patch: patch.setattr(triton, "__version__", "3.5.1"),
        "the Triton language 3.5.1 is installed; the plugin's kernels need 3.6 or later: pip "
        "install 'triton>=3.6', or use --merge-op matmul",
    ),
    "interpreting": (
        lambda patch: patch.setenv("TRITON_INTERPRET", "1"),
        "kernels cannot be compiled while TRITON_INTERPRET is set: unset it",
    ),
}


@pytest.mark.parametrize("case", COMPILERS)
def test_without_the_compiler_nothing_is_begun(tmp_path, monkeypatch, on, case):
    lose, message = COMPILERS[case]
    lose(monkeypatch)
    with pytest.raises(MissingComponentError) as refused:
        build(digits(tmp_path / "x"))
    assert str(refused.value) == message
    assert list(tmp_path.iterdir()) == []
    on(H200)
    assert not kernels.takes_plugins(TENSORRT)


@pytest.mark.parametrize("merge_op", ["plugin", "auto"])
def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, on, merge_op):
    """With ``auto`` the artifact does without kernels that cannot be compiled."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "/proc/no-such-folder")
    monkeypatch.setattr(FORM, "takes_plugins", lambda _: True)
    on(H200)
    request = digits(tmp_path / "x", merge_op=merge_op, batch=FIXED, check=False)
    if merge_op == "auto":
        assert build(request).manifest.merge.merge_op == "matmul"
        assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["build.json", "model.onnx"]
        return
    with pytest.raises(ExportError, match=r"cannot write its cache .*: set TRITON_CACHE_DIR to"):
        build(request)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_merge_needs_no_plugin(tmp_path):
    artifact = build(digits(tmp_path / "x", schedule=Schedule(0), check=False))
    assert artifact.manifest.plugins is None
    assert sorted(path.name for path in artifact.path.iterdir()) == ["build.json", "model.onnx"]


class Builder:
    """Builds nothing and says how many plugin layers there were."""

    file_name = "model.engine"

    def __init__(self, name="tensorrt", plugin_layers=12):
        self.name, self.plugin_layers = name, plugin_layers

    def build(self, *_):
        return SimpleNamespace(version="11.4.0", plugin_layers=self.plugin_layers, notes=())


def engine_of(artifact, plugins, builder):
    return kernels.build_engine(builder, artifact.path, EngineOptions(), Silent(), plugins=plugins)


def test_registration_wants_a_gpu_and_a_kernel_for_it(built, on):
    on(gpu.GpuReport((), "none"))
    plugins = kernels.plugins_of(built.manifest)
    assert plugins.kernels == built.manifest.plugins.kernels
    with pytest.raises(InputError, match="no GPU is visible; a TensorRT engine with plugins"):
        engine_of(built, plugins, Builder())
    # Other backends run the function bodies, whatever the GPU.
    engine_of(built, plugins, Builder("tensorrt-rtx", plugin_layers=0))


def test_kernels_that_the_manifest_lists_must_be_there(built, on):
    on(H200)
    with pytest.raises(InputError, match=r"plugins lacks TomeMatch_x, which build.json lists: reb"):
        engine_of(built, kernels.Plugins(12, ("TomeMatch_x",)), Builder())
    with pytest.raises(InputError, match=r"build\.json lists no kernels of its plugins: rebuild"):
        kernels.plugins_of(built.manifest.model_copy(update={"plugins": None}))
    assert kernels.plugins_of(manifest()) is None


def test_a_parser_that_passes_the_plugins_over_is_noticed(built, on, monkeypatch):
    on(H200)
    registered = []
    monkeypatch.setattr(
        "tome_export.plugins.tensorrt.register", lambda *args: registered.append(args)
    )
    plugins = kernels.plugins_of(built.manifest)
    with pytest.raises(ExportError) as refused:
        engine_of(built, plugins, Builder(plugin_layers=0))
    assert str(refused.value) == (
        "TensorRT 11.4.0 took 0 plugin layers; expected 12: its parser did not choose the plugins, "
        "rebuild the artifact with --merge-op matmul"
    )
    engine_of(built, plugins, Builder())
    assert [capability for _, capability in registered] == [H200.gpus[0].compute_capability] * 2


def test_compute_capabilities_are_not_passed_on_to_tensorrt(tmp_path, monkeypatch, on):
    """They choose kernels; TensorRT itself builds for the GPU at hand and refuses the option."""
    on(H200)
    seen = {}

    def build_engine(backend, _folder, options, _progress, *, plugins):
        seen.update(options=options, plugins=plugins, backend=backend.name)
        raise ExportError("far enough")

    monkeypatch.setattr(BUILD, "build_engine", build_engine)
    monkeypatch.setattr(FORM, "select", lambda _: Selection(TENSORRT, "x"))
    options = EngineOptions(compute_capabilities=("9.0",))
    request = digits(tmp_path / "x", engine="tensorrt", engine_options=options, check=False)
    with pytest.raises(ExportError, match="far enough"):
        build(request)
    assert seen["plugins"].nodes == 12
    assert seen["options"].compute_capabilities == ()
    assert list(tmp_path.iterdir()) == []
