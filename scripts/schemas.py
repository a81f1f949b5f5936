"""Write docs/schemas: the JSON Schema of every file in an artifact, from the models that write it.

python scripts/schemas.py
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from tome_export.artifact.bench import BENCH, Bench
from tome_export.artifact.cascade import CASCADE, Cascade
from tome_export.artifact.evaluation import EVAL, Evaluation
from tome_export.artifact.manifest import MANIFEST, Manifest
from tome_export.artifact.parity import PARITY, ParityFile
from tome_export.artifact.schedule import SCHEDULE, ScheduleFile, TunedSchedule

SCHEMAS = Path(__file__).parents[1] / "docs" / "schemas"

TITLES = {
    MANIFEST: "What was built",
    PARITY: "Parity with PyTorch, by decisions and numbers",
    BENCH: "Latency, throughput and memory beside another model",
    EVAL: "Accuracy on images",
    SCHEDULE: "Tokens to remove in every layer, and the search that found them if one did",
    CASCADE: "A calibrated cascade of artifacts",
}

DOCUMENTS: dict[str, Any] = {
    MANIFEST: Manifest,
    PARITY: ParityFile,
    BENCH: Bench,
    EVAL: Evaluation,
    SCHEDULE: TunedSchedule | ScheduleFile,
    CASCADE: Cascade,
}
"""File in an artifact -> what writes and reads it; of a schedule one by ``tune`` or by hand."""


def schema_of(name: str) -> dict[str, Any]:
    """The JSON Schema of a file.

    Args:
        name: Of ``DOCUMENTS``.
    """
    made = TypeAdapter(DOCUMENTS[name]).json_schema(mode="serialization")
    classes = {one.__name__: one for one in _below(BaseModel)}
    for title, part in {**made.get("$defs", {}), made.get("title", ""): made}.items():
        # Attributes that are inherited are described where they are declared.
        family = reversed(classes[title].__mro__) if title in classes else ()
        for docstring in (part.get("description"), *(one.__doc__ for one in family)):
            _describe(part, inspect.cleandoc(docstring or ""))
    return {
        "$schema": GenerateJsonSchema.schema_dialect,
        **made,
        "title": f"{name}: {TITLES[name]}",
    }


def _below(parent: type[BaseModel]) -> Iterator[type[BaseModel]]:
    for child in parent.__subclasses__():
        yield child
        yield from _below(child)


def _describe(part: dict[str, Any], docstring: str) -> None:
    """Put what a docstring says of a class and its attributes where a schema has it."""
    text, _, attributes = docstring.partition("\n\nAttributes:\n")
    part["description"] = _plain(text)
    found = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", attributes, flags=re.MULTILINE)
    for name, meaning in found:
        if name in part.get("properties", {}):
            part["properties"][name]["description"] = _plain(meaning)


def _plain(text: str) -> str:
    return " ".join(text.split())


def files() -> dict[Path, str]:
    """File -> its content."""
    return {
        SCHEMAS / name.replace(".json", ".schema.json"): json.dumps(schema_of(name), indent=2)
        + "\n"
        for name in DOCUMENTS
    }


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for path, content in files().items():
        path.write_text(content, encoding="utf-8")
