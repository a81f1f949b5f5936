"""What an import brings along. Who may import whom is held by ``lint-imports`` (``make lint``)."""

from __future__ import annotations

import graphlib
import subprocess
import sys

import grimp
import pytest

HEAVY = {
    *("torch", "torchvision", "timm", "transformers", "open_clip", "safetensors"),
    *("onnx", "onnxruntime", "onnxscript", "openvino", "tensorrt", "tensorrt_rtx", "triton"),
    *("datasets", "pyarrow", "ray", "scipy", "matplotlib", "tritonclient", "av"),
}

HELP = """
import sys
from tome_export.cli.main import main
sys.argv = ["tome-export", "--help"]
try:
    main()
finally:
    print("loaded", *sorted({name.split(".")[0] for name in sys.modules}))
"""


def python(code: str, **options: object) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True, **options).stdout


def test_help_does_not_import_heavy_packages():
    text, _, loaded = python(HELP).rpartition("loaded ")
    assert "Usage: tome-export" in text
    assert "tome_export" in loaded.split()
    assert HEAVY.intersection(loaded.split()) == set()


def test_features_wait_with_torch_until_a_model_is_loaded():
    names = [
        "bench",
        "build",
        "cascade",
        "evaluate",
        "parity",
        "predict",
        "report",
        "serve",
        "tune",
        "visualize",
    ]
    imports = "".join(f"import tome_export.{name}.main\n" for name in names)
    assert python(f"{imports}import sys; print('torch' in sys.modules)") == "False\n"


@pytest.mark.parametrize("name", ["cli", "models", "plugins"])
def test_top_level_folders_are_not_global_names(name, tmp_path):
    names = f"{name!r}, 'tome_export.{name}'"
    code = f"import importlib.util as u; print(*(u.find_spec(n) for n in ({names})))"
    assert python(code, cwd=tmp_path).startswith("None ModuleSpec")


def test_no_module_imports_itself_through_others():
    """Packages' own modules too, which the contract on cycles leaves out; lazily or for types."""
    graph = grimp.build_graph("tome_export", cache_dir=None)
    imported = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    assert "tome_export.cli.main" in imported
    try:
        graphlib.TopologicalSorter(imported).prepare()
    except graphlib.CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))
