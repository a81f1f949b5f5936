"""What does the log-size bias cost in PyTorch's fused attention, as a mask and as channels?

fp16, CUDA graphs, at the token counts of the first, a middle and a late layer of ViT-B/16 with
r = 16. ``benchmarks/attention.py`` says what the channels are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention import folded
from benchmarks.gpu import timing
from benchmarks.gpu.parts import Context
from benchmarks.gpu.rows import attempt
from benchmarks.harness import percentiles
from tome_export.patch.attention import log_size_bias

HEADS, WIDTH = 12, 64
TOKENS = (197, 117, 53)
BATCHES = (64, 1)
BACKENDS = {
    "as PyTorch chooses": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


def main(context: Context) -> None:
    """Emit a row per token count, batch and backend; flash takes no mask."""
    for tokens in TOKENS:
        for batch in BATCHES:
            for name in BACKENDS if context.device == "cuda" else list(BACKENDS)[:1]:
                about = {"case": name, "tokens": tokens, "batch": batch, "dtype": "float16"}
                attempt("attention", about, measured, name, tokens, batch, context.device)


@torch.inference_mode()
def measured(backend: str, tokens: int, batch: int, device: str) -> dict[str, Any]:
    """Seconds of every form of the bias, and times over those without one."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float16)

    qkv = draw(batch, tokens, 3, HEADS, WIDTH).permute(2, 0, 3, 1, 4)
    size = torch.randint(1, 5, (batch, tokens), generator=generator, device=device).float()
    mask = log_size_bias(size, torch.float16)
    wide = folded(qkv[0], qkv[1], size, 1)
    scale = WIDTH**-0.5

    # The kernels want queries, keys and values of one width.
    padded = functional.pad(qkv[2], (0, 8))

    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)

    def joined_here(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(*folded(q, k, size, 1), functional.pad(v, (0, 8)))

    runs: dict[str, Callable[..., object]] = {"none": attend}
    if backend != "flash" and mask is not None:
        whole = mask.contiguous()
        runs["mask"] = lambda q, k, v: attend(q, k, v, mask)
        runs["contiguous mask"] = lambda q, k, v: attend(q, k, v, whole)
    runs["channels"] = lambda *_: attend(*wide, padded)
    runs["channels, joined here"] = joined_here
    chosen = BACKENDS[backend]
    if chosen is None:
        seconds = timing.timed(runs, [tuple(qkv)], 20)
    else:
        with sdpa_kernel(chosen):
            seconds = timing.timed(runs, [tuple(qkv)], 20)
    return {
        "seconds": {name: percentiles(values) for name, values in seconds.items()},
        "time_over_none": {
            name: 1 / ratio for name, ratio in timing.medians_over(seconds, "none").items()
        },
    }
