"""The section from which a colleague can make the same artifact again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from tome_export.artifact import Manifest
from tome_export.reducers import DEFAULT
from tome_export.report.numbers import NONE, size
from tome_export.report.parts import Block, Commands, Section, Table, Text

TITLE = "Versions, files and how to make this again"

_ENVIRONMENT = ("gpu", "driver", "cpu", "cores", "python", "date")
_INFLECTED = re.compile(r"r=(\d+) (constant|decreasing|increasing)")


def origin_section(
    manifest: Manifest, reports: Mapping[str, Mapping[str, Any]], folder: str
) -> Section:
    """Commands, versions, machines, weights and the digest of every file.

    Args:
        manifest: The content of ``build.json``.
        reports: Reports by command: ``bench``, ``eval``, ``tune``.
        folder: What the artifact's directory is called.
    """
    machines = {
        command: report["environment"]
        for command, report in reports.items()
        if report.get("environment")
    }
    blocks: list[Block] = [
        Commands(commands(manifest, folder, reports)),
        _weights(manifest),
        _versions(manifest.versions, machines),
    ]
    if machines:
        blocks.append(_machines(machines))
    blocks += [_engines(manifest), _files(manifest)]
    return Section("origin", TITLE, tuple(blocks))


def commands(
    manifest: Manifest, folder: str, reports: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """The command line that builds this artifact, and those that measure it.

    Args:
        manifest: The content of ``build.json``.
        folder: What the artifact's directory is called.
        reports: Reports by command, whose settings are repeated.
    """
    quoted = shlex.quote(folder)
    lines = [shlex.join(["tome-export", "build", *_build_arguments(manifest), "-o", folder])]
    engines = sorted(manifest.engines)
    lines += [f"tome-export engine {quoted} --engine {name}" for name in engines[1:]]
    lines.append(f"tome-export check {quoted}")
    lines.append(shlex.join(["tome-export", "bench", folder, *_bench(reports.get("bench"))]))
    lines.append(shlex.join(["tome-export", "eval", folder, *_eval(reports.get("eval"))]))
    return [*lines, f"tome-export report {quoted}"]


def _build_arguments(manifest: Manifest) -> Iterator[str]:
    merge, weights = manifest.merge, manifest.model.weights
    yield manifest.model.name
    named = _INFLECTED.fullmatch(merge["schedule"])
    if named:
        yield from ("--r", named[1])
        if named[2] != "constant":
            yield from ("--schedule", named[2])
    else:
        yield from ("--schedule", ",".join(map(str, merge["r"])))
    yield f"--{manifest.precision}"
    if weights["kind"] == "random":
        yield from ("--weights", "random", "--seed", str(weights["seed"] or 0))
    elif weights["kind"] == "file":
        yield from ("--weights", weights["source"].partition(";")[0])
    reducer = merge.get("reducer")  # artifacts of before have one reducer
    if reducer is not None and reducer["name"] != DEFAULT:
        yield from ("--reducer", reducer["name"])
        for key, value in reducer["options"].items():
            if value is not None:
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                yield from ("--reducer-option", f"{key}={text}")
    yield "--prop-attn" if merge["prop_attn"] else "--no-prop-attn"
    yield from ("--batch", manifest.batch, "--merge-op", merge["merge_op"])
    if merge["merge_op"] == "plugin" and not manifest.batch.is_static:
        yield "--plugin-batch-range"
    yield from ("--attention", manifest.onnx.attention)
    for capability in (manifest.plugins or {}).get("compute_capabilities", ()):
        yield from ("--compute-capability", capability)
    engines = sorted(manifest.engines)
    yield from ("--engine", engines[0] if engines else "none")
    if manifest.parity is None:
        yield "--no-check"


def _bench(report: Mapping[str, Any] | None) -> Iterator[str]:
    if report is None or not report["rows"]:
        return
    batches = sorted({row["batch"] for row in report["rows"]})
    backends = dict.fromkeys(row["backend"] for row in report["rows"])
    yield from ("--batch", ",".join(map(str, batches)))
    yield from ("--backend", ",".join(backends))
    if report["against"] != "unmerged":
        yield from ("--against", report["against"].rstrip("/").rpartition("/")[2])


def _eval(report: Mapping[str, Any] | None) -> Iterator[str]:
    if report is None:
        yield from ("--data", "FOLDER")
        return
    data = report["data"]
    samples = data["kind"] == "samples"
    yield from ("--data", "samples" if samples else data["source"].rstrip("/").rpartition("/")[2])
    named = (re.fullmatch(r"r=(\d+)", one["name"]) for one in report["candidates"])
    others = [found[1] for found in named if found]
    if others:
        yield from ("--r", ",".join(others))


def _weights(manifest: Manifest) -> Table:
    weights = manifest.model.weights
    rows = [
        ("weights", f"{weights['kind']}: {weights['source']}"),
        ("sha256 of all weights", weights["state_sha256"]),
    ]
    if weights.get("sha256"):
        rows.append(("sha256 of their file", weights["sha256"]))
    return Table("Weights", ("", ""), rows, "ll")


def _versions(built: Mapping[str, str], machines: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = {"build": dict(built)}
    columns |= {name: dict(machine.get("versions") or {}) for name, machine in machines.items()}
    columns = {name: versions for name, versions in columns.items() if versions}
    packages = dict.fromkeys(package for versions in columns.values() for package in versions)
    rows = [
        (package, *(versions.get(package) or NONE for versions in columns.values()))
        for package in packages
    ]
    return Table("Versions", ("package", *columns), rows, "l" * (1 + len(columns)))


def _machines(machines: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (key, *(_plain(machine.get(key)) for machine in machines.values()))
        for key in _ENVIRONMENT
        if any(machine.get(key) for machine in machines.values())
    ]
    return Table("Where it was measured", ("", *machines), rows, "l" * (1 + len(machines)))


def _plain(value: Any) -> str:
    return NONE if value is None else str(value)


def _engines(manifest: Manifest) -> Block:
    engines = manifest.engines
    if not engines:
        return Text(f"Engine: none; {manifest.engine_note}.")
    rows = [
        (name, one["file"], one["version"], one["batch"], ", ".join(one["targets"]))
        for name, one in engines.items()
    ]
    headers = ("engine", "file", "version", "batch", "compute capability")
    return Table("Engines", headers, rows, "lllll")


def _files(manifest: Manifest) -> Table:
    from tome_export.report.page import NAME

    rows = [
        (name, size(record["bytes"]), record["sha256"])
        for name, record in manifest.files.items()
        if name != NAME  # which cannot hold its own digest
    ]
    return Table("Files of the artifact", ("file", "size", "sha256"), rows, "lrl")
