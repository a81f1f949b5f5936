"""What the server's log says: why it ended, and its lines as they come."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path

from tome_export.serve.process import POLL_SECONDS, signal_name

LIMIT = 400
"""Most characters of the server's own words in a message."""

_LEAD = re.compile(r"^(?P<level>[EWIF])\d{4} [\d:.]+ +\d+ (?P<source>\S+)\] *(?P<text>.*)$")
_FAILED = (
    re.compile(r"failed to load '(?P<model>[^']+)' version \d+: (?P<why>.*)"),
    re.compile(r"failed to load model '(?P<model>[^']+)': (?P<why>.*)"),
    re.compile(r"Poll failed for model directory '(?P<model>[^']+)': (?P<why>.*)"),
)
_KINDS = re.compile(r"^(Internal|Invalid argument|Not found|Unavailable|Unsupported): ")
_PARSER = re.compile(r"^\[libprotobuf ERROR [^\]]*\] *(?P<text>.*)$")
_STACK = re.compile(r"(\\n|\s)*At:\\n.*$")


def failed_models(log: str) -> dict[str, str]:
    """Model -> why the server could not load it, in one line each, in the log's order."""
    found: dict[str, str] = {}
    parser = ""
    for line in log.splitlines():
        said = _PARSER.match(line)
        if said is not None:
            parser = said["text"]
        lead = _LEAD.match(line)
        if lead is None or lead["level"] != "E":
            continue
        for pattern in _FAILED:
            matched = pattern.search(_plain(lead["text"]))
            if matched is not None:
                why = _KINDS.sub("", matched["why"])
                if parser and "text proto" in why:
                    why, parser = f"{why}: {parser}", ""
                found.setdefault(matched["model"], shortened(why))
    return found


def last_words(log: str) -> str:
    """The line that most likely says why the server ended: its last error, else its last line."""
    lines = [line for line in log.splitlines() if line.strip() and not line.startswith(("|", "+"))]
    for line in reversed(lines):
        lead = _LEAD.match(line)
        if lead is not None and lead["level"] in "EF":
            return shortened(_plain(lead["text"]))
        if line.lower().startswith("error: ") and "NVML" not in line:
            return shortened(line[len("error: ") :])
    bare = [line for line in lines if _LEAD.match(line) is None]
    return shortened((bare or lines)[-1]) if lines else "it said nothing"


def port_in_use(log: str) -> bool:
    """Whether the server ended because another process has one of its ports."""
    return "already in use" in log


def asked_to_stop(log: str) -> str | None:
    """Name of the signal that the server took for a request to end; None if it got none."""
    found = re.search(r"Signal \((\d+)\) received\.", log)
    return signal_name(int(found[1])) if found is not None else None


def shortened(text: str) -> str:
    """One line of ``LIMIT`` characters at most."""
    line = " ".join(text.replace("\\n", " ").split()).strip(' ".')
    return line if len(line) <= LIMIT else f"{line[:LIMIT]}…"


def _plain(text: str) -> str:
    """A message without its quotes and without the Python stack that may follow it."""
    return _STACK.sub("", text.strip().strip('"'))


class Follower:
    """Hands the lines of a growing log to a function, from a thread of its own."""

    def __init__(self, path: Path, sink: Callable[[str], None]) -> None:
        self._path, self._sink = path, sink
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="server-log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Hand over what is there, then end."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _follow(self) -> None:
        with self._path.open(encoding="utf-8", errors="replace") as stream:
            rest, last = "", False
            while not last:
                last = self._ended.wait(POLL_SECONDS)
                *lines, rest = (rest + stream.read()).split("\n")
                for line in (*lines, rest) if last and rest else lines:
                    self._sink(line)
