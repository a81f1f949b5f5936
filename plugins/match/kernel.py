"""TomeMatch in the Triton language: one program matches one image, in one launch.

See README.md beside this file for the mathematics and ``contract.py`` for what may come in.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-12)
"""``merge.spec.NORM_EPS``; a test holds the two together."""


@triton.jit(
    do_not_specialize=[
        "heads",
        "tokens",
        "r",
        "prefix",
        "class_token",
        "image_stride",
        "head_stride",
        "token_stride",
        "offset",
    ]
)
def match_kernel(
    keys,
    heads,
    tokens,
    r,
    prefix,
    class_token,
    image_stride,
    head_stride,
    token_stride,
    offset,
    keep,
    src,
    dst,
    WIDTH: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILES: tl.constexpr,
    RANK_CHUNK: tl.constexpr,
    UNROLL: tl.constexpr,
    DOT: tl.constexpr,
):
    """Merge plan of image ``program_id(0)``.

    Args:
        keys: Pointer to the keys; element (image, head, token, d) lies at the strides below.
        heads: H.
        tokens: N.
        r: Tokens to merge.
        prefix: Protected tokens P.
        class_token: 1 if the output order is by position, 0 if by rank.
        image_stride: In elements, divided by ``STRIDE_UNIT``; so are the next three.
        head_stride: As above.
        token_stride: As above.
        offset: From the pointer to the first key, as above.
        keep: ``[B, N - r]`` int32, written.
        src: ``[B, r]`` int32, written.
        dst: ``[B, r]`` int32, written.
        WIDTH: D.
        STRIDE_UNIT: Power of two that divides all strides and the offset; tells the compiler the
            alignment.
        BLOCK_A: Rows of set A held at a time.
        BLOCK_B: Rows of set B held at a time.
        BLOCK_D: Columns of the keys held at a time.
        TILES: Power of two, at least ``ceil(N / 2) / BLOCK_A``.
        RANK_CHUNK: Scores that every score is compared with at a time.
        UNROLL: Heads loaded at a time.
        DOT: Precision of the products, ``input_precision`` of ``tl.dot``.
    """
    image = tl.program_id(0).to(tl.int64)
    keys += (image * image_stride + offset) * STRIDE_UNIT
    rows_a = (tokens + 1) // 2
    rows_b = tokens // 2
    prefix_a = (prefix + 1) // 2
    prefix_b = prefix // 2

    # 1. The best partner of every token of A. Scores of all tiles stay in registers.
    tile = tl.arange(0, TILES)[:, None]
    scores = tl.full([TILES, BLOCK_A], float("-inf"), tl.float32)
    partners = tl.zeros([TILES, BLOCK_A], tl.int32)
    for t in range(tl.cdiv(rows_a, BLOCK_A)):
        a_row = t * BLOCK_A + tl.arange(0, BLOCK_A)
        best_score = tl.full([BLOCK_A], float("-inf"), tl.float32)
        best = tl.zeros([BLOCK_A], tl.int32) + prefix_b
        for first_b in range(0, rows_b, BLOCK_B):
            b_row = first_b + tl.arange(0, BLOCK_B)
            cosine = _cosine(
                keys,
                2 * a_row,
                2 * b_row + 1,
                heads,
                tokens,
                # With images inside heads, a head can lie further on than 32 bits count.
                head_stride.to(tl.int64) * STRIDE_UNIT,
                token_stride * STRIDE_UNIT,
                WIDTH,
                BLOCK_A,
                BLOCK_B,
                BLOCK_D,
                UNROLL,
                DOT,
            )
            allowed = (b_row >= prefix_b) & (b_row < rows_b)
            cosine = tl.where(allowed[None, :], cosine, float("-inf"))
            value, index = tl.max(
                cosine, 1, return_indices=True, return_indices_tie_break_left=True
            )
            # Strictly better: an equal score further on does not replace the lower index.
            better = value > best_score
            best = tl.where(better, first_b + index, best)
            best_score = tl.where(better, value, best_score)
        scores = tl.where(tile == t, best_score[None, :], scores)
        partners = tl.where(tile == t, best[None, :], partners)
    score = tl.reshape(scores, [TILES * BLOCK_A])
    partner = tl.reshape(partners, [TILES * BLOCK_A])

    # 2. The rank of each is the number of tokens that stand before it.
    row = tl.arange(0, TILES * BLOCK_A)
    rank = tl.zeros([TILES * BLOCK_A], tl.int32)
    for first in range(0, rows_a, RANK_CHUNK):
        other = first + tl.arange(0, RANK_CHUNK)
        other_score = tl.gather(score, other, 0)
        tie = (other_score[None, :] == score[:, None]) & (other[None, :] < row[:, None])
        before = (other_score[None, :] > score[:, None]) | tie
        # Only free rows count, so that ranks are 0, 1, … whatever the scores are.
        counted = (other >= prefix_a) & (other < rows_a)
        rank += tl.sum((before & counted[None, :]).to(tl.int32), 1)

    # 3. The plan. Set B closes the output, so its row j stands at a fixed distance from the end.
    free = (row >= prefix_a) & (row < rows_a)
    merged = free & (rank < r)
    stays = free & (rank >= r)
    by_position = tl.cumsum(stays.to(tl.int32), 0) - 1
    by_rank = rank - r
    kept = tokens - r
    b_start = kept - rows_b
    keep += image * kept
    tl.store(keep + prefix + tl.where(class_token != 0, by_position, by_rank), 2 * row, stays)
    tl.store(src + image * r + rank, 2 * row, merged)
    tl.store(dst + image * r + rank, b_start + partner, merged)
    for first in range(0, tokens, BLOCK_A):
        i = first + tl.arange(0, BLOCK_A)
        tl.store(keep + i, i, i < prefix)
        tl.store(keep + b_start + i, 2 * i + 1, (i >= prefix_b) & (i < rows_b))


@triton.jit
def _cosine(
    keys,
    a_token,
    b_token,
    heads,
    tokens,
    head_stride,
    token_stride,
    WIDTH: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
    DOT: tl.constexpr,
):
    """``[BLOCK_A, BLOCK_B]`` float32 cosines of the keys' means over heads.

    The product of the means is divided by their norms afterwards, so that D is walked once. A
    token whose norm is not finite scores 0.
    """
    product = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    a_square = tl.zeros([BLOCK_A], tl.float32)
    b_square = tl.zeros([BLOCK_B], tl.float32)
    mean = tl.div_rn(1.0, heads.to(tl.float32))
    a_at = a_token[:, None] * token_stride
    b_at = b_token[:, None] * token_stride
    for first in range(0, WIDTH, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)[None, :]
        a_inside = (a_token[:, None] < tokens) & (d < WIDTH)
        b_inside = (b_token[:, None] < tokens) & (d < WIDTH)
        a = tl.zeros([BLOCK_A, BLOCK_D], tl.float32)
        b = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for head in tl.range(0, heads, loop_unroll_factor=UNROLL):
            here = keys + head * head_stride + d
            a += tl.load(here + a_at, a_inside, 0.0).to(tl.float32)
            b += tl.load(here + b_at, b_inside, 0.0).to(tl.float32)
        a *= mean
        b *= mean
        a_square += tl.sum(a * a, 1)
        b_square += tl.sum(b * b, 1)
        product = tl.dot(a, tl.trans(b), product, input_precision=DOT)
    a_norm = tl.sqrt_rn(a_square)
    b_norm = tl.sqrt_rn(b_square)
    a_factor = tl.div_rn(1.0, tl.maximum(a_norm, NORM_EPS))
    b_factor = tl.div_rn(1.0, tl.maximum(b_norm, NORM_EPS))
    finite = (a_norm < float("inf"))[:, None] & (b_norm < float("inf"))[None, :]
    return tl.where(finite, product * a_factor[:, None] * b_factor[None, :], 0.0)
