"""Make an ONNX Runtime for one NVIDIA architecture that is small enough to carry.

The public wheel of onnxruntime-gpu (MIT licence) holds a 284 MB library with its kernels compiled
for six GPU architectures, a TensorRT provider, and a second copy of the runtime for C programs.
This leaves out what the Python package does not need to run ONNX models on one architecture through
the CUDA provider, and overwrites the other architectures' code with zeros, in place, so that
nothing inside the library moves. Equal wheels give equal bytes.

    python scripts/thin_onnxruntime_gpu.py FOLDER [--wheel FILE] [--python 3.12]
                                           [--compute-capability 9.0] [--parts 2]

FOLDER gets ``onnxruntime/`` and its licence; with ``--parts`` it gets ``onnxruntime-gpu.tar.xz.0``,
``.1``, … instead, which joined are one archive of those.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import lzma
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

NAME, VERSION = "onnxruntime-gpu", "1.31.1"
SHA256 = {
    "cp311": "e26c475fe361b2015f45b4b824bd13f0bb20204e59b62814e6f0acd5f3d491a6",
    "cp312": "05d548956197b9d01f59b625de740e0d6be3593f874e241a12dc0362650ecdf7",
    "cp313": "f659529e07c21ec6b6179fd1bfaf82ffb7c3dc9c0916e18f6f313f9a690891be",
}
"""sha256 of the wheels for Linux on x86-64, by Python version."""
ARCHITECTURES = (75, 80, 86, 89, 90, 120)
"""GPU architectures that the wheels hold machine code for."""
PYTHONS = tuple(f"{tag[2]}.{tag[3:]}" for tag in SHA256)
"""Versions of Python that there are wheels for."""
PLATFORM = "manylinux_2_28_x86_64"

PROVIDER = "onnxruntime/capi/libonnxruntime_providers_cuda.so"
LEFT_OUT = (
    "onnxruntime/capi/libonnxruntime_providers_tensorrt.so",
    # The Python module has the runtime inside it; this copy is for programs in C.
    f"onnxruntime/capi/libonnxruntime.so.{VERSION}",
    "onnxruntime/quantization/",
    "onnxruntime/tools/",
    "onnxruntime/transformers/",
    # Names files and their digests that are no longer true.
    f"onnxruntime_gpu-{VERSION}.dist-info/RECORD",
)
ARCHIVE = "onnxruntime-gpu.tar.xz"

# The container of device code that NVIDIA's compilers write, as public descriptions of it read:
# magic, version, bytes of this header, bytes of all entries; then per entry its kind, version,
# bytes of its header, bytes of its code, …, and the architecture at byte 28.
MAGIC = 0xBA55ED50
_CONTAINER = struct.Struct("<IHHQ")
_ENTRY = struct.Struct("<HHIQ12xI")
MACHINE_CODE = 2
"""The kind of an entry; PTX is 1."""


class ThinningError(RuntimeError):
    """The wheel is not the one that this script knows how to make smaller."""


@dataclass(frozen=True)
class Entry:
    """Device code for one architecture.

    Attributes:
        kind: ``MACHINE_CODE``, or another.
        architecture: Such as 90.
        start: Byte of the library at which the code begins.
        size: Its bytes, padding included.
    """

    kind: int
    architecture: int
    start: int
    size: int


def entries(library: bytes | bytearray) -> Iterator[list[Entry]]:
    """The entries of every container of device code in an ELF library.

    Raises:
        ThinningError: if there is none, or something else than whole containers.
    """
    start, size = section(library, b".nv_fatbin")
    position, end = start, start + size
    while position < end:
        magic, _, header, length = _CONTAINER.unpack_from(library, position)
        if magic != MAGIC or position + header + length > end:
            raise ThinningError(
                f"there is no container of device code at byte {position}: got {magic:#x}, "
                f"expected {MAGIC:#x} and its length inside the section"
            )
        inside, last = position + header, position + header + length
        found = []
        while inside < last:
            kind, _, header, length, architecture = _ENTRY.unpack_from(library, inside)
            if header < _ENTRY.size or inside + header + length > last:
                raise ThinningError(
                    f"the device code at byte {inside} reaches out of its container"
                )
            found.append(Entry(kind, architecture, inside + header, length))
            inside += header + length
        yield found
        position = last


def linked_libraries(library: bytes | bytearray) -> list[str]:
    """Names of the libraries that an ELF library is linked with, in its order."""
    start, size = section(library, b".dynamic")
    strings = section(library, b".dynstr")[0]
    entries = struct.iter_unpack("<QQ", library[start : start + size])
    begins = [strings + value for tag, value in entries if tag == 1]  # DT_NEEDED
    return [library[begin : library.index(b"\0", begin)].decode() for begin in begins]


def section(library: bytes | bytearray, name: bytes) -> tuple[int, int]:
    """Offset and size of a section of a 64-bit little-endian ELF file (ELF-64 Object File Format).

    Raises:
        ThinningError: if it is not such a file, or has no such section.
    """
    if library[:6] != b"\x7fELF\x02\x01":
        raise ThinningError("the library is no 64-bit little-endian ELF file")
    table = struct.unpack_from("<Q", library, 0x28)[0]
    width, count, names_at = struct.unpack_from("<HHH", library, 0x3A)
    headers = [
        struct.unpack_from("<IIQQQQ", library, table + index * width) for index in range(count)
    ]
    strings = headers[names_at][4]
    for header in headers:
        begin = strings + header[0]
        if library[begin : library.index(b"\0", begin)] == name:
            return header[4], header[5]
    raise ThinningError(f"the library has no section {name.decode()}")


def keep_architecture(library: bytearray, architecture: int) -> int:
    """Overwrite the code of other architectures with zeros.

    A container without machine code for the architecture keeps all it has.

    Returns:
        Bytes overwritten.

    Raises:
        ThinningError: if no container has machine code for it.
    """
    zeros = kept = 0
    for container in list(entries(library)):
        ours = [e for e in container if (e.kind, e.architecture) == (MACHINE_CODE, architecture)]
        kept += len(ours)
        for entry in container if ours else ():
            if entry not in ours:
                library[entry.start : entry.start + entry.size] = bytes(entry.size)
                zeros += entry.size
    if not kept:
        raise ThinningError(f"the library has no code for architecture {architecture}")
    return zeros


def thinned(wheel: Path, architecture: int) -> Iterator[tuple[str, bytes]]:
    """Name and content of each file that stays, in the order of their names."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if name.endswith("/") or name.startswith(LEFT_OUT):
                continue
            content = archive.read(name)
            if name == PROVIDER:
                library = bytearray(content)
                keep_architecture(library, architecture)
                content = bytes(library)
            yield name, content


