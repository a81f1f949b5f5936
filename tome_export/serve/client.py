"""A client of a server: what it serves, and one request at a time, over gRPC or HTTP."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from tome_export.errors import InputError, MissingComponentError, TomeExportError, UsageError
from tome_export.serve.names import IMAGE, PIPELINE, ROUTER, ROUTES, VIDEO
from tome_export.serve.server_log import shortened
from tome_export.spec import INPUT_NAME

if TYPE_CHECKING:
    from numpy.typing import NDArray

Protocol = Literal["grpc", "http"]

PORTS = {"grpc": 8001, "http": 8000}
"""The server's own defaults."""

TIMEOUT_SECONDS = 60.0

_SCHEMES: dict[str, tuple[Protocol | None, bool]] = {
    "": (None, False),
    "grpc": ("grpc", False),
    "grpcs": ("grpc", True),
    "http": ("http", False),
    "https": ("http", True),
}
_ADDRESS = re.compile(r"(?P<host>[^\s:/@\[\]\0-\x1f]+|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?")


class Client:
    """A connection to a server, for one thread; made by ``connect``.

    Attributes:
        address: ``host:port``.
        protocol: ``grpc`` or ``http``.
    """

    def __init__(self, address: str, protocol: Protocol, *, ssl: bool, seconds: float) -> None:
        self.address, self.protocol = address, protocol
        self._seconds = seconds
        self._library = _library(protocol)
        # Over HTTP the limit belongs to the connection, over gRPC to each call.
        if protocol == "http":
            limits = {"connection_timeout": seconds, "network_timeout": seconds}
            self._limit: dict[str, float] = {}
        else:
            limits, self._limit = {}, {"client_timeout": seconds}
        with self._explained():
            self._client = self._library.InferenceServerClient(address, ssl=ssl, **limits)

    def close(self) -> None:
        """End the connection."""
        self._client.close()

    def check_reachable(self) -> None:
        """Raise ``MissingComponentError`` if no server answers."""
        try:
            live = self._client.is_server_live(**self._limit)
        except Exception as error:  # of sockets, gevent, gRPC and the client library
            raise self._unreachable(error) from error
        if not live:
            raise self._unreachable(None)

    def _ask(self, method: str, *arguments: str) -> Any:
        """What the server says of itself, as JSON has it."""
        with self._explained():
            extra = {**self._limit, "as_json": True} if self.protocol == "grpc" else {}
            return getattr(self._client, method)(*arguments, **extra)

    def models(self) -> list[str]:
        """Names of the models that are ready, sorted."""
        index = self._ask("get_model_repository_index")
        entries = index.get("models", []) if isinstance(index, dict) else index
        return sorted({entry["name"] for entry in entries if entry.get("state") == "READY"})

    def tensors(self, model: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and outputs of a model: name -> ``{datatype, shape}``, batch included."""
        metadata = self._ask("get_model_metadata", model)

        def described(kind: str) -> dict[str, Any]:
            return {
                tensor["name"]: {
                    "datatype": tensor["datatype"],
                    "shape": [int(size) for size in tensor["shape"]],
                }
                for tensor in metadata[kind]
            }

        return described("inputs"), described("outputs")

    def routes(self, model: str) -> tuple[str, ...]:
        """The models behind a router; none if the model is no router."""
        found = self._ask("get_model_config", model)
        config = found.get("config", found)  # gRPC's answer holds it
        routes = config.get("parameters", {}).get(ROUTES, {}).get("string_value", "")
        return tuple(filter(None, routes.split(",")))

    def pipeline(self, name: str | None = None) -> str:
        """The model that takes encoded images or videos.

        ``name`` is that of it, of the model or router it belongs to, or what the names of the
        models behind a router have in common; None for the only one there is, where a router stands
        for the models behind it.
        """
        known = self.models()
        if name is not None:
            for candidate in (name, f"{name}{PIPELINE}", f"{name}{ROUTER}{PIPELINE}"):
                if candidate in known and {IMAGE, VIDEO} & self.tensors(candidate)[0].keys():
                    return candidate
            if name not in known:
                raise InputError(
                    f"no model {name} is ready at {self.address}; it serves "
                    f"{', '.join(known) or 'none'}"
                )
        pipelines = [model for model in known if self._is_pipeline(model)]
        if name is not None:
            raise InputError(
                f"model {name} at {self.address} takes no encoded images; write it with "
                "'tome-export serve ... --preprocess' or give one of "
                f"{', '.join(pipelines) or 'another server'}"
            )
        behind = {route for model in pipelines for route in self.routes(model)}
        pipelines = [model for model in pipelines if model not in behind]
        if len(pipelines) == 1:
            return pipelines[0]
        if pipelines:
            raise InputError(
                f"{self.address} serves {len(pipelines)} models that take images; choose one with "
                f"--model: {', '.join(pipelines)}"
            )
        raise InputError(
            f"{self.address} serves {', '.join(known) or 'no model'}, none of which takes encoded "
            "images; write the repository with 'tome-export serve ... --preprocess'"
        )

    def _is_pipeline(self, model: str) -> bool:
        """Whether it takes encoded images or videos, and gives more than their pixels."""
        inputs, outputs = self.tensors(model)
        encoded = {inputs[kind]["datatype"] for kind in (IMAGE, VIDEO) if kind in inputs}
        return bool(encoded & {"BYTES", "UINT8"}) and INPUT_NAME not in outputs

    def infer(
        self,
        model: str,
        inputs: Mapping[str, NDArray[Any]],
        *,
        shared_memory: bool = False,
        parameters: Mapping[str, str | int | bool] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """Send one request to the newest version of a model; the outputs come like the inputs.

        These are arrays with batch by name; BYTES as an object array of ``bytes``. Shared memory is
        for a server on the same machine only. Parameters are those of the request, such as ``r``
        for a router.
        """
        from tritonclient.utils import np_to_triton_dtype

        with contextlib.ExitStack() as stack:
            stack.enter_context(self._explained())
            tensors = []
            for name, array in inputs.items():
                datatype = np_to_triton_dtype(array.dtype)
                tensor = self._library.InferInput(name, list(array.shape), datatype)
                if shared_memory:
                    region, size = stack.enter_context(self._region(array))
                    tensor.set_shared_memory(region, size)
                else:
                    tensor.set_data_from_numpy(array)
                tensors.append(tensor)
            extra = {**self._limit, "parameters": dict(parameters or {}) or None}
            result = self._client.infer(model, tensors, **extra)
            answer = result.get_response()
            if self.protocol == "grpc":
                names = [output.name for output in answer.outputs]
            else:
                names = [output["name"] for output in answer["outputs"]]
            # Copied: the arrays may look into the response's own memory.
            return {name: result.as_numpy(name).copy() for name in names}

    @contextlib.contextmanager
    def _region(self, array: NDArray[Any]) -> Iterator[tuple[str, int]]:
        """The array in shared memory that the server knows; name of the region and bytes."""
        from tritonclient.utils import serialize_byte_tensor
        from tritonclient.utils import shared_memory as memory

        encoded = array.dtype.kind == "O"
        data = serialize_byte_tensor(array) if encoded else array
        size = len(data.item()) if encoded else array.nbytes
        name = f"tome_export_query_{secrets.token_hex(8)}"
        try:
            region = memory.create_shared_memory_region(name, name, size, create_only=True)
        except memory.SharedMemoryException as error:
            raise InputError(
                f"no shared memory of {size} bytes: {error.__cause__ or error}; free some, or "
                "leave --shared-memory out"
            ) from error
        try:
            memory.set_shared_memory_region(region, [data])
            with self._explained("; --shared-memory is for a server on this machine"):
                self._client.register_system_shared_memory(name, f"/{name}", size, **self._limit)
            yield name, size
        finally:
            with contextlib.suppress(Exception):  # a server that is gone has forgotten it
                self._client.unregister_system_shared_memory(name, **self._limit)
            memory.destroy_shared_memory_region(region)

    @contextlib.contextmanager
    def _explained(self, hint: str = "") -> Iterator[None]:
        try:
            yield
        except TomeExportError:
            raise
        except Exception as error:  # of sockets, gevent, gRPC and the client library
            if not self._is_live():
                raise self._unreachable(error) from error
            message = getattr(error, "message", lambda: None)() or str(error)
            if "DEADLINE_EXCEEDED" in str(error) or isinstance(error, TimeoutError):
                message = f"no answer within {self._seconds:g} s; is the server overloaded?"
            raise InputError(f"{self.address} refused: {shortened(message)}{hint}") from error

    def _is_live(self) -> bool:
        try:
            return bool(self._client.is_server_live(**self._limit))
        except Exception:  # whatever it is, the first failure is the one to tell
            return False

    def _unreachable(self, error: BaseException | None) -> MissingComponentError:
        message = getattr(error, "message", lambda: None)() or str(error or "it is not live")
        other = "http" if self.protocol == "grpc" else "grpc"
        return MissingComponentError(
            f"no server answers {self.protocol} at {self.address} ({shortened(message)}); start "
            f"one with 'tome-export serve ... --run', or is that its port for {other}?"
        )


@contextlib.contextmanager
def connect(
    url: str, protocol: Protocol | None = None, seconds: float = TIMEOUT_SECONDS
) -> Iterator[Client]:
    """A client of the server at a URL, ``host[:port]`` or with ``grpc[s]://`` or ``http[s]://``.

    The protocol is None for that of the scheme, else gRPC; an answer may take ``seconds``.
    """
    address, used, ssl = parse_url(url, protocol)
    client = Client(address, used, ssl=ssl, seconds=seconds)
    try:
        client.check_reachable()
        yield client
    finally:
        client.close()


def encoded_file(data: bytes, datatype: str, dims: int) -> NDArray[Any]:
    """The content of one file as a model takes it, with a batch of one.

    ``datatype`` is BYTES, of so many ``dims``, or UINT8, which DALI takes: ``[1, bytes]``.
    """
    if datatype == "UINT8":
        return np.frombuffer(data, np.uint8)[None]
    tensor = np.empty([1] * dims, np.object_)
    tensor[...] = data
    return tensor


def parse_url(url: str, protocol: Protocol | None = None) -> tuple[str, Protocol, bool]:
    """``host:port``, the protocol, and whether to encrypt; see ``connect``."""
    scheme, separator, rest = url.rpartition("://")
    if scheme not in _SCHEMES or (separator and not scheme):
        known = ", ".join(f"{name}://" for name in _SCHEMES if name)
        raise UsageError(f"URL is {url!r}; expected host:port, or one that starts with {known}")
    named, ssl = _SCHEMES[scheme]
    if named and protocol and named != protocol:
        raise UsageError(f"URL is {url!r} but the protocol asked for is {protocol}; give one")
    used: Protocol = protocol or named or "grpc"
    found = _ADDRESS.fullmatch(rest.rstrip("/"))
    port = int(found["port"] or PORTS[used]) if found is not None else 0
    if found is None or not 0 < port < 1 << 16:
        raise UsageError(f"URL is {url!r}; expected host:port, such as localhost:{PORTS[used]}")
    return f"{found['host']}:{port}", used, ssl


def _library(protocol: Protocol) -> ModuleType:
    try:
        if protocol == "grpc":
            import tritonclient.grpc as library
        else:
            import tritonclient.http as library
    except ImportError as error:
        raise MissingComponentError(
            f"tritonclient for {protocol} is not installed ({error}); "
            "pip install 'tome-export[serve]'"
        ) from error
    module: ModuleType = library
    return module
