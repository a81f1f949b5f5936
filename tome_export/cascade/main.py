"""``tome-export cascade``: a budget for each image, out of several artifacts of one model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tome_export.artifact import Artifact
from tome_export.artifact.cascade import (
    Cascade,
    CascadeData,
    CascadeMember,
    CascadeShare,
    CascadeTarget,
    CascadeTest,
    ChosenSetting,
    ConfidenceMeasure,
    Policy,
    PolicyName,
    SingleMember,
    SweepPoint,
)
from tome_export.artifact.compatibility import check_one_model, shared_facts
from tome_export.artifact.goal import Goal, Metric
from tome_export.cascade.calibrate import (
    CalibratedSetting,
    Costs,
    Observations,
    best_within,
    cheapest,
    complexity_settings,
    confidence_settings,
    front_of,
    learned_settings,
    outcome,
    trained_head,
)
from tome_export.cascade.observe import Members
from tome_export.data.find import SAMPLES, shared_path, source_of
from tome_export.data.labels import classes_of
from tome_export.data.metrics import CONFIDENCE, METHODS, mean_of, paired_difference, share_of
from tome_export.errors import InputError, UsageError
from tome_export.progress import Progress, Silent
from tome_export.runtime.environment import environment
from tome_export.runtime.inputs import refuse_extra_inputs, refuse_videos
from tome_export.runtime.registry import ORT_CPU, TORCH, require

LEAST = 10
"""Fewest images of a part: calibration, training of a head, or test."""

TARGETS = 5
"""Mean costs that heads are trained for, where the target is an accuracy."""

OF_MEANS = "Efron 1987, BCa bootstrap of the mean"
"""How the interval of a mean similarity is made."""

RULE = "a cascade is made of artifacts of one model, with different r"

Embedding = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Weights ``[D, C, h, w]`` and bias ``[D]`` of a patch embedding."""


@dataclass(frozen=True)
class CascadeRequest:
    """What to calibrate.

    Attributes:
        members: Artifacts of one model, from ``members_of``.
        data: A folder of images, shards, or ``samples``; see ``data.find``.
        policy: ``complexity``, ``confidence`` or ``learned``; see ``cascade.policy``.
        goal: ``target-macs``, of the mean per image, ``min-accuracy``, or without classes
            ``min-similarity``. What is relative is so to the artifact of the most MACs.
        test: Images to measure on; empty to keep a part of ``data`` for it.
        labels: File of labels, if ``data`` is a folder of images.
        classes_in_order: Whether class folders are in the order of the model's classes.
        test_labels: File of labels, if ``test`` is a folder.
        calibration: Share of ``data`` that is calibrated on, where ``test`` is empty.
        measure: Confidence by the largest probability, ``max``, or its lead, ``margin``.
        strength: Weight of the budget term in the training of a learned policy (lambda).
        limit: Most images of each source; None for ``observe.LIMIT``.
        seed: Seed of the order and the split of the images.
    """

    members: tuple[Artifact, ...]
    data: tuple[str, ...]
    policy: PolicyName
    goal: Goal
    test: tuple[str, ...] = ()
    labels: Path | None = None
    classes_in_order: bool = False
    test_labels: Path | None = None
    calibration: float = 0.5
    measure: ConfidenceMeasure = "max"
    strength: float = 1.0
    limit: int | None = None
    seed: int = 0
    backend: str = ORT_CPU

    @property
    def target(self) -> str:
        """The goal in words: what is relative is so to the artifact of the most MACs."""
        if self.goal.relative and self.goal.kind == "target-macs":
            return f"a mean of at most {self.goal.value:g} % of the highest artifact's MACs"
        if self.goal.relative:
            return f"accuracy at most {-self.goal.value:g} points below the highest artifact"
        return str(self.goal)

    def check(self) -> None:
        """Raise ``UsageError`` for a number out of range, and for images that are to be both."""
        if not 0 < self.calibration < 1:
            raise UsageError(
                f"calibration share is {self.calibration:g}; expected a number between 0 and 1"
            )
        if not 0 <= self.strength < float("inf"):
            raise UsageError(f"lambda is {self.strength:g}; expected a number, 0 or more")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit is {self.limit}; expected at least 1 image")
        if self.seed < 0:
            raise UsageError(f"--seed is {self.seed}; expected 0 or more")
        if self.test_labels is not None and not self.test:
            raise UsageError("--test-labels are for the images of --test; give --test too")
        folders = [one for one in (self.data, self.test) if one and one != (SAMPLES,)]
        shared: str | Path | None = SAMPLES if self.data == self.test == (SAMPLES,) else None
        if len(folders) == 2:
            shared = shared_path(*folders)
        if shared is not None:
            raise UsageError(
                f"--test names images of --data ({shared}); give others, or leave it out to keep a "
                "part of them"
            )
        if self.backend == TORCH:
            raise UsageError("backend is 'torch'; a cascade runs the artifacts, choose another one")
        require((self.backend,), but=TORCH)


