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
class Profile:
    """Time of one batch by ONNX Runtime's profiler.

    Attributes:
        runs: Runs measured, after one more to warm up.
        run_ms: A whole run while it is profiled, median: the nodes and the time between them, in
            which the profiler writes.
        nodes: How many nodes ran.
        place_ms: Milliseconds of the nodes of each layer and group. A node's time is the median
            over the runs, which what other programs slow for a while does not move.
    """

    runs: int
    run_ms: float
    nodes: int
    place_ms: Mapping[NodePlace, float]

    @property
    def total_ms(self) -> float:
        """Sum over all nodes."""
        return sum(self.place_ms.values())

    @property
    def groups_ms(self) -> dict[str, float]:
        """Milliseconds by group; groups that the model does not have are left out."""
        return _by_group(self.place_ms)

    @property
    def layers_ms(self) -> list[dict[str, float]]:
        """Milliseconds by group of every transformer block, in order; no other nodes."""
        last = max((place.layer for place in self.place_ms if place.layer is not None), default=-1)
        return [
            _by_group({place: ms for place, ms in self.place_ms.items() if place.layer == layer})
            for layer in range(last + 1)
        ]

    def entry(self) -> ModelProfile:
        """What ``bench.json`` holds of one model."""
        return ModelProfile(
            total_ms=self.total_ms,
            run_ms=self.run_ms,
            runs=self.runs,
            attributed_share=1.0 - self.groups_ms.get(OTHER, 0.0) / self.total_ms,
            nodes=self.nodes,
            groups_ms=self.groups_ms,
            layers=tuple(
                LayerTimes.model_validate({"layer": index, **groups})
                for index, groups in enumerate(self.layers_ms)
            ),
        )


def _by_group(place_ms: Mapping[NodePlace, float]) -> dict[str, float]:
    found = {place.group for place in place_ms}
    return {
        group: sum(ms for place, ms in place_ms.items() if place.group == group)
        for group in GROUPS
        if group in found
    }


def profile_onnx(model_path: Path, images: np.ndarray[Any, Any], runs: int = 10) -> Profile:
    """Profile one model; see ``profile_in_turn``."""
    return profile_in_turn({"": model_path}, images, runs)[""]


def profile_in_turn(
    model_paths: Mapping[str, Path], images: np.ndarray[Any, Any], runs: int = 10
) -> dict[str, Profile]:
    """Profile models on ONNX Runtime's CPU and attribute every node's time to a layer and group.

    Names of nodes tell the group (``onnx.names``). The models take turns, run by run, so that a
    drift of the machine's speed meets them all; one run more comes first to warm up. Not for a GPU:
    there the runtime's profiler sees kernels being launched, not running. Images are ``[B, C, H,
    W]`` float32; B is within the models' batch range.
    """
    with tempfile.TemporaryDirectory(prefix="tome-export-") as folder, ExitStack() as stack:
        opened = {}
        for index, (name, path) in enumerate(model_paths.items()):
            graph = load(path)
            inline(graph)
            prefix = Path(folder) / f"profile-{index}"
            runner = stack.enter_context(OrtRunner(graph, profile=prefix))
            finder = place_finder(graph.graph)
            opened[name] = runner, Fed(runner, extra_inputs_of(graph)), finder
        for _ in range(runs + 1):
            for _, fed, _ in opened.values():
                fed.infer({INPUT_NAME: images})
        return {
            name: profile_from_events(json.loads(runner.end_profiling().read_text()), finder)
            for name, (runner, _, finder) in opened.items()
        }


def profile_from_events(events: Sequence[Mapping[str, Any]], find: NodePlaceFinder) -> Profile:
    """Read the events of ONNX Runtime's profile; the first run is left out."""
    spans = sorted((e["ts"], e["dur"]) for e in events if e["name"] == RUN)[1:]
    nodes = [e for e in events if e["cat"] == "Node" and e["name"].endswith(NODE)]
    nodes.sort(key=lambda event: int(event["ts"]))
    places: dict[tuple[str, str], NodePlace] = {}
    times: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * len(spans))
    for run, (start, duration) in enumerate(spans):
        last = NodePlace(None, OTHER)
        for event in nodes:
            if start <= event["ts"] <= start + duration:
                # What the runtime itself puts in, such as a reordering, serves the node before it.
                last = find(event["name"]) or last
                key = (event["name"], event["args"].get("node_index", ""))
                places.setdefault(key, last)
                times[key][run] += event["dur"] / 1e3
    place_ms: dict[NodePlace, float] = defaultdict(float)
    for key, values in times.items():
        place_ms[places[key]] += median(values)
    run_ms = median(duration for _, duration in spans) / 1e3
    return Profile(len(spans), run_ms, len(times), place_ms)
