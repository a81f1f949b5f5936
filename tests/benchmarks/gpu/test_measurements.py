"""What the parts measure, on a CPU: all of it but the CUDA calls."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import match_cases, merge_cases
from benchmarks.gpu.match_cases import MatchCase
from benchmarks.gpu.merge_cases import MergeCase
from tome_export.merge import ops
from tome_export.merge.plan import MergePlan
from tome_export.plugins.match import contract as match_contract
from tome_export.plugins.merge import contract as merge_contract
from tome_export.plugins.store import Binary, Kernel, KernelStore

ROOT = Path(__file__).parents[3]


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rows_in(capsys, gpu_bench) -> list[dict]:
    row_from_line = gpu_bench("rows").row_from_line
    lines = capsys.readouterr().out.splitlines()
    return [row for row in map(row_from_line, lines) if row is not None]


# The check of the kernels


class OnTheCpu:
    """Does with PyTorch's operations what a started kernel would do with the same parameters."""

    def __init__(self, kernels, edit=lambda _: None):
        class Torch(kernels.PrecompiledKernels):
            def binaries(self, variant):
                self.variant = variant
                return super().binaries(variant)

            def loaded(self, _):
                return type("Loaded", (), {"registers": 0, "local_bytes": 0, "log": ""})()

            def start(self, binary, launch, inputs, outputs):
                assert len(binary.ptx) > 0
                if self.variant.op == "TomeMatch":
                    results = self._match(launch, *inputs)
                else:
                    results = ops.eager_merge(*inputs)
                for output, result in zip(outputs, results, strict=True):
                    output.copy_(result)
                edit(outputs)

            def _match(self, launch, keys):
                heads, tokens, r, prefix, class_token, image, head, token, offset = launch.scalars
                width, unit = (self.variant.constants[k] for k in ("WIDTH", "STRIDE_UNIT"))
                shape = (launch.grid[0], heads, tokens, width)
                strides = (*(unit * stride for stride in (image, head, token)), 1)
                view = keys.as_strided(shape, strides, keys.storage_offset() + unit * offset)
                return ops.eager_match(view, r, prefix, bool(class_token))

        self.of = Torch

    def made(self, variants):
        code = (Binary("8.0", "sm_80", "k", 1, 0, "8"), Binary("9.0", "sm_90a", "k", 1, 0, "9"))
        return self.of(KernelStore(Kernel.of(variant, code) for variant in variants), None, (9, 0))


def small(check, oracle):
    """One of each: contiguous keys, keys in a QKV product, a metric, ties, tokens."""
    keys = oracle.Keys(2, 3, 50, 16, 8, dtype="float32")
    return [
        check.Case(keys, every_code=True),
        check.Case(keys, check.QKV),
        check.Case(replace(keys, heads=0, prefix=0, class_token=False)),
        check.Case(replace(keys, content="one-hot")),
        check.Case(MergeCase(2, 50, 24, 8)),
    ]


def test_right_kernels_pass_and_every_case_is_a_row(gpu_bench, capsys):
    check = gpu_bench("check_kernels")
    cases = small(check, gpu_bench("oracle"))
    kernels = OnTheCpu(gpu_bench("kernels")).made([case.variant for case in cases])
    check.emit_rows(cases, kernels, "cpu")
    found = rows_in(capsys, gpu_bench)
    assert [row["target"] for row in found] == ["sm_90a", "sm_80", *["sm_90a"] * 4]
    assert [row["benchmark"] for row in found] == [*["TomeMatch"] * 5, "TomeMerge"]
    for row in found:
        assert row["passed"], row
        assert row["stays_inside"]
        assert row["repeatable"]


def beside(outputs):
    """Writes one element before an output."""
    outputs[0].as_strided((1,), (1,), outputs[0].storage_offset() - 1).fill_(7)


def unfinished(outputs):
    outputs[0].view(-1)[-1] = torch.nan if outputs[0].is_floating_point() else -1 << 30


calls = iter(range(1000))


