"""Run the official implementation on the cases below and record what it answers."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent

# tokens, r, class token, distillation token
OPERATORS = [
    (tokens, r, class_token, distill_token)
    for class_token, distill_token in ((False, False), (True, False), (True, True))
    for tokens in (16, 17, 24, 25)
    for r in (1, 5, 100)
]

SHRUNK = {"embed_dim": 64, "num_heads": 2, "depth": 4, "num_classes": 5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token, even patches": ("test_vit", SHRUNK | {"img_size": 64, "patch_size": 8}),
    "class token, odd patches": ("test_vit", SHRUNK | {"img_size": 72, "patch_size": 8}),
    "distilled": (
        "deit_tiny_distilled_patch16_224",
        SHRUNK | {"img_size": 64, "patch_size": 8},
    ),
    "distilled, odd patches": (
        "deit_tiny_distilled_patch16_224",
        SHRUNK | {"img_size": 72, "patch_size": 8},
    ),
    "no class token, even patches": (
        "vit_base_patch16_224",
        SHRUNK | {"img_size": 64, "patch_size": 8, "class_token": False, "global_pool": "avg"},
    ),
    "no class token, odd patches": (
        "vit_base_patch16_224",
        SHRUNK | {"img_size": 72, "patch_size": 8, "class_token": False, "global_pool": "avg"},
    ),
}
SCHEDULES: list[Any] = [0, 7, 1000, (9, -1.0), (9, 1.0), [3, 0, 40]]
BATCH = 2


def operator_inputs(case: tuple[Any, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Metric ``[B, N, 8]``, x ``[B, N, 2]`` and size ``[B, N]`` of a case."""
    rng = np.random.default_rng([int(value) for value in case])
    tokens = case[0]
    return (
        rng.standard_normal((BATCH, tokens, 8)),
        rng.standard_normal((BATCH, tokens, 2)),
        rng.integers(1, 30, (BATCH, tokens)).astype(np.float64),
    )


def images(side: int) -> np.ndarray:
    """``[B, 3, side, side]``."""
    return np.random.default_rng(side).standard_normal((BATCH, 3, side, side))


def small_vit(name: str, **kwargs: Any) -> Any:
    """The tests' model with the tests' weights."""
    spec = importlib.util.spec_from_file_location("conftest", HERE.parents[1] / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.small_vit(name, small=False, **kwargs)


def run_operator(case: tuple[Any, ...]) -> dict[str, Any]:
    import torch
    from tome.merge import bipartite_soft_matching, merge_wavg

    metric, x, size = (torch.from_numpy(part) for part in operator_inputs(case))
    merge, _ = bipartite_soft_matching(metric, *case[1:])
    members = merge(torch.eye(case[0], dtype=torch.float64).expand(BATCH, -1, -1), mode="sum")
    merged, sizes = merge_wavg(merge, x, size[..., None])
    return {
        "case": case,
        "position": members.argmax(dim=1).tolist(),
        "x": np.round(merged.numpy(), 12).tolist(),
        "size": sizes[..., 0].int().tolist(),
    }


def run_model(label: str, schedule: Any, prop_attn: bool) -> dict[str, Any]:
    import tome
    import torch

    name, kwargs = MODELS[label]
    model = small_vit(name, **kwargs).double()
    tome.patch.timm(model, trace_source=True, prop_attn=prop_attn)
    model.r = schedule
    with torch.no_grad():
        output = model(torch.from_numpy(images(kwargs["img_size"])))
    source = model._tome_info["source"]
    position = None if source is None else source.argmax(dim=1).tolist()
    return {
        "model": label,
        "schedule": schedule,
        "prop_attn": prop_attn,
        "output": np.round(output.numpy(), 12).tolist(),
        "position": position,
    }


def main() -> None:
    operators = [run_operator(case) for case in OPERATORS]
    runs = [
        run_model(label, schedule, prop_attn)
        for label in MODELS
        for schedule in SCHEDULES
        for prop_attn in ((True, False) if schedule == 7 else (True,))
    ]
    for name, rows in (("operators", operators), ("models", runs)):
        lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
        (HERE / f"{name}.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
