"""Training the head of a learned budget policy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tome_export.cascade.outcome import Observations

STEPS, RATE, DECAY = 300, 0.05, 1e-2
"""Steps of AdamW on all images at once, its learning rate and weight decay."""


def trained_head(
    seen: Observations,
    embedding: tuple[NDArray[np.float64], NDArray[np.float64]],
    shares: Sequence[float],
    target: float,
    strength: float,
) -> tuple[list[list[float]], list[float]]:
    """Train a linear head on the pooled patch embedding, and fold the embedding into it.

    The class of an image is the cheapest member that is right about it; the lowest one where none
    is. The loss is cross-entropy plus ``strength * (actual - target)^2``, where actual is the mean
    over the images of the share of MACs that the head's probabilities expect.

    Args:
        seen: Images to train on, with average patches ``[B, P]``.
        embedding: Weights ``[D, C, h, w]`` and bias ``[D]`` of the patch embedding.
        shares: MACs of each member over the largest's.
        target: Mean share to aim at.
        strength: Of the second term (lambda).

    Returns:
        Weights ``[M][P]`` and bias ``[M]`` on the average patch. Nothing is drawn at random.
    """
    import torch
    from torch.nn import functional

    if seen.patches is None:
        raise ValueError("average patches were not observed")
    kernels, offset = embedding[0].reshape(len(embedding[0]), -1), embedding[1]
    pooled = seen.patches @ kernels.T + offset
    mean, std = pooled.mean(axis=0), pooled.std(axis=0) + 1e-6
    x = torch.from_numpy((pooled - mean) / std)
    y = torch.from_numpy(np.where(seen.right.any(axis=0), seen.right.argmax(axis=0), 0))
    cost = torch.tensor(list(shares), dtype=torch.float64)
    weight = torch.zeros(len(cost), x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(len(cost), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.AdamW([weight, bias], lr=RATE, weight_decay=DECAY)
    for _ in range(STEPS):
        scores = functional.linear(x, weight, bias)
        actual = (scores.softmax(dim=1) @ cost).mean()
        loss = functional.cross_entropy(scores, y) + strength * (actual - target) ** 2
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    head, constant = weight.detach().numpy() / std, bias.detach().numpy()
    folded = head @ kernels
    return folded.tolist(), (constant + head @ (offset - mean)).tolist()
