"""What the kernels are held against, case by case: exact decisions, and PyTorch's own error.

Runs on any device, so that the arithmetic of the verdict is tested without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tome_export.merge import ops, reference
from tome_export.merge.lowering import merge_index_add
from tome_export.merge.plan import MergePlan
from tome_export.parity.compare import fp32_score_bound
from tome_export.parity.decisions import Plan, disagreements

Content = Literal["normal", "duplicates", "one-hot", "not finite", "huge"]
REFERENCE_TOKENS = 101
"""Up to here the oracle is the loop of ``merge.reference``; beyond, the operations in float64."""
ALLOWED = 2.0
"""Error of a merge as a multiple of PyTorch's own in the same dtype."""


@dataclass(frozen=True)
class Keys:
    """Keys to decide on.

    Attributes:
        batch: B.
        heads: H; 0 for a metric ``[B, N, D]``.
        tokens: N.
        width: D.
        r: Tokens to merge.
        prefix: Protected tokens.
        class_token: Whether the output order is by position.
        dtype: Of the keys.
        content: ``duplicates`` draws tokens from five vectors; ``one-hot`` from powers of two at
            one place each, whose scores are 0 and 1 in any arithmetic, so that plans have to be
            identical; ``not finite`` has NaN and infinities, ``huge`` numbers whose squares
            overflow fp32.
    """

    batch: int
    heads: int
    tokens: int
    width: int
    r: int
    prefix: int = 1
    class_token: bool = True
    dtype: str = "float16"
    content: Content = "normal"

    @property
    def case(self) -> str:
        """Short description."""
        heads = f"H{self.heads} " if self.heads else ""
        return f"{heads}N{self.tokens} D{self.width} P{self.prefix} {self.content}"


