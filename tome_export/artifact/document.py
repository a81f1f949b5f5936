"""The base of every JSON file that leaves a process: one model writes, reads and checks it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    AllowInfNan,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    WithJsonSchema,
)

from tome_export.artifact.files import json_bytes
from tome_export.errors import InputError
from tome_export.spec import MAX_BATCH, BatchRange

Read = TypeVar("Read", bound="Document")

LONGEST_NUMBER = 1000
"""Digits; Python reads and writes whole numbers of 4,300 at most."""

LONGEST_PLACE = 4096
"""Characters of a path, as Linux has them."""

DEEPEST = 64
"""Lists and objects in each other; those of our documents are ten deep."""

LARGEST_BYTES = 1 << 28
"""Bytes that a document may have: no command writes a hundredth of it."""

_EXPECTED = {
    "string_type": "text",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "greater_than_equal": "a number, {ge} or more",
    "less_than_equal": "a number, {le} or less",
    "finite_number": "a finite number",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "an object",
    "dataclass_type": "an object",
    "dict_type": "an object",
}
"""Pydantic's type of an error -> what is expected, in the words of all other messages."""


def _plain(text: Any) -> Any:
    r"""File names of another encoding hold lone surrogates, which JSON's text has none of."""
    if isinstance(text, str):
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text


Text = Annotated[str, BeforeValidator(_plain)]
r"""Text that may come from a file's name: what is no text in it becomes ``\udcff``."""

Measured = Annotated[
    float,
    AllowInfNan(True),
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None, when_used="json"),
    WithJsonSchema({"type": ["number", "null"]}),
]
"""A number that may be infinite or undefined; JSON has neither, and says null."""

Whole = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
"""A whole number of 64 bits."""

Count = Annotated[int, Field(ge=0, le=2**63 - 1)]
"""How many, or the index of something."""

Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""How many of what there is at least one of, such as rows or pixels."""

SizeText = Annotated[str, Field(pattern=r"^[1-9]\d{0,4}x[1-9]\d{0,4}$")]
"""Height and width of images in pixels, such as ``448x224``; see ``spec.ImageSize``."""

Positive = Annotated[float, Field(ge=0)]
"""A number that measures something: milliseconds, ratios."""

Measure = Annotated[float | int, Field(ge=0)]
"""The same, written as it was read: 8 is not 8.0."""

PathText = Annotated[
    str, Field(max_length=LONGEST_PLACE, pattern=r"^[^\x00]*$"), BeforeValidator(_plain)
]
"""A name, or the path of a file."""

Batch = Annotated[
    BatchRange,
    BeforeValidator(lambda value: _batch(value)),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": r"^\d+(:\d+:\d+)?$", "examples": ["1:8:32"]}),
]
"""Batch sizes as ``MIN:OPT:MAX``."""


def _whole(digits: str) -> int:
    if len(digits) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(digits)} digits, expected at most {LONGEST_NUMBER}")
    return int(digits)


def _check_values(values: Any) -> None:
    """Raise ``ValueError`` for what JSON allows and no reader of ours takes, in untyped entries."""
    pending = [(values, 0)]
    while pending:
        value, depth = pending.pop()
        if depth > DEEPEST:
            raise ValueError(f"lists and objects are more than {DEEPEST} deep in each other")
        if isinstance(value, dict | list):
            inside = value.values() if isinstance(value, dict) else value
            pending += [(one, depth + 1) for one in inside]
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is no number of JSON")
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"the number {short(value)} has more than 64 bits")


def _batch(value: Any) -> BatchRange:
    try:
        return value if isinstance(value, BatchRange) else BatchRange.parse(value)
    except (InputError, AttributeError):
        raise ValueError(f"a batch range such as 1:8:32, up to {MAX_BATCH}") from None


class Part(BaseModel):
    """An object inside a document. Further entries, such as a user's notes, are kept."""

    model_config = ConfigDict(
        frozen=True, extra="allow", allow_inf_nan=False, protected_namespaces=()
    )


class Document(Part):
    """A JSON file.

    Attributes:
        remedy: What to do about a file that cannot be used, for messages.
    """

    remedy: ClassVar[str]

    def json_bytes(self) -> bytes:
        """The file's content."""
        return json_bytes(self.model_dump(mode="json"))

    @classmethod
    def parse(cls: type[Read], content: bytes, file: Path) -> Read:
        """Read a file's content."""
        try:
            values = json.loads(content, parse_int=_whole)
            found = cls.model_validate_json(content, strict=True)
            _check_values(values)
            return found
        except ValidationError as error:
            raise InputError(f"{file} {fault_of(error, values)}; {cls.remedy}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file} is not valid JSON ({error}); {cls.remedy}") from error
        except InputError as error:  # of a value that is read into a type of ours
            raise InputError(f"{file}: {error}; {cls.remedy}") from error

    @classmethod
    def read(cls: type[Read], file: Path) -> Read:
        """Read a file."""
        try:
            with file.open("rb") as stream:
                content = stream.read(LARGEST_BYTES + 1)
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror}); {cls.remedy}") from error
        if len(content) > LARGEST_BYTES:
            raise InputError(
                f"{file} has more than {LARGEST_BYTES} bytes, expected a document; {cls.remedy}"
            )
        return cls.parse(content, file)


def fault_of(error: ValidationError, values: Any) -> str:
    """The first thing that is wrong, such as ``has merge.r[1] '8', expected a whole number``."""
    first = error.errors(include_url=False)[0]
    kind, context = first["type"], first.get("ctx", {})
    if kind == "json_invalid":
        return f"is not valid JSON ({context['error']})"
    where = _place(first["loc"], values)
    if kind == "missing":
        return f"has no {where}"
    if kind == "value_error":
        # A validator of ours says of one value what is expected, of all what is wrong.
        reason = str(context["error"])
        return f"has {where} {short(first['input'])}, expected {reason}" if where else reason
    if kind == "literal_error":
        words = context["expected"].replace("'", "").replace(" or ", ", ")
        expected = words if ", " not in words else f"one of {words}"
    else:
        plain = re.sub(r"^\w+ should (be|have|match) ", "", first["msg"])
        expected = _EXPECTED[kind].format(**context) if kind in _EXPECTED else plain
    what = f"has {where}" if where else "is"
    return f"{what} {short(first['input'])}, expected {expected}"


def _place(location: tuple[int | str, ...], value: Any) -> str:
    """Where in a document, such as ``engines['a'].file``, without the branches of a union."""
    text = ""
    for part in location:
        inside = isinstance(value, dict) and part in value
        if isinstance(value, list) and isinstance(part, int):
            text += f"[{part}]"
            value = value[part] if part < len(value) else None
        elif inside or isinstance(value, dict):
            plain = str(part).isidentifier() and len(str(part)) < 40
            text += (f".{part}" if text else str(part)) if plain else f"[{short(part)}]"
            value = value[part] if inside else None
    return text


def short(value: Any) -> str:
    """A value in a message, cut where it is long."""
    try:
        text = repr(value)
    except ValueError:  # of more digits than Python writes
        text = "a number of thousands of digits"
    return text if len(text) <= 40 else f"{text[:37]}..."
