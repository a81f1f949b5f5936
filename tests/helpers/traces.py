"""Traced graphs, each made once in a run of the tests: tracing is most of what a build takes."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import onnx
import pytest
import torch
from filelock import FileLock

AFTERWARDS = tuple(
    f"tome_export.{name}."
    for name in (
        *("artifact", "bench", "build", "cascade", "cli", "data", "display", "doctor", "engine"),
        *("evaluate", "parity", "progress", "report", "runtime", "serve", "tune", "visualize"),
    )
)
"""What tracing does not enter."""

LASTING = (sys.prefix, sys.base_prefix, Path(__file__).parents[2])
"""Where code does not change while the tests run."""


@contextmanager
def shared_traces(folder: Path) -> Iterator[None]:
    """Let an export take the graph that the same model gave with the same options before.

    The key is the content: every class, setting and weight of the model, and the options. What is
    done with a traced graph is done each time: operators, simplification, names, checks. While a
    test has patched code that tracing may enter, all is traced anew.

    Args:
        folder: Where the graphs are, for all workers of the run.
    """
    from tome_export.onnx import export

    trace = export._proto_from_model
    patches: set[pytest.MonkeyPatch] = set()
    set_attribute, undo = pytest.MonkeyPatch.setattr, pytest.MonkeyPatch.undo

    def noted(patch: pytest.MonkeyPatch, target: Any, *arguments: Any, **options: Any) -> None:
        if not f"{_module(target)}.".startswith(AFTERWARDS):
            patches.add(patch)
        set_attribute(patch, target, *arguments, **options)

    def undone(patch: pytest.MonkeyPatch) -> None:
        undo(patch)
        patches.discard(patch)

    def traced(model: Any, options: Any, output_names: Any) -> onnx.ModelProto:
        key = None if patches else _key(model, options, output_names)
        if key is None:
            return trace(model, options, output_names)
        path = folder / f"{key}.onnx"
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                path.write_bytes(trace(model, options, output_names).SerializeToString())
        return onnx.ModelProto.FromString(path.read_bytes())

    folder.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_proto_from_model", traced)
        patch.setattr(pytest.MonkeyPatch, "undo", undone)
        patch.setattr(pytest.MonkeyPatch, "setattr", noted)
        yield


def _module(target: Any) -> str:
    """Name of the module that an attribute to be patched is in."""
    if isinstance(target, str):
        return target
    if isinstance(target, ModuleType):
        return target.__name__
    return str(getattr(target, "__module__", None) or type(target).__module__)


def _key(*content: Any) -> str | None:
    """A digest; None if some class or function is from a file that a test wrote, or has no name."""
    pickled = io.BytesIO()
    try:
        _ContentPickler(pickled).dump(content)
    except (AttributeError, TypeError, pickle.PicklingError):
        return None
    return hashlib.sha256(pickled.getbuffer()).hexdigest()


class _ContentPickler(pickle.Pickler):
    """Leaves out what tells one process or one model from another of the same content."""

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type | FunctionType):
            file = getattr(sys.modules.get(value.__module__), "__file__", None)
            if file and not any(Path(file).is_relative_to(folder) for folder in LASTING):
                raise pickle.PicklingError(f"{value} is defined in {file}")
        if isinstance(value, torch.Tensor):
            raw = value.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            return tuple, ([type(value).__name__, str(value.dtype), tuple(value.shape), raw],)
        if isinstance(value, OrderedDict) and all(isinstance(key, int) for key in value):
            return tuple, ([*value.values()],)  # hooks, by the count of all hooks so far
        return NotImplemented
