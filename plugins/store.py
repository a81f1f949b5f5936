"""Compiled kernels in a folder: ``kernels.json`` and one ``.ptx`` each. Imports nothing heavy.

``tome-export engine`` reads it on the machine with the GPU, without torch or the Triton language.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, NonNegativeInt, TypeAdapter, ValidationError

from tome_export.errors import InputError
from tome_export.merge import spec
from tome_export.plugins.variants import Variant

FOLDER = "plugins"
"""Name of the folder in an artifact."""

INDEX = "kernels.json"
FORMAT = 1

DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
"""Compute capabilities compiled for unless others are asked for: Ampere to Blackwell."""

_STRICT = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one GPU architecture.

    Attributes:
        target: PTX target: ``sm_89`` runs on 8.9 and all later GPUs, ``sm_90a`` on 9.0 only.
        entry: Name of the kernel in the PTX.
        shared_bytes: Dynamic shared memory per program.
        ptx: The code, which is in a file of its own and not in the index.
        file: Name of that file; empty until the binary is written.
    """

    compute_capability: str
    target: str
    entry: str
    threads: NonNegativeInt
    shared_bytes: NonNegativeInt
    ptx: str = ""
    file: str = field(default="", compare=False)

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of that compute capability can run it (PTX ISA, directive ``.target``)."""
        own = parse_capability(self.compute_capability)
        return own == capability if self.target[-1].isalpha() else own <= capability

    def with_code(self, folder: Path) -> Binary:
        """The binary with the code of its file in a folder.

        Raises:
            ValueError: if the file holds another kernel.
            OSError: if it cannot be read.
        """
        ptx = (folder / Path(self.file).name).read_text()
        if f".entry {self.entry}(" not in ptx or f".target {self.target}\n" not in ptx:
            raise ValueError(f"{self.file} is not the kernel that its record describes")
        parse_capability(self.compute_capability)
        return replace(self, ptx=ptx)


@dataclass(frozen=True)
class Kernel(Variant):
    """A variant with what it was compiled to."""

    binaries: tuple[Binary, ...] = field(kw_only=True)

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    @classmethod
    def of(cls, variant: Variant, binaries: Iterable[Binary]) -> Kernel:
        """The kernel of a variant."""
        return cls(**vars(variant), binaries=tuple(binaries))

    @property
    def variant(self) -> Variant:
        """What was compiled."""
        return Variant(**{one.name: getattr(self, one.name) for one in fields(Variant)})

    def binary_for(self, capability: tuple[int, int]) -> Binary:
        """The binary for a GPU: its own, else the newest one that runs on it."""
        fitting = [binary for binary in self.binaries if binary.runs_on(capability)]
        if not fitting:
            have = ", ".join(binary.compute_capability for binary in self.binaries)
            major, minor = capability
            raise InputError(
                f"the artifact's {self.op} kernel was compiled for compute capabilities "
                f"{have}; the engine is for {major}.{minor}: rebuild the artifact with "
                f"--compute-capability {major}.{minor}, or with --merge-op matmul"
            )
        return max(fitting, key=lambda binary: parse_capability(binary.compute_capability))


@dataclass(frozen=True)
class _Index:
    """The file ``kernels.json``."""

    format: int
    operators: int
    compiler: str
    kernels: tuple[Kernel, ...]

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT


_INDEX = TypeAdapter(_Index)


class KernelStore:
    """The kernels of an artifact by the name of their variant."""

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        self.kernels = {kernel.name: kernel for kernel in kernels}

    def kernel(self, variant: Variant) -> Kernel:
        """The kernel of a variant."""
        kernel = self.kernels.get(variant.name)
        if kernel is None or kernel.variant != variant:
            raise InputError(
                f"the artifact has no kernel {variant.name}; it has "
                f"{', '.join(sorted(self.kernels)) or 'none'}: rebuild the artifact"
            )
        return kernel

    def check(self, capability: tuple[int, int]) -> None:
        """Raise ``InputError`` unless every kernel runs on such a GPU."""
        for kernel in self.kernels.values():
            kernel.binary_for(capability)

    def write(self, folder: Path, compiler: str) -> list[Path]:
        """Write the index and the PTX files into a new folder; returns what was written."""
        folder.mkdir()
        kernels = tuple(
            replace(
                kernel,
                binaries=tuple(
                    replace(binary, file=f"{kernel.name}.{binary.target}.ptx")
                    for binary in kernel.binaries
                ),
            )
            for kernel in self.kernels.values()
        )
        index = _Index(FORMAT, spec.VERSION, compiler, kernels)
        code = {"kernels": {"__all__": {"binaries": {"__all__": {"ptx"}}}}}
        files = {INDEX: _INDEX.dump_json(index, indent=2, exclude=code).decode() + "\n"}
        files |= {binary.file: binary.ptx for kernel in kernels for binary in kernel.binaries}
        for file, content in files.items():
            (folder / file).write_text(content)
        return [folder / file for file in files]

    @classmethod
    def read(cls, folder: Path) -> KernelStore:
        """Read what ``write`` wrote."""
        path = folder / INDEX
        try:
            index = _INDEX.validate_json(path.read_bytes())
            if (index.format, index.operators) != (FORMAT, spec.VERSION):
                raise InputError(
                    f"{path} has format {index.format} for operators version {index.operators}; "
                    f"this version reads {FORMAT} and {spec.VERSION}: rebuild the artifact"
                )
            return cls(
                Kernel.of(kernel.variant, [one.with_code(folder) for one in kernel.binaries])
                for kernel in index.kernels
            )
        except OSError as error:
            raise InputError(
                f"cannot read {error.filename or path} ({error.strerror}): rebuild the artifact or "
                "copy it whole"
            ) from error
        except ValueError as error:
            raise InputError(
                f"{path} is not an index of kernels ({_reason(error)}); rebuild the artifact or "
                "copy it again"
            ) from error


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def parse_capability(text: str) -> tuple[int, int]:
    """``"9.0"`` -> ``(9, 0)``."""
    found = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})", text)
    if found is None:
        raise InputError(f"compute capability is {text!r}; expected two numbers such as 9.0")
    return int(found[1]), int(found[2])