def members_of(paths: Sequence[Path]) -> tuple[Artifact, ...]:
    """Open artifacts of one model, by MACs ascending."""
    if len(paths) < 2:
        raise UsageError(
            f"{len(paths)} artifact is given; a cascade is made of two or more of one model, with "
            "different r"
        )
    opened = (Artifact.open(path.absolute()) for path in paths)
    members = sorted(opened, key=lambda one: one.manifest.macs.merged)
    for one in members:
        refuse_extra_inputs(one, "cascade")
        refuse_videos(one, "cascade")
        if one.manifest.output_kind != "classes":
            continue
        single = one.manifest.output.shape[-1] == 1 and one.manifest.activation == "sigmoid"
        if one.manifest.activation != "softmax" and not single:
            gives = "a regression's numbers"
            if one.manifest.activation == "sigmoid":
                gives = "a yes or no for each of several classes"
            raise InputError(
                f"{one.path} gives {gives}, and a cascade is calibrated by the one class of an "
                "image; give artifacts of a classifier whose classes exclude each other"
            )
    check_one_model(members, _facts, RULE)
    for before, after in itertools.pairwise(members):
        if before.manifest.macs.merged == (macs := after.manifest.macs.merged):
            raise InputError(
                f"{before.path} and {after.path} take the same {macs / 1e6:.2f} M MACs; "
                "a cascade is made of artifacts of different cost, leave one out"
            )
    return tuple(members)


def check_kind(members: Sequence[Artifact], policy: PolicyName, goal: Goal) -> None:
    """Refuse a policy or a target that makes no sense for what the members give."""
    kind = members[-1].manifest.output_kind
    gives = f"the artifacts give {members[-1].manifest.output.name}, not classes"
    if kind != "classes" and policy == "confidence":
        raise UsageError(
            f"{gives}, of which none is confident; choose --policy complexity or learned"
        )
    if kind != "classes" and goal.kind == "min-accuracy":
        raise UsageError(f"{gives}, and have no accuracy; give --min-similarity or --target-macs")
    if kind == "classes" and goal.kind == "min-similarity":
        raise UsageError(
            "the artifacts give classes, and --min-similarity is for features and maps; give "
            "--min-accuracy or --target-macs"
        )


def _facts(artifact: Artifact) -> dict[str, Any]:
    outputs = [(one.name, one.dtype, one.shape[1:]) for one in artifact.manifest.outputs]
    return {**shared_facts(artifact), "outputs": outputs}


