"""Ports of this machine."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Sequence

from tome_export.errors import UsageError


def check_ports(ports: Sequence[int]) -> None:
    """Whether a server could listen on all of these; 0 stands for any free one.

    Raises:
        UsageError: if one is none, or two are the same.
    """
    for port in ports:
        if not 0 <= port <= 65535:
            raise UsageError(f"port is {port}; expected 0 to 65535, 0 for a free one")
        if port and ports.count(port) > 1:
            raise UsageError(f"port {port} is given twice; give different ones, or 0 for free ones")


def free_ports(host: str, wanted: Sequence[int]) -> list[int]:
    """The ports asked for, with free ones in place of 0.

    A free port may be taken before it is used: whoever uses it must be ready to try again.

    Raises:
        UsageError: if the host is not an address of this machine, or a port is taken, given
            twice or none.
    """
    check_ports(wanted)
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
        return ports


def is_open(address: str) -> bool:
    """Whether something listens at ``host:port``."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True