def moody(outputs):
    """Two results that are each right: the plan's order among tokens that are not there."""
    outputs[-1].view(-1)[0] += next(calls) % 2


@pytest.mark.parametrize(
    ("edit", "wrong"),
    [(beside, "stays_inside"), (unfinished, "passed"), (moody, "repeatable")],
)
def test_wrong_kernels_fail(gpu_bench, capsys, edit, wrong):
    check = gpu_bench("check_kernels")
    cases = small(check, gpu_bench("oracle"))
    kernels = OnTheCpu(gpu_bench("kernels"), edit).made([case.variant for case in cases])
    check.emit_rows([cases[1], cases[4]], kernels, "cpu")
    for row in rows_in(capsys, gpu_bench):
        assert row["passed"] is False, row
        assert row[wrong] is False, row


def test_only_right_kernels_that_ran_pass_the_memory_check(gpu_bench, monkeypatch, tmp_path):
    check, tools = gpu_bench("check_kernels"), gpu_bench("run_tools")
    for edit, status in ((lambda _: None, 0), (beside, 1)):
        on_the_cpu = OnTheCpu(gpu_bench("kernels"), edit)
        kernels = on_the_cpu.made([case.variant for case in check.memcheck_cases()])
        monkeypatch.setattr(check, "precompiled_kernels", lambda _, kernels=kernels: kernels)
        assert tools.main([str(tmp_path), "cpu"]) == status


def test_every_kernel_that_a_part_starts_is_carried(gpu_bench, monkeypatch, tmp_path):
    """All but the compiler's work, which takes minutes: the store that is written, read again."""
    prepare, check, timed = map(gpu_bench, ("prepare", "check_kernels", "time_kernels"))

    def compiled(_, capability):
        major, minor = capability
        ptx = f".target sm_{major}{minor}\n.entry k("
        return Binary(f"{major}.{minor}", f"sm_{major}{minor}", "k", 1, 0, ptx)

    monkeypatch.setattr(prepare, "compile_ptx", compiled)
    prepared = gpu_bench("prepared").Prepared(tmp_path)
    prepare.write_kernels(prepared, "8.9")
    store = KernelStore.read(prepared.kernels)
    needed = [case.variant for case in (*check.cases(), *check.memcheck_cases())]
    for shape in timed.SHAPES:
        case = shape.match_case(2)
        strides = match_cases.make_keys(case, generator()).stride()[:3]
        needed.append(match_contract.variant(case.tokens, case.width, case.dtype, strides))
        needed.append(merge_contract.variant(shape.merge_case(2).width, "float16"))
    for variant in needed:
        found = [binary.compute_capability for binary in store.kernel(variant).binaries]
        assert found == ["8.9", "8.0"]
    assert len(store.kernels) > len({variant.name for variant in needed})  # the models' layers


def test_layers_of_the_models_are_carried(gpu_bench):
    models = gpu_bench("time_models")
    case = models.ModelCase("vit_tiny_patch16_384", 23, (1,), {"depth": 6})
    names = [variant.name for variant in models.variants([case])]
    # 577 tokens, then 508 and fewer: two kernels of match.
    assert [name.rpartition("_")[2] for name in names] == ["n1024", "n512", "c192"]


# The arithmetic


@pytest.mark.parametrize(
    ("moved", "occupied", "free", "calls", "sets"),
    [
        (300_000, 300_000, 1 << 40, 300, 300),  # small: until twice the cache is passed
        (56 << 20, 56 << 20, 1 << 40, 68, 2),
        (1 << 30, 3 << 30, 1 << 40, 4, 1),
        (5_000_000_000, 5_000_000_000, 1 << 40, 1, 1),
        (1 << 20, 3 << 20, 30 << 20, 30, 10),  # no room for more
        (1 << 20, 3 << 20, 1 << 20, 1, 1),
    ],
)
def test_rotation(gpu_bench, moved, occupied, free, calls, sets):
    found = gpu_bench("timing").rotation(moved, occupied, 60_000_000, free)
    assert (found.calls, found.sets) == (calls, sets)


