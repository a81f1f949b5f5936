"""TomeMerge in the Triton language: one program writes one output token.

See README.md beside this file for the mathematics and ``contract.py`` for what may come in.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens", "r"])
def merge_kernel(
    x,
    size,
    keep,
    src,
    dst,
    tokens,
    r,
    x_out,
    size_out,
    WIDTH: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Output token ``program_id(0) % K`` of image ``program_id(0) // K``, K = N - r.

    Tokens are added in a fixed order (the kept one, then the folded ones by rank), without
    atomics, so equal inputs give equal bits. Indices outside their range are read as zeros.

    Args:
        x: ``[B, N, C]``.
        size: ``[B, N]`` float32.
        keep: ``[B, N - r]`` int32.
        src: ``[B, r]`` int32.
        dst: ``[B, r]`` int32.
        tokens: N.
        r: Tokens folded away.
        x_out: ``[B, N - r, C]``, written.
        size_out: ``[B, N - r]`` float32, written.
        WIDTH: C.
        BLOCK_C: Power of two, at least C.
        BLOCK_R: Folded tokens looked at at a time, a power of two.
    """
    kept = tokens - r
    # One dimension: the others of a grid end at 65,535.
    place = tl.program_id(0) % kept
    image = (tl.program_id(0) // kept).to(tl.int64)
    x += image * tokens * WIDTH
    size += image * tokens
    src += image * r
    dst += image * r
    c = tl.arange(0, BLOCK_C)

    token = tl.load(keep + image * kept + place)
    weight = tl.load(size + token, (token >= 0) & (token < tokens), 0.0)
    total = weight * _row(x, token, tokens, c, WIDTH)
    for first in range(0, r, BLOCK_R):
        j = first + tl.arange(0, BLOCK_R)
        folded = (tl.load(dst + j, j < r, -1) == place) & (j < r)
        left = tl.sum(folded.to(tl.int32), 0)
        while left > 0:
            lowest = tl.min(tl.where(folded, j, r), 0)
            token = tl.load(src + lowest)
            part = tl.load(size + token, (token >= 0) & (token < tokens), 0.0)
            total += part * _row(x, token, tokens, c, WIDTH)
            weight += part
            folded = folded & (j != lowest)
            left -= 1
    mean = tl.div_rn(total, tl.zeros_like(total) + weight)
    out = (image * kept + place) * WIDTH + c
    tl.store(x_out + out, mean.to(x_out.dtype.element_ty), c < WIDTH)
    tl.store(size_out + image * kept + place, weight)


@triton.jit
def _row(x, token, tokens, c, WIDTH: tl.constexpr):
    """``[BLOCK_C]`` float32: one token."""
    end = tl.where((token >= 0) & (token < tokens), WIDTH, 0)
    return tl.load(x + token * WIDTH + c, c < end, 0.0).to(tl.float32)
