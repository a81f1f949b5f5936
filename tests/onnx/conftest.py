"""Exported models, each made once per session."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from tome_export.onnx.export import ExportOptions, OnnxFiles, onnx_from_model
from tome_export.patch import patch


@dataclass(frozen=True)
class Exported:
    model: Any
    path: Path
    files: OnnxFiles
    proto: onnx.ModelProto


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """``export(make_vit, name, schedule, options, **kwargs)``; the same call exports once."""
    made: dict[str, Exported] = {}

    def get(make_vit, name="test_vit", schedule=5, options=None, output="logits", **kwargs):
        options = options or ExportOptions()
        key = repr((name, schedule, options, output, sorted(kwargs.items())))
        if key not in made:
            model = patch(make_vit(name, **{"depth": 3, **kwargs}), schedule)
            path = tmp_path_factory.mktemp("export") / "model.onnx"
            metadata = {"schedule": str(model.settings.schedule), "counts": [1, 2]}
            written = onnx_from_model(model, path, options, output, metadata)
            made[key] = Exported(model, path, written, onnx.load(path))
        return made[key]

    return get
