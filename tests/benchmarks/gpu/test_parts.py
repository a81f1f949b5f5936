"""The commands of the GPU benchmark: limits, rows, and what is said when something is missing."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STEPS = ("step1", "step2", "step3")


def run(step: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.gpu.{step}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


@pytest.fixture
def prepared(gpu_bench, tmp_path):
    """A prepared folder with nothing in it."""
    module = gpu_bench("prepared")
    folder = module.Prepared(tmp_path / "prepared")
    folder.folder.mkdir()
    folder.write(module.PreparedInfo("3.12", "a commit", "triton 3.9.0", "9.0"))
    return folder


def test_without_a_gpu_nothing_is_written(gpu_bench, tmp_path):
    if gpu_bench("rows").gpu_state() is not None:
        pytest.skip("this machine has a GPU")
    done = run("step1", "--out", str(tmp_path / "gpu.json"))
    assert done.returncode == 4
    assert done.stderr == "nothing was measured: nvidia-smi finds no NVIDIA GPU\n"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_was_not_prepared_is_named(gpu_bench, tmp_path, capsys):
    parts, step = gpu_bench("parts"), gpu_bench("step1").STEP
    assert parts.run_step(step, (), ["--prepared", str(tmp_path), "--device", "cpu"]) == 4
    assert f"{tmp_path} is not a prepared folder" in capsys.readouterr().err


def test_a_folder_for_another_python_is_refused(gpu_bench, monkeypatch, prepared):
    monkeypatch.setattr(gpu_bench("rows"), "gpu_state", dict)
    prepared.write(gpu_bench("prepared").PreparedInfo("3.99", "a commit", "triton", "9.0"))
    assert "was prepared for 3.99" in gpu_bench("parts").missing(prepared, "cuda")


@pytest.mark.parametrize(
    ("own", "fix"),
    [
        ("8.9", "use 'python -m benchmarks.gpu.prepare --compute-capability 8.9'"),
        ("10.0", "there is code for 8.0, 8.6, 8.9, 9.0, 12.0; steps 1 and 3 need none"),
    ],
)
def test_step_2_refuses_a_gpu_that_its_code_is_not_for(
    gpu_bench, monkeypatch, prepared, tmp_path, capsys, own, fix
):
    parts = gpu_bench("parts")
    monkeypatch.setattr(parts.rows, "gpu_state", lambda: {"compute_cap": own})
    info = prepared.read()
    prepared.write(replace(info, python=f"{sys.version_info.major}.{sys.version_info.minor}"))
    out = tmp_path / "gpu.json"
    arguments = ["--prepared", str(prepared.folder), "--out", str(out)]
    assert parts.run_step(gpu_bench("step2").STEP, (), arguments) == 4
    assert capsys.readouterr().err == (
        f"nothing was measured: this GPU has compute capability {own}; ONNX Runtime was prepared "
        f"for 9.0: {fix}\n"
    )
    assert not out.exists()
    # A step of other parts leaves out what that one could not run.
    left = gpu_bench("step2").STEP.parts[:1]
    arguments += ["--only", left[0].name]
    assert parts.run_step(gpu_bench("step3").STEP, left, arguments) == 3
    said = capsys.readouterr().out
    assert "skipped: this GPU has compute capability" in said
    assert said.endswith("left out or cut short: ort-fused\n")


def test_the_gpu_that_was_prepared_for_is_not_refused(gpu_bench, monkeypatch, prepared):
    parts = gpu_bench("parts")
    monkeypatch.setattr(parts.rows, "gpu_state", lambda: {"compute_cap": "9.0"})
    assert parts.unfit_gpu(prepared.read()) is None


def test_unknown_part_is_named(gpu_bench, capsys):
    with pytest.raises(SystemExit):
        gpu_bench("parts").run_step(gpu_bench("step2").STEP, (), ["--only", "ort-parts,nonsense"])
    said = capsys.readouterr().err
    assert "'nonsense' is no part; expected some of ort-fused, ort-parts, ort-r13, ort-tf32" in said


@pytest.mark.parametrize("name", STEPS)
def test_the_parts_of_a_step_exist_and_fit_its_limit(gpu_bench, name):
    step = gpu_bench(name).STEP
    for part in step.parts:
        module, _, function = part.function.partition(":")
        assert callable(getattr(gpu_bench(module), function))
        assert part.expected_s < part.limit_s
    limits = {1: 300, 2: 180, 3: 180}
    # The rest is for starting Python and unpacking, and half a minute stays for the machine.
    assert sum(part.expected_s for part in step.parts) <= step.limit_s <= limits[step.number] - 15


def test_the_table_of_parts_is_the_codes(gpu_bench):
    text = (ROOT / "benchmarks" / "gpu" / "README.md").read_text()
    written = re.findall(r"^\| (\d) \| `([a-z0-9-]+)` \| (.+) \| (\d+) \| (\d+) \|$", text, re.M)
    expected = [
        (
            str(step.number),
            part.name,
            part.question,
            f"{part.expected_s:.0f}",
            f"{part.limit_s:.0f}",
        )
        for step in (gpu_bench(name).STEP for name in STEPS)
        for part in step.parts
    ]
    assert written == expected
    assert len({name for _, name, *_ in written}) == len(written)


@pytest.fixture
def run_script(gpu_bench, tmp_path, prepared):
    """Run a step of parts that are given as text, each a module's ``main``."""
    parts = gpu_bench("parts")

    def run(bodies: dict[str, str], *arguments: str, limit_s: float = 60.0, left=()) -> int:
        folder = tmp_path / "scripts"
        folder.mkdir(exist_ok=True)
        for name, body in bodies.items():
            (folder / f"{name}.py").write_text(
                "import os, sys, time\nfrom benchmarks.gpu.rows import emit\n"
                "def main(context):\n" + "".join(f"    {line}\n" for line in body.splitlines())
            )
        made = {n: parts.Part(n, f"{n}:main", limit_s / 2, limit_s, "?") for n in bodies}
        chosen = tuple(made[name] for name in bodies if name not in left)
        (folder / "step7.py").write_text(
            "import sys\nimport benchmarks.gpu\n"
            f"benchmarks.gpu.__path__.append({str(folder)!r})\n"
            "from benchmarks.gpu.parts import BenchmarkStep, Part, run_step\n"
            f"step, left = BenchmarkStep(7, 60.0, {chosen!r}), {tuple(made[n] for n in left)!r}\n"
            "sys.exit(run_step(step, left))\n"
        )
        step = parts.BenchmarkStep(7, 60.0, chosen)
        options = ["--prepared", str(prepared.folder), "--device", "cpu"]
        options += ["--out", str(tmp_path / "out" / "gpu.json"), *arguments]
        later = tuple(made[name] for name in left)
        return parts.run_step(step, later, options, (str(folder / "step7.py"),))

    return run


