"""One model each of three libraries from its maker to a model repository.

``benchmarks/families.py`` does the same for every family, in fp16 and with engines too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import make
from PIL import Image

from tome_export.build import BuildRequest, build
from tome_export.errors import InputError
from tome_export.evaluate.main import EvalRequest, evaluate
from tome_export.merge.schedule import Schedule
from tome_export.runtime.model import reference_model, rescheduled
from tome_export.runtime.ort import OrtRunner
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.spec import INPUT_NAME, TowerOptions

pytest.importorskip("transformers")

OWN = """
from torchvision.models.vision_transformer import VisionTransformer
from towers import live

def small():
    return live(VisionTransformer(32, 4, 2, 4, 32, 64, num_classes=7))
"""

Untouched = Callable[[torch.Tensor], torch.Tensor]


def clip_folder(_make_llava: Any) -> tuple[str, Untouched, dict[str, Any]]:
    made = make("CLIP", num_hidden_layers=2)
    made.save_pretrained("clip")
    model = type(made).from_pretrained("clip").eval()
    return "hf:clip", lambda images: model(images).pooler_output, {}


def own_function(_make_llava: Any) -> tuple[str, Untouched, dict[str, Any]]:
    Path("own_towers_t.py").write_text(OWN)
    sys.path.insert(0, str(Path.cwd()))
    try:
        import own_towers_t
    finally:
        sys.path.pop(0)
    return "own_towers_t:small", own_towers_t.small(), {}


def llava_folder(make_llava: Any) -> tuple[str, Untouched, dict[str, Any]]:
    tower = make_llava(Path("llava"))

    def features(images: torch.Tensor) -> torch.Tensor:
        vision = tower.vision_model
        states = vision(pixel_values=images, output_hidden_states=True).hidden_states
        return tower.mm_projector(states[-2][:, 1:])

    return "hf:llava", features, {"tower": TowerOptions("llava", projector=True)}


@pytest.mark.parametrize("maker", [clip_folder, own_function, llava_folder])
def test_from_the_library_to_the_repository(maker, make_llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, untouched, form = maker(make_llava)
    request = {"model": name, "engine": "none", **form}
    artifact = build(BuildRequest(output=Path("merged"), schedule=Schedule(11), **request))
    parity = artifact.manifest.parity
    assert parity.passed
    assert parity.disagreements == 0
    assert parity.decisions > 0

    plain = build(BuildRequest(output=Path("plain"), schedule=Schedule(), check=False, **request))
    images = np.random.default_rng(5).standard_normal((2, 3, 32, 32), dtype=np.float32)
    with torch.no_grad():
        expected = untouched(torch.from_numpy(images)).numpy()
        unmerged = rescheduled(reference_model(artifact)[0], Schedule())
        patched = unmerged(torch.from_numpy(images)).numpy()
    with OrtRunner(plain.model_path) as runner:
        exported = runner.infer({INPUT_NAME: images})[plain.manifest.output.name]
    np.testing.assert_allclose(patched, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    np.testing.assert_allclose(exported, expected, rtol=0, atol=1e-5 * np.abs(expected).max())

    options = ServeOptions(preprocess=True)
    result = serve(ServeRequest((artifact.path,), tmp_path / "repository", options))
    kinds = ["postprocess"] if artifact.manifest.output.name == "logits" else []
    written = {model.name.removeprefix(f"{result.models[0].name}_") for model in result.models[1:]}
    assert written == {"preprocess", *kinds, "pipeline"}
    for model in result.models:
        assert (tmp_path / "repository" / model.name / "config.pbtxt").is_file()


def test_features_of_the_tokens_that_are_left_do_not_compare(make_llava, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name, _, form = llava_folder(make_llava)
    request = BuildRequest(
        name, Path("merged"), schedule=Schedule(3), engine="none", check=False, **form
    )
    artifact = build(request)
    Path("pictures").mkdir()
    Image.new("RGB", (40, 40)).save("pictures/black.png")
    with pytest.raises(InputError, match=r"which do not compare; build it with --dense"):
        evaluate(EvalRequest(artifact.path, data=("pictures",), workers=0))
