"""Perceiver resampler: learned latents attend to the final tokens (arXiv 2204.14198)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from tome_export.compressors.base import Compressor, FinalTokens
from tome_export.errors import InputError
from tome_export.reducers.learned import (
    RANDOM,
    absolute,
    first_misfit,
    frozen,
    random_module,
    state_of_file,
)
from tome_export.spec import PatchGrid
from tome_export.weights.files import check_finite

PREFIX = "perceiver."
"""In front of every key of the resampler in a whole checkpoint of OpenFlamingo."""

_DEFAULTS = {"latents": 64, "layers": 6, "heads": 8}
"""Sizes of a resampler with random weights: those of Flamingo and OpenFlamingo."""


@dataclass(frozen=True)
class Resampler(Compressor):
    """Latents become tokens: in every layer they attend to the image's tokens and to themselves.

    ``z <- z + softmax(q k^T / sqrt(D) + log s) v`` with q of the latents, k and v of tokens and
    latents together, then ``z <- z + FFW(z)``; a layer norm at the end (Flamingo, section 3.1.1
    and appendix A.1.1). ``log s``, the size of each token, is added for merged tokens so that each
    counts as its patches (as ToMe's proportional attention, eq. 1); of a latent it is 0.

    Weights are in the layout of OpenFlamingo's ``PerceiverResampler``, a checkpoint of the whole
    model included. Limits: one image, so no embeddings of time (``frame_embs``,
    ``media_time_embs``); the width of the latents is that of the tower's features.

    Attributes:
        weights: ``random``, or a file; its path is kept as an absolute one.
        latents: Tokens that are made; None for those of the file, or 64.
        layers: Number of layers; None for those of the file, or 6.
        heads: Heads of the attention; None for the file's by ``head_width``, or 8.
        head_width: Width of one head, which a file does not say.
        seed: Seed of random weights.
    """

    weights: str = RANDOM
    latents: int | None = None
    layers: int | None = None
    heads: int | None = None
    head_width: int = 64
    seed: int = 0

    name = "resampler"
    summary = "learned latents attend to the tokens"
    source = "Flamingo: a Visual Language Model for Few-Shot Learning, arXiv 2204.14198"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", absolute(self.weights))
        for name in ("latents", "layers", "heads", "head_width"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"option {name} of resampler is {value}; expected 1 or more")

    def cells(self) -> None:
        """Latents lie nowhere."""

    def module(self, width: int, grid: PatchGrid) -> nn.Module:  # noqa: ARG002
        """The resampler with its weights."""
        if self.weights == RANDOM:
            asked = {name: getattr(self, name) or most for name, most in _DEFAULTS.items()}
            made = partial(PerceiverResampler, width, head_width=self.head_width, **asked)
            return random_module(made, self.seed)
        state = state_of_file(self.weights)
        if any(key.startswith(PREFIX) for key in state):
            state = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
        feed_forward = state.get("layers.0.1.1.weight")
        inner = 0 if feed_forward is None else feed_forward.shape[0]
        counts = self._counts(state, width)
        module = PerceiverResampler(width, head_width=self.head_width, inner=inner, **counts)
        if misfit := first_misfit(module, state):
            key, got, wanted = misfit
            raise self._other(f"has {key} {_shape(got)}; expected {_shape(wanted)}")
        check_finite(state, f"resampler weights {self.weights} have")
        module.load_state_dict(state)
        return frozen(module)

    def _counts(self, state: Mapping[str, Tensor], width: int) -> dict[str, int]:
        """Latents, layers and heads of a file, if they are those asked for."""
        latents, query = state.get("latents"), state.get("layers.0.0.to_q.weight")
        if latents is None or latents.ndim != 2 or query is None or query.ndim != 2:
            raise self._other("has no latents and layers.0.0.to_q.weight")
        if latents.shape[1] != width:
            raise self._other(
                f"is for features {latents.shape[1]} wide and the model's are {width}"
            )
        depth = {key.split(".")[1] for key in state if key.startswith("layers.")}
        heads, rest = divmod(query.shape[0], self.head_width)
        if rest or not heads:
            raise self._other(
                f"has queries {query.shape[0]} wide, no multiple of head_width {self.head_width}"
            )
        counts = {"latents": latents.shape[0], "layers": len(depth), "heads": heads}
        for name, count in counts.items():
            if getattr(self, name) not in (None, count):
                raise self._other(f"has {count} {name} and {getattr(self, name)} are asked for")
        return counts

    def _other(self, what: str) -> InputError:
        return InputError(
            f"resampler weights {self.weights} {what}; give a file in the layout of OpenFlamingo's "
            "PerceiverResampler that fits, or weights=random"
        )


class Attention(nn.Module):
    """Latents attend to the image's tokens and to themselves."""

    def __init__(self, width: int, heads: int, head_width: int) -> None:
        super().__init__()
        self.heads = heads
        inner = heads * head_width
        self.norm_media = nn.LayerNorm(width)
        self.norm_latents = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, inner, bias=False)
        self.to_kv = nn.Linear(width, 2 * inner, bias=False)
        self.to_out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, latents: Tensor, bias: Tensor | None) -> Tensor:
        """``x [B, K, C]``, ``latents [B, L, C]``, ``bias [B, 1, 1, K + L]`` -> ``[B, L, C]``."""
        latents = self.norm_latents(latents)
        both = torch.cat([self.norm_media(x), latents], dim=1)
        key, value = self.to_kv(both).chunk(2, dim=-1)
        query, key, value = (self._split(part) for part in (self.to_q(latents), key, value))
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.to_out(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class PerceiverResampler(nn.Module):
    """The layers; parameters are named as OpenFlamingo's."""

    def __init__(
        self, width: int, latents: int, layers: int, heads: int, head_width: int, inner: int = 0
    ) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        inner = inner or 4 * width
        self.layers = nn.ModuleList(
            nn.ModuleList([Attention(width, heads, head_width), _feed_forward(width, inner)])
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, final: FinalTokens) -> Tensor:
        """``[B, K, C] -> [B, latents, C]``."""
        x, size = final.x, final.size
        latents = self.latents.expand(x.shape[0], -1, -1)
        bias = None
        if size is not None:
            own = torch.zeros_like(latents[:, :, 0], dtype=size.dtype)
            bias = torch.cat([size.log(), own], dim=1)[:, None, None, :].to(x.dtype)
        for layer in self.layers:
            latents = latents + layer[0](x, latents, bias)  # type: ignore[index]
            latents = latents + layer[1](latents)  # type: ignore[index]
        return self.norm(latents)  # type: ignore[no-any-return]


def _feed_forward(width: int, inner: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(width),
        nn.Linear(width, inner, bias=False),
        nn.GELU(),
        nn.Linear(inner, width, bias=False),
    )


def _shape(shape: list[int] | None) -> str:
    return "nothing" if shape is None else f"of shape {shape}"