def rows_in(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "out" / "gpu.json").read_text())


@pytest.mark.parametrize(
    ("ending", "limit_s", "reason"),
    [
        ("sys.exit(3)", 60, "status 3: see its traceback"),
        ("os.system('sleep 60')", 5.0, "was ended after 5 s"),
    ],
)
def test_a_part_that_fails_leaves_its_rows_and_the_next_runs(
    run_script, tmp_path, capsys, ending, limit_s, reason
):
    first = f"print('a library talks')\nemit('match', x=float('nan'), passed=True)\n{ending}"
    bodies = {"first": first, "second": "emit('merge', passed=True)"}
    assert run_script(bodies, limit_s=limit_s) == 1
    written = rows_in(tmp_path)
    assert list(written["environment"]) == ["step 7"]
    assert written["environment"]["step 7"]["prepared"]["compiler"] == "triton 3.9.0"
    match, cut_short, merge, ended = written["rows"]
    about = {"run": "step 7", "part": "first"}
    assert match == {**about, "benchmark": "match", "x": "nan", "passed": True}
    assert (cut_short["benchmark"], cut_short["done"]) == ("part", False)
    assert reason in cut_short["error"]
    assert (merge["part"], merge["passed"]) == ("second", True)
    assert (ended["benchmark"], ended["done"]) == ("part", True)
    said = capsys.readouterr().out
    assert "4 rows, 1 failed" in said
    assert said.endswith("left out or cut short: first\n")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gpu.json"]


