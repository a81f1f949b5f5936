"""What a parity check found, as plain values, and the verdict that follows."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from tome_export.parity.decisions import Disagreement
from tome_export.spec import AttentionForm

LISTED = 20
"""Disagreements listed per layer in the JSON; all are counted."""


@dataclass(frozen=True)
class LayerParity:
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

    layer: int
    decisions: int
    disagreements: int
    defects: int
    largest_margin: float
    margin_bound: float
    score_error: float
    score_error_allowed: float
    op_defects: int
    images_diverged: int
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


@dataclass(frozen=True)
class OutputParity:
    """The model's output against the reference's.

    Attributes:
        max_abs: Largest absolute difference.
        relative: ``max_abs`` over the reference's largest absolute value.
        cosine: Smallest cosine similarity over the images.
        top1_agreement: Share of images whose largest logit is that of the same class; None where
            the output is features, whose largest entry says nothing.
    """

    max_abs: float
    relative: float
    cosine: float
    top1_agreement: float | None


@dataclass(frozen=True)
class ParityReport:
    """A candidate against PyTorch in fp32.

    Attributes:
        candidate: What was checked, for example ``onnx on ONNX Runtime CPU``.
        precision: Of the candidate.
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
    precision: str
    images: int
    k: float
    layers: tuple[LayerParity, ...]
    output: OutputParity
    led_output: OutputParity
    led_allowed: float
    twin_difference: float
    twin_allowed: float
    source_map_defects: int | None = None
    entropy_defects: int | None = None
    entropy: tuple[float, ...] = ()
    subject: str = "image"
    suggested_attention: AttentionForm | None = None

    @property
    def disagreements(self) -> int:
        """Decisions that differ, over all layers."""
        return sum(layer.disagreements for layer in self.layers)

    @property
    def decisions(self) -> int:
        """Decisions compared, over all layers."""
        return sum(layer.decisions for layer in self.layers)

    @property
    def defects(self) -> int:
        """Decisions that rounding cannot explain, over all layers."""
        return sum(layer.defects + layer.op_defects for layer in self.layers)

    @property
    def first_diverging_layer(self) -> int | None:
        """First layer where a free-running plan differs from the reference's."""
        return next((layer.layer for layer in self.layers if layer.images_diverged), None)

    @property
    def failures(self) -> list[str]:
        """Why the check failed, the first failing layer first; empty if it passed."""
        reasons = []
        advice = ""
        if self.suggested_attention is not None and not self.led_output.max_abs <= self.led_allowed:
            advice = (
                f"; if fused attention is why, build with --attention {self.suggested_attention}"
            )
        if not math.isfinite(self.led_allowed):
            reasons.append(
                f"PyTorch itself gives infinite or undefined output in {self.precision}; use bf16 "
                "or fp32 for this model"
            )
        elif not math.isfinite(self.output.max_abs + self.led_output.max_abs):
            reasons.append("the output is infinite or undefined where PyTorch's is not")
        for layer in self.layers:
            if not math.isfinite(layer.score_error_allowed):
                reasons.append(
                    f"layer {layer.layer}: PyTorch's own scores are undefined in {self.precision}"
                )
            if layer.op_defects:
                reasons.append(
                    f"layer {layer.layer}: {layer.op_defects} merge decisions do not follow from "
                    "the layer's own metric"
                )
            if layer.defects:
                reasons.append(
                    f"layer {layer.layer}: {layer.defects} of {layer.decisions} merge decisions "
                    f"differ with a margin up to {layer.largest_margin:.2e}, outside the rounding "
                    f"bound {layer.margin_bound:.2e}"
                )
            if not layer.score_error <= layer.score_error_allowed:
                reasons.append(
                    f"layer {layer.layer}: score error {layer.score_error:.2e} exceeds "
                    f"{layer.score_error_allowed:.2e} ({self.k:g} times PyTorch's own){advice}"
                )
        if not self.led_output.max_abs <= self.led_allowed:
            reasons.append(
                f"output error {self.led_output.max_abs:.2e} exceeds {self.led_allowed:.2e} "
                f"({self.k:g} times PyTorch's own in {self.precision}){advice}"
            )
        if not self.twin_difference <= self.twin_allowed:
            reasons.append(
                f"the shipped graph's output differs from its instrumented twin's by "
                f"{self.twin_difference:.2e}, allowed {self.twin_allowed:.2e}"
            )
        if self.source_map_defects:
            reasons.append(
                f"the source map of {self.source_map_defects} of {self.images} {self.subject}s "
                "does not follow from their merge plans"
            )
        if self.entropy_defects:
            reasons.append(
                f"the entropy of {self.entropy_defects} of {self.images} {self.subject}s does not "
                "follow from their merge plans"
            )
        return reasons

    @property
    def passed(self) -> bool:
        """Whether the candidate computes what PyTorch computes, as far as rounding allows."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, verdict first; what is not a finite number becomes None."""
        values = {
            "passed": self.passed,
            "failures": self.failures,
            "first_diverging_layer": self.first_diverging_layer,
            "decisions": self.decisions,
            "disagreements": self.disagreements,
            "defects": self.defects,
            **asdict(self),
        }
        return {key: _finite(value) for key, value in values.items()}


def _finite(value: Any) -> Any:
    """JSON has no infinity, the margin of an unsound plan, and no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
