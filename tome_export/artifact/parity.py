"""``parity.json``, the verdict in it, and what ``build.json`` keeps of it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

from tome_export.artifact.document import Count, Document, Measured, Part
from tome_export.spec import AttentionForm, Precision

PARITY = "parity.json"

LISTED = 20
"""Disagreements listed per layer; all are counted."""

Kind = Literal["selection", "destination", "order", "structure"]


class Disagreement(Part):
    """One decision that differs from the reference's.

    Attributes:
        image: Index of the image.
        token: Input index of the set-A token concerned, or what a plan has in its place.
        kind: ``selection`` (merged or not), ``destination`` (into which token), ``order`` (of
            the tokens that stay), ``structure`` (what no rounding can change).
        margin: Difference of the two cosine scores, in the reference, that the decision hangs on.
    """

    image: Count
    token: int
    kind: Kind
    margin: Measured


class LayerParity(Part):
    """One merging layer, led by the reference's plans so that both see the same tokens.

    Attributes:
        layer: Index of the block.
        decisions: Decisions compared: mergeable set-A tokens times images.
        disagreements: Those that differ from the reference's.
        defects: Those whose margin lies outside the rounding bound.
        largest_margin: Largest score margin among the disagreements.
        margin_bound: Twice the allowed score error: what rounding can overturn.
        score_error: Largest difference of a cosine score from the reference's.
        score_error_allowed: k times that of PyTorch in the same precision.
        op_defects: Decisions that do not follow from the layer's own metric, beyond fp32
            rounding of the scores: a wrong match, whatever the precision.
        images_diverged: Images whose free-running plans differ here for the first time.
        examples: The first few disagreements, largest margin first.
        across: Whether it is the merge across clips of a video, ahead of the block's attention.
    """

    layer: Count
    decisions: Count
    disagreements: Count
    defects: Count
    largest_margin: Measured
    margin_bound: Measured
    score_error: Measured
    score_error_allowed: Measured
    op_defects: Count
    images_diverged: Count
    examples: tuple[Disagreement, ...] = ()
    across: bool = False

    @property
    def passed(self) -> bool:
        """No defect and no more score error than allowed."""
        return (
            self.defects == 0
            and self.op_defects == 0
            and self.score_error <= self.score_error_allowed
        )


class OutputParity(Part):
    """The model's output against the reference's.

    Attributes:
        max_abs: Largest absolute difference.
        relative: ``max_abs`` over the reference's largest absolute value.
        cosine: Smallest cosine similarity over the images.
        top1_agreement: Share of images whose largest logit is that of the same class; of a sigmoid,
            whose every class has the same yes or no. None where the output is features or a
            regression's numbers, whose largest entry says nothing.
    """

    max_abs: Measured
    relative: Measured
    cosine: Measured
    top1_agreement: float | None


class ParitySummary(Part):
    """What ``build.json`` keeps of a parity check; see ``ParityReport`` for its entries."""

    passed: bool
    candidate: str
    precision: Precision
    images: Count
    subject: str
    decisions: Count
    disagreements: Count
    defects: Count
    first_diverging_layer: Count | None
    output: OutputParity
    led_output: OutputParity
    led_allowed: Measured


class Verdict(Part):
    """What follows from a comparison.

    Attributes:
        passed: Whether the candidate computes what PyTorch computes, as far as rounding allows.
        failures: Why it does not, the first failing layer first; empty if it passed.
        first_diverging_layer: First layer where a free-running plan differs from the reference's.
        decisions: Decisions compared, over all layers.
        disagreements: Those that differ.
        defects: Those that rounding cannot explain.
    """

    passed: bool
    failures: tuple[str, ...]
    first_diverging_layer: Count | None
    decisions: Count
    disagreements: Count
    defects: Count


class Comparison(Part):
    """A candidate against PyTorch in fp32.

    Attributes:
        candidate: What was checked, for example ``onnx on ONNX Runtime CPU``.
        precision: Precision of the candidate.
        images: Number of images.
        k: Factor allowed over PyTorch's own error in the same precision.
        layers: Every merging layer.
        output: The candidate as shipped, making its own decisions.
        led_output: The candidate led by the reference's plans: numerical error alone.
        led_allowed: Largest ``led_output.max_abs`` allowed: k times the yardstick's, plus eight
            units in the last place of the largest output.
        twin_difference: Largest difference between the shipped graph's output and that of its
            instrumented twin when both decide for themselves, over the images where no plan
            differs: the twin speaks for the shipped graph as far as this is small.
        twin_allowed: What it may be.
        source_map_defects: Images whose source map is not the composition of the plans that the
            graph itself chose, or not its twin's where no plan differs; None for a model without
            that output.
        entropy_defects: Images whose entropy output is not that of the sizes which follow from the
            plans that the graph itself chose, or not its twin's where no plan differs; None for a
            model without that output.
        entropy: Token-size entropy of each image, 0 to 1 (``merge.entropy``), counted from the
            plans that the instrumented graph chose for itself.
        subject: What the images are: ``image``, or ``video`` where the model takes videos.
        suggested_attention: The value of ``--attention`` with which the candidate would sum more
            exactly; None where attention is not fused in half precision.
    """

    candidate: str
    precision: Precision
    images: Count
    k: float
    layers: tuple[LayerParity, ...]
    output: OutputParity
    led_output: OutputParity
    led_allowed: Measured
    twin_difference: Measured
    twin_allowed: Measured
    source_map_defects: Count | None = None
    entropy_defects: Count | None = None
    entropy: tuple[Measured, ...] = ()
    subject: Literal["image", "video"] = "image"
    suggested_attention: AttentionForm | None = None

    def judged(self) -> ParityReport:
        """The comparison with the verdict that follows from it."""
        layers, failures = self.layers, tuple(self._failures())
        verdict = Verdict(
            passed=not failures,
            failures=failures,
            first_diverging_layer=next((one.layer for one in layers if one.images_diverged), None),
            decisions=sum(layer.decisions for layer in layers),
            disagreements=sum(layer.disagreements for layer in layers),
            defects=sum(layer.defects + layer.op_defects for layer in layers),
        )
        return ParityReport(**{**dict(self), **dict(verdict)})

    def _failures(self) -> Iterator[str]:
        advice = ""
        if self.suggested_attention is not None and not self.led_output.max_abs <= self.led_allowed:
            advice = (
                f"; if fused attention is why, build with --attention {self.suggested_attention}"
            )
        if not math.isfinite(self.led_allowed):
            yield (
                f"PyTorch itself gives infinite or undefined output in {self.precision}; use bf16 "
                "or fp32 for this model"
            )
        elif not math.isfinite(self.output.max_abs + self.led_output.max_abs):
            yield "the output is infinite or undefined where PyTorch's is not"
        for layer in self.layers:
            where = f"layer {layer.layer}:"
            if not math.isfinite(layer.score_error_allowed):
                yield f"{where} PyTorch's own scores are undefined in {self.precision}"
            if layer.op_defects:
                yield (
                    f"{where} {layer.op_defects} merge decisions do not follow from the layer's "
                    "own metric"
                )
            if layer.defects:
                yield (
                    f"{where} {layer.defects} of {layer.decisions} merge decisions differ with a "
                    f"margin up to {layer.largest_margin:.2e}, outside the rounding bound "
                    f"{layer.margin_bound:.2e}"
                )
            if not layer.score_error <= layer.score_error_allowed:
                yield (
                    f"{where} score error {layer.score_error:.2e} exceeds "
                    f"{layer.score_error_allowed:.2e} ({self.k:g} times PyTorch's own){advice}"
                )
        if not self.led_output.max_abs <= self.led_allowed:
            yield (
                f"output error {self.led_output.max_abs:.2e} exceeds {self.led_allowed:.2e} "
                f"({self.k:g} times PyTorch's own in {self.precision}){advice}"
            )
        if not self.twin_difference <= self.twin_allowed:
            yield (
                f"the shipped graph's output differs from its instrumented twin's by "
                f"{self.twin_difference:.2e}, allowed {self.twin_allowed:.2e}"
            )
        checked = {"source map": self.source_map_defects, "entropy": self.entropy_defects}
        for what, defects in checked.items():
            if defects:
                yield (
                    f"the {what} of {defects} of {self.images} {self.subject}s does not follow "
                    "from their merge plans"
                )


class ParityReport(Comparison, Verdict):
    """A comparison with PyTorch and its verdict, which comes first in the file."""

    def summary(self) -> ParitySummary:
        """The part of it that ``build.json`` keeps."""
        return ParitySummary(**{name: getattr(self, name) for name in ParitySummary.model_fields})


class ParityFile(Document):
    """The content of ``parity.json``.

    Attributes:
        format: Version of this file.
        checks: A report of every backend that was checked.
    """

    remedy: ClassVar[str] = "run 'tome-export check' of this version again"

    format: Literal[1] = 1
    checks: tuple[ParityReport, ...]