def test_summary_and_shares(gpu_bench):
    seconds = {"kernels": np.array([1.0, 2.0, 4.0]), "eager": np.array([6.0, 10.0, 40.0])}
    found = gpu_bench("time_kernels").summary(seconds, 500, 1000.0, "eager")
    assert found["floor_seconds"] == 0.5
    assert found["share_of_floor"] == {"kernels": 0.25, "eager": 0.05}
    assert found["speedup"] == {"kernels": 6.0}  # the median of the rounds' ratios 6, 5, 10
    assert found["seconds"]["kernels"]["p50"] == 2.0


def test_end_to_end_row(gpu_bench):
    seconds = {
        "unmerged": np.array([3.0, 3.0, 3.0]),
        "merged": np.array([2.0, 2.0, 2.0]),
        "eager": np.array([6.0, 6.0, 6.0]),
    }
    row = gpu_bench("time_models").end_to_end_row(seconds, 2.0)
    assert row["speedup"] == {"merged": 1.5, "eager": 0.5}
    assert row["speedup_over_macs_ratio"] == {"merged": 0.75, "eager": 0.25}


def test_kernels_are_timed(gpu_bench, monkeypatch, capsys):
    kernels, timing = gpu_bench("time_kernels"), gpu_bench("timing")
    monkeypatch.setattr(timing, "free_bytes", lambda _: 1 << 20)
    ways = {"kernels": kernels.EAGER, "eager": kernels.EAGER}
    kernels.emit_rows(ways, [kernels.Shape("small", 2, 50, 8)], [3], "cpu")
    copy, *found = rows_in(capsys, gpu_bench)
    assert copy["gigabytes_per_s"] > 0
    assert [row["benchmark"] for row in found] == ["match+merge", "match", "merge"]
    for row in found:
        assert set(row["seconds"]) == {"kernels", "eager"}
        assert row["share_of_floor"]["kernels"] > 0
        assert (row["shape"], row["batch"], row["r"]) == ("small", 3, 8)


def test_models_are_timed_and_profiled(gpu_bench, capsys):
    models = gpu_bench("time_models")
    case = models.ModelCase("test_vit", 8, (2, 1))
    models.emit_rows([case], None, "cpu")
    models.emit_profiles([case], None, "cpu")
    *timed, unmerged, merged = rows_in(capsys, gpu_bench)
    assert [row["batch"] for row in timed] == [2, 1]
    for row in timed:
        assert set(row["seconds"]) == {"unmerged", "merged", "eager"}
        assert row["macs_ratio"] > 1
    for row in (unmerged, merged):
        assert sum(row["attention"].values()) == 6  # a call per layer


def test_the_bias_of_attention_is_timed(gpu_bench, monkeypatch, capsys):
    attention = gpu_bench("time_attention")
    monkeypatch.setattr(attention, "TOKENS", (21,))
    monkeypatch.setattr(attention, "BATCHES", (2,))
    attention.main(gpu_bench("parts").Context(None, "cpu", 60.0))
    (row,) = rows_in(capsys, gpu_bench)
    assert "error" not in row
    assert set(row["time_over_none"]) == set(row["seconds"]) - {"none"}
    assert {"mask", "channels", "channels, joined here"} <= set(row["seconds"])


