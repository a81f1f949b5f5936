"""Prune the least attended tokens, merge the next least (DiffRate, arXiv 2305.17997)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tome_export.errors import InputError
from tome_export.merge.lowering import accumulate_dtype, gather_tokens, spread, unit_vectors
from tome_export.merge.ops import merge
from tome_export.merge.plan import MergePlan
from tome_export.merge.schedule import LayerTokens, Schedule
from tome_export.reducers.base import LayerContext, LayerSpec, ModelShape, ScoredReducer
from tome_export.reducers.plans import cosines, ranked_plan

_KEYS = ("prune_kept_num", "merge_kept_num")


@dataclass(frozen=True)
class DiffRate(ScoredReducer):
    """Sort by class attention, prune the tail, merge the least important of what is left.

    Of N tokens in layer l ``min(N, prune_kept[l])`` are left after pruning and of those
    ``merge_kept[l]`` after merging, prefix included (section 3.2). A token that merges goes into
    the most similar one that stays, never into a prefix token: the plain mean, whose size grows by
    the sizes of the others times their similarity, 0 if that is less. docs/reducers.md says more.

    Attributes:
        file: JSON with ``prune_kept_num`` and ``merge_kept_num``, a number for each layer, such as
            the authors'; read once, the other options then hold what it said.
        entry: Where in the file these are: names with ``/`` between them.
        prune_kept: Tokens left after pruning, per layer.
        merge_kept: Tokens left after merging, per layer.
    """

    file: str | None = None
    entry: str | None = None
    prune_kept: tuple[int, ...] = ()
    merge_kept: tuple[int, ...] = ()

    name = "diffrate"
    summary = "drop the least attended tokens, merge the next least into the most similar"
    source = "DiffRate: Differentiable Compression Rate for Efficient ViTs, arXiv 2305.17997"
    drops = True
    prop_attn = True
    needs_class_attention = True
    at_most_half = False
    own_counts = True
    counts_patches = False

    def __post_init__(self) -> None:
        if self.file is None and self.entry is not None:
            raise InputError(
                f"option entry of reducer diffrate is {self.entry!r} of no file; give "
                "also file=FILE"
            )
        if self.file is not None:
            if self.prune_kept or self.merge_kept:
                raise InputError("reducer diffrate has counts from file and as options; give one")
            prune, merged = _counts_from_file(Path(self.file), self.entry)
            # The counts and not the path go into manifests.
            for name, value in (("prune_kept", prune), ("merge_kept", merged)):
                object.__setattr__(self, name, value)
            object.__setattr__(self, "file", None)
            object.__setattr__(self, "entry", None)
        counts = {"prune_kept": self.prune_kept, "merge_kept": self.merge_kept}
        if len(self.prune_kept) != len(self.merge_kept):
            lengths = " and ".join(f"{len(value)} of {name}" for name, value in counts.items())
            raise InputError(f"reducer diffrate has {lengths}; expected one of each per layer")
        for name, values in counts.items():
            if any(value < 1 for value in values):
                raise InputError(
                    f"reducer diffrate has {min(values)} in {name}; expected 1 or more tokens"
                )

    def counts(self, shape: ModelShape) -> Schedule:
        """What the counts remove from the tokens of this model."""
        if not self.prune_kept:
            raise InputError(
                "reducer diffrate has no counts; give --reducer-option file=FILE, a JSON file with "
                "prune_kept_num and merge_kept_num, or --r N to merge N tokens per layer"
            )
        self._check_depth(shape)
        removed, tokens = [], shape.tokens
        for prune, merged in zip(self.prune_kept, self.merge_kept, strict=True):
            limit = self.limit(tokens, shape.prefix)
            removed.append(min(limit, max(0, tokens - min(prune, merged))))
            tokens -= removed[-1]
        return Schedule(per_layer=tuple(removed))

    def layers(self, schedule: Schedule, shape: ModelShape) -> tuple[LayerTokens, ...]:
        """See ``Reducer.layers``."""
        self._check_depth(shape)
        return super().layers(schedule, shape)

    def _check_depth(self, shape: ModelShape) -> None:
        if self.prune_kept and len(self.prune_kept) != shape.depth:
            raise InputError(
                f"reducer diffrate has counts of {len(self.prune_kept)} layers; the model has "
                f"{shape.depth}: give counts that were found for it"
            )

    def _merging(self, layer: int, tokens: int, r: int) -> int:
        """How many of r tokens merge; the others are pruned."""
        prune_kept = self.prune_kept[layer] if self.prune_kept else tokens
        return r - min(r, max(0, tokens - prune_kept))

    def signals(self, layer: LayerContext) -> tuple[Tensor, ...]:
        """Class attention ``[B, n]``, and where tokens merge cosines ``[B, n, n]``; n = N - P."""
        attention = layer.class_attention[:, layer.prefix :]
        if not self._merging(layer.index, layer.tokens, layer.r):
            return (attention,)
        return attention, cosines(layer.x[:, layer.prefix :])

    def plan(self, signals: tuple[Tensor, ...], layer: LayerSpec) -> MergePlan:
        """Rank, cut twice, and find the most similar token that stays."""
        merging = self._merging(layer.index, layer.tokens, layer.r)
        similarity = signals[1] if merging else None
        return ranked_plan(signals[0], layer, similarity, merging)

    def apply(self, layer: LayerContext, plan: MergePlan) -> tuple[Tensor, Tensor]:
        """The plain mean, and sizes that grow by similarity."""
        if not self._merging(layer.index, layer.tokens, layer.r):
            return layer.kept(plan)
        x, _ = merge(layer.x, torch.ones_like(layer.size), plan)
        into = plan.keep.gather(1, plan.dst.clamp_min(0).long())
        unit = unit_vectors(layer.x.to(accumulate_dtype(layer.x)))
        similarity = (gather_tokens(unit, plan.src) * gather_tokens(unit, into)).sum(dim=-1)
        grown = layer.size.gather(1, plan.src.long()) * similarity.clamp_min(0).float()
        moved = spread(plan.dst, grown, plan.keep.shape[1]).sum(dim=-1)
        return x, layer.size.gather(1, plan.keep.long()) + moved


def _counts_from_file(path: Path, entry: str | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"counts file {path} of reducer diffrate cannot be read ({error.strerror}); give the "
            "path of a JSON file"
        ) from None
    except ValueError:
        raise InputError(f"counts file {path} of reducer diffrate is not JSON") from None
    where = ""
    for part in entry.split("/") if entry else ():
        names = list(found) if isinstance(found, dict) else []
        if part not in names:
            raise InputError(
                f"counts file {path} has no entry {where + part}; expected one of "
                f"{', '.join(where + name for name in names) or 'none'}"
            )
        found, where = found[part], f"{where}{part}/"
    if not isinstance(found, dict) or any(key not in found for key in _KEYS):
        listed = ", ".join(where + name for name in found) if isinstance(found, dict) else "a list"
        raise InputError(
            f"counts file {path} has {listed}; expected {' and '.join(_KEYS)}, or say with "
            "--reducer-option entry=NAME/NAME where they are"
        )
    return _numbers(found[_KEYS[0]], path, _KEYS[0]), _numbers(found[_KEYS[1]], path, _KEYS[1])


def _numbers(value: Any, path: Path, key: str) -> tuple[int, ...]:
    """A list of whole numbers, or one written as text, as in the authors' file."""
    try:
        listed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        listed = None
    if not isinstance(listed, list) or not all(type(number) is int for number in listed):
        raise InputError(
            f"counts file {path} has {value!r} as {key}; expected a list of whole numbers, one per "
            "layer"
        )
    return tuple(listed)
