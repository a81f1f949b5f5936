"""The section from which a colleague can make the same artifact again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping

from tome_export.artifact import Manifest
from tome_export.artifact.bench import Bench
from tome_export.artifact.environment import Environment
from tome_export.artifact.evaluation import Evaluation
from tome_export.artifact.manifest import RESULTS
from tome_export.artifact.schedule import TunedSchedule
from tome_export.display import NONE, size
from tome_export.reducers import DEFAULT
from tome_export.report.parts import Block, Commands, Section, Table, Text
from tome_export.report.speed import against

TITLE = "Versions, files and how to make this again"

_INFLECTED = re.compile(r"r=(\d+) (constant|decreasing|increasing)")


def origin_section(
    manifest: Manifest,
    bench: Bench | None,
    evaluation: Evaluation | None,
    schedule: TunedSchedule | None,
    folder: str,
) -> Section:
    """Commands, versions, machines, weights and the digest of every file.

    Args:
        manifest: The content of ``build.json``.
        bench: That of ``bench.json``, if there is one.
        evaluation: That of ``eval.json``.
        schedule: That of ``schedule.json``.
        folder: What the artifact's directory is called.
    """
    measured = {"bench": bench, "eval": evaluation, "tune": schedule}
    machines = {command: one.environment for command, one in measured.items() if one}
    blocks: list[Block] = [
        Commands(commands(manifest, bench, evaluation, folder)),
        _weights(manifest),
        _versions({"build": manifest.versions} | {n: m.versions for n, m in machines.items()}),
    ]
    if machines:
        blocks.append(_machines(machines))
    blocks += [_engines(manifest), _files(manifest)]
    return Section("origin", TITLE, blocks)


def commands(
    manifest: Manifest, bench: Bench | None, evaluation: Evaluation | None, folder: str
) -> list[str]:
    """The command line that builds this artifact, and those that measure it as it was measured.

    Args:
        manifest: The content of ``build.json``.
        bench: That of ``bench.json``, whose settings are repeated.
        evaluation: That of ``eval.json``, likewise.
        folder: What the artifact's directory is called.
    """
    engines = sorted(manifest.engines)
    lines = [
        ["build", *_build_arguments(manifest), "-o", folder],
        *(["engine", folder, "--engine", name] for name in engines[1:]),
        ["check", folder],
        ["bench", folder, *_bench_arguments(bench)],
        ["eval", folder, *_eval_arguments(evaluation)],
        ["report", folder],
    ]
    return [shlex.join(["tome-export", *line]) for line in lines]


def _build_arguments(manifest: Manifest) -> Iterator[str]:
    merge, weights = manifest.merge, manifest.model.weights
    yield manifest.model.name
    named = _INFLECTED.fullmatch(merge.schedule)
    if named:
        yield from ("--r", named[1])
        if named[2] != "constant":
            yield from ("--schedule", named[2])
    else:
        yield from ("--schedule", ",".join(map(str, merge.r)))
    yield f"--{manifest.precision}"
    if weights.kind == "random":
        yield from ("--weights", "random", "--seed", str(weights.seed or 0))
    elif weights.kind == "file":
        yield from ("--weights", weights.source.partition(";")[0])
        if weights.key:
            yield from ("--weights-key", weights.key)
    if merge.reducer.name != DEFAULT:
        yield from ("--reducer", merge.reducer.name)
        for key, value in merge.reducer.options.items():
            if value is not None:
                text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
                yield from ("--reducer-option", f"{key}={text}")
    if manifest.form.note.startswith("--activation "):
        yield from manifest.form.note.split()
    yield "--prop-attn" if merge.prop_attn else "--no-prop-attn"
    yield from ("--batch", str(manifest.batch), "--merge-op", merge.merge_op)
    if merge.merge_op == "plugin" and not manifest.batch.is_static:
        yield "--plugin-batch-range"
    yield from ("--attention", manifest.onnx.attention)
    for capability in manifest.plugins.compute_capabilities if manifest.plugins else ():
        yield from ("--compute-capability", capability)
    yield from ("--engine", next(iter(sorted(manifest.engines)), "none"))
    if manifest.parity is None:
        yield "--no-check"


def _bench_arguments(bench: Bench | None) -> Iterator[str]:
    if bench is None or not bench.rows:
        return
    yield from ("--batch", ",".join(map(str, sorted({row.batch for row in bench.rows}))))
    yield from ("--backend", ",".join(dict.fromkeys(row.backend for row in bench.rows)))
    if against(bench) != "unmerged":
        yield from ("--against", against(bench))


def _eval_arguments(evaluation: Evaluation | None) -> Iterator[str]:
    if evaluation is None:
        yield from ("--data", "FOLDER")
        return
    data = evaluation.data
    samples = data.kind == "samples"
    yield from ("--data", "samples" if samples else data.source.rstrip("/").rpartition("/")[2])
    named = (re.fullmatch(r"r=(\d+)", one.name) for one in evaluation.candidates)
    others = [found[1] for found in named if found]
    if others:
        yield from ("--r", ",".join(others))


def _weights(manifest: Manifest) -> Table:
    weights = manifest.model.weights
    rows = [
        ("weights", f"{weights.kind}: {weights.source}"),
        ("sha256 of all weights", weights.state_sha256),
    ]
    if weights.sha256:
        rows.append(("sha256 of their file", weights.sha256))
    return Table("Weights", ("", ""), rows, "ll")


def _versions(columns: Mapping[str, Mapping[str, str]]) -> Table:
    packages = dict.fromkeys(package for versions in columns.values() for package in versions)
    rows = [(p, *(versions.get(p, NONE) for versions in columns.values())) for p in packages]
    return Table("Versions", ("package", *columns), rows, "l" * (1 + len(columns)))


def _machines(machines: Mapping[str, Environment]) -> Table:
    rows = [
        (key, *(NONE if value is None else str(value) for value in values))
        for key in ("gpu", "driver", "cpu", "cores", "python", "date")
        if any(values := [getattr(machine, key) for machine in machines.values()])
    ]
    return Table("Where it was measured", ("", *machines), rows, "l" * (1 + len(machines)))


def _engines(manifest: Manifest) -> Block:
    if not manifest.engines:
        return Text(f"Engine: none; {manifest.engine_note}.")
    rows = [
        (name, one.file, one.version, one.batch, ", ".join(one.targets))
        for name, one in manifest.engines.items()
    ]
    headers = ("engine", "file", "version", "batch", "compute capability")
    return Table("Engines", headers, rows, "lllll")


def _files(manifest: Manifest) -> Table:
    # All but the page, which cannot hold its own digest.
    files = {name: one for name, one in manifest.files.items() if RESULTS.get(name) != "report"}
    rows = [(name, size(one.bytes), one.sha256) for name, one in files.items()]
    return Table("Files of the artifact", ("file", "size", "sha256"), rows, "lrl")