def test_nothing_in_a_captured_graph_waits_for_the_gpu(gpu_bench):
    """A CUDA graph can hold no copy from the CPU's memory and no value read back.

    Tensors without memory run the same operations as those of a GPU would.
    """
    from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    crossings = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            values = tree_leaves((args, kwargs, result))
            devices = {v.device.type for v in values if isinstance(v, torch.Tensor)}
            if len(devices) > 1:
                crossings.append(str(func))
            return result

    models = gpu_bench("time_models")
    model = models.without_weights(models.ModelCase("test_vit", 8, (2,)))
    merged = models.patch(model, 8)
    half = {"dtype": torch.float16, "device": "cuda"}
    with FakeTensorMode(allow_non_fake_inputs=True):
        models.draw_weights(model, "cuda")
        images = torch.empty((2, *merged.input_size), **half)
        keys, x = torch.empty((2, 3, 50, 16), **half), torch.empty((2, 50, 48), **half)
        with torch.inference_mode(), Watch():
            assert merged(images).device.type == "cuda"
            plan = ops.eager_match(keys, 8, 1, True)
            ops.eager_merge(x, torch.empty((2, 50), device="cuda"), *plan)
        assert crossings == []
        with Watch():
            images + torch.ones(1).to("cuda")
        assert crossings
        with pytest.raises(DataDependentOutputException):
            images.sum().item()


# Bytes and inputs of the operators


def test_the_sizes_of_elements_are_written_once():
    from tome_export.plugins import variants

    assert match_cases.ITEM_BYTES is merge_cases.ITEM_BYTES is variants.ITEM_BYTES


