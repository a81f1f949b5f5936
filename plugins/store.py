"""Compiled kernels in a folder: ``kernels.json`` and one ``.ptx`` each. Imports nothing heavy.

``tome-export engine`` reads it on the machine with the GPU, without torch or the Triton language.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

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
        written = [folder / INDEX]
        entries = []
        for kernel in self.kernels.values():
            binaries = []
            for binary in kernel.binaries:
                name = f"{kernel.variant.name}.{binary.target}.ptx"
                (folder / name).write_text(binary.ptx)
                written.append(folder / name)
                record = asdict(binary)
                del record["ptx"]
                binaries.append({"file": name, **record})
            entries.append({**_plain(kernel.variant), "binaries": binaries})
        index = {
            "format": FORMAT,
            "operators": spec.VERSION,
            "compiler": compiler,
            "kernels": entries,
        }
        written[0].write_text(json.dumps(index, indent=2) + "\n")
        return written

    @classmethod
    def read(cls, folder: Path) -> KernelStore:
        """Read what ``write`` wrote.

        Raises:
            InputError: if it is missing, damaged or of another format.
        """
        path = folder / INDEX
        try:
            index = json.loads(path.read_text())
            if index["format"] != FORMAT or index["operators"] != spec.VERSION:
                raise InputError(
                    f"{path} has format {index['format']} for operators version "
                    f"{index['operators']}; this version reads {FORMAT} and {spec.VERSION}: "
                    "rebuild the artifact"
                )
            return cls([_kernel(entry, folder) for entry in index["kernels"]])
        except OSError as error:
            raise InputError(
                f"cannot read {error.filename or path} ({error.strerror}): rebuild the artifact or "
                "copy it whole"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} is not an index of kernels ({type(error).__name__}: {error}); rebuild the "
                "artifact or copy it again"
            ) from error


def _plain(variant: Variant) -> dict[str, Any]:
    return {**asdict(replace(variant, constants={})), "constants": dict(variant.constants)}


def _kernel(entry: Mapping[str, Any], folder: Path) -> Kernel:
    variant = Variant(**{key: value for key, value in entry.items() if key != "binaries"})
    if not (isinstance(variant.name, str) and isinstance(variant.constants, dict)):
        raise TypeError("a kernel has no name or no constants")
    return Kernel(variant, tuple(_binary(record, folder) for record in entry["binaries"]))


def _binary(record: Mapping[str, Any], folder: Path) -> Binary:
    fields = {key: value for key, value in record.items() if key != "file"}
    binary = Binary(**fields, ptx=(folder / Path(record["file"]).name).read_text())
    numbers = (binary.threads, binary.shared_bytes)
    if not (
        isinstance(binary.compute_capability, str)
        and all(type(number) is int and number >= 0 for number in numbers)
        and f".entry {binary.entry}(" in binary.ptx
        and f".target {binary.target}\n" in binary.ptx
    ):
        raise ValueError(f"{record['file']} is not the kernel that its record describes")
    parse_capability(binary.compute_capability)
    return binary


def parse_capability(text: str) -> tuple[int, int]:
    """``"9.0"`` -> ``(9, 0)``.

    Raises:
        InputError: if it is not written like that.
    """
    found = re.fullmatch(r"([0-9]{1,3})\.([0-9]{1,3})", text)
    if found is None:
        raise InputError(f"compute capability is {text!r}; expected two numbers such as 9.0")
    return int(found[1]), int(found[2])
