"""The parity check: an exported graph against PyTorch, decision by decision, then by numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tome_export.artifact.parity import LISTED, Comparison, LayerParity, OutputParity, ParityReport
from tome_export.errors import InputError, ParityError
from tome_export.merge.plan import Across, Step, step_layer, step_number
from tome_export.parity.decisions import Array, Plan, cosine_scores, disagreements
from tome_export.parity.extras import entropies, entropy_defects, source_map_defects
from tome_export.parity.reference import LayerRecord, Pass, run_reference, run_yardstick
from tome_export.parity.scores import judge_scores
from tome_export.runtime.inputs import unit_inputs
from tome_export.runtime.ort import OrtRunner
from tome_export.runtime.runner import Runner, infer_in_batches
from tome_export.spec import ENTROPY, INPUT_NAME, LOGITS, SOURCE_MAP, answers, default_activation
from tome_export.video import VIDEO_MASK

if TYPE_CHECKING:
    import onnx

    from tome_export.onnx.twin import Twin
    from tome_export.patch import MergedModel
    from tome_export.spec import Activation, AttentionForm, BatchRange, Precision

K = 4.0
"""Error allowed as a multiple of PyTorch's own in the same precision.

Runtimes order and fuse the same operations in their own way, so a correct one differs from PyTorch
by about as much as PyTorch from the exact result, and the largest of many such differences by a few
times that. How much of the allowance each recipe uses is in benchmarks/results/recipes.json.
"""

RunnerFactory = Callable[["onnx.ModelProto | Path"], AbstractContextManager[Runner]]


class ParityFailedError(ParityError):
    """Parity failed; ``report`` says where."""

    def __init__(self, report: ParityReport) -> None:
        first, more = report.failures[0], len(report.failures) - 1
        also = f" (and {more} more findings)" if more else ""
        super().__init__(
            f"parity failed for {report.candidate} in {report.precision}: {first}{also}; expected "
            "PyTorch's results as far as rounding allows"
        )
        self.report = report


# Infinite and undefined numbers are for the verdict to report, not for numpy to warn about.
@np.errstate(invalid="ignore", over="ignore")
def check_parity(
    model: MergedModel,
    exported: onnx.ModelProto | Path,
    images: Array,
    precision: Precision,
    batch: BatchRange,
    *,
    inputs: Mapping[str, Array] | None = None,
    runner_factory: RunnerFactory = OrtRunner,
    candidate: str = "onnx on ONNX Runtime CPU",
    engine: bool = False,
    activation: Activation | None = None,
    k: float = K,
    progress: Callable[[str], None] = lambda _: None,
) -> ParityReport:
    """Compare an exported graph with PyTorch in fp32 on real images.

    Args:
        model: The patched model, fp32, eval mode: the reference.
        exported: The graph as shipped, or its file: that is read when its turn comes, and held
            once, which large models need.
        images: ``[B, C, H, W]`` float32, preprocessed.
        precision: Precision of the exported graph.
        batch: Batch sizes it accepts.
        inputs: The model's other inputs by name, ``[B, ...]`` float32; None for those of
            ``inputs_of``.
        runner_factory: Makes a runner of a graph, or of its file where the graph was given as one
            and has its weights beside it: ONNX Runtime, or an engine on a GPU.
        candidate: Name of graph and runtime for the report.
        engine: Whether the candidate is an engine of TensorRT, and no ONNX runtime.
        activation: What makes scores of logits; None for the usual one of so many.
        k: Error allowed as a multiple of PyTorch's own in the same precision.
        progress: Told what is being run.
    """
    from tome_export.onnx.files import beside, data_of, load
    from tome_export.onnx.twin import twin_from_model

    if len(images) == 0:
        raise InputError("no image to check parity on; give at least one")
    size = min(batch.max, max(batch.min, len(images)))
    inputs = inputs_of(model, len(images)) if inputs is None else inputs
    pixels = {INPUT_NAME: images, **inputs}

    progress("PyTorch fp32 reference")
    reference = run_reference(model, images, inputs)
    progress(f"PyTorch's own error in {precision}")
    yardstick = run_yardstick(model, images, precision, reference, inputs)
    progress(candidate)
    # Weights in a file of their own stay there; ONNX Runtime's emulation of bfloat16 changes them.
    file = exported if isinstance(exported, Path) else None
    stays = file is not None and precision != "bf16" and data_of(file).exists()
    graph = load(exported, weights=not stays) if isinstance(exported, Path) else exported
    output_name = graph.graph.output[0].name
    with runner_factory(file if file is not None and stays else graph) as runner:
        shown = infer_in_batches(runner, pixels, len(images), size)
    shipped = shown[output_name]
    scores = None
    if output_name == LOGITS and model.map_name is None:
        scores = activation or default_activation(shipped.shape[-1])
    twin = twin_from_model(graph, consume=graph is not exported)
    if not twin.layers:
        free = led = Pass(shipped, {}, shown.get(SOURCE_MAP), shown.get(ENTROPY))
    else:
        progress(f"{candidate}, instrumented")
        with (
            beside(twin.model, file if stays else None) as runnable,
            runner_factory(runnable) as runner,
        ):
            free, led = _run_twin(twin, runner, pixels, size, output_name, reference)

    diverged = _first_divergence(reference, free)
    scored = model.settings.reducer.scored
    layers = tuple(
        judge_scores(model, step_layer(step), reference, yardstick, led, diverged, k)
        if scored
        else _layer_parity(model, step, reference, yardstick, led, diverged, k)
        for step in sorted(reference.layers, key=step_number)
    )
    # With a flip in every image there is no steady one to compare; then compare them all.
    steady = diverged < 0 if (diverged < 0).any() else np.ones_like(diverged, bool)
    # The output is float32 in every precision: a few units in its last place are always allowed.
    rounding = 8 * float(np.finfo(np.float32).eps * np.abs(reference.output).max())
    allowed = k * float(np.abs(yardstick.output - reference.output).max()) + rounding
    return Comparison(
        candidate=candidate,
        precision=precision,
        images=len(images),
        k=k,
        layers=layers,
        output=_output_parity(shipped, reference.output, scores),
        led_output=_output_parity(led.output, reference.output, scores),
        led_allowed=allowed,
        twin_difference=float(np.abs(shipped - free.output)[steady].max(initial=0.0)),
        twin_allowed=allowed,
        source_map_defects=source_map_defects(model, free, shown.get(SOURCE_MAP), diverged),
        entropy_defects=entropy_defects(model, free, shown.get(ENTROPY), diverged),
        entropy=tuple(entropies(model, free).tolist()),
        subject="video" if model.takes_video else "image",
        suggested_attention=_suggested_attention(graph, precision, engine),
    ).judged()


def _suggested_attention(
    graph: onnx.ModelProto, precision: Precision, engine: bool
) -> AttentionForm | None:
    """The form of attention whose sums are exact where those of a graph may not be."""
    attentions = [node for node in graph.graph.node if node.op_type == "Attention"]
    if not attentions or precision == "fp32":
        return None
    casts = {node.output[0] for node in graph.graph.node if node.op_type == "Cast"}
    # Nothing else in the graph casts queries, which are what attention's operator reads first.
    cast_up = all(node.input[0] in casts for node in attentions)
    return "fused-fp32" if engine and precision == "fp16" and not cast_up else "parts"


def inputs_of(model: MergedModel, count: int) -> dict[str, Array]:
    """Inputs besides the images for a check: seeded vectors of unit length, and masks of frames."""
    found = unit_inputs(model.extra_inputs, count)
    if VIDEO_MASK in found:
        # The last frame of every other video does not count.
        found[VIDEO_MASK][1::2, -1] = 0
    return found


def _run_twin(
    twin: Twin,
    runner: Runner,
    given: Mapping[str, Array],
    size: int,
    output_name: str,
    reference: Pass,
) -> tuple[Pass, Pass]:
    """The twin deciding for itself, and led by the reference's plans."""
    from tome_export.onnx.twin import LEAD

    inputs, count = dict(given), len(given[INPUT_NAME])
    for layer in twin.layers:
        record = reference.layers[layer.step]
        rows = (count, layer.sequences) if layer.sequences > 1 else (count,)
        parts = (x.reshape(*rows, -1) for x in (record.keep, record.src, record.dst))
        inputs |= dict(zip(layer.given, parts, strict=True))
    passes = []
    for lead in (False, True):
        inputs[LEAD] = np.full((count, 1), lead)
        results = infer_in_batches(runner, inputs, count, size)
        layers = {
            layer.step: LayerRecord(
                tuple(_rows(results[name], layer.sequences) for name in layer.signals),
                *(_rows(results[name], layer.sequences) for name in layer.chosen),
            )
            for layer in twin.layers
        }
        more = results.get(SOURCE_MAP), results.get(ENTROPY)
        passes.append(Pass(results[output_name], layers, *more))
    return passes[0], passes[1]


