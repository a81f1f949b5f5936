"""``tome-export cascade``: a budget for each image, out of several artifacts of one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tome_export.artifact import Artifact
from tome_export.artifact.files import check_new_file, json_bytes, write_whole, writing_to
from tome_export.cascade.calibrate import Point, best_within, cheapest, check_budget, front_of
from tome_export.cascade.outcome import Observations
from tome_export.cascade.policy import MEASURES, POLICIES
from tome_export.data.find import SAMPLES, shared_path
from tome_export.errors import InputError, UsageError
from tome_export.pipeline.cascade_images import Looks, Seen, observed
from tome_export.pipeline.cascade_members import macs_of, members_of
from tome_export.pipeline.cascade_result import Found, goal_text, values_of
from tome_export.pipeline.cascade_serve import ServedCascade, check_served, serve_cascade
from tome_export.pipeline.cascade_settings import embedding_of, policy_macs_of, trial_of
from tome_export.pipeline.eval import EvalRequest, classes_of, source_of
from tome_export.progress import Progress, Silent
from tome_export.runtime.registry import ORT_CPU, TORCH, require
from tome_export.tune.goal import Goal

LEAST = 10
"""Fewest images of a part: calibration, training of a head, or test."""


@dataclass(frozen=True)
class CascadeRequest:
    """What to calibrate.

    Attributes:
        artifacts: Two or more of one model, in any order.
        data: Images: a folder, shards, or ``samples``; see ``data.find``.
        policy: Of ``cascade.policy.POLICIES``.
        goal: ``target-macs``, of the mean per image, or ``min-accuracy``. What is relative is so to
            the artifact of the most MACs.
        output: The file of the result; a page of the same name that ends in .html goes beside it.
        test: Images to measure on; empty to keep a part of ``data`` for it.
        labels: File of labels, if ``data`` is a folder of images.
        test_labels: The same of ``test``.
        calibration: Share of ``data`` that is calibrated on, where ``test`` is empty.
        measure: Of the confidence: ``max`` or ``margin``.
        strength: Of the budget term in the training of a learned policy (lambda).
        limit: Most images of each source; None for ``cascade_images.LIMIT``.
        seed: Of the order and the split of the images.
        backend: What runs the members.
        repository: Model repository to write the cascade into; None for none.
        name: What the names of the models in there begin with; None for the model's.
        preprocess: Write also a pipeline that takes encoded images.
        force: Replace existing files.
    """

    artifacts: tuple[Path, ...]
    data: tuple[str, ...]
    policy: str
    goal: Goal
    output: Path
    test: tuple[str, ...] = ()
    labels: Path | None = None
    test_labels: Path | None = None
    calibration: float = 0.5
    measure: str = "max"
    strength: float = 1.0
    limit: int | None = None
    seed: int = 0
    backend: str = ORT_CPU
    repository: Path | None = None
    name: str | None = None
    preprocess: bool = False
    force: bool = False


@dataclass(frozen=True)
class CascadeResult:
    """What was found.

    Attributes:
        path: The file of the result.
        page: The page beside it.
        values: The content of the file.
        served: What is in the repository; None if none was asked for.
    """

    path: Path
    page: Path
    values: dict[str, Any]
    served: ServedCascade | None


def cascade(request: CascadeRequest, progress: Progress | None = None) -> CascadeResult:
    """Calibrate a cascade, measure it on images it was not calibrated on, write and serve it.

    Raises:
        UsageError: if a number or name is out of range.
        InputError: if artifacts, images, output or repository are not usable, or no thresholds
            meet the target; the message says what can be reached.
        MissingComponentError: if the backend, or what serving needs, is not here.
        ExportError: if a member fails.
    """
    progress = progress or Silent()
    page = request.output.with_suffix(".html")
    _check(request, page)
    progress.stage("Verify the artifacts")
    members = members_of(request.artifacts)
    if request.repository is not None:
        check_served(request, members)
    macs = [macs_of(one) for one in members]
    embedding = embedding_of(members[-1], request.policy)
    own = policy_macs_of(members[-1], len(members), embedding, request.policy)
    budget = request.goal.budget(macs[-1])
    if budget is not None:  # before the images, which take longer
        check_budget(budget, macs[0] + own, macs[-1], goal_text(request.goal))
    patch = None if embedding is None else (embedding[0].shape[2], embedding[0].shape[3])
    looks = Looks(members, request.backend, request.measure, patch)
    calibration, test, seen = _parts(request, looks, progress)
    progress.stage(f"Calibrate on {len(calibration)} images")
    trial = trial_of(request, calibration, macs, embedding)
    front = front_of(trial.settings, trial.seen, macs, own)
    chosen = _chosen(request.goal, front, trial.seen, macs)
    found = Found(members, macs, own, trial, test, front, chosen, seen)
    values = values_of(request, found)
    served = None
    if request.repository is not None:
        served = serve_cascade(request, members, macs, own, chosen.settings, progress)
        values["served"] = served.to_dict()
    _write(request.output, page, values)
    return CascadeResult(request.output, page, values, served)


def _check(request: CascadeRequest, page: Path) -> None:
    for what, value, known in (
        ("policy", request.policy, POLICIES),
        ("confidence measure", request.measure, MEASURES),
    ):
        if value not in known:
            raise UsageError(f"{what} is {value!r}; expected one of {', '.join(known)}")
    if not 0 < request.calibration < 1:
        raise UsageError(
            f"calibration share is {request.calibration:g}; expected a number between 0 and 1"
        )
    if not 0 <= request.strength < float("inf"):
        raise UsageError(f"lambda is {request.strength:g}; expected a number, 0 or more")
    if request.limit is not None and request.limit < 1:
        raise UsageError(f"--limit is {request.limit}; expected at least 1 image")
    if request.seed < 0:
        raise UsageError(f"--seed is {request.seed}; expected 0 or more")
    _check_apart(request)
    if request.backend == TORCH:
        raise UsageError("backend is 'torch'; a cascade runs the artifacts, choose another one")
    if request.repository is None and (request.preprocess or request.name is not None):
        raise UsageError("--preprocess and --name are for what is served; give --repository too")
    if request.output == page:
        raise UsageError(f"output is {page}, which is the page's name; give one such as a .json")
    require((request.backend,))
    check_new_file(request.output, force=request.force)
    check_new_file(page, force=request.force)


def _check_apart(request: CascadeRequest) -> None:
    if not request.test:
        if request.test_labels is not None:
            raise UsageError("--test-labels are for the images of --test; give --test too")
        return
    if request.data == request.test == (SAMPLES,):
        shared: str | Path | None = SAMPLES
    else:
        folders = (() if one == (SAMPLES,) else one for one in (request.data, request.test))
        shared = shared_path(*folders)
    if shared is not None:
        raise UsageError(
            f"--test names images of --data ({shared}); give others, or leave it out to keep a "
            "part of them"
        )


def _parts(
    request: CascadeRequest, looks: Looks, progress: Progress
) -> tuple[Observations, Observations, tuple[Seen, ...]]:
    """Calibration images, test images, and what was seen of each source."""
    progress.stage(f"Run {len(looks.members)} artifacts on the images")
    seen = [_observed(request, request.data, request.labels, looks, progress)]
    order = np.random.default_rng(request.seed).permutation(len(seen[0].observations))
    first = seen[0].observations.take(order)
    if request.test:
        progress.stage("Run them on the test images")
        seen.append(_observed(request, request.test, request.test_labels, looks, progress))
        calibration, test = first, seen[1].observations
        if seen[0].labelled != seen[1].labelled:
            raise InputError(
                "one of the data and the test images has labels and the other has none; give both "
                "with labels (--labels, --test-labels or class sub-folders), or both without"
            )
    else:
        count = round(request.calibration * len(first))
        rows = np.arange(len(first), dtype=np.int64)
        calibration, test = first.take(rows[:count]), first.take(rows[count:])
    parts = 2 if request.policy == "learned" else 1
    for part, images, least in (
        ("calibration", len(calibration), parts * LEAST),
        ("test", len(test), LEAST),
    ):
        if images < least:
            raise InputError(
                f"{images} images are for {part}; expected {least} or more, give more with --data"
            )
    return calibration, test, tuple(seen)


def _observed(
    request: CascadeRequest,
    data: tuple[str, ...],
    labels: Path | None,
    looks: Looks,
    progress: Progress,
) -> Seen:
    artifact: Artifact = looks.members[-1]
    listed = EvalRequest(artifact.path, data, labels=labels)
    source = source_of(artifact, listed, classes_of(artifact))
    return observed(source, request.limit, looks, progress)


def _chosen(goal: Goal, front: Sequence[Point], seen: Observations, macs: Sequence[int]) -> Point:
    asked = goal_text(goal)
    budget = goal.budget(macs[-1])
    if budget is not None:
        return best_within(front, budget, macs, asked)
    needed = goal.needed(len(seen), int(seen.right[-1].sum()))
    assert needed is not None  # noqa: S101 (a goal that is no budget has a number of images)
    return cheapest(front, needed, len(seen), asked)


def _write(output: Path, page: Path, values: dict[str, Any]) -> None:
    """The page first: where the result is, its page is too."""
    from tome_export.report.page import render_cascade

    for path, content in ((page, render_cascade(values).encode()), (output, json_bytes(values))):
        with writing_to(path, "file"):
            write_whole(path, content)
