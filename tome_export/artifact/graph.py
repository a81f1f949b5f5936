"""What ``model.onnx`` refers to, found without loading it, before any library opens it.

The file is read field by field (protocol buffers' wire format), so that its weights take no memory.
"""

from __future__ import annotations

import mmap
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from tome_export.artifact.document import short
from tome_export.artifact.files import open_regular
from tome_export.errors import InputError

INSIDE: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
}
"""Message -> number of a field -> message in it, wherever a tensor may be (onnx.proto)."""

_OP_TYPE = 4  # of a NodeProto
_DATA_TYPE, _NAME, _EXTERNAL, _LOCATION = 2, 8, 13, 14  # of a TensorProto
_VALUES = (4, 5, 9)  # of a TensorProto: float_data, int32_data, raw_data
_KEY, _VALUE = 1, 2  # of a StringStringEntryProto

PRECISIONS = {1: ("fp32", 4), 10: ("fp16", 2), 16: ("bf16", 2)}
"""Type of a tensor's values (``TensorProto.DataType``) -> precision, and bytes of a value."""

REFUSED = {
    "EPContext": "which names a file to be loaded",
    "Loop": "which may never end, and no model that can be merged has",
}
"""Operators that no build writes -> why they are not for a runtime."""

_WHOLE, _BYTES, _SKIPPED = 0, 2, {1: 8, 5: 4}
"""Kinds of values on the wire; of the last, numbers of so many bytes, none is looked at."""

_LARGEST = (1 << 64) - 1

LONGEST_TEXT = 1000
"""Bytes that are read of a name."""

MOST_FIELDS = 5_000_000
"""Fields that a model's messages may have: the largest models have some 100,000."""

DEEPEST = 100
"""Messages in each other, as in protocol buffers' own readers."""


def check_graph(folder: Path, name: str, listed: Mapping[str, int], precision: str) -> None:
    """Make sure that a model takes its weights from nowhere but the artifact."""
    data = f"{name}.data"
    with open_regular(folder, name) as stream:
        try:
            if not listed.get(name):
                raise ValueError("is not a readable ONNX model (it is empty)")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                reader = _Reader(content, data, listed.get(data))
                reader.read("ModelProto", 0, len(content))
        except ValueError as error:
            raise InputError(f"{folder / name} {error}; rebuild the artifact") from None
    most = max(reader.weights, key=reader.weights.__getitem__, default=precision)
    if most != precision:
        raise InputError(
            f"{folder / name} has weights in {most}, and build.json says {precision}; rebuild the "
            "artifact"
        )


class _Reader:
    """One model; what is wrong with it is a ``ValueError``."""

    def __init__(self, content: mmap.mmap, data: str, size: int | None) -> None:
        self._content, self._data, self._size = content, data, size
        self._left = MOST_FIELDS
        self.weights: Counter[str] = Counter()

    def read(self, kind: str, start: int, end: int, depth: int = 0) -> None:
        """Look at a message, and all that are in it."""
        if depth > DEEPEST:
            raise ValueError(f"has messages more than {DEEPEST} deep in each other")
        inside = INSIDE[kind]
        for number, value in self._fields(start, end):
            if isinstance(value, int):
                continue
            within = inside.get(number)
            if within == "TensorProto":
                self._tensor(*value)
            elif within is not None:
                self.read(within, *value, depth + 1)
            elif kind == "NodeProto" and number == _OP_TYPE:
                operator = self._text(value)
                if operator in REFUSED:
                    raise ValueError(f"has a node {operator}, {REFUSED[operator]}")

    def _tensor(self, start: int, end: int) -> None:
        """Count its values, and check where they are."""
        name, data_type, external, values = "", 0, False, 0
        entries: dict[str, str] = {}
        for number, value in self._fields(start, end):
            if isinstance(value, int):
                data_type = value if number == _DATA_TYPE else data_type
                external |= number == _LOCATION and value == 1
            elif number == _NAME:
                name = self._text(value)
            elif number in _VALUES:
                values += value[1] - value[0]
            elif number == _EXTERNAL:
                key, text = self._entry(*value)
                if key in entries:
                    raise ValueError(f"says twice where the {key} of a tensor's values is")
                entries[key] = text
        if external or entries:
            values += self._stored(name, entries)
        if data_type in PRECISIONS:
            precision, size = PRECISIONS[data_type]
            self.weights[precision] += values // size

    def _stored(self, name: str, entries: Mapping[str, str]) -> int:
        """Bytes of a tensor's values in the file of weights."""
        where = entries.get("location", "")
        if where != self._data or self._size is None:
            listed = f"{self._data} only" if self._size is not None else "no file of weights"
            raise ValueError(
                f"takes tensor {short(name)} from the file {short(where)}, and build.json lists "
                f"{listed}"
            )
        for key in ("offset", "length"):
            if not re.fullmatch("[0-9]{1,18}", entries.get(key, "0")):
                raise ValueError(
                    f"has tensor {short(name)} of {key} {short(entries[key])} in {where}, expected "
                    "a whole number"
                )
        offset = int(entries.get("offset", "0"))
        length = int(entries.get("length", self._size - offset))
        if not 0 <= length <= self._size - offset:
            raise ValueError(
                f"takes tensor {short(name)} from bytes {offset} to {offset + length} of {where}, "
                f"which has {self._size}"
            )
        return length

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        """Key and value of a ``StringStringEntryProto``."""
        found = {n: self._text(v) for n, v in self._fields(start, end) if not isinstance(v, int)}
        return found.get(_KEY, ""), found.get(_VALUE, "")

    def _text(self, place: tuple[int, int]) -> str:
        """A text, cut where it is longer than any name that is looked for."""
        start, end = place
        return self._content[start : min(end, start + LONGEST_TEXT)].decode("utf-8", "replace")

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int | tuple[int, int]]]:
        """Number of each field of a message, and its whole number or where its bytes are."""
        at = start
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"has more than {MOST_FIELDS} fields, expected an exported model")
            key, at = self._number(at, end)
            number, kind = key >> 3, key & 7
            value: int | tuple[int, int] = 0
            if kind == _WHOLE:
                value, at = self._number(at, end)
            elif kind == _BYTES:
                length, at = self._number(at, end)
                value, at = (at, at + length), at + length
            elif kind in _SKIPPED:
                at += _SKIPPED[kind]
            if at > end or number == 0 or kind not in (_WHOLE, _BYTES, *_SKIPPED):
                raise ValueError(f"is not a readable ONNX model (at byte {at})")
            yield number, value

    def _number(self, at: int, end: int) -> tuple[int, int]:
        """A whole number, seven bits a byte from the lowest, and where the next field is."""
        value = 0
        for count, byte in enumerate(self._content[at : min(end, at + 10)]):
            value |= (byte & 0x7F) << 7 * count
            if byte < 0x80:
                return value & _LARGEST, at + count + 1
        raise ValueError(f"is not a readable ONNX model (at byte {at})")
