"""Small timm models with live weights, and images, for every area of the tests."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from forkserver import ForkServer
from traces import shared_traces
from trained import make_trained_folder

import tome_export  # noqa: F401 (before the libraries that would report what the tests do)

ImageMaker = Callable[..., Any]
VitMaker = Callable[..., Any]

SMALL = {"img_size": 64, "patch_size": 8, "num_classes": 10}
"""64 patches of 8 x 8 pixels."""


def small_vit(
    name: str = "test_vit",
    *,
    seed: int = 0,
    small: bool = True,
    edit: Callable[[Any], None] = lambda _: None,
    **kwargs: Any,
) -> Any:
    """A timm model in eval mode, every parameter of which is drawn anew and matters.

    Values come from NumPy by the parameter's name, so that they do not hang on the order in which
    some version of timm makes its layers. Matrices have unit gain: at timm's initial 0.02 a narrow
    model's attention is uniform, and a lost log-size bias would hardly move the output.
    """
    import timm

    model = timm.create_model(name, **{**(SMALL if small else {}), **kwargs})
    edit(model)
    return make_live(model, seed)


def make_live(model: Any, seed: int = 0) -> Any:
    """The model in eval mode, every parameter of it drawn anew as in ``small_vit``."""
    import torch

    with torch.no_grad():
        for parameter_name, value in model.named_parameters():
            rng = np.random.default_rng([seed, zlib.crc32(parameter_name.encode())])
            mean, std = _mean_and_std(parameter_name, tuple(value.shape))
            drawn = mean + std * rng.standard_normal(tuple(value.shape))
            value.copy_(torch.from_numpy(np.asarray(drawn)))
    return model.eval()


def _mean_and_std(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    if name.endswith("gamma"):
        return 0.5, 0.1
    if name.endswith("weight"):
        return (0.0, math.prod(shape[1:]) ** -0.5) if len(shape) > 1 else (1.0, 0.1)
    return 0.0, 0.5 if len(shape) > 1 else 0.1  # tokens and position embeddings; biases


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


@pytest.fixture(scope="session", autouse=True)
def _shared_traces(run_folder: Path) -> Iterator[None]:
    """See ``shared_traces``."""
    with shared_traces(run_folder / "traces"):
        yield


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Runs Python code in processes that have torch already."""
    server = ForkServer()
    yield server
    server.close()


@pytest.fixture(scope="session")
def make_vit() -> VitMaker:
    """See ``small_vit``."""
    return small_vit


@pytest.fixture
def make_images() -> ImageMaker:
    """``make(model, count)``: seeded float32 images ``[count, C, H, W]`` of a patched model."""

    def make(model: Any, count: int = 3, seed: int = 0) -> Any:
        rng = np.random.default_rng(seed)
        return rng.standard_normal((count, *model.input_size), dtype=np.float32)

    return make


TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "patch_size": 4,
    "image_size": 32,
    "projection_dim": 16,
}
"""A CLIP vision transformer of 64 patches."""

LANGUAGE_WIDTH = 48


