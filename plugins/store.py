"""Compiled kernels in a folder: ``kernels.json`` and one ``.ptx`` each. Imports nothing heavy.

``tome-export engine`` reads it on the machine with the GPU, without torch or the Triton language.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from tome_export.errors import InputError
from tome_export.merge import spec
from tome_export.plugins.variants import Variant

FOLDER = "plugins"
"""Name of the folder in an artifact."""

INDEX = "kernels.json"
FORMAT = 1

DEFAULT_CAPABILITIES = ("8.0", "8.6", "8.9", "9.0", "10.0", "12.0")
"""Compute capabilities compiled for unless others are asked for: Ampere to Blackwell."""


@dataclass(frozen=True)
class Binary:
    """A kernel compiled for one GPU architecture.

    Attributes:
        compute_capability: It was compiled for, such as ``9.0``.
        target: PTX target: ``sm_89`` runs on 8.9 and all later GPUs, ``sm_90a`` on 9.0 only.
        entry: Name of the kernel in the PTX.
        threads: Per program.
        shared_bytes: Dynamic shared memory per program.
        ptx: The code.
    """

    compute_capability: str
    target: str
    entry: str
    threads: int
    shared_bytes: int
    ptx: str

    def runs_on(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of that compute capability can run it (PTX ISA, directive ``.target``)."""
        own = parse_capability(self.compute_capability)
        return own == capability if self.target[-1].isalpha() else own <= capability


@dataclass(frozen=True)
class Kernel:
    """A variant with what it was compiled to."""

    variant: Variant
    binaries: tuple[Binary, ...]

    def binary_for(self, capability: tuple[int, int]) -> Binary:
        """The binary for a GPU: its own, else the newest one that runs on it.

        Raises:
            InputError: if none does.
        """
        fitting = [binary for binary in self.binaries if binary.runs_on(capability)]
        if not fitting:
            have = ", ".join(binary.compute_capability for binary in self.binaries)
            major, minor = capability
            raise InputError(
                f"the artifact's {self.variant.op} kernel was compiled for compute capabilities "
                f"{have}; the engine is for {major}.{minor}: rebuild the artifact with "
                f"--compute-capability {major}.{minor}, or with --merge-op matmul"
            )
        return max(fitting, key=lambda binary: parse_capability(binary.compute_capability))


class KernelStore:
    """The kernels of an artifact by variant."""

    def __init__(self, kernels: Iterable[Kernel]) -> None:
        self.kernels = {kernel.variant.name: kernel for kernel in kernels}

    def kernel(self, variant: Variant) -> Kernel:
        """The kernel of a variant.

        Raises:
            InputError: if the artifact has none.
        """
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
        """Write the index and the PTX files into a new folder.

        Args:
            folder: Made here.
            compiler: What compiled them, with its version.

        Returns:
            What was written.
        """
        folder.mkdir()
        files, entries = {}, []
        for kernel in self.kernels.values():
            records = []
            for binary in kernel.binaries:
                file = f"{kernel.variant.name}.{binary.target}.ptx"
                fields = asdict(binary)
                files[file] = fields.pop("ptx")
                records.append(_Record(file=file, **fields))
            variant = {**vars(kernel.variant), "constants": dict(kernel.variant.constants)}
            entries.append(_Entry(**variant, binaries=tuple(records)))
        index = _Index(
            format=FORMAT, operators=spec.VERSION, compiler=compiler, kernels=tuple(entries)
        )
        files = {INDEX: index.model_dump_json(indent=2) + "\n", **files}
        for file, content in files.items():
            (folder / file).write_text(content)
        return [folder / file for file in files]

    @classmethod
    def read(cls, folder: Path) -> KernelStore:
        """Read what ``write`` wrote.

        Raises:
            InputError: if it is missing, damaged or of another format.
        """
        path = folder / INDEX
        try:
            index = _Index.model_validate_json(path.read_bytes())
            if (index.format, index.operators) != (FORMAT, spec.VERSION):
                raise InputError(
                    f"{path} has format {index.format} for operators version {index.operators}; "
                    f"this version reads {FORMAT} and {spec.VERSION}: rebuild the artifact"
                )
            return cls([entry.kernel(folder) for entry in index.kernels])
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


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _Record(_Part):
    """A binary in the index: its code is in a file of its own."""

    file: str
    compute_capability: str
    target: str
    entry: str
    threads: NonNegativeInt
    shared_bytes: NonNegativeInt

    def binary(self, folder: Path) -> Binary:
        ptx = (folder / Path(self.file).name).read_text()
        if f".entry {self.entry}(" not in ptx or f".target {self.target}\n" not in ptx:
            raise ValueError(f"{self.file} is not the kernel that its record describes")
        parse_capability(self.compute_capability)
        return Binary(**self.model_dump(exclude={"file"}), ptx=ptx)


class _Entry(_Part):
    """A kernel in the index."""

    name: str
    op: str
    dtype: str
    constants: dict[str, int | str]
    num_warps: int
    max_registers: int | None
    binaries: tuple[_Record, ...]

    def kernel(self, folder: Path) -> Kernel:
        variant = Variant(**self.model_dump(exclude={"binaries"}))
        return Kernel(variant, tuple(record.binary(folder) for record in self.binaries))


class _Index(_Part):
    """The file ``kernels.json``."""

    format: int
    operators: int
    compiler: str
    kernels: tuple[_Entry, ...]


def _reason(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return f"{type(error).__name__}: {error}"
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")


def parse_capability(text: str) -> tuple[int, int]:
    """``"9.0"`` -> ``(9, 0)``.

    Raises:
        InputError: if it is not written like that.
    """
    found = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})", text)
    if found is None:
        raise InputError(f"compute capability is {text!r}; expected two numbers such as 9.0")
    return int(found[1]), int(found[2])
