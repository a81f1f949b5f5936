"""What reducers and compressors learned is in the artifact, and apart from the model's weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tome_export.artifact.learned import REDUCER
from tome_export.build import BuildRequest, build
from tome_export.errors import InputError
from tome_export.merge.schedule import Schedule
from tome_export.patch.describe import learned_sha256, state_sha256
from tome_export.runtime.model import reference_model
from tome_export.serve.main import shared_facts


def metric_layers(seed=0):
    """DTEM's metric layers for vit_digits, 6 blocks of width 64, drawn at random."""
    rng = np.random.default_rng(seed)
    return {
        f"blocks.{block}.attn.qkv.metric_layer.{name}": torch.from_numpy(
            rng.standard_normal(shape, dtype=np.float32)
        )
        for block in range(6)
        for name, shape in (("weight", (64, 64)), ("bias", (64,)))
    }


def built(folder, r, *options, **more):
    request = BuildRequest(
        "vit_digits", folder, Schedule(r), engine="none", check=False, reducer="dtem", **more,
        reducer_options=options,
    )  # fmt: skip
    return build(request)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Of DTEM, whose weights file is gone."""
    folder = tmp_path_factory.mktemp("learned")
    weights = folder / "metric.safetensors"
    save_file(metric_layers(), weights)
    made = built(folder / "artifact", 6, f"weights={weights}")
    weights.unlink()
    return made


def test_the_artifact_needs_no_other_file(artifact):
    model, _ = reference_model(artifact)
    found = model.reducer.state_dict()
    assert found.keys() == metric_layers().keys()
    assert all(torch.equal(found[key], value) for key, value in metric_layers().items())
    assert REDUCER in artifact.manifest.files


def test_the_model_has_the_weights_of_the_model_without_it(artifact, tmp_path):
    other = built(tmp_path / "plain", 0, "weights=random")
    assert shared_facts(other) == shared_facts(artifact)
    plain, _ = reference_model(other)
    model, _ = reference_model(artifact)
    assert state_sha256(plain) == state_sha256(model)
    assert (learned_sha256(plain), len(learned_sha256(model))) == (None, 64)
    assert not (other.path / REDUCER).exists()


def test_other_learned_weights_are_refused(artifact):
    file = artifact.path / REDUCER
    content = file.read_bytes()
    try:
        save_file(metric_layers(seed=1), file)
        assert load_file(file).keys() == metric_layers().keys()
        with pytest.raises(InputError, match=r"learned weights of reducer dtem .* rebuild"):
            reference_model(artifact)
    finally:
        file.write_bytes(content)