@pytest.fixture(scope="session")
def make_llava() -> Callable[..., Any]:
    """``make(folder, layout="llava"|"transformers")``: a tiny checkpoint with live weights.

    ``drop`` leaves tensors out whose name it is true of; other arguments go into ``config.json``.
    What stands for the language model is one tensor that would be seen if it were read.
    Gives the uncut ``LlavaTower`` with the projector.
    """
    pytest.importorskip("transformers")
    from safetensors.torch import save_file

    def make(
        folder: Any,
        layout: str = "llava",
        *,
        drop: Callable[[str], bool] = lambda _: False,
        **config: Any,
    ) -> Any:
        from tome_export.models.llava.config import Projector
        from tome_export.models.llava.tower import LlavaTower

        projector = Projector(2, LANGUAGE_WIDTH)
        tower = make_live(LlavaTower(TOWER, TOWER["num_hidden_layers"], "patch", projector))
        state = {}
        for key, value in tower.state_dict().items():
            if layout == "llava":
                prefix = "model.vision_tower.vision_tower."
                name = f"model.{key}" if key.startswith("mm_") else f"{prefix}{key}"
            else:
                name = f"vision_tower.{key}"
                for number in (1, 2):
                    inner = f"mm_projector.{2 * number - 2}."
                    outer = f"multi_modal_projector.linear_{number}."
                    name = key.replace(inner, outer) if key.startswith(inner) else name
            state[name] = value
        state["model.layers.0.self_attn.q_proj.weight"] = value.new_zeros(1000, 1000)
        folder.mkdir(parents=True, exist_ok=True)
        kept = {key: value for key, value in state.items() if not drop(key)}
        save_file(kept, folder / "model.safetensors")
        values = _llava_config(folder) if layout == "llava" else _transformers_config()
        (folder / "config.json").write_text(json.dumps({**values, **config}))
        return tower

    return make


def _llava_config(folder: Any) -> dict[str, Any]:
    clip = folder / "clip"
    clip.mkdir(parents=True, exist_ok=True)
    (clip / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **TOWER}))
    return {
        "model_type": "llava_llama",
        "mm_vision_tower": "clip",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": TOWER["hidden_size"],
        "hidden_size": LANGUAGE_WIDTH,
    }


def _transformers_config() -> dict[str, Any]:
    return {
        "model_type": "llava",
        "vision_config": {"model_type": "clip_vision_model", **TOWER},
        "text_config": {"model_type": "llama", "hidden_size": LANGUAGE_WIDTH},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


@pytest.fixture
def make_tower() -> Callable[..., Any]:
    """``make(select_feature=, projector=)``: a live ``LlavaTower`` of three layers of ``TOWER``."""
    pytest.importorskip("transformers")
    from tome_export.models.llava.config import Projector
    from tome_export.models.llava.tower import LlavaTower

    def make(select_feature: Any = "patch", projector: bool = False, layers: int = 3) -> Any:
        shape = Projector(2, LANGUAGE_WIDTH) if projector else None
        return make_live(LlavaTower(TOWER, layers, select_feature, shape)).requires_grad_(False)

    return make


@pytest.fixture(scope="session")
def built_artifact(run_folder: Path) -> Callable[..., Any]:
    """``built_artifact(model="vit_digits", **options)``: an ``Artifact``; not to be changed.

    The options are those of a ``BuildRequest``, without an engine unless one is asked for. The same
    request is built once for all workers of the run. ``model`` is a recipe: what a path or a
    function names may be another thing in the next test.
    """
    from tome_export.artifact import Artifact
    from tome_export.build import BuildRequest, build
    from tome_export.models import RECIPES

    def get(model: str = "vit_digits", **options: Any) -> Artifact:
        assert model in RECIPES, model
        request = BuildRequest(model, Path("none"), **{"engine": "none", **options})
        key = hashlib.sha256(repr(request).encode()).hexdigest()[:16]
        path = run_folder / "artifacts" / key / model.removeprefix("vit_")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                build(replace(request, output=path))
        return Artifact.open(path)

    return get


@pytest.fixture(scope="session")
def trained_folder(run_folder: Path) -> Path:
    """A trained DINOv2 and its saliency decoder, downloaded; see ``scripts/trained_dinov2.py``."""
    folder = run_folder / "trained"
    with FileLock(folder.with_suffix(".lock")):
        made = folder / "out" / "dinov2"
        return made if made.exists() else make_trained_folder(folder)


@pytest.fixture(scope="session")
def digit_members(built_artifact: Callable[..., Any]) -> Any:
    """Artifacts of vit_digits by r, for cascades: 32, 16 and 8; not to be changed."""
    from tome_export.merge.schedule import Schedule

    return {r: built_artifact(schedule=Schedule(r), check=False).path for r in (32, 16, 8)}
