"""How much of the saved work becomes saved time in whole models on the GPU?

fp16, CUDA graphs, random weights: the library's model with its own fused attention, the merged one
with PyTorch's operations for match and merge, and the merged one with the kernels, replayed in
turn. Beside them, which attention PyTorch takes for the log-size bias of merged layers, and what
each of its kernels would take.
"""

from __future__ import annotations

import gc
import itertools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gpu_timing as timing
import numpy as np
import torch
from gpu_check import install
from gpu_rows import attempt
from harness import percentiles
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as attend

from tome_export.patch import patch
from tome_export.patch.attention import log_size_bias
from tome_export.plugins import torch_ops

PART = "models"
BATCHES = (64, 8, 1, 256)
MODELS: dict[str, tuple[int, ...]] = {
    "vit_large_patch16_224": (8,),
    "vit_base_patch16_224": (13, 16),
    "vit_large_patch16_384": (23,),
}
BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


def main(quick: bool) -> None:
    """Emit the rows of every model, r and batch, and of their attention."""
    import timm

    install()
    models = {"vit_base_patch16_224": (16,)} if quick else MODELS
    for name, values in models.items():
        model = timm.create_model(name).eval()
        patched: dict[int, Any] = {r: patch(model, r) for r in values}
        ratios = {r: merged.macs(merged=False) / merged.macs() for r, merged in patched.items()}
        model.to("cuda", torch.float16)
        for batch in (8,) if quick else BATCHES:
            size = patched[values[0]].input_size
            images = torch.randn((batch, *size), device="cuda", dtype=torch.float16)
            about = {"model": name, "batch": batch, "dtype": "float16"}
            attempt(PART, "end to end", about, end_to_end, model, patched, ratios, images)
            if batch not in (8, 64):
                continue
            merged = patched[values[0]]
            for label, module in (("unmerged", model), ("merged", merged)):
                attempt(PART, "profile", about | {"case": label}, profiled, module, images)
            heads = merged.model.blocks[0].attn.num_heads
            shape = (batch, heads, merged.layers[1].tokens_in, 64)
            attempt(PART, "attention", about, attention_rows, shape)
        del model, patched, merged, module
        gc.collect()
        torch.cuda.empty_cache()


@torch.inference_mode()
def end_to_end(
    model: nn.Module, patched: Mapping[int, nn.Module], ratios: dict[int, float], images: Tensor
) -> list[dict[str, Any]]:
    """One row per r; all variants are timed in turn."""

    def eager(module: nn.Module) -> Callable[[Tensor], object]:
        def run(pixels: Tensor) -> object:
            with torch_ops.eager():
                return module(pixels)

        return run

    runs: dict[str, Callable[..., object]] = {"unmerged": model}
    for r, merged in patched.items():
        runs |= {f"merged {r}": merged, f"merged {r} eager": eager(merged)}
    seconds = timing.timed(runs, [(images,)], 1, 1.5)
    return [end_to_end_row(seconds, r, ratio) for r, ratio in ratios.items()]


def end_to_end_row(seconds: dict[str, timing.Array], r: int, macs_ratio: float) -> dict[str, Any]:
    """Speed-ups of one r from the seconds of all variants, ``[rounds]`` each."""
    own = {
        "unmerged": seconds["unmerged"],
        "kernels": seconds[f"merged {r}"],
        "eager": seconds[f"merged {r} eager"],
    }
    speedup = timing.medians_over(own, "unmerged")
    return {
        "r": r,
        "rounds": len(own["unmerged"]),
        "macs_ratio": macs_ratio,
        "seconds": {name: percentiles(values) for name, values in own.items()},
        "speedup": speedup,
        "speedup_over_macs_ratio": {name: value / macs_ratio for name, value in speedup.items()},
    }


@torch.inference_mode()
def profiled(module: nn.Module, images: Tensor) -> dict[str, Any]:
    """Which attention PyTorch takes, and the kernels that take the most time.

    Returns:
        ``attention``: calls of each scaled-dot-product operator; ``kernels``: share of the GPU's
        time of the ten longest, by name.
    """
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if images.is_cuda:
        activities.append(ProfilerActivity.CUDA)
    module(images)
    with profile(activities=activities) as profiler:
        module(images)
        if images.is_cuda:
            torch.cuda.synchronize()
    averages = profiler.key_averages()
    used = {
        event.key.removeprefix("aten::_scaled_dot_product_"): event.count
        for event in averages
        if event.key.startswith("aten::_scaled_dot_product_")
    }
    times = {
        event.key[:120]: float(event.self_device_time_total)
        for event in averages
        if str(event.device_type).endswith("CUDA") and event.self_device_time_total > 0
    }
    total = sum(times.values()) or 1.0
    longest = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {"attention": used, "kernels": {name: value / total for name, value in longest}}


@torch.inference_mode()
def attention_rows(shape: tuple[int, int, int, int]) -> list[dict[str, Any]]:
    """Time of each of PyTorch's attention kernels with and without the bias of merged layers.

    Args:
        shape: B, H, N, D of the second layer.
    """
    batch, heads, tokens, width = shape
    inputs = _projected(shape)
    size = torch.randint(1, 5, (batch, tokens), device="cuda").float()
    bias = log_size_bias(size, torch.float16)
    assert bias is not None  # noqa: S101
    forms: dict[str, Tensor | None] = {
        "no bias": None,
        "[B, 1, N, N] expanded": bias,
        "[B, 1, 1, N]": bias[:, :, :1],
        "[B, H, N, N] contiguous": bias.expand(-1, heads, -1, -1).contiguous(),
    }
    seconds: dict[str, Any] = {}
    refused: dict[str, str] = {}

    def measure(label: str, backend: SDPBackend | None, mask: Tensor | None, parts: Any) -> None:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                found = timing.timed({label: _attention(backend, mask)}, [parts], 16, 0.05)
            except RuntimeError as error:  # this kernel does not take this form; torch warns why
                reasons = [str(warning.message) for warning in told] or [str(error)]
                refused[label] = "; ".join(reason.splitlines()[0][:120] for reason in reasons)
            else:
                seconds[label] = percentiles(np.asarray(found[label]))

    for (form, mask), (name, backend) in itertools.product(
        forms.items(), {"default": None, **BACKENDS}.items()
    ):
        measure(f"{name}, {form}", backend, mask, inputs)
    # log(size) as one more column of the keys against a constant one of the queries, padded to
    # whole 16 bytes: kernels that take no bias could take this.
    wide = _projected((batch, heads, tokens, width + 8))
    measure("default, no bias, D + 8", None, None, wide)
    return [
        {"shape": f"B{batch} H{heads} N{tokens} D{width}", "seconds": seconds, "refused": refused}
    ]


def _projected(shape: tuple[int, int, int, int]) -> tuple[Tensor, ...]:
    """q, k and v as views of one projection, as in the models."""
    batch, heads, tokens, width = shape
    qkv = torch.randn((batch, tokens, 3 * heads * width), device="cuda", dtype=torch.float16)
    return tuple(
        part.reshape(batch, tokens, heads, width).transpose(1, 2) for part in qkv.chunk(3, dim=-1)
    )


def _attention(backend: SDPBackend | None, mask: Tensor | None) -> Callable[..., object]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> object:
        if backend is None:
            return attend(q, k, v, attn_mask=mask)
        with sdpa_kernel(backend):
            return attend(q, k, v, attn_mask=mask)

    return run
