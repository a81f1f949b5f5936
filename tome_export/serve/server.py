"""A server on a repository: started, ready, and gone with everything that it made."""

from __future__ import annotations

import contextlib
import http.client
import math
import os
import secrets
import shlex
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tome_export import TELEMETRY_OFF
from tome_export.engine.gpu import detect
from tome_export.errors import (
    ExportError,
    InputError,
    MissingComponentError,
    TomeExportError,
    UsageError,
)
from tome_export.progress import Progress, Silent
from tome_export.serve import server_log
from tome_export.serve.config import CPU, KEPT_VERSIONS, VERSION_COMPATIBLE
from tome_export.serve.installation import find
from tome_export.serve.process import POLL_SECONDS, GroupProcess, Stubs, Watchdog, signal_name
from tome_export.serve.repository import CONFIG, config_of, is_ours, models_in, versions_of

READY_SECONDS = 60.0
"""Most time to load everything; the TensorRT accelerator builds engines then and needs more."""

STOP_SECONDS = 10
"""What requests in flight are given to end."""

CHECK_SECONDS = 0.5
"""From one look at the processes of the python models to the next."""

MOST_RESTARTS, RESTARTS_SECONDS = 3, 600.0
"""A server that loses such a process more often in that time is not started again: a request that
comes again and again, or too little memory, would end it for ever."""

CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)
"""What ends a server by a fault of its own; other signals are somebody's will."""

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (POSIX shared memory on Linux, no temporary file)

ATTEMPTS = 5
"""Starts of a server that loses a port, chosen for it, to another program."""

_REPORTS = "ORT_DISABLE_TELEMETRY"
_REACHED_AT = {"0.0.0.0": "127.0.0.1"}  # noqa: S104 (a server that listens on every address)


