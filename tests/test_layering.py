"""Who may import whom, lazily or not: the rules of the layers, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
# Folder of each layer -> its package.
PACKAGES = {
    ROOT / "tome_export": "tome_export",
    ROOT / "cli": "tome_export.cli",
    ROOT / "models": "tome_export.models",
    ROOT / "plugins": "tome_export.plugins",
}

# Heavy or special packages -> the layers that may import them, in functions too.
ONLY = {
    "onnx": {"onnx"},
    "onnx_ir": {"onnx"},
    "onnxscript": {"onnx"},
    "onnxsim": {"onnx"},
    "timm": {"patch", "models"},
    "tensorrt": {"engine", "plugins"},
    "tensorrt_rtx": {"engine"},
    "tensorrt_lean": {"engine"},
    "polygraphy": {"engine"},
    "tritonclient": {"serve"},
    "triton": {"plugins"},
    "click": {"cli"},
    "rich": {"cli"},
    "transformers": {"patch", "models"},
    "open_clip": {"patch", "models"},
    "onnxruntime": {"runtime", "serve"},
    "ray": {"evaluation"},
    "pyarrow": {"evaluation"},
    "av": {"video"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
}

# What each layer may import of this package, besides itself, errors and spec.
MAY_IMPORT = {
    "merge": set(),
    "plugins": {"merge.spec"},
    # Their weights are read as those of models.
    "reducers": {"merge", "weights"},
    # Options are read as those of reducers, weights as those of models.
    "compressors": {"merge", "reducers.options", "reducers.learned"},
    "patch": {"merge", "plugins", "reducers", "compressors"},
    "models": {"patch", "merge", "video", "weights"},
    "onnx": {"patch", "merge", "reducers"},
    "engine": set(),
    "runtime": {"onnx"},
    "parity": {"onnx", "patch", "merge", "reducers", "runtime"},
    "bench": {"onnx", "runtime", "merge"},
    "evaluation": {"runtime"},
    "tune": {"merge", "files"},
    "cascade": set(),
    "inspect": set(),
    "video": set(),
    "weights": set(),
    "report": {"inspect", "files", "reducers"},
    "serve": {"engine", "artifact", "cascade", "video"},
    "artifact": {"staging", "schema", "files"},
    "staging": {"schema", "files"},
    "files": set(),
    "schema": set(),
    "pipeline": {
        "artifact",
        "files",
        "engine",
        "merge",
        "models",
        "onnx",
        "parity",
        "patch",
        "plugins",
        "reducers",
        "report",
        "runtime",
        "serve",
        "bench",
        "evaluation",
        "tune",
        "cascade",
        "compressors",
        "inspect",
        "video",
    },
    "cli": {"pipeline", "artifact", "files", "engine", "models", "merge", "reducers"},
}

COMMON = {"errors", "spec", "progress", ""}


class Import(NamedTuple):
    file: Path
    line: int
    name: str
    type_only: bool
    lazy: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.name}"


def modules() -> Iterator[tuple[Path, str]]:
    """Every source file with its module name."""
    for folder, package in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield path, ".".join([package, *parts]).removesuffix(".__init__")


def is_type_checking(test: ast.expr) -> bool:
    return "TYPE_CHECKING" in ast.unparse(test)


def imports_of(path: Path, module: str) -> Iterator[Import]:
    """All imports of a file, those inside functions and ``TYPE_CHECKING`` blocks marked."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def names(node: ast.AST) -> list[str]:
        if isinstance(node, ast.Import):
            return [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # ``from a import b`` may import the module a.b.
            return [f"{base}.{alias.name}" for alias in node.names]
        call = node if isinstance(node, ast.Call) else None
        if call and ast.unparse(call.func) in (
            "import_module",
            "importlib.import_module",
            "__import__",
        ):
            return [a.value for a in call.args[:1] if isinstance(a, ast.Constant)]
        return []

    def walk(node: ast.AST, type_only: bool, lazy: bool) -> Iterator[Import]:
        for name in names(node):
            yield Import(path, node.lineno, name, type_only, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and is_type_checking(node.test):
            for child in node.body:
                yield from walk(child, True, inside)
            for child in node.orelse:
                yield from walk(child, type_only, inside)
            return
        for child in ast.iter_child_nodes(node):
            yield from walk(child, type_only, inside)

    yield from walk(ast.parse(path.read_text(encoding="utf-8")), False, False)


def layer_of(module: str) -> str:
    """``tome_export.onnx.build`` -> ``onnx``; ``""`` for the package itself."""
    return module.removeprefix("tome_export").removeprefix(".").split(".")[0]


def violations(found: Import, layer: str) -> str | None:
    """What is wrong with one import, or None."""
    top = found.name.split(".")[0]
    if top in ONLY and layer not in ONLY[top]:
        return None if found.type_only else f"{top} is only for {', '.join(sorted(ONLY[top]))}"
    if layer in ("merge", "plugins") and top == "numpy" and layer == "merge":
        return "merge knows torch and the standard library only"
    if top in ("cli", "models", "plugins"):
        return "the top-level folders are not global import names"
    if top != "tome_export":
        if layer == "merge" and top != "torch" and top not in sys.stdlib_module_names:
            return "merge knows torch and the standard library only"
        return None
    target = layer_of(found.name)
    if target == layer or target in COMMON or target.startswith("__"):
        return None
    if target == "cli" and layer != "cli":
        return "the library must not import the command line"
    if layer in COMMON:
        return "errors and spec import nothing of the layers"
    allowed = MAY_IMPORT[layer]
    below = found.name.removeprefix("tome_export.")
    if any(below == name or below.startswith(name + ".") for name in allowed):
        return None
    return f"{layer} may import {', '.join(sorted(allowed)) or 'errors and spec only'}"


ALL = list(modules())


@pytest.mark.parametrize(("path", "module"), ALL, ids=[module for _, module in ALL])
def test_module_keeps_to_its_layer(path, module):
    layer = layer_of(module)
    assert layer in MAY_IMPORT or layer in COMMON or layer.startswith("_"), f"{layer} has no rule"
    wrong = [
        f"{found}: {reason}"
        for found in imports_of(path, module)
        if (reason := violations(found, layer))
    ]
    assert wrong == []


HEAVY = {"torch", "onnx", "onnxruntime", "timm", "tensorrt", "tensorrt_rtx", "torchvision"}
LIGHT_LAYERS = ("cli", "engine", "artifact", "staging", "schema", "files", "errors", "spec", "")


@pytest.mark.parametrize(("path", "module"), ALL, ids=[module for _, module in ALL])
def test_what_the_command_line_imports_at_start_is_light(path, module):
    if layer_of(module) not in LIGHT_LAYERS:
        return
    eager = [f for f in imports_of(path, module) if not f.lazy and not f.type_only]
    assert [str(f) for f in eager if f.name.split(".")[0] in HEAVY] == []


@pytest.mark.parametrize("target", ["tome_export", "tome_export.cli.main"])
def test_importing_does_not_pull_heavy_packages(target):
    code = f"import sys, {target}; print(*sorted(n.split('.')[0] for n in sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "tome_export" in loaded
    assert HEAVY.intersection(loaded) == set()


@pytest.mark.parametrize("name", ["cli", "plugins"])
def test_top_level_folders_are_not_global_names(name, tmp_path):
    names = f"{name!r}, 'tome_export.{name}'"
    code = f"import importlib.util as u; print(*(u.find_spec(n) for n in ({names})))"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    ).stdout
    assert found.startswith("None ModuleSpec"), found


@pytest.mark.parametrize(
    ("source", "module", "expected"),
    [
        ("def f():\n    import onnx", "tome_export.parity.x", "onnx is only for onnx"),
        ("if TYPE_CHECKING:\n    import onnx", "tome_export.parity.x", None),
        ("import tensorrt_rtx.foo", "tome_export.onnx.x", "tensorrt_rtx is only for engine"),
        ("from tome_export.patch import patch", "tome_export.merge.x", "errors and spec only"),
        ("from ..patch import patch", "tome_export.merge.x", "errors and spec only"),
        ("import numpy", "tome_export.merge.x", "torch and the standard library"),
        ("from tome_export.merge.ops import match", "tome_export.plugins.x", "merge.spec"),
        ("from tome_export.merge import spec", "tome_export.plugins.x", None),
        ("import importlib\nimportlib.import_module('timm')", "tome_export.onnx.x", "timm is only"),
        ("from tome_export.cli import main", "tome_export.pipeline.x", "must not import the comm"),
        ("from tome_export import cli", "tome_export.engine.x", "must not import the command"),
        ("from models import x", "tome_export.pipeline.x", "not global import names"),
        ("from tome_export.merge import spec", "tome_export.errors", "import nothing"),
        ("from tome_export.pipeline import build", "tome_export.onnx.x", "onnx may import"),
        ("from tome_export.errors import InputError", "tome_export.merge.x", None),
    ],
)
def test_the_rules_catch_what_they_should(tmp_path, source, module, expected):
    path = tmp_path / "x.py"
    path.write_text(source)
    reasons = [violations(found, layer_of(module)) for found in imports_of(path, module)]
    caught = [reason for reason in reasons if reason]
    assert (not caught) if expected is None else any(expected in reason for reason in caught)