def _rows(array: Array, sequences: int) -> Array:
    """``[B, S, ...]`` as ``[B S, ...]``; without several sequences it is that already."""
    return array.reshape(-1, *array.shape[2:]) if sequences > 1 else array


def _first_divergence(reference: Pass, free: Pass) -> Array:
    """The number of the first merge of each image whose free-running plan differs: ``[B]`` int.

    -1 where none does.
    """
    first = np.full(len(reference.output), -1)
    for step in sorted(free.layers, key=step_number):
        ours, theirs = reference.layers[step], free.layers[step]
        each = len(ours.keep) // len(first)
        for image in np.flatnonzero(first < 0).tolist():
            rows = range(image * each, (image + 1) * each)
            if any(ours.plan(row) != theirs.plan(row) for row in rows):
                first[image] = step_number(step)
    return first


def fp32_score_bound(width: int) -> float:
    """How far an fp32 cosine score can be from its exact value.

    A dot product of D unit-vector terms is off by at most about D u, the two normalisations by a
    few u more (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1); u = 2^-24.
    """
    return (width + 8) * 2.0**-24


def _layer_parity(
    model: MergedModel,
    layer: Step,
    reference: Pass,
    yardstick: Pass,
    led: Pass,
    diverged: Array,
    k: float,
) -> LayerParity:
    ours, theirs, measure = (p.layers[layer] for p in (reference, led, yardstick))
    (metric,), (their_metric,), (own_metric,) = ours.signals, theirs.signals, measure.signals
    prefix, class_token = model.prefix_at(layer), model.class_token
    each = model.sequences_at(layer)
    width = metric.shape[-1]
    found, op_defects, errors, own_errors = [], 0, [0.0], [0.0]
    for row in range(len(metric)):
        image = row // each
        scores = cosine_scores(metric[row], prefix)
        theirs_scores = cosine_scores(their_metric[row], prefix)
        errors.append(_distance(theirs_scores, scores))
        own_errors.append(_distance(cosine_scores(own_metric[row], prefix), scores))
        plan = theirs.plan(row)
        found += disagreements(ours.plan(row), plan, scores, prefix, class_token, image)
        exact = _plan_from_scores(theirs_scores, len(plan.src), prefix, class_token)
        own = disagreements(exact, plan, theirs_scores, prefix, class_token, image)
        op_defects += sum(d.margin > 2 * fp32_score_bound(width) for d in own)
    # Both runtimes also round the score itself in fp32, after the metric is given.
    allowed = k * float(np.max(own_errors)) + fp32_score_bound(width)
    margins = [d.margin for d in found]
    mergeable = (metric.shape[1] + 1) // 2 - (prefix + 1) // 2
    return LayerParity(
        layer=step_layer(layer),
        across=isinstance(layer, Across),
        decisions=mergeable * len(metric),
        disagreements=len(found),
        defects=sum(margin > 2 * allowed for margin in margins),
        largest_margin=max(margins, default=0.0),
        margin_bound=2 * allowed,
        score_error=float(np.max(errors)),
        score_error_allowed=allowed,
        op_defects=op_defects,
        images_diverged=int((diverged == step_number(layer)).sum()),
        examples=tuple(sorted(found, key=lambda d: -d.margin)[:LISTED]),
    )


