"""Whether a server answers requests, which its own health endpoints do not say.

A python model runs in a process of its own, the stub. When that is gone every request to the model
fails, while ``/v2/health/ready`` goes on answering 200 (triton-inference-server/server issues 7230
and 8604). So this looks at those processes, asks each model whether it is ready, as servers of 2026
tell it of a lost stub too, and has one model answer a request.

The file is the whole of a program for the server's container, which has Python for its models but
not this package:

    python3 probe.py ADDRESS MODEL HEADER DATA [OTHER_MODEL ...]

ADDRESS is ``http://host:port``. HEADER is a request to MODEL as JSON, with the bytes that follow it
counted in ``binary_data_size``; DATA is the beginning of these in base64, and zeros follow. Exit
code 0 if all is well, 1 with a line on standard error if not.
"""

from __future__ import annotations

import base64
import glob
import http.client
import json
import sys
import urllib.error
import urllib.request

SERVER = "tritonserver"

STUB = "triton_python_backend_stub"[:15]
"""Name of a stub's process, as far as Linux keeps it."""

DEAD, STOPPED = "ZX", "T"
"""States of a process in ``/proc/PID/stat``."""

BUSY = http.client.SERVICE_UNAVAILABLE
"""What a full queue answers: the server is overloaded and well."""

TIMEOUT_SECONDS = 30.0


def stub_states(server: int | None = None) -> dict[int, tuple[str, int]]:
    """Process id of every stub (of one server) -> state, and exit status as ``wait`` has it."""
    names, found = {}, {}
    for path in glob.glob("/proc/[0-9]*/stat"):  # noqa: PTH207 (of hundreds, and every second)
        try:
            with open(path, errors="replace") as stream:  # noqa: PTH123
                head, _, tail = stream.read().rpartition(")")
        except OSError:  # it has ended
            continue
        pid, _, name = head.partition(" (")
        # state, parent, … exit_code: the last field, and 0 for who may not see it (proc(5))
        state, parent, *_, status = tail.split()
        names[int(pid)] = name
        if name == STUB:
            found[int(pid)] = (state, int(parent), int(status))
    # A stub's own children, which decode images, have its name too.
    return {
        pid: (state, status)
        for pid, (state, parent, status) in found.items()
        if (parent == server if server is not None else names.get(parent) == SERVER)
    }


def main(address: str, model: str, header: str, data: str, *others: str) -> None:
    """Leave with a line for the first thing that is wrong."""
    for pid, (state, _) in stub_states().items():
        if state in DEAD + STOPPED:
            sys.exit(f"process {pid} of a python model does not run (state {state})")
    for name in (model, *others):
        _ask(f"{address}/v2/models/{name}/ready")
    sizes = [one["parameters"]["binary_data_size"] for one in json.loads(header)["inputs"]]
    content = base64.b64decode(data).ljust(sum(sizes), b"\0")
    length = {"Inference-Header-Content-Length": str(len(header.encode()))}
    url = f"{address}/v2/models/{model}/infer"
    _ask(urllib.request.Request(url, header.encode() + content, length), busy=BUSY)  # noqa: S310


def _ask(request: str | urllib.request.Request, busy: int = 0) -> None:
    url = request if isinstance(request, str) else request.full_url
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is here
    try:
        opener.open(request, timeout=TIMEOUT_SECONDS).close()
    except urllib.error.HTTPError as error:
        if error.code != busy:
            sys.exit(f"{url}: {error.code} {error.read(300).decode(errors='replace')}")
    except (OSError, http.client.HTTPException) as error:
        sys.exit(f"{url}: {error}")


if __name__ == "__main__":
    main(*sys.argv[1:])
