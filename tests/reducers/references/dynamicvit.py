"""DynamicViT's predictor from its paper, section 3.2, for one image in loops of float64."""

from __future__ import annotations

import math


def linear(state, name, x):
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return [sum(map(float.__mul__, row, x)) + b for row, b in zip(weight, bias, strict=True)]


def layer_norm(state, name, x):
    mean = sum(x) / len(x)
    spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    return [(v - mean) / spread * w + b for v, w, b in zip(x, weight, bias, strict=True)]


def gelu(x):
    return [v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x]


def scores(state, stage, tokens):
    """Log-probability of keeping each token; ``state`` has the names of the public checkpoints."""
    name = f"score_predictor.{stage}"
    z = []
    for token in tokens:
        inner = linear(state, f"{name}.in_conv.1", layer_norm(state, f"{name}.in_conv.0", token))
        z.append(gelu(inner))
    half = len(z[0]) // 2
    shared = [sum(token[c] for token in z) / len(z) for c in range(half, len(z[0]))]
    found = []
    for token in z:
        hidden = gelu(linear(state, f"{name}.out_conv.0", token[:half] + shared))
        keep, drop = linear(
            state, f"{name}.out_conv.4", gelu(linear(state, f"{name}.out_conv.2", hidden))
        )
        found.append(keep - max(keep, drop) - math.log1p(math.exp(-abs(keep - drop))))
    return found


def plan(layer, state, stages):
    """Tokens go behind the block in front of a stage's layer."""
    found = scores(state, stages.index(layer.layer + 1), layer.x[layer.prefix :])
    ranked = sorted(range(len(found)), key=lambda i: (-found[i], i))
    tokens = [layer.prefix + i for i in ranked]
    cut = len(tokens) - layer.r
    return [*range(layer.prefix), *sorted(tokens[:cut])], tokens[cut:], [-1] * layer.r


def counts(depth, patches, rates, stages):
    """Tokens that go behind each block: ``floor(rate n)`` of the first n are left."""
    removed, left = [0] * depth, patches
    for stage, rate in zip(stages, rates, strict=True):
        stay = min(left, max(1, math.floor(rate * patches)))
        removed[stage - 1] = left - stay
        left = stay
    return removed