def cascade(request: CascadeRequest, progress: Progress | None = None) -> Cascade:
    """Calibrate a cascade, and measure it on images it was not calibrated on.

    Raises:
        UsageError: if a number or name is out of range.
        InputError: if images are not usable, or no thresholds meet the target; the message says
            what can be reached.
        MissingComponentError: if the backend is not here.
        ExportError: if a member fails.
    """
    progress = progress or Silent()
    request.check()
    members = request.members
    check_kind(members, request.policy, request.goal)
    embedding: Embedding | None = None
    if request.policy == "learned":
        from tome_export.onnx.files import patch_embedding

        embedding = patch_embedding(members[-1].model_path)
    own = _policy_macs(request.policy, members, embedding)
    costs = Costs(tuple(one.manifest.macs.merged for one in members), own)
    budget = request.goal.budget(costs.members[-1])
    if budget is not None:  # before the images, which take longer
        costs.check_budget(budget, costs.members[0] + own, request.target)
    images = _observe(request, embedding, progress)
    progress.stage(f"Calibrate on {len(images.fit) + len(images.calibration)} images")
    settings = _settings(request, images, costs, embedding)
    front = front_of(settings, images.calibration, costs)
    if budget is not None:
        chosen = best_within(front, budget, costs, request.target)
    else:
        chosen = cheapest(front, _needed(request.goal, images.calibration), request.target)
    return _document(request, images, costs, front, chosen)


def _policy_macs(name: PolicyName, members: Sequence[Artifact], embedding: Embedding | None) -> int:
    """What the policy itself takes per image, every addition counted as a multiply-accumulate.

    ``complexity``: two differences and two sums per pixel and axis at most. ``learned``: the
    average patch, one addition per pixel, and the folded matrix on it. ``confidence``: none, a
    softmax is not counted in the models either. Pixels in uint8 are normalised first, one more.
    """
    recipe = members[-1].manifest.preprocessing
    pixels, raw = math.prod(recipe.input_size), int(recipe.pixel_dtype == "uint8")
    if name == "complexity":
        return (4 + raw) * pixels
    if embedding is None:
        return 0
    return (1 + raw) * pixels + len(members) * math.prod(embedding[0].shape[1:])


@dataclass(frozen=True)
class _Images:
    """What was observed of the images, by what they are for; a head is trained on ``fit``."""

    fit: Observations
    calibration: Observations
    test: Observations
    labelled: bool
    data: CascadeData


def _observe(request: CascadeRequest, embedding: Embedding | None, progress: Progress) -> _Images:
    """Run the members on all images; a head is trained on the first half of those to calibrate."""
    patch = None if embedding is None else (embedding[0].shape[2], embedding[0].shape[3])
    members = Members(request.members, request.backend, request.measure, patch)
    classes = classes_of(request.members[-1])
    if classes is not None:
        classes = replace(classes, in_order=request.classes_in_order)
    progress.stage(f"Run {len(request.members)} artifacts on the images")
    source = source_of(request.members[-1], request.data, request.labels, classes)
    calibration, unreadable = members.observe(source, request.limit, progress)
    order = np.random.default_rng(request.seed).permutation(len(calibration))
    notes = [*source.notes]
    if request.test:
        progress.stage("Run them on the test images")
        other = source_of(request.members[-1], request.test, request.test_labels, classes)
        test, more = members.observe(other, request.limit, progress)
        if classes is not None and (source.labels is None) != (other.labels is None):
            raise InputError(
                "one of the data and the test images has labels and the other has none; give both "
                "with labels (--labels, --test-labels or class sub-folders), or both without"
            )
        unreadable += more
        notes += other.notes
    else:
        count = round(request.calibration * len(order))
        order, test = order[:count], calibration.take(order[count:])
    for part, images, least in (
        ("calibration", len(order), LEAST if embedding is None else 2 * LEAST),
        ("test", len(test), LEAST),
    ):
        if images < least:
            without = ""
            if unreadable:
                without = f" ({len(unreadable)} could not be used: {unreadable[0].reason})"
            raise InputError(
                f"{images} images are for {part}{without}; expected {least} or "
                "more, give more with --data"
            )
    fitted = 0 if embedding is None else len(order) // 2
    data = CascadeData(
        source=", ".join(request.data),
        test_source=", ".join(request.test) or None,
        fitted=fitted,
        calibration=len(order) - fitted,
        test=len(test),
        seed=request.seed,
        unreadable=unreadable,
        notes=tuple(dict.fromkeys(notes)),
    )
    fit, calibration = calibration.take(order[:fitted]), calibration.take(order[fitted:])
    labelled = classes is not None and source.labels is not None
    return _Images(fit, calibration, test, labelled, data)


