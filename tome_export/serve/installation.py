"""The server on this machine: where it is, and what it needs to start."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import sysconfig
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from tome_export.errors import MissingComponentError

NAME = "tritonserver"

STAND_IN = Path(__file__).parent / "stand_in" / "model.py"

OLDER_NUMPY = Path(sys.prefix) / "share" / "tome-export" / NAME
"""NumPy 1 for the server inside nvidia-pytriton, where this Python has a later one."""

_PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Installation:
    """A server that can be started.

    Attributes:
        backends: Folder of its backends; None where the server knows by itself.
        stub: The python backend's interpreter process for this Python, of the server inside
            nvidia-pytriton; None where the server brings its own.
    """

    binary: Path
    backends: Path | None
    stub: Path | None = None

    @property
    def has_onnxruntime(self) -> bool:
        """Whether it comes with the real ONNX Runtime backend."""
        return self.backends is None or (self.backends / "onnxruntime").is_dir()

    def environment(self, folder: Path) -> dict[str, str]:
        """Environment to start it in; may use an empty folder.

        The server inside nvidia-pytriton runs python models in the first interpreter on the path,
        and with nothing that the environment says about Python. So that it finds the packages of
        this one, with a NumPy that it can use, it gets a virtual environment of its own.
        """
        environment = dict(os.environ)
        if self.stub is None:
            return environment
        venv.create(folder, symlinks=True)
        packages = folder / "lib" / f"python{_PYTHON}" / "site-packages"
        theirs = [p for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
        older = [str(OLDER_NUMPY)] if OLDER_NUMPY.is_dir() else []
        # No __pycache__ in a repository that may be read-only or shared.
        lines = ["import sys; sys.dont_write_bytecode = True", *older, *theirs]
        (packages / "tome_export.pth").write_text("\n".join(lines) + "\n")
        first = {"PATH": str(folder / "bin")}
        if library := sysconfig.get_config_var("LIBDIR"):
            first["LD_LIBRARY_PATH"] = library
        for name, place in first.items():
            before = environment.get(name)
            environment[name] = f"{place}{os.pathsep}{before}" if before else place
        environment.pop("PYTHONHOME", None)
        return environment

    def prepare_backends(self, folder: Path, *, stand_in: bool) -> Path | None:
        """The folder for ``--backend-directory``, made in an empty one; None for the server's own.

        With ``stand_in`` our stand-in runs the models of the ONNX Runtime backend.
        """
        if self.stub is None and not stand_in:
            return self.backends
        for backend in sorted(self.backends.iterdir()) if self.backends is not None else ():
            if backend.name != "python":
                (folder / backend.name).symlink_to(backend)
                continue
            # Of the backend that runs our stand-in the server accepts no link to another folder.
            shutil.copytree(backend, folder / "python")
            if self.stub is not None:
                (folder / "python" / self.stub.name).symlink_to(self.stub)
        if stand_in:
            stood_for = folder / "onnxruntime"
            stood_for.unlink(missing_ok=True)
            stood_for.mkdir()
            shutil.copyfile(STAND_IN, stood_for / STAND_IN.name)
        return folder


def find() -> Installation:
    """The server to start: ``tritonserver`` on the path, else the one inside nvidia-pytriton."""
    on_path = shutil.which(NAME)
    if on_path is not None:
        binary = Path(on_path).resolve()
        backends = binary.parents[1] / "backends"
        return Installation(binary, backends if backends.is_dir() else None)
    spec = importlib.util.find_spec("pytriton")
    for place in (spec.submodule_search_locations if spec is not None else None) or ():
        root = Path(place) / NAME
        if (root / "bin" / NAME).is_file():
            return Installation(root / "bin" / NAME, root / "backends", _stub_in(root))
    raise MissingComponentError(
        f"no {NAME} on PATH and no nvidia-pytriton, which brings one, is installed; run this in "
        "NVIDIA's Triton Inference Server container, or: pip install --no-deps nvidia-pytriton"
    )


def _stub_in(root: Path) -> Path:
    folder = root / "python_backend_stubs"
    stub = folder / _PYTHON / _STUB
    if not stub.is_file():
        there = sorted((p.name for p in folder.glob("*.*")), key=lambda n: int(n.split(".")[1]))
        raise MissingComponentError(
            f"this is Python {_PYTHON}; the {NAME} inside nvidia-pytriton runs python models with "
            f"{', '.join(there) or 'none'}; use one of these, or a {NAME} of its own on PATH"
        )
    # Its stub reads the size of an array from where NumPy 1 kept it: with NumPy 2 every output of a
    # python model arrives empty, and nothing complains.
    if int(version("numpy").split(".")[0]) > 1 and not (OLDER_NUMPY / "numpy").is_dir():
        raise MissingComponentError(
            f"the {NAME} inside nvidia-pytriton needs NumPy 1 for its python models, which Python "
            "3.12 is the last to have; put it beside this one: "
            f"pip install --no-deps --target {OLDER_NUMPY} 'numpy<2'"
        )
    return stub
