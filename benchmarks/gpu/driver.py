"""Starting compiled kernels through the CUDA driver, as TensorRT starts a plugin's kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

LIBRARY = "libcuda.so.1"

# CUjit_option and CUfunction_attribute (cuda.h).
_INFO_LOG, _INFO_LOG_BYTES, _ERROR_LOG, _ERROR_LOG_BYTES = 3, 4, 5, 6
_LOCAL_BYTES, _REGISTERS = 3, 4
_LOG_BYTES = 1 << 14


class DriverError(RuntimeError):
    """A call of the driver API failed; the message holds the log of its compiler, if it has one."""


@dataclass(frozen=True)
class Loaded:
    """A kernel on the GPU.

    Attributes:
        module: Handle of its module.
        function: Handle of the kernel.
        registers: Per thread.
        local_bytes: Per thread: what did not fit into registers.
        log: What the driver's compiler remarked.
    """

    module: ctypes.c_void_p
    function: ctypes.c_void_p
    registers: int
    local_bytes: int
    log: str


class Driver:
    """The driver API in the current context: torch's, once a tensor is on the GPU.

    Args:
        library: Name or path of the driver.

    Raises:
        OSError: if there is no driver.
        DriverError: if no context is current.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        self._lib = ctypes.CDLL(library)
        # Handles are pointers: without the types ctypes would cut them to 32 bits.
        pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
        types = {
            "cuCtxGetCurrent": [pointer],
            "cuModuleLoadDataEx": [pointer, pointer, unsigned, pointer, pointer],
            "cuModuleGetFunction": [pointer, pointer, ctypes.c_char_p],
            "cuModuleUnload": [pointer],
            "cuFuncGetAttribute": [pointer, ctypes.c_int, pointer],
            "cuLaunchKernel": [pointer, *[unsigned] * 7, pointer, pointer, pointer],
            "cuGetErrorName": [ctypes.c_int, pointer],
            "cuGetErrorString": [ctypes.c_int, pointer],
        }
        for name, arguments in types.items():
            function = getattr(self._lib, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        context = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(context))
        if not context:
            raise DriverError("no CUDA context is current; expected torch's: put a tensor on it")

    def load(self, ptx: str, entry: str) -> Loaded:
        """Compile PTX for the current GPU and find the kernel in it.

        Args:
            ptx: The code.
            entry: Name of the kernel.

        Raises:
            DriverError: with the log of the driver's compiler.
        """
        image = ctypes.create_string_buffer(ptx.encode())  # ends with a zero byte, as it has to
        info, error = (ctypes.create_string_buffer(_LOG_BYTES) for _ in range(2))
        options = (ctypes.c_int * 4)(_INFO_LOG, _INFO_LOG_BYTES, _ERROR_LOG, _ERROR_LOG_BYTES)
        # Sizes are given as the values of the pointers themselves.
        values = (ctypes.c_void_p * 4)(
            ctypes.addressof(info), _LOG_BYTES, ctypes.addressof(error), _LOG_BYTES
        )
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            self._call(
                "cuModuleLoadDataEx", ctypes.byref(module), image, len(options), options, values
            )
        except DriverError as failure:
            log = error.value.decode(errors="replace").strip()
            raise DriverError(f"{failure}; the driver's compiler: {log or 'no log'}") from None
        self._call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        return Loaded(
            module,
            function,
            self._attribute(function, _REGISTERS),
            self._attribute(function, _LOCAL_BYTES),
            info.value.decode(errors="replace").strip(),
        )

    def unload(self, kernel: Loaded) -> None:
        """Free a kernel whose runs are over."""
        self._call("cuModuleUnload", kernel.module)

    def start(
        self,
        kernel: Loaded,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        stream: int,
        parameters: Sequence[ctypes.c_void_p | ctypes.c_int32],
    ) -> None:
        """Start a kernel.

        Args:
            kernel: From ``load``.
            grid: Programs in x, y and z.
            threads: Per program.
            shared_bytes: Dynamic shared memory per program.
            stream: Handle.
            parameters: In the kernel's order; pointers to GPU memory and integers.
        """
        addresses = (ctypes.c_void_p * len(parameters))(
            *(ctypes.addressof(parameter) for parameter in parameters)
        )
        block = (threads, 1, 1)
        self._call(
            "cuLaunchKernel",
            kernel.function,
            *grid,
            *block,
            shared_bytes,
            stream,
            addresses,
            None,
        )

    def _attribute(self, function: ctypes.c_void_p, attribute: int) -> int:
        value = ctypes.c_int()
        self._call("cuFuncGetAttribute", ctypes.byref(value), attribute, function)
        return value.value

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status != 0:
            raise DriverError(f"{name} returned {status} ({self._meaning(status)})")

    def _meaning(self, status: int) -> str:
        parts = []
        for name in ("cuGetErrorName", "cuGetErrorString"):
            found = ctypes.c_char_p()
            if getattr(self._lib, name)(status, ctypes.byref(found)) == 0 and found.value:
                parts.append(found.value.decode(errors="replace"))
        return ": ".join(parts) or "unknown to this driver"


def parameters(
    inputs: Sequence[int], scalars: Sequence[int], outputs: Sequence[int]
) -> list[ctypes.c_void_p | ctypes.c_int32]:
    """A plugin kernel's parameters: pointers of the inputs, scalars, pointers of the outputs."""
    return [
        *(ctypes.c_void_p(address) for address in inputs),
        *(ctypes.c_int32(value) for value in scalars),
        *(ctypes.c_void_p(address) for address in outputs),
    ]