def get_wheel(python: str, folder: Path) -> Path:
    """The pinned wheel for a Python version, downloaded by pip.

    Raises:
        ThinningError: if there is none for it, or pip cannot get it.
    """
    if python not in PYTHONS:
        raise ThinningError(
            f"{NAME} {VERSION} has no wheel for Python {python}; it has {', '.join(PYTHONS)}"
        )
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--python-version", python]
    command += ["--platform", PLATFORM, "--dest", str(folder), f"{NAME}=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        raise ThinningError(f"pip cannot download {NAME} {VERSION}: {last}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_wheel(wheel: Path) -> None:
    """Raise ``ThinningError`` unless the file is one of the pinned wheels."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest not in SHA256.values():
        raise ThinningError(
            f"{wheel.name} has the sha256 {digest}; expected {NAME} {VERSION} for Linux on x86-64"
        )


def write_tree(wheel: Path, architecture: int, folder: Path) -> None:
    """Unpack what stays of the wheel into a folder, whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
        tree = Path(draft) / "tree"
        for name, content in thinned(wheel, architecture):
            path = tree.joinpath(*PurePosixPath(name).parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        shutil.rmtree(folder, ignore_errors=True)
        tree.rename(folder)


def write_parts(wheel: Path, architecture: int, folder: Path, count: int) -> list[Path]:
    """The same as a compressed archive, cut into parts of about equal size."""
    packed = io.BytesIO()
    with (
        lzma.open(packed, "wb", preset=9 | lzma.PRESET_EXTREME) as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name, content in thinned(wheel, architecture):
            about = tarfile.TarInfo(name)
            about.size, about.mode = len(content), 0o644
            archive.addfile(about, io.BytesIO(content))
    content = packed.getvalue()
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(content) // count)
    written = []
    for index in range(count):
        path = folder / f"{ARCHIVE}.{index}"
        path.write_bytes(content[index * size : (index + 1) * size])
        written.append(path)
    return written


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that is written")
    parser.add_argument("--wheel", type=Path, help="the public wheel; downloaded if not given")
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("--python", default=own, help="version that will import it")
    parser.add_argument("--compute-capability", default="9.0", help="of the GPU")
    parser.add_argument("--parts", type=int, help="write a compressed archive in so many parts")
    options = parser.parse_args(arguments)
    try:
        with tempfile.TemporaryDirectory() as folder:
            wheel = options.wheel or get_wheel(options.python, Path(folder))
            check_wheel(wheel)
            architecture = int(options.compute_capability.replace(".", ""))
            if options.parts:
                files = write_parts(wheel, architecture, options.folder, options.parts)
            else:
                write_tree(wheel, architecture, options.folder)
                files = sorted(path for path in options.folder.rglob("*") if path.is_file())
            sizes = {path: path.stat().st_size for path in files}
            print(f"{wheel.stat().st_size / 2**20:8.1f} MiB  {wheel.name}")
    except ThinningError as error:
        print(f"nothing was written: {error}", file=sys.stderr)
        return 1
    for path, size in sizes.items():
        if size >= 2**20:
            print(f"{size / 2**20:8.1f} MiB  {path.relative_to(options.folder)}")
    print(f"{sum(sizes.values()) / 2**20:8.1f} MiB  in all, {len(files)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main())
