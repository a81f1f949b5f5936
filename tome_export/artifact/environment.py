"""The machine and the libraries that a measurement was made with, as documents hold them."""

from __future__ import annotations

from importlib import metadata

import tome_export
from tome_export.artifact.document import Part


class Environment(Part):
    """Hardware, versions and date.

    Attributes:
        cpu: Model of the processor.
        cores: CPU cores that the process could use.
        gpu: Model of the first GPU that the process saw; None without one.
        driver: Version of its driver; None without one.
        machine: Architecture, such as ``x86_64``.
        python: Version of Python.
        versions: Package -> version.
        date: ISO 8601, UTC.
    """

    cpu: str
    cores: int
    gpu: str | None
    driver: str | None
    machine: str
    python: str
    versions: dict[str, str]
    date: str


PACKAGES = ("torch", "timm", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "onnxsim")


def versions() -> dict[str, str]:
    """Versions of this package and of what it used."""
    found = {"tome-export": tome_export.__version__}
    installed = {d.name.lower(): d.version for d in metadata.distributions() if d.name}
    return found | {name: installed[name] for name in PACKAGES if name in installed}
