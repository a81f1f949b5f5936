"""NVIDIA's load generator ``perf_analyzer``: where it is, what it lacks, and one measurement.

It comes inside an older wheel of tritonclient, which goes into a folder of its own, with the CUDA
runtime that it is linked against (no GPU is needed):

    pip install --no-deps --target TOOLS tritonclient==2.50.0 nvidia-cuda-runtime-cu12

Its library for base 64, libb64.so.0d, is the system's (Debian: libb64-0d), or the one that
nvidia-pytriton brings.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tome_export.errors import ExportError, MissingComponentError

NAME = "perf_analyzer"
INSTALL = "pip install --no-deps --target TOOLS tritonclient==2.50.0 nvidia-cuda-runtime-cu12"

WINDOWS = 3
"""It wants three windows in a row that agree, and gives what they hold together."""


@dataclass(frozen=True)
class Load:
    """What one measurement found.

    Attributes:
        images_per_second: Answers within the windows, by their length.
        latency_ms: ``p50``, ``p95``, ``p99``: from sending a request to its answer.
        queue_ms: Mean time of a request in the server's queue.
    """

    images_per_second: float
    latency_ms: Mapping[str, float]
    queue_ms: float


class PerfAnalyzer:
    """The program, ready to run.

    Args:
        path: It, or the folder that ``pip install --target`` wrote; None for the one on PATH.
        folder: An empty folder for its files.

    Raises:
        MissingComponentError: if it is not there, or a library that it needs.
    """

    def __init__(self, path: Path | None, folder: Path) -> None:
        self.binary, self._folder = find(path), folder
        places = library_folders(self.binary)
        for library in bundled_libraries():
            (folder / "libb64.so.0d").symlink_to(library)
            places.append(folder)
        before = os.environ.get("LD_LIBRARY_PATH")
        joined = [*map(str, places), *([before] if before else [])]
        self._environment = {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(joined)}
        ran = self._run("--version")
        if ran.returncode:
            reason = (ran.stderr or ran.stdout).strip().splitlines()[-1:]
            raise MissingComponentError(
                f"{self.binary} does not start ({' '.join(reason)}); expected what '{INSTALL}' "
                "and the package libb64-0d bring"
            )

    def measure(
        self,
        address: str,
        model: str,
        concurrency: int,
        images: NDArray[np.float32],
        seconds: float,
    ) -> Load:
        """Keep ``concurrency`` requests of one image each under way, and look at the answers.

        Args:
            address: ``host:port`` of gRPC.
            model: Its name.
            concurrency: Requests at once.
            images: ``pixel_values [images, C, H, W]``, sent in turn.
            seconds: Length of the measurement.

        Raises:
            ExportError: if the program fails, or a request does.
        """
        data, report = self._folder / "images.json", self._folder / "report.csv"
        data.write_text(input_data(images))
        ran = self._run(
            *("-m", model, "-u", address, "-i", "grpc", "--async", "--input-data", str(data)),
            *("--concurrency-range", str(concurrency), "-f", str(report)),
            *("--measurement-interval", str(round(seconds * 1000 / WINDOWS))),
            # How steady the windows are is judged from the rounds of the benchmark.
            *("--stability-percentage", "999", "--max-trials", "20"),
        )
        if ran.returncode or not report.is_file():
            words = (ran.stderr.strip() or ran.stdout.strip())[-300:]
            raise ExportError(f"{NAME} ended with exit code {ran.returncode}: {words}")
        return load_from_report(report.read_text())

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.binary), *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )


def find(path: Path | None) -> Path:
    """The executable.

    Args:
        path: It, or the folder it was installed to; None for the one on PATH.

    Raises:
        MissingComponentError: if it is not there.
    """
    if path is None:
        found = shutil.which(NAME)
        places = [Path(found).resolve()] if found else []
    else:
        places = [path, path / "bin" / NAME]
    for place in places:
        if place.is_file() and os.access(place, os.X_OK):
            return place.absolute()
    raise MissingComponentError(
        f"{NAME} is not {'on PATH' if path is None else f'at {path}'}; '{INSTALL}' and give "
        "--perf-analyzer TOOLS"
    )


def library_folders(binary: Path) -> list[Path]:
    """Where the CUDA runtime may lie that was installed beside it."""
    return [*binary.parents[1].glob("nvidia/*/lib")]


def bundled_libraries() -> list[Path]:
    """libb64 of nvidia-pytriton, under the name its wheel gave it; at most one."""
    folders = [Path(place) / "nvidia_pytriton.libs" for place in sys.path]
    return [library for folder in folders for library in sorted(folder.glob("libb64*"))][:1]


def input_data(images: NDArray[np.float32]) -> str:
    """Images as the program's JSON, each ``pixel_values [C, H, W]``."""
    return json.dumps(
        {
            "data": [
                {
                    "pixel_values": {
                        "b64": base64.b64encode(np.ascontiguousarray(image).tobytes()).decode(),
                        "shape": list(image.shape),
                    }
                }
                for image in images
            ]
        }
    )


def load_from_report(text: str) -> Load:
    """Read the CSV report of one concurrency.

    Raises:
        ExportError: if it has no such row.
    """
    rows = [*csv.DictReader(io.StringIO(text.strip()))]
    try:
        (row,) = rows
        return Load(
            float(row["Inferences/Second"]),
            {name: float(row[f"{name} latency"]) / 1e3 for name in ("p50", "p95", "p99")},
            float(row["Server Queue"]) / 1e3,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ExportError(f"{NAME} wrote a report of another form: {text[:200]!r}") from error
