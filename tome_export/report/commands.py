"""The command lines from which a colleague can make the same artifact again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

from tome_export.artifact import Manifest
from tome_export.artifact.bench import Bench
from tome_export.artifact.evaluation import Evaluation
from tome_export.reducers import DEFAULT

_INFLECTED = re.compile(r"r=(\d+) (constant|decreasing|increasing)")


def reproducing_commands(
    manifest: Manifest, bench: Bench | None, evaluation: Evaluation | None, folder: str
) -> list[str]:
    """The command line that builds this artifact, and those that measure it as it was measured."""
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
    if manifest.model.image_size is not None:
        yield from ("--image-size", manifest.model.image_size)
    if manifest.preprocessing.form != "float32":
        yield from ("--input", manifest.preprocessing.form)
    form = manifest.form
    asked = {"--dense": form.dense, "--source-map": form.source_map, "--entropy": form.entropy}
    yield from (option for option, given in asked.items() if given)
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
    if compared_with(bench) != "unmerged":
        yield from ("--against", compared_with(bench))


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


def compared_with(bench: Bench) -> str:
    """What the artifact was measured against, without the folders it lies in."""
    return bench.against.rstrip("/").rpartition("/")[2] or "unmerged"
