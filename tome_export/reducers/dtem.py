"""DTEM: ToMe's matching by a metric that was learned for it (arXiv 2412.10569)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from tome_export.errors import InputError
from tome_export.merge.schedule import LayerTokens
from tome_export.reducers.base import LayerContext, MatchReducer, ModelShape
from tome_export.reducers.learned import RANDOM, absolute, filled, random_module, state_of_file

_KEY = ".attn.qkv.metric_layer."


@dataclass(frozen=True)
class DTEM(MatchReducer):
    """In each block a linear layer gives the metric, in place of the mean key.

    It reads what the projections of queries and keys read, the normalised tokens that enter
    attention, and gives ``features`` numbers per token (section 3.2). Matching and the
    size-weighted mean are ToMe's. The weights are in the layout of the authors' code,
    ``blocks.I.attn.qkv.metric_layer.weight`` and ``.bias`` for every block; other keys of the file
    are left alone. Blocks with attentions side by side are refused.

    Attributes:
        weights: A file, or ``random``.
        features: Width of the metric.
    """

    weights: str | None = None
    features: int = 64

    name = "dtem"
    summary = "merge the most similar pairs by a learned metric"
    source = "Learning to Merge Tokens via Decoupled Embedding, arXiv 2412.10569, section 3.2"

    def __post_init__(self) -> None:
        if self.features < 1:
            raise InputError(f"features of reducer dtem is {self.features}; expected 1 or more")
        object.__setattr__(self, "weights", absolute(self.weights))

    def module(self, shape: ModelShape) -> nn.Module:
        """One linear layer per block."""
        if self.weights == RANDOM:
            return random_module(lambda: Metrics(shape, self.features))
        if self.weights is None:
            raise InputError(
                "reducer dtem has no weights; give a DTEM checkpoint with --reducer-option "
                "weights=PATH, or try the toolchain with --reducer-option weights=random"
            )
        found = {key: value for key, value in state_of_file(self.weights).items() if _KEY in key}
        where = f"weights file {self.weights}"
        if not found:
            raise InputError(
                f"{where} has no blocks.*{_KEY}*, the metric of reducer dtem; expected a "
                "checkpoint of the authors' code, or its metric layers alone"
            )
        # Of a tower that is cut behind an inner layer the blocks beyond are gone.
        blocks = tuple(f"blocks.{index}{_KEY}" for index in range(shape.depth))
        own = {key: value for key, value in found.items() if key.startswith(blocks)}
        return filled(Metrics(shape, self.features), own, where, self.name)

    def macs(self, layer: LayerTokens, shape: ModelShape) -> int:
        """MACs of the linear layer."""
        return layer.tokens_in * shape.width * self.features

    def metric(self, layer: LayerContext) -> Tensor:
        """``[B, N, features]``."""
        if layer.attention.tokens is None:
            raise InputError(
                "reducer dtem needs blocks with one attention each; this model has attentions side "
                "by side, use a reducer that compares keys, such as tome"
            )
        assert isinstance(layer.module, Metrics)  # noqa: S101 (what ``module`` made)
        metric: Tensor = layer.module(layer.attention.tokens, layer.index)
        return metric


class Metrics(nn.Module):
    """The metric layers of all blocks, with the keys of the authors' checkpoints."""

    def __init__(self, shape: ModelShape, features: int) -> None:
        super().__init__()

        def block() -> nn.Module:
            layer = nn.ModuleDict({"metric_layer": nn.Linear(shape.width, features)})
            return nn.ModuleDict({"attn": nn.ModuleDict({"qkv": layer})})

        self.blocks = nn.ModuleList(block() for _ in range(shape.depth))

    def forward(self, tokens: Tensor, layer: int) -> Tensor:
        """``[B, N, C]`` of one block -> ``[B, N, features]``."""
        metric: Tensor = self.blocks[layer].get_submodule("attn.qkv.metric_layer")(tokens)
        return metric
