"""Which NVIDIA GPUs this machine has, asked of the driver itself: needs no torch, no nvidia-smi."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from functools import lru_cache

# CUDA driver API, CUdevice_attribute and CUresult (cuda.h).
_ATTRIBUTE_MAJOR = 75
_ATTRIBUTE_MINOR = 76
_MEANINGS = {
    3: "the driver could not start",
    34: "a stub of the driver library was found instead of the driver",
    100: "no CUDA device is visible",
    803: "the driver and its library have different versions: restart the machine",
    804: "this GPU does not support the installed compatibility package",
    999: "unknown error of the driver",
}


@dataclass(frozen=True)
class Gpu:
    """One visible GPU."""

    index: int
    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int

    def __str__(self) -> str:
        major, minor = self.compute_capability
        return f"{self.name} (compute capability {major}.{minor}, {self.memory_bytes >> 30} GiB)"


@dataclass(frozen=True)
class GpuReport:
    """The visible GPUs in CUDA's order, and one line about them or about why there are none."""

    gpus: tuple[Gpu, ...]
    reason: str


class _DriverError(Exception):
    """A call of the driver API returned other than CUDA_SUCCESS."""


def _call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    status = getattr(library, function)(*arguments)
    if status != 0:
        meaning = _MEANINGS.get(status, "see CUresult in NVIDIA's driver API reference")
        raise _DriverError(f"{function} returned {status}: {meaning}")


def _describe(library: ctypes.CDLL, index: int) -> Gpu:
    device = ctypes.c_int()
    _call(library, "cuDeviceGet", ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    _call(library, "cuDeviceGetAttribute", ctypes.byref(major), _ATTRIBUTE_MAJOR, device)
    _call(library, "cuDeviceGetAttribute", ctypes.byref(minor), _ATTRIBUTE_MINOR, device)
    capability = (major.value, minor.value)
    return Gpu(index, name.value.decode(errors="replace"), capability, memory.value)


def detect_with(library_name: str) -> GpuReport:
    """Ask the driver library of that name; the tests call it with other libraries."""
    try:
        library = ctypes.CDLL(library_name)
    except OSError:
        return GpuReport((), f"no NVIDIA driver here ({library_name} was not found)")
    try:
        _call(library, "cuInit", 0)
        count = ctypes.c_int()
        _call(library, "cuDeviceGetCount", ctypes.byref(count))
        gpus = tuple(_describe(library, index) for index in range(count.value))
    except AttributeError:
        return GpuReport((), f"{library_name} is not an NVIDIA driver library")
    except _DriverError as error:
        return GpuReport((), f"no usable GPU: {error}")
    if not gpus:
        return GpuReport((), "the NVIDIA driver is here, but no GPU is visible")
    return GpuReport(gpus, "; ".join(str(gpu) for gpu in gpus))


@lru_cache(maxsize=1)
def detect() -> GpuReport:
    """The GPUs CUDA programs of this process see (``CUDA_VISIBLE_DEVICES`` is honoured).

    The answer cannot change within a process: the driver reads its settings once.
    """
    return detect_with("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