def make_keys(case: Keys, seed: int = 0) -> Tensor:
    """``[B, H, N, D]`` or ``[B, N, D]`` on the CPU, the same for the same case everywhere."""
    rng = np.random.default_rng([seed, case.batch, case.heads, case.tokens, case.width])
    b, h, n, d = case.batch, max(1, case.heads), case.tokens, case.width
    values = rng.standard_normal((b, h, n, d))
    if case.content == "duplicates":
        chosen = rng.integers(0, 5, (b, n))
        values = np.stack([values[i][:, np.minimum(chosen[i], n - 1)] for i in range(b)])
    elif case.content == "one-hot":
        place = rng.integers(0, max(2, n // 4), (b, n)) % d
        scale = 2.0 ** rng.integers(-3, 4, (b, n))
        token = np.eye(d)[place] * scale[..., None]
        values = np.broadcast_to(token[:, None], (b, h, n, d)).copy()
    elif case.content == "not finite":
        for value in (np.nan, np.inf, -np.inf):
            hit = rng.random((b, n)) < 0.08
            values[..., 0] = np.where(hit[:, None], value, values[..., 0])
    elif case.content == "huge":
        hit = rng.random((b, n)) < 0.2
        values = np.where(hit[:, None, :, None], values * 1e25, values)
    keys = torch.from_numpy(values).to(getattr(torch, case.dtype))
    return keys if case.heads else keys[:, 0]


def judge_match(case: Keys, keys: Tensor, plan: tuple[Tensor, ...]) -> dict[str, Any]:
    """Compare a plan with the exact one, decision by decision.

    Args:
        case: Gives r, prefix and order.
        keys: ``make_keys`` of it.
        plan: ``keep``, ``src``, ``dst`` on any device.

    Returns:
        ``decisions``; ``disagreements`` with the exact plan; those ``explained`` by a margin
        inside the rounding bound of an fp32 score of a given metric, and those that the rounding
        of the mean over heads explains on top (``explained_by_mean``); ``defects``, the rest;
        ``passed``.
    """
    exact = keys.double().cpu()
    scores = ops.scores_and_masks(exact, case.prefix).numpy()
    found = [part.cpu().numpy() for part in plan]
    bound = 2 * fp32_score_bound(case.width)
    margins: list[float] = []
    identical = 0
    wanted = _oracle(case, exact)
    for image, ours in enumerate(wanted):
        theirs = Plan(*(part[image] for part in found))
        pairs = ((ours.keep, theirs.keep), (ours.src, theirs.src), (ours.dst, theirs.dst))
        identical += all(np.array_equal(a, b) for a, b in pairs)
        margins += [
            d.margin
            for d in disagreements(
                ours, theirs, scores[image], case.prefix, case.class_token, image
            )
        ]
    limit = bound + 2 * _mean_bound(exact)
    defects = sum(not margin <= limit for margin in margins)
    explained = sum(margin <= bound for margin in margins)
    strict = case.content == "one-hot"
    per_image = (case.tokens + 1) // 2 - (case.prefix + 1) // 2
    return {
        "decisions": case.batch * per_image,
        "disagreements": len(margins),
        "explained": explained,
        "explained_by_mean": len(margins) - defects - explained,
        "defects": defects,
        "largest_margin": max(margins, default=0.0),
        "margin_bound": bound,
        "identical_plans": identical,
        "images": case.batch,
        "passed": defects == 0 and (identical == case.batch or not strict),
    }


def _oracle(case: Keys, exact: Tensor) -> list[Plan]:
    if case.tokens > REFERENCE_TOKENS:
        parts = [part.numpy() for part in ops.match(exact, case.r, case.prefix, case.class_token)]
        return [Plan(*(part[image] for part in parts)) for image in range(case.batch)]
    plans = []
    for image in exact:
        rows = image.tolist() if image.ndim == 2 else reference.mean_keys(image.tolist())
        plan = reference.match(rows, case.r, case.prefix, case.class_token)
        plans.append(
            Plan(*(np.array(part, dtype=np.int32) for part in (plan.keep, plan.src, plan.dst)))
        )
    return plans


def _mean_bound(exact: Tensor) -> float:
    """How far the fp32 mean over heads can move a score.

    Summing H numbers is off by at most H u of the sum of their magnitudes (Higham, section 4.2);
    relative to the mean's norm that turns each of the two unit vectors by as much.
    """
    if exact.ndim == 3 or exact.shape[1] == 1:
        return 0.0
    magnitude = torch.linalg.vector_norm(exact.abs().mean(1), dim=-1)
    norm = torch.linalg.vector_norm(exact.mean(1), dim=-1)
    usable = torch.isfinite(norm) & (norm > 0) & (norm < 2.0**64)
    ratio = float((magnitude / norm)[usable].max()) if bool(usable.any()) else 0.0
    return 2 * exact.shape[1] * 2.0**-24 * ratio


def judge_merge(
    inputs: tuple[Tensor, ...], kernel: tuple[Tensor, ...], eager: tuple[Tensor, ...]
) -> dict[str, Any]:
    """Errors of two merges against float64.

    Args:
        inputs: ``x, size, keep, src, dst``.
        kernel: ``x', size'`` of the kernel.
        eager: The same by PyTorch's operations.

    Returns:
        Largest errors of x' and their ratio, number of sizes that differ from the exact ones, and
        ``passed``: at most ``ALLOWED`` times PyTorch's error and no wrong size.
    """
    x, size, *plan = (part.cpu() for part in inputs)
    exact, sizes = merge_index_add(x.double(), size.double(), MergePlan(*plan))
    ours, theirs = (
        float((result[0].cpu().double() - exact).abs().max()) for result in (kernel, eager)
    )
    wrong = int((kernel[1].cpu().double() != sizes).sum())
    return {
        "kernel_error": ours,
        "eager_error": theirs,
        "error_over_eager": ours / theirs if theirs else (1.0 if ours == 0 else float("inf")),
        "wrong_sizes": wrong,
        "passed": bool(ours <= ALLOWED * theirs) and wrong == 0,
    }