@pytest.mark.parametrize("layout", ["contiguous", "qkv"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_match_bytes_are_those_of_its_tensors(layout, dtype):
    case = MatchCase(2, 3, 50, 16, 7, dtype=dtype, layout=layout)
    keys = match_cases.make_keys(case, generator())
    assert keys.shape == (2, 3, 50, 16)
    assert keys.is_contiguous() == (layout == "contiguous")
    assert keys.stride(-1) == 1
    plan = ops.match(keys, case.r, case.prefix, case.class_token)
    held = sum(part.numel() * part.element_size() for part in (keys, *plan))
    assert match_cases.bytes_moved(case) == held


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge_inputs_are_a_plan_and_its_bytes_are_counted(prefix, dtype):
    case = MergeCase(3, 51, 24, 9, prefix, dtype)
    x, size, keep, src, dst = inputs = merge_cases.make_inputs(case, generator())
    everyone = torch.cat([keep, src], 1).sort(1).values
    assert torch.equal(everyone, torch.arange(51, dtype=torch.int32).expand(3, 51))
    assert torch.equal(keep[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(3, -1))
    assert bool((keep.gather(1, dst.long()) % 2 == 1).all())
    merged = ops.merge(x, size, MergePlan(keep, src, dst))
    tensors = (*inputs, *merged)
    held = sum(part.numel() * part.element_size() for part in tensors)
    assert merge_cases.bytes_moved(case) == held


# ONNX Runtime


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Two graphs of a small model without their weights, in a prepared folder."""
    sys.path.insert(0, str(ROOT))
    from benchmarks.gpu import graphs
    from benchmarks.gpu.prepared import Prepared, PreparedInfo

    sys.path.remove(str(ROOT))
    folder = Prepared(tmp_path_factory.mktemp("prepared"))
    cases = [graphs.GraphCase(r, "parts") for r in (0, 16)]
    graphs.write_graphs(folder.graphs, "vit_digits", cases, depth=2)
    folder.write(PreparedInfo("3.12", "a commit", "triton", "9.0"))
    return folder


def test_graphs_are_carried_without_their_weights(gpu_bench, prepared):
    graphs = gpu_bench("graphs")
    case = graphs.GraphCase(16, "parts")
    carried = (prepared.graphs / case.file).stat().st_size
    index = json.loads((prepared.graphs / graphs.INDEX).read_text())
    whole = graphs.Graphs(prepared.graphs).graph(case)
    emptied = set(index["weights"][case.file])
    weights = [c for c in whole.graph.initializer if c.name in emptied]
    assert carried < sum(len(constant.raw_data) for constant in weights) / 4
    assert len(weights) == len(emptied) > 8
    some = index["weights"][case.file][weights[0].name]
    some["sha256"] = "0" * 64
    assert any(weight["transposed"] for weight in index["weights"][case.file].values())
    other = graphs.Graphs(prepared.graphs)
    other._index = index
    with pytest.raises(ValueError, match=r"differs from what r16_parts.onnx was exported with"):
        other.graph(case)


def test_a_constant_that_is_no_parameter_is_not_left_out(gpu_bench, prepared):
    graphs = gpu_bench("graphs")
    whole = graphs.Graphs(prepared.graphs).graph(graphs.GraphCase(0, "parts"))
    with pytest.raises(ValueError, match="is no parameter of the model"):
        graphs._take_weights(whole, {})


def test_a_whole_step_on_the_cpu(prepared, tmp_path):
    """The command, its process, the graphs with their weights put back, parity, rows, table."""
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu.step2", "--device", "cpu"]
    command += ["--prepared", str(prepared.folder), "--only", "ort-parts", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    row, end = json.loads(out.read_text())["rows"]
    assert end["done"]
    assert (row["run"], row["part"], row["model"]) == ("step 2", "ort-parts", "vit_digits")
    assert row["passed"], row
    assert row["defects"] == 0
    assert row["decisions"] > 50
    assert row["macs_ratio"] > 1
    assert set(row["seconds"]) == {"merged", "unmerged"}
    assert row["nodes_on_cpu"]["merged"]["TopK"] == 2
    assert "vit_digits 16 8 " in done.stdout
    assert done.stdout.endswith("left out or cut short: nothing\n")


def test_only_tf32_deviates_from_the_projects_options(gpu_bench, monkeypatch):
    from tome_export.runtime import ort

    monkeypatch.setitem(ort.CUDA_OPTIONS, "an_option", "of the project")
    providers = gpu_bench("run_onnxruntime").providers
    assert providers("cpu", True) == providers("cpu", False) == ort.providers("cpu")
    assert providers("cuda", False) == ort.providers("cuda")
    (name, options), cpu = providers("cuda", True)
    assert options == {"use_tf32": "1", "an_option": "of the project"}
    assert [name, cpu] == [ort.providers("cuda")[0][0], *ort.providers("cpu")]
    assert ort.CUDA_OPTIONS["use_tf32"] == "0"


def test_cuda_libraries_that_are_nowhere_are_named(gpu_bench, monkeypatch):
    module = gpu_bench("run_onnxruntime")
    monkeypatch.setattr(module, "linked_libraries", lambda _: ["libc.so.6", "libcunowhere.so.1"])
    with pytest.raises(OSError, match=r"libcunowhere\.so\.1"):
        module.load_cuda_libraries(Path(sys.executable))


# The other machine


BARE = """
import sys

LACKING = "click datasets hypothesis jinja2 matplotlib onnx_ir onnxscript onnxsim".split()
LACKING += "polygraphy psutil rich scipy".split()


class Bare:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, *arguments):
        return None if name in LACKING else self.finder.find_spec(name, *arguments)

    def __getattr__(self, name):
        return getattr(self.finder, name)


# Without the finder of an editable installation.
sys.meta_path = [Bare(f) for f in sys.meta_path if "editable" not in str(f).lower()]
from benchmarks.gpu import check_kernels, run_onnxruntime, run_tools, time_kernels, time_models
import tome_export.data.samples, tome_export.parity.compare, tome_export.plugins
print(tome_export.plugins.__file__)
"""


def test_the_parts_need_no_installation_and_few_packages():
    """The checkout as it is, where it is not installed, with what may be lacking there."""
    command = [sys.executable, "-c", BARE]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.strip() == str(ROOT / "tome_export" / "plugins" / "__init__.py"), done.stderr


BEFORE_UNPACKING = """
import sys

sys.path = [p for p in sys.path if "site-packages" not in p]
from benchmarks.gpu import parts, step1, step2, step3
from benchmarks.gpu.prepared import Prepared
print(parts.missing(Prepared(parts.Path("nowhere")), "cpu"))
"""


def test_a_step_begins_before_the_packages_that_it_brings_are_there():
    """Nothing but the standard library is imported until they are unpacked."""
    command = [sys.executable, "-c", BEFORE_UNPACKING]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert "nowhere is not a prepared folder" in done.stdout, done.stderr