@dataclass(frozen=True)
class ServerOptions:
    """Arguments and environment that a server of a repository must be started with."""

    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self, repository: Path) -> str:
        """The server's command line, for a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        argument = f"--model-repository={shlex.quote(str(repository))}"
        return " ".join([*variables, "tritonserver", argument, *self.arguments])


def server_options_from_repository(repository: Path) -> ServerOptions:
    """What our own models of a repository need to load and to compute right.

    - A version-compatible engine brings a runtime of its own, code that the TensorRT backend runs
      only if it is told that all engines of the server are trusted.
    - ONNX Runtime's TensorRT accelerator has no key for TF32, which TensorRT's builder allows by
      default; NVIDIA's libraries read one variable that forbids it.
    - ONNX Runtime reports to its maker (docs/privacy.md).
    """
    models = [repository / name for name in models_in(repository) if is_ours(repository / name)]
    configs = [config_of(model) for model in models]
    arguments, environment = [], {}
    if any(
        (model / str(version) / VERSION_COMPATIBLE).is_file()
        for model in models
        for version in versions_of(model)[-KEPT_VERSIONS:]
    ):
        arguments.append("--backend-config=tensorrt,version-compatible=true")
    if any(
        accelerator.name == "tensorrt"
        for config in configs
        for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator
    ):
        environment["NVIDIA_TF32_OVERRIDE"] = "0"
    if any(config.platform == "onnxruntime_onnx" for config in configs):
        environment[_REPORTS] = TELEMETRY_OFF[_REPORTS]
    return ServerOptions(tuple(arguments), environment)


@dataclass(frozen=True)
class RunRequest:
    """A server to start.

    Attributes:
        host: Address to listen on; only this machine reaches the default.
        http_port: Port of HTTP; 0 for a free one, as for ``grpc_port`` and ``metrics_port``.
        ready_seconds: Most time until it is ready; None does not wait. The first start of an ONNX
            model on a GPU builds TensorRT engines, which takes minutes.
        on_log: Called with each line of the server's log, from another thread.
        gpu: Whether models run on GPUs, and not with their configs for CPUs; None for where there
            is one.
        control: ``none`` serves what is there; ``explicit`` loads ``load`` (``*`` is all) and then
            on request; ``poll`` looks for changes every second.
        stand_in: Let our stand-in run the models of the ONNX Runtime backend; None where the
            server comes without that backend.
    """

    repository: Path
    host: str = "127.0.0.1"
    http_port: int = 0
    grpc_port: int = 0
    metrics_port: int = 0
    ready_seconds: float | None = READY_SECONDS
    on_log: Callable[[str], None] | None = None
    gpu: bool | None = None
    control: Literal["none", "explicit", "poll"] = "none"
    load: Sequence[str] = ()
    stand_in: bool | None = None
    arguments: Sequence[str] = ()

    def __post_init__(self) -> None:
        for port in self.ports:
            if not 0 <= port <= 65535:
                raise UsageError(f"port is {port}; expected 0 to 65535, 0 for a free one")
            if port and self.ports.count(port) > 1:
                raise UsageError(
                    f"port {port} is given twice; give different ones, or 0 for free ones"
                )
        if self.ready_seconds is not None and not 0 < self.ready_seconds < math.inf:
            raise UsageError(f"ready timeout is {self.ready_seconds:g}; expected seconds above 0")

    @property
    def ports(self) -> tuple[int, int, int]:
        """Ports of HTTP, gRPC and the metrics."""
        return self.http_port, self.grpc_port, self.metrics_port


@contextlib.contextmanager
def running(request: RunRequest, progress: Progress | None = None) -> Iterator[RunningServer]:
    """Run a server on a repository while the block lasts; on a machine without a GPU on the CPU."""
    repository, gpu = request.repository, request.gpu
    if not repository.is_dir():
        raise InputError(f"{repository} is not a folder; expected a model repository")
    if request.control == "none" and not any(repository.glob(f"*/{CONFIG}")):
        raise InputError(
            f"{repository} has no model (no folder with a {CONFIG}); write one with "
            f"'tome-export serve ARTIFACT --repository {repository}'"
        )
    if gpu is None:
        gpu = bool(detect().gpus)
        plans = () if gpu else sorted(repository.glob("*/*/model.plan"))
        if plans:
            raise MissingComponentError(
                f"{plans[0]} is a TensorRT engine and this machine has no GPU that CUDA sees; run "
                "the server on a machine with one, or serve the ONNX model with --format onnx"
            )
    options = server_options_from_repository(repository)
    (progress or Silent()).stage("Start tritonserver")
    installation = find()
    stand_in = request.stand_in
    if stand_in is None:
        stand_in = not installation.has_onnxruntime
    with contextlib.ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="tome-export-server-"))
        )
        # Of this server alone, so that what a killed one leaves can be told from another's.
        memory = f"tome_export_{os.getpid()}_{secrets.token_hex(4)}_"
        watchdog = Watchdog(folder, SHARED_MEMORY / memory, STOP_SECONDS)
        stack.callback(watchdog.end)
        for part in ("backends", "python"):
            (folder / part).mkdir()
        backends = installation.prepare_backends(folder / "backends", stand_in=stand_in)
        prefix = f"shm-region-prefix-name={memory}"
        arguments = [
            str(installation.binary),
            f"--model-repository={repository.absolute()}",
            *([f"--backend-directory={backends}"] if backends is not None else []),
            "--disable-auto-complete-config",
            f"--exit-timeout-secs={STOP_SECONDS}",
            f"--model-control-mode={request.control}",
            *(["--repository-poll-secs=1"] if request.control == "poll" else []),
            *(f"--load-model={name}" for name in request.load),
            *([] if gpu else [f"--model-config-name={CPU}"]),
            *options.arguments,
            *request.arguments,
            f"--backend-config=python,{prefix}",
            *([f"--backend-config=onnxruntime,{prefix}"] if stand_in else []),
        ]
        environment = {**options.environment, **installation.environment(folder / "python")}
        log_path = folder / "log"
        process = GroupProcess(log_path, SHARED_MEMORY / memory, watchdog)
        server = RunningServer(request, arguments, environment, process, stand_in=stand_in)
        if request.on_log is not None:
            follower = server_log.Follower(log_path, request.on_log)
            stack.callback(follower.stop)
        stack.callback(server.stop)
        server.launch()
        if request.ready_seconds is not None:
            server.wait_ready(request.ready_seconds)
        yield server


class RunningServer:
    """A server and its child processes; made by ``running``.

    Attributes:
        http: ``host:port`` of HTTP; ``grpc`` and ``metrics`` likewise.
        stand_in: Whether our stand-in runs the models of the ONNX Runtime backend.
    """

    def __init__(
        self,
        request: RunRequest,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        process: GroupProcess,
        *,
        stand_in: bool,
    ) -> None:
        self.log_path, self.stand_in = process.log_path, stand_in
        self.http, self.grpc, self.metrics = "", "", ""
        self._request, self._ports = request, request.ports
        self._arguments, self._environment = arguments, environment
        self._restarts: list[float] = []
        self._process = process

    @property
    def pid(self) -> int:
        """The server's process id, which is also that of the group of its child processes."""
        return self._process.pid

    def launch(self) -> None:
        """Start the process, on free ports where none are asked for."""
        listen = self._request.host
        self._launched_on = free_ports(listen, self._ports)
        host = _REACHED_AT.get(listen, listen)
        self.http, self.grpc, self.metrics = (f"{host}:{port}" for port in self._launched_on)
        arguments = [*self._arguments]
        for name, port in zip(("http", "grpc", "metrics"), self._launched_on, strict=True):
            arguments += [f"--{name}-address={listen}", f"--{name}-port={port}"]
        try:
            self._process.launch(arguments, self._environment)
        except OSError as error:
            raise ExportError(f"cannot start tritonserver: {error}; install it again") from error
        reloads = self._request.control != "none"
        self._stubs = Stubs(self.pid, self._request.repository, reloads=reloads)
        self._look_at = 0.0
        self._ends_by = 0.0

    def is_alive(self) -> bool:
        """Whether the server runs."""
        return self._process.is_alive()

    def wait_ready(self, seconds: float = READY_SECONDS) -> None:
        """Return once every model is loaded and all ports answer."""
        deadline = time.monotonic() + seconds
        attempts = 1
        while not self._answers():
            lost_port = 0 in self._ports and server_log.port_in_use(self._process.log())
            # A port that was free may have been taken before the server came to it.
            if lost_port and attempts < ATTEMPTS:
                attempts += 1
                self.stop(0)
                self.launch()
            elif not self.is_alive():
                raise self._reason("while loading")
            if time.monotonic() > deadline:
                words = server_log.last_words(self._process.log())
                raise ExportError(
                    f"tritonserver is not ready after {seconds:g} s: {words}; allow more time "
                    "(--ready-timeout): the first start on a GPU may build engines"
                )
            time.sleep(POLL_SECONDS)
        self._stubs.lost()  # what they are of is not known any more once they are gone

    def wait(self, on_event: Callable[[str], None] | None = None) -> None:
        """Block while the server runs, and restart it as ``restart_if_broken`` does."""
        while True:
            self.restart_if_broken(on_event)
            time.sleep(5 * POLL_SECONDS)

    def restart_if_broken(self, on_event: Callable[[str], None] | None = None) -> bool:
        """Start a server again, at the same addresses, that has crashed or lost a python model.

        Where a model has lost its process the server goes on saying that it is ready, and answers
        requests to that model with errors.
        """
        tell = on_event or (lambda _: None)
        now = time.monotonic()
        if not self.is_alive():
            number = -self._process.exit_code()
            if number not in CRASHES:
                raise self._reason("while serving")
            lost = f"tritonserver has crashed ({signal_name(number)})"
        elif now < self._look_at:
            return False
        else:
            self._look_at = now + CHECK_SECONDS
            lost = self._stubs.lost()
            if lost and not self._answers():
                # Asked to end by somebody, it is no longer ready, and its models' processes go
                # first. One that stays so is none that was asked.
                self._ends_by = self._ends_by or now + 2 * STOP_SECONDS
                if now < self._ends_by:
                    return False
        if not lost:
            return False
        self._restarts = [at for at in self._restarts if now - at < RESTARTS_SECONDS]
        if len(self._restarts) == MOST_RESTARTS:
            self.stop(0)
            raise ExportError(
                f"{lost}, after {MOST_RESTARTS} restarts in {RESTARTS_SECONDS / 60:g} minutes for "
                "such reasons; see whether the system is out of memory or a request ends it, and "
                "start it again"
            )
        self._restarts.append(now)
        tell(f"{lost}; tritonserver is started again")
        self._restart(self._request.ready_seconds or READY_SECONDS)
        tell("tritonserver is ready again")
        return True

    def _restart(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.stop(0)  # asked to end, it would wait for the lost process
        self._ports = self._launched_on
        while True:
            try:
                self.launch()
                break
            except UsageError:  # what has just been killed may hold a port for a moment
                if time.monotonic() > deadline:
                    raise
                time.sleep(POLL_SECONDS)
        self.wait_ready(max(deadline - time.monotonic(), POLL_SECONDS))

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End the server, its child processes and its shared memory; may be called again."""
        self._process.stop(seconds)

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.http, timeout=1)
        try:
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status != http.client.OK:
                return False
            for address in (self.grpc, self.metrics):  # the port of the metrics opens last
                host, _, port = address.rpartition(":")
                socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return self.is_alive()  # what answers must be ours, not who took our port

    def _reason(self, when: str) -> TomeExportError:
        """Why the server has ended, as an error to raise; tidies up after it."""
        log, code = self._process.log(), self._process.exit_code()
        self.stop(0)
        failed = server_log.failed_models(log)
        # After a model that it cannot load the server may crash on its way out.
        if code < 0 and not (failed and -code in CRASHES):
            return ExportError(
                f"tritonserver was ended by {signal_name(-code)} {when}; if nobody did that, see "
                "whether the system was out of memory, and start it again"
            )
        asked = server_log.asked_to_stop(log)
        if asked is not None:  # what the log says after it, or has said before, is not the reason
            return ExportError(
                f"tritonserver was asked to stop by {asked} {when}, not by us; start it again"
            )
        if failed:
            reasons = "; ".join(f"{model}: {why}" for model, why in failed.items())
            return InputError(
                f"tritonserver cannot load {self._request.repository}: {reasons}; "
                "write the model again, or take it out"
            )
        words = server_log.last_words(log)
        if server_log.port_in_use(log):
            return UsageError(f"{words}; choose another port, or 0 for a free one")
        return ExportError(f"tritonserver ended with exit code {code} {when}: {words}")


def free_ports(host: str, wanted: Sequence[int]) -> tuple[int, int, int]:
    """The three ports asked for, with free ones in place of 0, which others may take meanwhile."""
    with contextlib.ExitStack() as stack:
        ports = []
        for port in wanted:
            # Held until all are chosen, so that none comes twice.
            held = stack.enter_context(socket.socket())
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                held.bind((host, port))
            except OSError as error:
                fix = "give an IPv4 address or a name of this machine"
                if port:
                    fix = "choose another port, or 0 for a free one"
                raise UsageError(
                    f"cannot listen on {host}:{port}: {error.strerror or error}; {fix}"
                ) from error
            ports.append(held.getsockname()[1])
        return ports[0], ports[1], ports[2]