def _distance(a: Array, b: Array) -> float:
    finite = np.isfinite(b)
    return float(np.abs(a[finite] - b[finite]).max(initial=0.0))


def _plan_from_scores(scores: Array, r: int, prefix: int, class_token: bool) -> Plan:
    """The plan that exact scores lead to, by the rules of ``merge.ops.match``."""
    best, value = scores.argmax(axis=1), scores.max(axis=1, initial=-np.inf)
    rank = np.argsort(-value, kind="stable")
    rank = rank[np.isfinite(value[rank])]
    stay = np.sort(rank[r:]) if class_token else rank[r:]
    odd = np.arange(1, sum(scores.shape), 2)
    keep = np.concatenate([np.arange(prefix), 2 * stay, odd[odd >= prefix]])
    position = {token: index for index, token in enumerate(keep.tolist())}
    dst = np.array([position[2 * b + 1] for b in best[rank[:r]].tolist()], dtype=np.int64)
    return Plan(keep, 2 * rank[:r], dst)


def _output_parity(
    candidate: Array, reference: Array, activation: Activation | None
) -> OutputParity:
    a = candidate.reshape(len(candidate), -1).astype(np.float64)
    b = reference.reshape(len(reference), -1).astype(np.float64)
    error = float(np.abs(a - b).max())
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = (a * b).sum(axis=1) / np.where(norms > 0, norms, 1.0)
    same = None
    if activation is not None and activation != "none":
        same = float((answers(a, activation) == answers(b, activation)).all(axis=1).mean())
    return OutputParity(
        max_abs=error,
        relative=error / max(float(np.abs(b).max()), np.finfo(np.float32).tiny),
        cosine=float(cosine.min()),
        top1_agreement=same,
    )