def test_what_there_is_no_time_for_is_said(run_script, tmp_path, capsys):
    bodies = {"first": "emit('match', passed=True)"}
    assert run_script(bodies, "--limit", "0.5") == 3
    (row,) = rows_in(tmp_path)["rows"]
    assert (row["done"], row["skipped"]) == (False, "no time was left")
    assert capsys.readouterr().out.endswith("left out or cut short: first\n")


@pytest.mark.parametrize(("passed", "status"), [(True, 3), (False, 1)])
def test_what_the_whole_limit_cuts_short_has_not_failed(
    run_script, gpu_bench, monkeypatch, tmp_path, capsys, passed, status
):
    """But a wrong result of it counts."""
    monkeypatch.setattr(gpu_bench("parts"), "SHORTEST_S", 0.1)
    bodies = {"first": f"emit('match', passed={passed})\ntime.sleep(60)"}
    assert run_script(bodies, "--limit", "4") == status
    match, end = rows_in(tmp_path)["rows"]
    assert match["passed"] == passed
    assert (end["done"], "error" in end) == (False, False)
    assert end["skipped"].endswith("when the step's time was over")
    assert capsys.readouterr().out.endswith("left out or cut short: first\n")


@pytest.mark.parametrize(
    ("statuses", "ends_well"),
    [("0 0 0", True), ("3 3 0", True), ("0 0 3", False), ("1 0 0", False), ("0 4 0", False)],
)
def test_make_runs_all_steps_and_fails_with_them(tmp_path, statuses, ends_well):
    """With programs in place of Python's and NVIDIA's, which note how they are called."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    programs = {
        "python": f'set -- "$@"; echo "$@" >> {tmp_path}/calls\n'
        'case "$2" in *.step?) n=${2#*.step}; set -- ' + statuses + "; shift $((n-1)); exit $1;; *)"
        " echo 3.13;; esac",
        "nvidia-smi": "echo 8.9",
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "installed").touch()
    command = ["make", "bench-gpu", f"VENV={tmp_path}", f"BIN={tmp_path}"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={"PATH": path}
    )
    assert (done.returncode == 0) == ends_well, done.stdout + done.stderr
    prepare, *steps = (tmp_path / "calls").read_text().splitlines()[1:]
    assert prepare == "-m benchmarks.gpu.prepare --python 3.13 --compute-capability 8.9"
    assert steps == [f"-m benchmarks.gpu.{step}" for step in STEPS]


def test_a_later_step_runs_what_earlier_ones_left(run_script, gpu_bench, tmp_path):
    """And keeps their rows with the machine that they were measured on."""
    rows = gpu_bench("rows")
    results = rows.Results(tmp_path / "earlier.json")
    results.begin("step 1", {"gpu": "another"}, ["kept", "cut"])
    for part, done in (("kept", True), ("cut", False)):
        results.add(part, {"benchmark": "match", "x": 1})
        results.add(part, {"benchmark": "part", "done": done})
    bodies = {name: f"emit('{name}', x=2)" for name in ("own", "kept", "cut")}
    arguments = ("--earlier", str(results.path))
    assert run_script(bodies, *arguments, left=("kept", "cut")) == 0
    written = rows_in(tmp_path)
    measured = [(r["run"], r["part"], r["x"]) for r in written["rows"] if "x" in r]
    assert measured == [("step 1", "kept", 1), ("step 7", "own", 2), ("step 7", "cut", 2)]
    assert written["environment"]["step 1"] == {"gpu": "another"}
    assert set(written["environment"]) == {"step 1", "step 7"}


def test_a_failing_case_is_a_row_and_the_next_one_runs(gpu_bench, capsys):
    rows = gpu_bench("rows")

    def measure(value):
        if value is None:
            raise ValueError("no value\nand more")
        return {"value": value}

    rows.attempt("a", {"batch": 1}, measure, None)
    rows.attempt("b", {"batch": 2}, measure, 7)
    lines = capsys.readouterr().out.splitlines()
    first, second = (rows.row_from_line(line) for line in lines)
    assert rows.failed(first)
    assert "ERROR ValueError: no value" in rows.text({"part": "p", **first})
    assert second == {"benchmark": "b", "batch": 2, "value": 7}
    assert rows.row_from_line("anything else") is None


def test_the_table_is_short_and_from_the_rows(gpu_bench):
    times = {"p20": 1e-6, "p50": 2e-6, "p80": 3e-6}
    pair = {
        "shape": "ViT-B/16",
        "layout": "qkv",
        "batch": 64,
        "seconds": dict.fromkeys(("kernels", "eager"), times),
        "share_of_floor": {"kernels": 0.625},
        "speedup": {"kernels": 5.5},
    }
    model = {
        "model": "vit",
        "r": 8,
        "batch": 1,
        "seconds": dict.fromkeys(("unmerged", "merged"), times),
        "speedup": {"merged": 1.75},
        "speedup_over_macs_ratio": {"merged": 0.25},
    }
    rows = [
        {"part": "right", "benchmark": "match", "passed": True, "defects": 0},
        {"part": "right", "benchmark": "match", "passed": False, "defects": 3},
        {"part": "fast", "benchmark": "match+merge", **pair},
        {"part": "fast", "benchmark": "match+merge", "error": "of another shape"},
        {"part": "models", "benchmark": "end to end", **model},
    ]
    first, _, pair_line, _, model_line = gpu_bench("rows").table(rows)
    assert first == "right: 1 of 2 passed, 3 defects"
    assert pair_line.split() == ["ViT-B/16", "qkv", "64", "2.0", "2.0", "0.62", "5.5"]
    assert model_line.split() == ["vit", "8", "1", "2", "2", "1.75", "0.25"]
    assert gpu_bench("rows").table([]) == []


def test_only_files_with_a_marked_test_are_read(gpu_bench, tmp_path):
    (tmp_path / "test_a.py").write_text("@pytest.mark.gpu\ndef test_a(): ...\n")
    (tmp_path / "test_b.py").write_text("import a_package_that_is_not_there\n")
    (tmp_path / "test_c.py").write_text("pytestmark = [\n    pytest.mark.gpu,\n]\n")
    tools = gpu_bench("run_tools")
    assert [p.name for p in tools.marked_files(tmp_path)] == ["test_a.py", "test_c.py"]
    assert tools.marked_files(ROOT / "tests")


MARKED = """
import pytest


