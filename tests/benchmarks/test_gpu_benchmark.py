"""The GPU benchmark: all of it that needs no GPU, and a short run where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tome_export.merge import ops
from tome_export.merge.plan import MergePlan
from tome_export.plugins.match import benchmark as match_benchmark
from tome_export.plugins.match.benchmark import MatchCase
from tome_export.plugins.merge import benchmark as merge_benchmark
from tome_export.plugins.merge.benchmark import MergeCase

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PARTS = ("check", "aot", "ops", "models", "runtimes")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


# The command


def test_without_a_gpu_nothing_is_written(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = run("--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 4
    assert done.stderr == "nothing was measured: torch sees no NVIDIA GPU\n"
    assert list(tmp_path.iterdir()) == []


def test_unknown_part_is_named():
    done = run("--only", "ops,nonsense")
    assert done.returncode == 2
    assert "'nonsense' is no part; expected some of check,aot,ops,models,runtimes" in done.stderr


@pytest.mark.parametrize("part", PARTS)
def test_every_part_can_be_loaded(bench, part):
    assert callable(bench(f"gpu_{part}").main)


@pytest.mark.parametrize(
    ("ending", "limit_s", "reason"),
    [
        ("sys.exit(3)", 60, "status 3: see its traceback"),
        ("time.sleep(60)", 1.5, "was ended after 2 s"),
    ],
)
def test_a_part_that_fails_leaves_its_rows(bench, monkeypatch, tmp_path, ending, limit_s, reason):
    gpu, rows = bench("gpu"), bench("gpu_rows")
    script = tmp_path / "part.py"
    script.write_text(
        f"import sys, time\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport gpu_rows\n"
        "print('a library talks')\n"
        f"gpu_rows.emit('ops', 'match', x=float('nan'), passed=True)\n{ending}\n"
    )
    monkeypatch.setattr(gpu, "__file__", str(script))
    results = rows.Results(tmp_path / "out" / "gpu.json", {"gpu": "test"})
    gpu.run_part("ops", True, limit_s, results)
    written = json.loads(results.path.read_text())
    assert written["environment"] == {"gpu": "test"}
    first, error, last = written["rows"]
    assert first == {"part": "ops", "benchmark": "match", "x": "nan", "passed": True}
    assert reason in error["error"]
    assert last["benchmark"] == "seconds"
    assert [rows.failed(row) for row in written["rows"]] == [False, True, False]
    assert [path.name for path in results.path.parent.iterdir()] == ["gpu.json"]


def test_a_part_without_time_left_is_said(bench, tmp_path):
    rows = bench("gpu_rows")
    results = rows.Results(tmp_path / "gpu.json", {})
    bench("gpu").run_part("ops", True, 0.0, results)
    assert [rows.failed(row) for row in results.rows] == [True]


def test_a_failing_case_is_a_row_and_the_next_one_runs(bench, capsys):
    rows = bench("gpu_rows")

    def measure(value):
        if value is None:
            raise ValueError("no value\nand more")
        return {"value": value}

    rows.attempt("ops", "a", {"batch": 1}, measure, None)
    rows.attempt("ops", "b", {"batch": 2}, measure, 7)
    lines = capsys.readouterr().out.splitlines()
    first, second = (rows.row_from_line(line) for line in lines)
    assert rows.failed(first)
    assert "ERROR ValueError: no value" in rows.text(first)
    assert second == {"part": "ops", "benchmark": "b", "batch": 2, "value": 7}
    assert rows.row_from_line("anything else") is None


def test_the_table_is_short_and_from_the_rows(bench):
    times = {"p20": 1e-6, "p50": 2e-6, "p80": 3e-6}
    names = ("kernel tf32x3", "kernel ieee", "eager")
    pair = {
        "shape": "ViT-B/16",
        "layout": "qkv",
        "batch": 64,
        "seconds": dict.fromkeys(names, times),
        "share_of_floor": {"kernel tf32x3": 0.625},
        "speedup": {"kernel tf32x3": 5.5},
    }
    model = {
        "model": "vit",
        "r": 8,
        "batch": 1,
        "seconds": dict.fromkeys(("unmerged", "kernels", "eager"), times),
        "speedup": {"kernels": 1.75},
        "speedup_over_macs_ratio": {"kernels": 0.25},
    }
    rows = [
        {"part": "check", "benchmark": "match", "passed": True, "defects": 0},
        {"part": "check", "benchmark": "match", "passed": False, "defects": 3},
        {"part": "ops", "benchmark": "match+merge", **pair},
        {"part": "ops", "benchmark": "match+merge", "error": "of another shape"},
        {"part": "models", "benchmark": "end to end", **model},
    ]
    first, _, ops_line, _, model_line = bench("gpu_rows").table(rows)
    assert first == "check: 1 of 2 passed, 3 defects"
    assert ops_line.split() == ["ViT-B/16", "qkv", "64", "2.0", "2.0", "2.0", "0.62", "5.5"]
    assert model_line.split() == ["vit", "8", "1", "2", "2", "2", "1.75", "0.25"]
    assert bench("gpu_rows").table([]) == []


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
def test_rotation(bench, moved, occupied, free, calls, sets):
    found = bench("gpu_timing").rotation(moved, occupied, 60_000_000, free)
    assert (found.calls, found.sets) == (calls, sets)


def test_summary_and_shares(bench):
    seconds = {"kernel": np.array([1.0, 2.0, 4.0]), "eager": np.array([6.0, 10.0, 40.0])}
    found = bench("gpu_ops").summary(seconds, 500, 1000.0, "eager")
    assert found["floor_seconds"] == 0.5
    assert found["share_of_floor"] == {"kernel": 0.25, "eager": 0.05}
    assert found["speedup"] == {"kernel": 6.0}  # the median of the rounds' ratios 6, 5, 10
    assert found["seconds"]["kernel"]["p50"] == 2.0
    assert "speedup" not in bench("gpu_ops").summary(seconds, 500, 1000.0, None)


def test_end_to_end_row(bench):
    seconds = {
        "unmerged": np.array([3.0, 3.0, 3.0]),
        "merged 8": np.array([2.0, 2.0, 2.0]),
        "merged 8 eager": np.array([6.0, 6.0, 6.0]),
        "merged 4": np.array([9.0, 9.0, 9.0]),
    }
    row = bench("gpu_models").end_to_end_row(seconds, 8, 2.0)
    assert row["speedup"] == {"kernels": 1.5, "eager": 0.5}
    assert row["speedup_over_macs_ratio"] == {"kernels": 0.75, "eager": 0.25}


def test_architectures_of_a_gpu(bench):
    aot = bench("gpu_aot")
    assert aot.capabilities((9, 0)) == [(9, 0), (8, 0), (8, 6), (8, 9)]
    assert aot.capabilities((8, 7)) == [(8, 7), (8, 0), (8, 6)]


def test_attention_that_torch_takes_is_named(bench, make_vit):
    from tome_export.patch import patch

    model = patch(make_vit(), 8)
    found = bench("gpu_models").profiled(model, torch.randn(1, *model.input_size))
    assert sum(found["attention"].values()) == len(model.layers)


# Bytes and inputs of the operators


@pytest.mark.parametrize("layout", ["contiguous", "qkv"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_match_bytes_are_those_of_its_tensors(layout, dtype):
    case = MatchCase(2, 3, 50, 16, 7, dtype=dtype, layout=layout)
    keys = match_benchmark.make_keys(case, generator())
    assert keys.shape == (2, 3, 50, 16)
    assert keys.is_contiguous() == (layout == "contiguous")
    assert keys.stride(-1) == 1
    plan = ops.match(keys, case.r, case.prefix, case.class_token)
    held = sum(part.numel() * part.element_size() for part in (keys, *plan))
    assert match_benchmark.bytes_moved(case) == held


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_merge_inputs_are_a_plan_and_its_bytes_are_counted(prefix, dtype):
    case = MergeCase(3, 51, 24, 9, prefix, dtype)
    x, size, keep, src, dst = inputs = merge_benchmark.make_inputs(case, generator())
    everyone = torch.cat([keep, src], 1).sort(1).values
    assert torch.equal(everyone, torch.arange(51, dtype=torch.int32).expand(3, 51))
    assert torch.equal(keep[:, :prefix], torch.arange(prefix, dtype=torch.int32).expand(3, -1))
    assert bool((keep.gather(1, dst.long()) % 2 == 1).all())
    merged = ops.merge(x, size, MergePlan(keep, src, dst))
    tensors = (*inputs, *merged)
    held = sum(part.numel() * part.element_size() for part in tensors)
    assert merge_benchmark.bytes_moved(case) == held
    # Beside those: the residual that is added, and the normalised result.
    extra = sum(part.numel() * part.element_size() for part in (x, merged[0]))
    assert merge_benchmark.bytes_moved_fused(case) == held + extra


def test_kernels_of_the_benchmark_run(tmp_path):
    """Both forms of the product and every candidate, under the Triton interpreter."""
    pytest.importorskip("triton", reason="the Triton language runs the kernels")
    script = tmp_path / "run.py"
    script.write_text(
        "import torch\n"
        "from tome_export.merge import ops\n"
        "from tome_export.merge.plan import MergePlan\n"
        "from tome_export.plugins.match import benchmark as match\n"
        "from tome_export.plugins.merge import benchmark as merge\n"
        "generator = torch.Generator().manual_seed(0)\n"
        "for layout in ('contiguous', 'qkv'):\n"
        "    case = match.MatchCase(2, 3, 50, 64, 16, layout=layout)\n"
        "    keys = match.make_keys(case, generator)\n"
        "    runs = match.candidates(case, lambda *given: tuple(ops.match(*given)))\n"
        "    plans = {name: run(keys) for name, run in runs.items()}\n"
        "    for name, plan in plans.items():\n"
        "        same = map(torch.equal, plan, plans['eager'])\n"
        "        print(name, all(same))\n"
        "inputs = merge.make_inputs(merge.MergeCase(2, 50, 96, 16), generator)\n"
        "runs = merge.candidates(lambda x, size, *p: ops.merge(x, size, MergePlan(*p)))\n"
        "results = [run(*inputs) for run in runs.values()]\n"
        "print(list(runs), all(map(torch.allclose, *results)))\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    names = ("kernel tf32x3", "kernel ieee", "mean by torch, then kernel", "eager")
    lines = [f"{name} True" for name in names]
    assert done.stdout.splitlines() == [*lines, *lines, "['kernel', 'eager'] True"]


# Runtimes


def test_driver_parameters_are_in_the_plugins_order(bench):
    found = bench("gpu_driver").parameters([1 << 40], [-3, 7], [1 << 41, 0])
    assert [type(value).__name__ for value in found] == [
        "c_void_p",
        "c_int",
        "c_int",
        "c_void_p",
        "c_void_p",
    ]
    assert [value.value for value in found] == [1 << 40, -3, 7, 1 << 41, None]


def test_onnxruntime_row(bench):
    """On the CPU provider: the same code as on the GPU's."""
    found = bench("gpu_runtimes").onnxruntime_row(
        "vit_digits", 8, "decomposed", "CPUExecutionProvider", batch=4
    )
    assert found["passed"], found
    assert found["defects"] == 0
    assert found["macs_ratio"] > 1.5
    assert set(found["seconds"]) == {"merged", "unmerged"}


