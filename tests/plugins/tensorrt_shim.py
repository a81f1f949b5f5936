"""The real Python layer of TensorRT on a machine without TensorRT and without a GPU.

``load`` compiles ``tensorrt_shim.c`` to the three libraries that ``tensorrt_bindings`` is linked
to, so that ``tensorrt`` and ``tensorrt.plugin`` import, with the lean runtime's plugin registry. It
alters ``sys.modules`` and loads libraries for good: call it in a process of its own.

``symbolic`` and ``Dimension`` stand in for the builder's shape expressions, which only a builder
can make: with them a plugin's output shapes and launch parameters can be read and evaluated.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

SOURCE = Path(__file__).with_name("tensorrt_shim.c")
LIBRARIES = ("libnvinfer", "libnvonnxparser", "libnvinfer_plugin")


class ShimUnavailable(RuntimeError):  # noqa: N818 - a reason to skip, not an error
    """TensorRT's Python layer cannot be had here; the message is the reason to skip."""


def load(folder: Path) -> ModuleType:
    """Import TensorRT's Python layer as ``tensorrt`` and ``tensorrt.plugin``.

    Args:
        folder: An existing folder for the compiled libraries; those already there are used.

    Returns:
        The module ``tensorrt``: the real one where TensorRT itself is installed.

    Raises:
        ShimUnavailable: A package or the C compiler is missing, or the import failed.
            ``sys.modules`` is then as it was.
    """
    if importlib.util.find_spec("tensorrt_libs") or importlib.util.find_spec("tensorrt"):
        return _imported("tensorrt")
    bindings = importlib.util.find_spec("tensorrt_bindings")
    lean = importlib.util.find_spec("tensorrt_lean_libs")
    if bindings is None or lean is None:
        raise ShimUnavailable(
            "needs the packages tensorrt-cu13-bindings and tensorrt-lean-cu13-libs"
        )
    lean_library = _only_file(lean, "libnvinfer_lean.so.*")
    major = lean_library.name.rpartition(".")[2]
    paths = [_compiled(name, major, folder) for name in LIBRARIES]
    try:
        for path in (lean_library, *paths):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise ShimUnavailable(f"a library does not load: {error}") from error
    return _imported("tensorrt_bindings")


def _only_file(spec: Any, pattern: str) -> Path:
    found = sorted(Path(next(iter(spec.submodule_search_locations))).glob(pattern))
    if len(found) != 1:
        raise ShimUnavailable(
            f"expected one {pattern} in the package {spec.name}, got {len(found)}"
        )
    return found[0]


def _compiled(name: str, major: str, folder: Path) -> Path:
    target = folder / f"{name}.so.{major}"
    if target.exists():
        return target
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ShimUnavailable("needs a C compiler (cc or gcc)")
    new = target.with_suffix(".new")
    # The soname is what makes the dynamic loader take this library for the one it looks for.
    command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{target.name}", "-o", new, SOURCE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ShimUnavailable(f"the C compiler failed: {done.stderr.strip()}")
    return new.replace(target)


def _imported(package: str) -> ModuleType:
    before = dict(sys.modules)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes in NVIDIA's docstrings
            module = importlib.import_module(package)
            sys.modules["tensorrt"] = module  # its plugin package imports it by this name
            importlib.import_module(f"{package}.plugin")
        # Every submodule too: else `import tensorrt.plugin._lib` makes a second registry.
        for name in [name for name in sys.modules if name.startswith("tensorrt_bindings.")]:
            sys.modules["tensorrt" + name.removeprefix("tensorrt_bindings")] = sys.modules[name]
    except Exception as error:
        for name in sys.modules.keys() - before.keys():
            if name.partition(".")[0] in {"tensorrt", "tensorrt_bindings"}:
                del sys.modules[name]
        raise ShimUnavailable(f"TensorRT's Python layer does not import: {error}") from error
    return module


@dataclass(frozen=True)
class Dimension:
    """One symbolic size, with the methods of ``tensorrt.IDimensionExpr``.

    Args:
        text: How it reads: ``"batch"``, ``"16"``, ``"CEIL_DIV(batch, 4)"``.
        value: Gives its value for given sizes of the free dimensions, ``{"batch": 3}``.
        constant: Whether it has no free dimension.
    """

    text: str
    value: Callable[[dict[str, int]], int] = field(compare=False)
    constant: bool = False

    @classmethod
    def named(cls, name: str) -> Dimension:
        """A free dimension."""
        return cls(name, lambda sizes: sizes[name])

    @classmethod
    def of(cls, size: int) -> Dimension:
        """A static dimension."""
        return cls(str(size), lambda _: size, constant=True)

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value({})

    def is_size_tensor(self) -> bool:
        return False


_OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "SUM": lambda a, b: a + b,
    "SUB": lambda a, b: a - b,
    "PROD": lambda a, b: a * b,
    "MAX": max,
    "MIN": min,
    "EQUAL": lambda a, b: int(a == b),
    "LESS": lambda a, b: int(a < b),
    "FLOOR_DIV": lambda a, b: a // b,
    "CEIL_DIV": lambda a, b: -(-a // b),
}


class ExprBuilder:
    """The methods of ``tensorrt.IExprBuilder`` that a plugin's shape expressions call."""

    def constant(self, value: int) -> Dimension:
        return Dimension.of(value)

    def operation(self, operation: Any, first: Dimension, second: Dimension) -> Dimension:
        compute = _OPERATIONS[operation.name]
        text = f"{operation.name}({first.text}, {second.text})"
        constant = first.constant and second.constant

        def value(sizes: dict[str, int]) -> int:
            return compute(first.value(sizes), second.value(sizes))

        return Dimension(str(value({})) if constant else text, value, constant)


class _Dimensions(list[Any]):
    """``tensorrt.DimsExprs``, which is made with its length."""

    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class _ScalarArgument:
    """``SymExprImpl``, TensorRT's hand-over of one integer to the builder; here it can be read."""

    def __init__(self, expr: Any) -> None:
        self.dtype = type(expr).__name__
        self.expr: Dimension = expr._expr


class ExtraArguments(list[Any]):
    """``tensorrt.ISymExprs``: the kernel's integer arguments."""

    nbSymExprs = 0  # noqa: N815 - TensorRT's name

    def __setitem__(self, index: Any, value: Any) -> None:
        self.extend([None] * (self.nbSymExprs - len(self)))
        super().__setitem__(index, value)


@contextmanager
def symbolic(trt: ModuleType) -> Iterator[ExprBuilder]:
    """Let ``tensorrt.plugin`` compute with ``Dimension``; the real classes come back afterwards."""
    tensor = sys.modules["tensorrt.plugin._tensor"]
    stand_ins = [
        (trt, "IDimensionExpr", Dimension),
        (trt, "DimsExprs", _Dimensions),
        (tensor, "SymExprImpl", _ScalarArgument),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in stand_ins]
    for owner, name, stand_in in stand_ins:
        setattr(owner, name, stand_in)
    try:
        yield ExprBuilder()
    finally:
        tensor.SymIntExpr._exprBuilder = None  # left set when a plugin's function raised
        for owner, name, original in originals:
            setattr(owner, name, original)
