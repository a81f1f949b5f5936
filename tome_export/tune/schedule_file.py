"""The file a search writes and a build takes: one JSON object, ``schedule.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tome_export.artifact.files import draft_of, json_bytes, write_whole, writing_to
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
        tokens_in: Tokens that entered the model's first layer; None if the file does not say.
        state_sha256: Digest of the weights it was found with; None if the file does not say.
        reducer: Name and options of the reducer, as a manifest has them; None if the file does not
            say.
    """

    path: Path
    model: str
    schedule: tuple[int, ...]
    content: bytes
    tokens_in: int | None = None
    state_sha256: str | None = None
    reducer: Mapping[str, Any] | None = None

    def check_reducer(self, reducer: Mapping[str, Any]) -> None:
        """Refuse another reducer than that of the search, wherever its weights are by now.

        Args:
            reducer: Name and options, as a manifest has them.

        Raises:
            InputError: if it differs.
        """
        if self.reducer is None or _placeless(self.reducer) == _placeless(reducer):
            return
        found, options = self.reducer.get("name"), json.dumps(self.reducer.get("options"))
        raise InputError(
            f"schedule file {self.path} is for --reducer {found} with options {options}; give the "
            f"same here, or the numbers themselves: --schedule {','.join(map(str, self.schedule))}"
        )

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

    def check_tokens(self, tokens_in: int, merged: Sequence[int]) -> None:
        """Refuse a model with fewer or more tokens, or one that cannot merge as many.

        Args:
            tokens_in: Tokens that enter the model's first layer.
            merged: r that the model merges in each layer, given this schedule.

        Raises:
            InputError: if it differs.
        """
        if self.tokens_in is not None and tokens_in != self.tokens_in:
            raise InputError(
                f"schedule file {self.path} is for {self.tokens_in} tokens; {self.model} has "
                f"{tokens_in} here, tune it again at this image size"
            )
        for layer, (wanted, able) in enumerate(zip(self.schedule, merged, strict=True)):
            if wanted != able:
                raise InputError(
                    f"schedule file {self.path} merges {wanted} tokens in layer {layer}, where "
                    f"{self.model} can merge {able}; tune it again, or give a list with "
                    "--schedule, which is cut to what is possible"
                )

    def note(self, state_sha256: str) -> str | None:
        """What to tell of a model with other weights than those of the search; None of the same.

        Args:
            state_sha256: Digest of the model's weights.
        """
        if self.state_sha256 in (None, state_sha256):
            return None
        return (
            f"{self.path.name} was found with other weights: its accuracy is not that of this "
            "model, tune again to know"
        )


def _placeless(reducer: Mapping[str, Any]) -> Any:
    """Name and options as JSON has them, without the path of weights."""
    options = reducer.get("options")
    kept = {k: v for k, v in options.items() if k != "weights"} if isinstance(options, dict) else {}
    return json.loads(json.dumps({"name": reducer.get("name"), "options": kept}))


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
    tokens_in = values.get("tokens_in")
    if tokens_in is not None and not _is_r(tokens_in):
        raise InputError(
            f"schedule file {path} has tokens_in {_short(tokens_in)}; expected a whole number, "
            f"{_AGAIN}"
        )
    weights = values.get("weights")
    digest = weights.get("state_sha256") if isinstance(weights, dict) else None
    known = digest if isinstance(digest, str) else None
    reducer = values.get("reducer")
    if reducer is not None and not isinstance(reducer, dict):
        raise InputError(
            f"schedule file {path} has reducer {_short(reducer)}; expected an object, {_AGAIN}"
        )
    return ScheduleFile(path, model, tuple(schedule), content, tokens_in, known, reducer)


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
    with writing_to(path, "file"):
        draft = draft_of(path)
        draft.touch()
        draft.unlink()


def write_schedule(
    path: Path,
    values: Mapping[str, Any],
    *,
    force: bool,
    tokens_in: int | None = None,
    state_sha256: str | None = None,
) -> dict[str, Any]:
    """Write a schedule file, whole or not at all.

    Args:
        path: The file.
        values: Its content.
        force: Replace one that exists.
        tokens_in: Tokens that enter the first layer of the model, prefix tokens included; None if
            not known. A build refuses a model with others.
        state_sha256: Digest of the weights; None if not known. A build tells of others.

    Returns:
        What was written.

    Raises:
        InputError: as ``check_writable``.
    """
    content = dict(values)
    if tokens_in is not None:
        content["tokens_in"] = tokens_in
    if state_sha256 is not None:
        content["weights"] = {**content.get("weights", {}), "state_sha256": state_sha256}
    whole = json_bytes(content)
    check_writable(path, force=force)
    with writing_to(path, "file"):
        write_whole(path, whole)
    return content
