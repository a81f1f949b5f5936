"""The kernels under the Triton interpreter, in one process for all tests that need them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest


class Interpreter:
    """Calls functions of ``interpreter.py`` in a process whose Triton interpreter is on."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("interpreter.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TRITON_INTERPRET": "1"},
        )

    def __call__(self, function: str, *arguments: Any, **options: Any) -> Any:
        """What the function returns; ``RuntimeError`` with its error's type and message."""
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        pickle.dump((function, arguments, options), to)
        to.flush()
        done, answer = pickle.load(back)  # noqa: S301 - from our own child
        if not done:
            raise RuntimeError(": ".join(answer))
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.communicate(timeout=30)


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Interpreter]:
    """``interpreter("match", keys, r, prefix, class_token)`` on CPU tensors."""
    pytest.importorskip("triton", reason="the Triton language runs the kernels")
    worker = Interpreter()
    yield worker
    worker.close()


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, str], Any]:
    """``compiled(variant, "9.0")``: the kernel, compiled once per session, from nothing.

    The compiler's own cache is elsewhere: it would hide what is not deterministic.
    """
    pytest.importorskip("triton", reason="the Triton language compiles the kernels")
    from tome_export.plugins import aot
    from tome_export.plugins.store import parse_capability

    folder = tmp_path_factory.mktemp("triton")

    @cache
    def compile_once(variant: Any, capability: str) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TRITON_CACHE_DIR", str(folder))
            return aot.compile_ptx(variant, parse_capability(capability))

    return compile_once


@pytest.fixture(scope="session")
def gpu() -> str:
    """Name of a CUDA device on which the custom operators run the kernels."""
    import torch

    from tome_export.merge import ops
    from tome_export.plugins import torch_ops

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the GPU is older than compute capability 8.0")
    assert torch_ops.install(ops.eager_match, ops.eager_merge)
    return "cuda"
