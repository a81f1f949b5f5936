"""The folder that is prepared on one machine and used on another: what lies where.

    prepared.json            Python version, commit, compiler and compute capability
    step1/kernels/           PTX of every kernel variant, with its launch parameters
    step1/wheels/            packages that the other machine may lack
    step1/onnxruntime-gpu.tar.xz.0, step2/onnxruntime-gpu.tar.xz.1
    step2/graphs/            ONNX graphs without their weights
    step2/wheels/ step3/wheels/

What is unpacked on the other machine lies beside that in ``site/`` and ``onnxruntime-gpu/``.
"""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

from scripts import thin_onnxruntime_gpu

STEPS = (1, 2, 3)
LIMIT_BYTES = 60 << 20
"""What a step may bring beside the repository."""
OLDEST_CAPABILITY = "8.0"
"""What the kernels are compiled for besides the GPU's own: code that every later GPU runs too."""
COMPUTE_CAPABILITIES = tuple(
    f"{architecture // 10}.{architecture % 10}"
    for architecture in thin_onnxruntime_gpu.ARCHITECTURES
    if architecture >= int(OLDEST_CAPABILITY.replace(".", ""))
)
"""GPUs that a folder can be prepared for: the wheels have machine code for each."""
KERNELS_LIMIT_BYTES = 3 << 20
ARCHIVE = "onnxruntime-gpu.tar.xz"


@dataclass(frozen=True)
class PreparedInfo:
    """What ``prepared.json`` says.

    Attributes:
        python: Version that the wheels are for, such as 3.12.
        commit: Of the checkout that prepared the folder.
        compiler: What compiled the kernels.
        compute_capability: That of the GPU that ONNX Runtime's code is for, such as 9.0.
    """

    python: str
    commit: str
    compiler: str
    compute_capability: str


class Prepared:
    """A prepared folder.

    Args:
        folder: It need not exist.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.kernels = self.folder / "step1" / "kernels"
        self.graphs = self.folder / "step2" / "graphs"
        self.site = self.folder / "site"
        self.onnxruntime = self.folder / "onnxruntime-gpu"

    def wheels(self, step: int) -> Path:
        """Where the wheels of a step are."""
        return self.folder / f"step{step}" / "wheels"

    def part(self, index: int) -> Path:
        """One half of the archive of ONNX Runtime."""
        return self.folder / f"step{index + 1}" / f"{ARCHIVE}.{index}"

    def write(self, info: PreparedInfo) -> None:
        """Write ``prepared.json``."""
        (self.folder / "prepared.json").write_text(json.dumps(asdict(info), indent=1) + "\n")

    def read(self) -> PreparedInfo:
        """Read ``prepared.json``.

        Raises:
            OSError: if it is not there.
        """
        return PreparedInfo(**json.loads((self.folder / "prepared.json").read_text()))

    def sizes(self, step: int) -> dict[Path, int]:
        """Bytes of every file that a step brings, by its path in the folder."""
        files = sorted(p for p in (self.folder / f"step{step}").rglob("*") if p.is_file())
        return {path.relative_to(self.folder): path.stat().st_size for path in files}

    def unpack_wheels(self) -> list[str]:
        """Unpack the wheels of packages that this machine lacks, or has only in older versions.

        Returns:
            Name and version of each.
        """
        used = []
        for step in STEPS:
            for wheel in sorted(self.wheels(step).glob("*.whl")):
                name, version = wheel.name.split("-")[:2]
                if not _is_older(_installed(name), version):
                    continue
                used.append(f"{name} {version}")
                shutil.unpack_archive(wheel, self.site, "zip")
        return used

    def join_onnxruntime(self) -> None:
        """Make a folder that holds the package ``onnxruntime`` of the two halves; once.

        Raises:
            OSError: if a half is not there.
        """
        if self.onnxruntime.exists():
            return
        packed = b"".join(self.part(index).read_bytes() for index in (0, 1))
        draft = self.onnxruntime.with_suffix(".partial")
        shutil.rmtree(draft, ignore_errors=True)
        with tarfile.open(fileobj=io.BytesIO(packed), mode="r:xz") as archive:
            archive.extractall(draft, filter="data")
        draft.rename(self.onnxruntime)


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _is_older(installed: str | None, wanted: str) -> bool:
    from packaging.version import Version

    return installed is None or Version(installed) < Version(wanted)
