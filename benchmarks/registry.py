"""Which of timm's ViTs can be patched, and does r = 0 leave every one of them as it is?

Takes every entry of timm's registry whose class is VisionTransformer or VisionTransformerDistilled,
at reduced depth and width with live random weights, and compares the patched model at r = 0 with
timm's own output. Prints one row per entry that does not pass, then the table; writes JSON rows to
benchmarks/results/registry.json.

    python -m benchmarks.registry [NAME_PART]
"""

from __future__ import annotations

import argparse
import collections
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer

from benchmarks.harness import write_rows
from tome_export.errors import InputError
from tome_export.models.recipe import wake_constants
from tome_export.patch import patch

TOLERANCE = 1e-6
CLASSES = (VisionTransformer, VisionTransformerDistilled)
HEAD_WIDTH = 32
NARROW: dict[str, Any] = {"embed_dim": 2 * HEAD_WIDTH, "num_heads": 2, "depth": 2}


@dataclass(frozen=True)
class Row:
    """One registry entry.

    Attributes:
        name: Of the entry.
        structure: Block, attention, MLP, pooling and prefix, as far as they differ.
        verdict: ``equal``, ``refused`` or ``WRONG``.
        reason: Why it was refused, or how far it is off.
        relative_error: Largest difference over timm's largest absolute output; None if refused.
    """

    name: str
    structure: str
    verdict: str
    reason: str
    relative_error: float | None


def class_of(name: str) -> type | None:
    """The class an entry makes; None if it cannot be made without its weights."""
    try:
        with torch.device("meta"):
            return type(timm.create_model(name))
    # Families have many ways not to be made on the meta device.
    except Exception as error:
        print(f"not made {name}: {type(error).__name__}", flush=True)
        return None


def candidates(part: str = "") -> list[str]:
    """Entries that may be plain ViTs: those of the modules that know one of the classes."""
    modules = [(name, vars(module)) for name, module in sys.modules.items()]
    makers = {name for name, known in modules if known.get("VisionTransformer") is CLASSES[0]}
    entry = timm.models.model_entrypoint
    return [n for n in timm.list_models() if part in n and entry(n).__module__ in makers]


def small(name: str) -> Any:
    """The entry at reduced depth and width with live weights."""
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, **NARROW)
    except AssertionError:
        # A convolutional stem without projection gives the width; the depth is still free.
        model = timm.create_model(name, depth=NARROW["depth"])
    wake_constants(model)
    return model.eval()


def structure(model: Any) -> str:
    """What sets a model apart, in one line."""
    block = model.blocks[0]
    inner = [getattr(block, role) for role in ("attn", "mlp") if hasattr(block, role)]
    parts = [type(module).__name__ for module in (model.patch_embed, block, *inner)]
    prefix = f"prefix={model.num_prefix_tokens}" + ("c" if model.has_class_token else "")
    return " ".join([*parts, f"pool={model.global_pool or 'none'}", prefix])


def compare(name: str) -> Row:
    """One entry, r = 0 against timm."""
    model = small(name)
    kind = structure(model)
    try:
        merged = patch(model, 0)
        patch(model, 8).macs()
    except InputError as error:
        return Row(name, kind, "refused", str(error), None)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(1, *merged.input_size, generator=generator)
    with torch.no_grad():
        expected, output = model(images), merged(images)
    difference = float((output - expected).abs().max() / expected.abs().max())
    if output.shape == expected.shape and difference <= TOLERANCE:
        return Row(name, kind, "equal", "", difference)
    return Row(name, kind, "WRONG", f"relative error {difference:.1e}", difference)


def sweep(part: str = "") -> list[Row]:
    """Every entry of the two classes."""
    rows = []
    # Registry names that are deprecated warn that they are.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in candidates(part):
            if class_of(name) in CLASSES:
                row = compare(name)
                rows.append(row)
                if row.verdict != "equal":
                    print(f"{row.verdict:8} {row.name}: {row.reason}", flush=True)
    return rows


def table(rows: list[Row]) -> str:
    """Verdicts by structure, then in sum."""
    kinds = sorted({row.structure for row in rows})
    count = collections.Counter((row.structure, row.verdict) for row in rows)
    lines = [f"{'structure':62} {'equal':>6} {'refused':>8} {'WRONG':>6}"]
    lines += [
        f"{kind:62} {count[kind, 'equal']:6} {count[kind, 'refused']:8} {count[kind, 'WRONG']:6}"
        for kind in kinds
    ]
    total = collections.Counter(row.verdict for row in rows)
    errors = [row.relative_error for row in rows if row.relative_error is not None]
    lines.append(
        f"{f'all {len(rows)}, largest error {max(errors, default=0.0):.1e}':62} "
        f"{total['equal']:6} {total['refused']:8} {total['WRONG']:6}"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", default="", help="only names with this; prints only")
    part = parser.parse_args().part
    start = time.perf_counter()
    rows = sweep(part)
    print(table(rows))
    print(f"{time.perf_counter() - start:.0f} s")
    if not part:
        print(write_rows("registry", [{**asdict(row), "tolerance": TOLERANCE} for row in rows]))
    return int(any(row.verdict == "WRONG" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
