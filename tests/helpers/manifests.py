"""A whole manifest, for tests that need an artifact and no model in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx

from tome_export.artifact import Manifest


def manifest_values(**changes: Any) -> dict[str, Any]:
    """The content of a ``build.json`` of two layers, as JSON has it, without files."""
    pixels = {"name": "pixel_values", "dtype": "float32", "shape": ["batch", 1, 8, 8]}
    logits = {"name": "logits", "dtype": "float32", "shape": ["batch", 10]}
    values = {
        "format": 1,
        "model": {
            "name": "m",
            "folder": None,
            "family": "timm_vit",
            "timm_name": None,
            "description": "a model",
            "weights": {
                "kind": "file",
                "source": "w.pth",
                "sha256": None,
                "seed": None,
                "stored_dtype": "float32",
                "state_sha256": "00",
            },
            "learned_sha256": None,
            "random_weights": False,
        },
        "merge": {
            "reducer": {"name": "tome", "options": {}},
            "schedule": "r=1",
            "r": [1, 1],
            "prop_attn": True,
            "prefix": 1,
            "class_token": True,
            "scored": False,
            "merge_op": "matmul",
            "note": "",
        },
        **merging(5, (1, 1)),
        "patches": {"rows": 2, "cols": 2, "height": 4, "width": 4},
        "video": None,
        "macs": {"merged": 180, "unmerged": 200, "ratio": 200 / 180},
        "precision": "fp32",
        "batch": "1:8:32",
        "input": pixels,
        "inputs": [pixels],
        "output": logits,
        "outputs": [logits],
        "form": {"dense": False, "source_map": False, "entropy": False, "kind": "classes"},
        "compressor": None,
        "tower": None,
        "preprocessing": {
            "input_size": [1, 8, 8],
            "mean": [0.5],
            "std": [0.5],
            "crop_pct": 1,
            "interpolation": "bicubic",
        },
        "activation": "softmax",
        "labels": None,
        "onnx": {
            "opset": 23,
            "attention": "parts",
            "attention_note": "",
            "nodes": 9,
        },
        "engine_note": "none",
        "versions": {"tome-export": "0.1.0"},
    }
    if "form" not in changes and changes.get("output", logits)["name"] != "logits":
        values["form"]["kind"] = "features"
    return values | changes


def manifest(**changes: Any) -> Manifest:
    """The same as it is read."""
    return Manifest.model_validate(manifest_values(**changes))


def merging(tokens_in: int, r: Sequence[int]) -> dict[str, Any]:
    """The entries ``tokens_in``, ``tokens`` and ``layers`` of a model that merges so."""
    tokens = [tokens_in - sum(r[: layer + 1]) for layer in range(len(r))]
    costs = {"behind_block": False, "macs": 90, "macs_unmerged": 100}
    layers = [
        {"tokens_in": before, "r": one, "tokens_out": after, **costs}
        for before, one, after in zip([tokens_in, *tokens], r, tokens, strict=False)
    ]
    return {"tokens_in": tokens_in, "tokens": tokens, "layers": layers}


def graph(text: str = "x") -> bytes:
    """An ONNX model that holds nothing but a text."""
    return onnx.ModelProto(producer_name=text).SerializeToString()


def engine_values(file: str, backend: str = "tensorrt") -> dict[str, Any]:
    """What a manifest says of an engine, as JSON has it."""
    return {
        "backend": backend,
        "version": "1",
        "file": file,
        "size_bytes": 1,
        "build_seconds": 1.0,
        "batch": "1:1:1",
        "inputs": [],
        "outputs": [],
        "targets": ["8.9"],
        "network_layers": 1,
        "plugin_layers": 0,
        "version_compatible": False,
        "layers": None,
        "notes": [],
    }