def test_what_is_not_installed_is_skipped(bench, monkeypatch):
    runtimes = bench("gpu_runtimes")
    monkeypatch.setattr(runtimes, "_can_import", lambda _: False)
    for rows in (runtimes.tensorrt_rows(), runtimes.tensorrt_rtx_rows()):
        assert [list(row) for row in rows] == [["skipped"]]
    (row,) = runtimes.onnxruntime_rows(True)
    assert "skipped" in row


def test_a_command_that_fails_says_so(bench):
    runtimes = bench("gpu_runtimes")
    assert runtimes.command(["models"])["passed"]
    refused = runtimes.command(["check", "/nowhere"])
    assert refused["status"] == 3
    assert "/nowhere" in refused["said"]


def test_reports_are_kept_without_their_layers(bench):
    runtimes = bench("gpu_runtimes")
    said = json.dumps({"passed": True, "reports": [{"passed": True, "layers": [1, 2]}]})
    assert runtimes.reports_in(said) == [{"passed": True}]
    assert runtimes.reports_in("3 passed") == runtimes.reports_in("{}") == []


@pytest.mark.gpu
@pytest.mark.parametrize("part", PARTS)
def test_gpu_part_passes(part, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    out = tmp_path / "gpu.json"
    done = run("--quick", "--only", part, "--out", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert len(rows) > 1
