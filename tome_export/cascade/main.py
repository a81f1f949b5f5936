"""``tome-export cascade``: a budget for each image, out of several artifacts of one model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
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
    CascadeScore,
    CascadeTarget,
    CascadeTest,
    ChosenSetting,
    ConfidenceMeasure,
    LearnedPolicy,
    Policy,
    PolicyName,
    SingleMember,
    SweepPoint,
)
from tome_export.artifact.compatibility import check_one_model, shared_facts
from tome_export.artifact.evaluation import UnreadableImage
from tome_export.artifact.files import check_new_file, keeping, write_whole, writing_to
from tome_export.artifact.goal import Goal
from tome_export.cascade import policy
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
from tome_export.cascade.images import ObservationSpec, ObservedImages, observed
from tome_export.cascade.policy import MEASURES, POLICIES
from tome_export.data.find import SAMPLES, shared_path, source_of
from tome_export.data.labels import classes_of
from tome_export.data.metrics import CONFIDENCE, METHODS, paired_difference, share_of
from tome_export.errors import InputError, UsageError
from tome_export.progress import Progress, Silent
from tome_export.runtime.inputs import refuse_extra_inputs
from tome_export.runtime.registry import ORT_CPU, TORCH, require
from tome_export.serve.cascade import CascadeServeRequest, check_cascade, serve_cascade
from tome_export.serve.model_file import image_shape

LEAST = 10
"""Fewest images of a part: calibration, training of a head, or test."""

TARGETS = 5
"""Mean costs that heads are trained for, where the target is an accuracy."""

Embedding = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Weights ``[D, C, h, w]`` and bias ``[D]`` of a patch embedding."""


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
        classes_in_order: As of ``data.labels.Classes``, of both.
        test_labels: File of labels, if ``test`` is a folder.
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
        self_test: As of ``ServeRequest``, of what is written into the repository.
    """

    artifacts: tuple[Path, ...]
    data: tuple[str, ...]
    policy: PolicyName
    goal: Goal
    output: Path
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
    repository: Path | None = None
    name: str | None = None
    preprocess: bool = False
    force: bool = False
    self_test: bool | None = False

    @property
    def page(self) -> Path:
        """The page beside the result."""
        return self.output.with_suffix(".html")

    @property
    def target(self) -> str:
        """The goal in words: what is relative is so to the artifact of the most MACs."""
        if self.goal.relative and self.goal.kind == "target-macs":
            return f"a mean of at most {self.goal.value:g} % of the highest artifact's MACs"
        if self.goal.relative:
            return f"accuracy at most {-self.goal.value:g} points below the highest artifact"
        return str(self.goal)


def cascade(request: CascadeRequest, progress: Progress | None = None) -> Cascade:
    """Calibrate a cascade, measure it on images it was not calibrated on, write and serve it.

    Raises:
        UsageError: if a number or name is out of range.
        InputError: if artifacts, images, output or repository are not usable, or no thresholds
            meet the target; the message says what can be reached.
        UnrecordedError: if result, page or repository cannot be written any more; it holds what
            was found.
        MissingComponentError: if the backend, or what serving needs, is not here.
        ExportError: if a member fails.
    """
    from tome_export.report.page import render_cascade

    progress = progress or Silent()
    _check(request)
    progress.stage("Verify the artifacts")
    members = members_of(request.artifacts)
    serving = None
    if request.repository is not None:
        serving = CascadeServeRequest(
            request.repository,
            members,
            request.name,
            request.preprocess,
            request.force,
            request.self_test,
        )
        check_cascade(serving)
    embedding = _embedding(members[-1]) if request.policy == "learned" else None
    costs = Costs(
        tuple(one.manifest.macs.merged for one in members),
        _policy_macs(request.policy, members, embedding),
    )
    budget = request.goal.budget(costs.members[-1])
    if budget is not None:  # before the images, which take longer
        costs.check_budget(budget, costs.members[0] + costs.policy, request.target)
    images = _images(request, members, embedding, progress)
    progress.stage(f"Calibrate on {len(images.calibration)} images")
    found = _Calibration(request, members, costs, images, embedding).document()
    if serving is not None:
        with keeping(found):
            served = serve_cascade(serving, found, Path(policy.__file__), progress)
        found = found.model_copy(update={"served": served})
    # The page first: where the result is, its page is too.
    page = render_cascade(found).encode()
    with keeping(found):
        for path, content in ((request.page, page), (request.output, found.json_bytes())):
            with writing_to(path, "file"):
                write_whole(path, content)
    return found


def _check(request: CascadeRequest) -> None:
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
    if request.repository is None and (
        request.preprocess or request.name is not None or request.self_test
    ):
        raise UsageError(
            "--preprocess, --name and --self-test are for what is served; give --repository too"
        )
    if request.output == request.page:
        raise UsageError(
            f"output is {request.page}, which is the page's name; give one such as a .json"
        )
    require((request.backend,), but=TORCH)
    check_new_file(request.output, force=request.force)
    check_new_file(request.page, force=request.force)


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


def members_of(paths: Sequence[Path]) -> tuple[Artifact, ...]:
    """Open artifacts of one model, by MACs ascending.

    Raises:
        UsageError: if there is only one.
        InputError: if one is damaged, gives no classes or takes more than images, if they are of
            different models, inputs or outputs, or two take the same MACs.
    """
    if len(paths) < 2:
        raise UsageError(
            f"{len(paths)} artifact is given; a cascade is made of two or more of one model, with "
            "different r"
        )
    opened = (Artifact.open(path.absolute()) for path in paths)
    members = sorted(opened, key=lambda one: one.manifest.macs.merged)
    for one in members:
        refuse_extra_inputs(one, "cascade")
        if (name := one.manifest.output.name) != "logits":
            raise InputError(
                f"{one.path} gives {name}, not classes, by which a cascade is calibrated; give "
                "artifacts of a classifier"
            )
        single = one.manifest.output.shape[-1] == 1 and one.manifest.activation == "sigmoid"
        if one.manifest.activation != "softmax" and not single:
            gives = "a regression's numbers"
            if one.manifest.activation == "sigmoid":
                gives = "a yes or no for each of several classes"
            raise InputError(
                f"{one.path} gives {gives}, and a cascade is calibrated by the one class of an "
                "image; give artifacts of a classifier whose classes exclude each other"
            )
    rule = "a cascade is made of artifacts of one model, with different r"
    check_one_model(members, _facts, rule)
    for before, after in itertools.pairwise(members):
        if before.manifest.macs.merged == (macs := after.manifest.macs.merged):
            raise InputError(
                f"{before.path} and {after.path} take the same {macs / 1e6:.2f} M MACs; "
                "a cascade is made of artifacts of different cost, leave one out"
            )
    return tuple(members)


def _facts(artifact: Artifact) -> dict[str, Any]:
    outputs = [(one.name, one.dtype, image_shape(one)) for one in artifact.manifest.outputs]
    return {**shared_facts(artifact), "outputs": outputs}


def _embedding(artifact: Artifact) -> Embedding:
    from tome_export.onnx.patch_embedding import patch_embedding

    return patch_embedding(artifact.model_path)


def _policy_macs(name: PolicyName, members: Sequence[Artifact], embedding: Embedding | None) -> int:
    """What the policy itself takes per image, every addition counted as a multiply-accumulate.

    ``complexity``: two differences and two sums per pixel and axis at most. ``learned``: the
    average patch, one addition per pixel, and the folded matrix on it. ``confidence``: none, a
    softmax is not counted in the models either.
    """
    pixels = math.prod(members[-1].manifest.preprocessing.input_size)
    if name == "complexity":
        return 4 * pixels
    return 0 if embedding is None else pixels + len(members) * math.prod(embedding[0].shape[1:])


@dataclass(frozen=True)
class _Images:
    """What was observed of the images, by what they are for."""

    calibration: Observations
    test: Observations
    labelled: bool
    unreadable: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


def _images(
    request: CascadeRequest,
    members: tuple[Artifact, ...],
    embedding: Embedding | None,
    progress: Progress,
) -> _Images:
    patch = None if embedding is None else (embedding[0].shape[2], embedding[0].shape[3])
    spec = ObservationSpec(members, request.backend, request.measure, patch)

    def of(data: tuple[str, ...], labels: Path | None) -> ObservedImages:
        classes = classes_of(members[-1])
        if classes is not None:
            classes = replace(classes, in_order=request.classes_in_order)
        source = source_of(members[-1], data, labels, classes)
        return observed(source, request.limit, spec, progress)

    progress.stage(f"Run {len(members)} artifacts on the images")
    first = of(request.data, request.labels)
    order = np.random.default_rng(request.seed).permutation(len(first.observations))
    unreadable, notes = first.unreadable, first.notes
    if request.test:
        progress.stage("Run them on the test images")
        other = of(request.test, request.test_labels)
        if first.labelled != other.labelled:
            raise InputError(
                "one of the data and the test images has labels and the other has none; give both "
                "with labels (--labels, --test-labels or class sub-folders), or both without"
            )
        calibration, test = first.observations.take(order), other.observations
        unreadable += other.unreadable
        notes += other.notes
    else:
        count = round(request.calibration * len(order))
        calibration = first.observations.take(order[:count])
        test = first.observations.take(order[count:])
    for part, images, least in (
        ("calibration", len(calibration), (2 if request.policy == "learned" else 1) * LEAST),
        ("test", len(test), LEAST),
    ):
        if images < least:
            raise InputError(
                f"{images} images are for {part}; expected {least} or more, give more with --data"
            )
    return _Images(calibration, test, first.labelled, unreadable, tuple(dict.fromkeys(notes)))


class _Calibration:
    """A policy at every threshold that is worth it, on images whose every answer is known.

    A learned policy is trained on the first half of the images, its price calibrated on the rest.

    Raises:
        InputError: if no thresholds meet the target; it says what can be reached.
    """

    def __init__(
        self,
        request: CascadeRequest,
        members: tuple[Artifact, ...],
        costs: Costs,
        images: _Images,
        embedding: Embedding | None,
    ) -> None:
        self.request, self.members, self.costs, self.images = request, members, costs, images
        self.seen, self.fitted, settings = images.calibration, 0, list[Policy]()
        budget = request.goal.budget(costs.members[-1])
        if embedding is not None:
            self.fitted = len(self.seen) // 2
            rows = np.arange(len(self.seen), dtype=np.int64)
            fit = self.seen.take(rows[: self.fitted])
            self.seen = self.seen.take(rows[self.fitted :])
            targets = np.linspace(costs.shares[0], 1.0, TARGETS)
            for target in targets if budget is None else [budget / costs.members[-1]]:
                head = trained_head(fit, embedding, costs.shares, float(target), request.strength)
                settings += learned_settings(self.seen, head)
        elif request.policy == "complexity":
            settings += complexity_settings(self.seen)
        else:
            settings += confidence_settings(self.seen, request.measure)
        self.front = front_of(settings, self.seen, costs)
        if budget is not None:
            self.chosen = best_within(self.front, budget, costs, request.target)
        else:
            count = len(self.seen)
            needed = request.goal.needed(count, int(self.seen.right[-1].sum())) or 0
            self.chosen = cheapest(self.front, needed, count, request.target)

    def document(self) -> Cascade:
        """The content of ``cascade.json``."""
        from tome_export.runtime.environment import environment

        request = self.request
        test, goal = self.images.test, request.goal
        highest = self.members[-1].manifest.model
        chosen = outcome(self.chosen.policy, test, self.costs)
        macs, right = float(chosen.macs.mean()), chosen.right
        budget = goal.budget(self.costs.members[-1])
        if budget is not None:
            met = macs <= budget
        else:
            needed = goal.needed(len(test), int(test.right[-1].sum())) or 0
            met = int(right.sum()) >= needed
        members = tuple(
            CascadeMember(
                artifact=str(one.path),
                schedule=one.manifest.merge.schedule,
                r=one.manifest.merge.r,
                precision=one.manifest.precision,
                macs=one.manifest.macs.merged,
                calibration=share_of(calibrated),
                test=share_of(tested),
            )
            for one, calibrated, tested in zip(
                self.members, self.seen.right, test.right, strict=True
            )
        )
        # The cheapest that is as accurate on the test images.
        single = next((one for one in members if one.test.share >= right.mean()), None)
        return Cascade(
            model=highest.name,
            random_weights=highest.random_weights,
            policy=request.policy,
            metric="top1" if self.images.labelled else "agreement",
            target=CascadeTarget(kind=goal.kind, value=goal.value, text=request.target),
            settings=self.chosen.policy,
            policy_macs=self.costs.policy,
            members=members,
            chosen=ChosenSetting(
                calibration=self._calibration_score(self.chosen),
                test=CascadeTest(
                    macs=macs,
                    **vars(share_of(right)),
                    budgets=np.bincount(chosen.budget, minlength=len(members)).tolist(),
                    difference_to_highest=paired_difference(right, test.right[-1]),
                    met=met,
                ),
            ),
            single=single
            and SingleMember(
                artifact=single.artifact,
                macs=single.macs,
                share=single.test.share,
                saved=1 - macs / single.macs,
            ),
            sweep=tuple(map(self._sweep_point, self.front)),
            data=CascadeData(
                source=", ".join(request.data),
                test_source=", ".join(request.test) or None,
                fitted=self.fitted,
                calibration=len(self.seen),
                test=len(test),
                seed=request.seed,
                unreadable=tuple(
                    UnreadableImage(name=name, reason=reason)
                    for name, reason in self.images.unreadable
                ),
                notes=self.images.notes,
            ),
            backend=request.backend,
            confidence=CONFIDENCE,
            methods=METHODS,
            environment=environment(),
        )

    def _calibration_score(self, setting: CalibratedSetting) -> CascadeScore:
        return _score(setting.macs, setting.correct, len(self.seen))

    def _sweep_point(self, setting: CalibratedSetting) -> SweepPoint:
        """A setting of the front on both parts; the front is chosen on calibration images alone."""
        policy, test = setting.policy, self.images.test
        tested = outcome(policy, test, self.costs)
        return SweepPoint(
            thresholds=None if isinstance(policy, LearnedPolicy) else policy.thresholds,
            price=policy.price if isinstance(policy, LearnedPolicy) else None,
            calibration=self._calibration_score(setting),
            test=_score(float(tested.macs.mean()), int(tested.right.sum()), len(test)),
            chosen=setting is self.chosen,
        )


def _score(macs: float, correct: int, images: int) -> CascadeScore:
    return CascadeScore(macs=macs, correct=correct, images=images, share=correct / images)