@pytest.mark.gpu
def test_right():
    pass


@pytest.mark.gpu
def test_skipped():
    pytest.skip("9 failed before")
"""
FAILING = """

@pytest.mark.gpu
def test_wrong():
    assert False
"""


@pytest.mark.parametrize(
    ("text", "passed", "counts"),
    [
        (MARKED + FAILING, False, {"passed": 1, "failed": 1, "skipped": 1}),
        (MARKED, True, {"passed": 1, "skipped": 1}),
        (MARKED.replace("pass\n", "pytest.skip('no GPU')\n"), False, {"skipped": 2}),
    ],
    ids=["one fails", "none fails", "all are skipped"],
)
def test_marked_tests_that_fail_fail_the_row(gpu_bench, prepared, tmp_path, text, passed, counts):
    (tmp_path / "marked").mkdir()
    (tmp_path / "marked" / "test_marked.py").write_text(text)
    tools, rows = gpu_bench("run_tools"), gpu_bench("rows")
    context = gpu_bench("parts").Context(prepared, "cpu", 60.0)
    row = tools.run_marked_tests(context, tmp_path / "marked")
    assert row["passed"] is passed, row
    assert row["tests"] == counts
    assert rows.failed(row) is not passed
    assert all(
        f"{n} {name}" in rows.text({"part": "t", "benchmark": "b", **row})
        for name, n in counts.items()
    )


def test_a_program_that_fails_or_hangs_says_so(gpu_bench):
    tools = gpu_bench("run_tools")
    failed = tools.finished([sys.executable, "-c", "print('why'); raise SystemExit(9)"], 60)
    assert failed == {"passed": False, "status": 9, "said": "why"}
    assert tools.finished(["sleep", "60"], 0.2)["said"] == "not done after 0 s"


def test_without_the_sanitizer_it_is_skipped(gpu_bench, monkeypatch, capsys):
    tools = gpu_bench("run_tools")
    monkeypatch.setattr(tools.shutil, "which", lambda _: None)
    tools.memcheck(None)
    assert "compute-sanitizer is not installed" in capsys.readouterr().out
