"""The file a search writes and a build takes: one JSON object, ``schedule.json``."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tome_export.errors import InputError

FORMAT = 1
"""Version of the file; raised when a reader of the old form would misread the new."""

NAME = "schedule.json"

_AGAIN = "write it with 'tome-export tune'"


@dataclass(frozen=True)
class ScheduleFile:
    """What a schedule file says.

    Attributes:
        path: The file.
        model: Recipe that the schedule was found for.
        schedule: r of every layer.
        content: The whole file.
    """

    path: Path
    model: str
    schedule: tuple[int, ...]
    content: bytes

    def check_model(self, model: str) -> None:
        """Refuse another model than that of the search.

        Args:
            model: The recipe's name.

        Raises:
            InputError: if it differs.
        """
        if model != self.model:
            raise InputError(
                f"schedule file {self.path} is for {self.model}, not for {model}; tune {model}, or "
                f"give the numbers themselves: --schedule {','.join(map(str, self.schedule))}"
            )

    def check_depth(self, depth: int) -> None:
        """Refuse a model with another number of layers.

        Raises:
            InputError: if it differs.
        """
        if depth != len(self.schedule):
            raise InputError(
                f"schedule file {self.path} has {len(self.schedule)} layers; {self.model} has "
                f"{depth}, tune it again"
            )


def read_schedule(path: Path) -> ScheduleFile:
    """Read a schedule file.

    Raises:
        InputError: if it cannot be read, is no JSON, of another format, or holds no schedule.
    """
    try:
        content = path.read_bytes()
        values = json.loads(content)
    except FileNotFoundError:
        raise InputError(f"schedule file {path} does not exist; {_AGAIN}") from None
    except OSError as error:
        raise InputError(f"schedule file {path} cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"schedule file {path} is not valid JSON ({error}); {_AGAIN}") from error
    if not isinstance(values, dict) or isinstance(values.get("format"), bool):
        raise InputError(f"schedule file {path} is not a JSON object with a format; {_AGAIN}")
    if values.get("format") != FORMAT:
        raise InputError(
            f"schedule file {path} has format {values.get('format')!r}; this version reads format "
            f"{FORMAT}, {_AGAIN}"
        )
    model, schedule = values.get("model"), values.get("schedule")
    if not isinstance(model, str) or not model:
        raise InputError(f"schedule file {path} has model {model!r}; expected a name, {_AGAIN}")
    if not isinstance(schedule, list) or not schedule or not all(map(_is_r, schedule)):
        raise InputError(
            f"schedule file {path} has schedule {_short(schedule)}; expected one whole number, 0 "
            f"or more, per layer, {_AGAIN}"
        )
    return ScheduleFile(path, model, tuple(schedule), content)


def _is_r(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_writable(path: Path, *, force: bool) -> None:
    """Find out before a long search whether its result can be written.

    Raises:
        InputError: if the file exists (without ``force``), is a folder, or cannot be written.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file such as {path / NAME}")
    if path.exists() and not force:
        raise InputError(f"{path} exists; give another file, or --force to replace it")
    with _writing(path):
        descriptor, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        Path(draft).unlink()


def write_schedule(path: Path, values: Mapping[str, Any], *, force: bool) -> None:
    """Write a schedule file, whole or not at all.

    Raises:
        InputError: as ``check_writable``.
    """
    check_writable(path, force=force)
    with _writing(path):
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        draft = Path(name)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
                stream.write(json.dumps(values, indent=2, ensure_ascii=False) + "\n")
            # A temporary file is its owner's alone; a result is as open as any new file.
            mask = os.umask(0)
            os.umask(mask)
            draft.chmod(0o666 & ~mask)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


_REASONS = {
    errno.ENOENT: "its folder does not exist; make it or give another file",
    errno.ENOTDIR: "a part of the path is a file; give another file",
    errno.EACCES: "permission is denied; give a file in a folder you can write",
    errno.EPERM: "permission is denied; give a file in a folder you can write",
    errno.EROFS: "the filesystem is read-only; give another file",
    errno.ENOSPC: "no space is left on the device; free some or give another file",
    errno.EDQUOT: "the disk quota is used up; free some space or give another file",
    errno.ENAMETOOLONG: "the name is too long; give a shorter one",
}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _REASONS:
            raise
        raise InputError(f"cannot write {path}: {_REASONS[error.errno]}") from error
