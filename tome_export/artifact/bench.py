"""``bench.json``: how fast an artifact is, beside the unmerged model or another artifact."""

from __future__ import annotations

from typing import ClassVar, Literal

from tome_export.artifact.document import Count, Document, Part, Positive, Text
from tome_export.artifact.environment import Environment

BENCH = "bench.json"


class Quantiles(Part):
    """The 20th, 50th and 80th percentile of some rounds."""

    p20: float
    p50: float
    p80: float


class Timed(Part):
    """Milliseconds of a batch, images or videos per second by the median, and peak memory."""

    latency_ms: Quantiles
    throughput: float
    peak_memory_bytes: Count | None = None


class BenchRow(Part):
    """Both models, timed in turn on one backend at one batch size.

    Attributes:
        backend: Its name.
        batch: Images or videos per run.
        merged: The artifact.
        against: What it is compared with.
        speedup: Quantiles of the ratio of the two within each round.
        share_of_macs_limit: Median speed-up over the ratio of MACs.
    """

    backend: str
    batch: Count
    merged: Timed
    against: Timed
    speedup: Quantiles
    share_of_macs_limit: float


class LayerTimes(Part):
    """Milliseconds of one transformer block by group of nodes: ``attention``, ``match``, ..."""

    __pydantic_extra__: dict[str, float]

    layer: Count


class ModelProfile(Part):
    """Where the time of one model goes, by the runtime's own profiler.

    Attributes:
        total_ms: Sum over all nodes.
        run_ms: Median of a whole run while it is profiled: the nodes and the time between them.
        runs: Runs measured.
        attributed_share: Share of the nodes' time that is in a named group.
        nodes: Nodes that ran.
        groups_ms: Milliseconds by group of nodes.
        layers: The same of every transformer block.
    """

    total_ms: float
    run_ms: float
    runs: Count
    attributed_share: float
    nodes: Count
    groups_ms: dict[str, float]
    layers: tuple[LayerTimes, ...]


class BenchProfile(Part):
    """Both models' profiles.

    Attributes:
        backend: Where they ran.
        batch: Images or videos per run.
        total_ms: That of the merged model, like the next.
        attributed_share: See ``ModelProfile``.
        merged: The artifact.
        against: What it is compared with.
    """

    backend: str
    batch: Count
    total_ms: float
    attributed_share: float
    merged: ModelProfile
    against: ModelProfile


class Bench(Document):
    """The content of ``bench.json``.

    Attributes:
        format: Version of this file.
        latency_ms: Backend -> median milliseconds of the artifact on a single image.
        environment: Where it was measured.
        against: ``unmerged``, or the directory of another artifact.
        macs_ratio: MACs of the other model over those of the artifact.
        rounds: Timed runs of each model.
        warmup: Untimed runs of each model, first.
        images: What was fed: ``samples`` or ``noise``.
        notes: What a reader should know.
        rows: One per backend and batch size.
        profile: One per batch size, on the backends that can be profiled.
    """

    remedy: ClassVar[str] = "run 'tome-export bench' of this version again"

    format: Literal[1] = 1
    latency_ms: dict[str, Positive]
    environment: Environment
    against: Text
    macs_ratio: float
    rounds: Count
    warmup: Count
    images: str
    notes: tuple[str, ...]
    rows: tuple[BenchRow, ...]
    profile: tuple[BenchProfile, ...]
