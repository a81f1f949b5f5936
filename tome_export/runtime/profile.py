"""Where the time goes: the runtime's own profile, per layer and grouped by part of the model."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from tome_export.artifact.bench import LayerTimes, ModelProfile
from tome_export.onnx.files import extra_inputs_of, load
from tome_export.onnx.functions import inline
from tome_export.onnx.names import GROUPS, OTHER, NodePlace, place_finder
from tome_export.runtime.inputs import Fed
from tome_export.runtime.ort import OrtRunner
from tome_export.spec import INPUT_NAME

NodePlaceFinder = Callable[[str], NodePlace | None]

NODE, RUN = "_kernel_time", "model_run"


@dataclass(frozen=True)
class NodeTime:
    """What one node of the optimised graph takes.

    Attributes:
        operator: Its operator, such as ``FusedMatMul``.
        place: Layer and group.
        ms: Median over the runs, which what other programs slow for a while does not move.
    """

    operator: str
    place: NodePlace
    ms: float


@dataclass(frozen=True)
class Profile:
    """Time per node of one batch, by ONNX Runtime's profiler.

    Attributes:
        batch: Images per run.
        runs: Runs measured, after one more to warm up.
        run_ms: A whole run while it is profiled, median: the nodes and the time between them, in
            which the profiler writes.
        nodes: All nodes that ran, in their order.
    """

    batch: int
    runs: int
    run_ms: float
    nodes: tuple[NodeTime, ...]

    @property
    def total_ms(self) -> float:
        """Sum over all nodes."""
        return sum(node.ms for node in self.nodes)

    @property
    def groups_ms(self) -> dict[str, float]:
        """Milliseconds by group; groups that the model does not have are left out."""
        return _by_group(self.nodes)

    @property
    def layers_ms(self) -> list[dict[str, float]]:
        """Milliseconds by group of every transformer block, in order; no other nodes."""
        blocks: dict[int, list[NodeTime]] = defaultdict(list)
        for node in self.nodes:
            if node.place.layer is not None:
                blocks[node.place.layer].append(node)
        return [_by_group(blocks[layer]) for layer in range(max(blocks, default=-1) + 1)]

    @property
    def attributed_share(self) -> float:
        """Share of the nodes' time that is in a group other than ``other``."""
        return 1.0 - self.groups_ms.get(OTHER, 0.0) / self.total_ms

    def entry(self) -> ModelProfile:
        """What ``bench.json`` holds of one model."""
        return ModelProfile(
            total_ms=self.total_ms,
            run_ms=self.run_ms,
            runs=self.runs,
            attributed_share=self.attributed_share,
            nodes=len(self.nodes),
            groups_ms=self.groups_ms,
            layers=tuple(
                LayerTimes.model_validate({"layer": index, **groups})
                for index, groups in enumerate(self.layers_ms)
            ),
        )


def profile_onnx(model_path: Path, images: np.ndarray[Any, Any], runs: int = 10) -> Profile:
    """Profile one model; see ``profile_in_turn``."""
    return profile_in_turn({"": model_path}, images, runs)[""]


def profile_in_turn(
    model_paths: Mapping[str, Path], images: np.ndarray[Any, Any], runs: int = 10
) -> dict[str, Profile]:
    """Profile models on ONNX Runtime's CPU and attribute every node's time to a layer and group.

    Names of nodes tell the group (``onnx.names``). The models take turns, run by run, so that a
    drift of the machine's speed meets them all. Not for a GPU: there the runtime's profiler sees
    kernels being launched, not running.

    Args:
        model_paths: By any name, ``model.onnx`` of an artifact or of
            ``pipeline.reference.export_variant``.
        images: ``pixel_values [B, C, H, W]`` float32; B is within the models' batch range.
        runs: Runs to measure, at least 1; one more comes first to warm up.

    Raises:
        InputError: if a file is not an ONNX model.
        MissingComponentError: if onnxruntime is not here.
        ExportError: if onnxruntime refuses a model.
    """
    with tempfile.TemporaryDirectory(prefix="tome-export-") as folder, ExitStack() as stack:
        runners: dict[str, OrtRunner] = {}
        fed: dict[str, Fed] = {}
        finders: dict[str, NodePlaceFinder] = {}
        for index, (name, path) in enumerate(model_paths.items()):
            prefix = Path(folder) / f"profile-{index}"
            graph = load(path)
            inline(graph)
            finders[name] = place_finder(graph.graph)
            runners[name] = stack.enter_context(OrtRunner(graph, profile=prefix))
            fed[name] = Fed(runners[name], extra_inputs_of(graph))
        for _ in range(runs + 1):
            for runner in fed.values():
                runner.infer({INPUT_NAME: images})
        files = {name: runner.end_profiling() for name, runner in runners.items()}
        return {
            name: profile_from_events(json.loads(file.read_text()), len(images), finders[name])
            for name, file in files.items()
        }


def profile_from_events(
    events: Sequence[Mapping[str, Any]], batch: int, find: NodePlaceFinder
) -> Profile:
    """Read the events of ONNX Runtime's profile; the first run is left out.

    Args:
        events: As in the file.
        batch: Images per run.
        find: Gives the place of a node by its name, None if that says nothing.
    """
    spans = sorted((e["ts"], e["dur"]) for e in events if e["name"] == RUN)[1:]
    nodes = [e for e in events if e["cat"] == "Node" and e["name"].endswith(NODE)]
    nodes.sort(key=lambda event: int(event["ts"]))
    places: dict[tuple[str, str], NodePlace] = {}
    operators: dict[tuple[str, str], str] = {}
    times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(spans))
    for run, (start, duration) in enumerate(spans):
        last = NodePlace(None, OTHER)
        for event in nodes:
            if not start <= event["ts"] <= start + duration:
                continue
            # What the runtime itself puts in, such as a reordering, serves the node before it.
            last = find(event["name"]) or last
            key = (event["name"], event["args"].get("node_index", ""))
            places.setdefault(key, last)
            operators.setdefault(key, event["args"]["op_name"])
            times[key][run] += event["dur"] / 1e3
    found = tuple(
        NodeTime(operators[key], places[key], median(values)) for key, values in times.items()
    )
    run_ms = median(duration for _, duration in spans) / 1e3
    return Profile(batch, len(spans), run_ms, found)


def _by_group(nodes: Sequence[NodeTime]) -> dict[str, float]:
    times: dict[str, float] = {}
    for group in GROUPS:
        chosen = [node.ms for node in nodes if node.place.group == group]
        if chosen:
            times[group] = sum(chosen)
    return times