def _settings(
    request: CascadeRequest, images: _Images, costs: Costs, embedding: Embedding | None
) -> Iterable[Policy]:
    """A policy at every threshold or price that is worth it on the calibration images."""
    if embedding is None and request.policy == "complexity":
        return complexity_settings(images.calibration)
    if embedding is None:
        return confidence_settings(images.calibration, request.measure)
    budget = request.goal.budget(costs.members[-1])
    targets = np.linspace(costs.shares[0], 1.0, TARGETS).tolist()
    found: list[Policy] = []
    for target in targets if budget is None else [budget / costs.members[-1]]:
        head = trained_head(images.fit, embedding, costs.shares, target, request.strength)
        found += learned_settings(images.calibration, head)
    return found


def _needed(goal: Goal, observed: Observations) -> float:
    """Images that must be right for a target of accuracy, or similarity of all; 0 for any other."""
    return goal.needed(len(observed), float(observed.score[:, -1].sum())) or 0


def _share(score: NDArray[Any]) -> CascadeShare:
    """The mean of what counts of some images ``[B]``, with its interval."""
    if score.dtype == np.bool_:
        return CascadeShare(**vars(share_of(score)))
    found = mean_of(score)
    return CascadeShare(
        correct=None, images=len(score), share=found.mean, low=found.low, high=found.high
    )


def _metric(images: _Images) -> Metric:
    if images.test.score.dtype != np.bool_:
        return "similarity"
    return "top1" if images.labelled else "agreement"


def _document(
    request: CascadeRequest,
    images: _Images,
    costs: Costs,
    front: Sequence[CalibratedSetting],
    chosen: CalibratedSetting,
) -> Cascade:
    """The content of ``cascade.json``; everything was chosen on the calibration images alone."""
    goal, test, highest = request.goal, images.test, request.members[-1].manifest.model
    tested = outcome(chosen.policy, test, costs)
    score, budget = tested.mean, goal.budget(costs.members[-1])
    met = score.total >= _needed(goal, test) if budget is None else score.macs <= budget
    alone, exact = test.score[:, -1], test.score.dtype == np.bool_
    members = tuple(
        CascadeMember(
            artifact=str(one.path),
            schedule=one.manifest.merge.schedule,
            r=one.manifest.merge.r,
            precision=one.manifest.precision,
            macs=one.manifest.macs.merged,
            calibration=_share(images.calibration.score[:, index]),
            test=_share(test.score[:, index]),
        )
        for index, one in enumerate(request.members)
    )
    # The cheapest that is as accurate on the test images.
    single = next((one for one in members if one.test.share >= score.share), None)
    return Cascade(
        model=highest.name,
        random_weights=highest.random_weights,
        policy=request.policy,
        metric=_metric(images),
        target=CascadeTarget(kind=goal.kind, value=goal.value, text=request.target),
        settings=chosen.policy,
        policy_macs=costs.policy,
        members=members,
        chosen=ChosenSetting(
            calibration=chosen.score,
            test=CascadeTest(
                **{**vars(_share(tested.score)), **vars(score)},
                budgets=np.bincount(tested.budget, minlength=len(members)).tolist(),
                difference_to_highest=paired_difference(tested.score, alone) if exact else None,
                met=met,
            ),
        ),
        single=single
        and SingleMember(
            artifact=single.artifact,
            macs=single.macs,
            share=single.test.share,
            saved=1 - score.macs / single.macs,
        ),
        sweep=tuple(
            SweepPoint(
                thresholds=getattr(setting.policy, "thresholds", None),
                price=getattr(setting.policy, "price", None),
                calibration=setting.score,
                test=outcome(setting.policy, test, costs).mean,
                chosen=setting is chosen,
            )
            for setting in front
        ),
        data=images.data,
        backend=request.backend,
        confidence=CONFIDENCE,
        methods=METHODS if exact else METHODS.model_copy(update={"share": OF_MEANS}),
        environment=environment(),
    )
