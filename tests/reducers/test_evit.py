"""EViT: the most attended stay, the others become one token, as in the paper."""

from __future__ import annotations

import json
import re

import pytest
import torch
from reducers import (
    digit_images,
    digit_model,
    options_of,
    plain,
    steps,
)
from references import evit as reference

from tome_export.errors import InputError
from tome_export.patch import patch
from tome_export.reducers import reducer_from_text
from tome_export.reducers.base import ModelShape
from tome_export.reducers.evit import EViT


def test_the_fused_token_is_the_papers():
    for step in steps(digit_model(EViT(), [5, 0, 9]), digit_images(2)):
        for image in range(2):
            x, size = reference.tokens(plain(step.layer, image))
            torch.testing.assert_close(step.x[image], torch.tensor(x), rtol=1e-5, atol=1e-6)
            assert step.size[image].tolist() == size


@pytest.mark.parametrize(
    ("depth", "patches", "prefix", "keep", "at", "stages"),
    [
        (12, 196, 1, (0.7,), (), (3, 6, 9)),
        (12, 196, 2, (0.5,), (), (3, 6, 9)),
        (6, 64, 1, (0.7, 0.6, 0.5), (), (1, 3, 4)),
        (16, 196, 1, (0.7,), (), (4, 8, 12)),
        (12, 196, 1, (0.9, 0.1), (0, 11), (0, 11)),
        (4, 3, 1, (0.9,), (0, 1, 2, 3), (0, 1, 2, 3)),
        (2, 1, 1, (0.5,), (), (1,)),
    ],
)
@pytest.mark.parametrize("name", ["evit", "topk"])
def test_counts_are_the_papers(name, depth, patches, prefix, keep, at, stages):
    options = [
        f"keep={','.join(map(str, keep))}",
        *([f"at={','.join(map(str, at))}"] if at else []),
    ]
    reducer = reducer_from_text(name, options)
    tower = ModelShape(32, depth, patches + prefix, prefix)
    rates = keep * len(stages) if len(keep) == 1 else keep
    expected = reference.counts(depth, patches, rates, stages, fused=name == "evit")
    assert list(reducer.counts(tower).per_layer) == expected
    assert [layer.r for layer in reducer.layers(reducer.counts(tower), tower)] == expected


def test_deit_has_the_tokens_of_the_paper():
    """Of 196 patches 138, 98 and 70 are left, the fused token among them from the first on."""
    layers = EViT().layers(EViT().counts(ModelShape(384, 12, 197, 1)), ModelShape(384, 12, 197, 1))
    assert [layer.tokens_out for layer in layers if layer.r] == [140, 100, 72]


def test_dense_outputs_have_the_fused_token_where_its_patches_are(make_vit, make_images):
    model = patch(make_vit("test_vit"), [50], reducer=EViT(), dense=True, source_map=True)
    with torch.no_grad():
        output, places = model(torch.from_numpy(make_images(model, 2)))
    assert (places == 13).sum(dim=1).tolist() == [51, 51]
    fused = output[0][places[0] == 13]
    assert torch.equal(fused, fused[:1].expand(51, -1))


def test_models_without_class_token_are_refused(make_vit):
    model = make_vit("test_vit", class_token=False, global_pool="avg")
    with pytest.raises(InputError, match="reducer evit ranks tokens by the class token's att"):
        patch(model, None, reducer=EViT())


def test_options():
    found = options_of(reducer_from_text("evit", ["keep=0.5,0.6", "at=2,4"]))
    assert json.loads(json.dumps(found)) == {"keep": [0.5, 0.6], "at": [2, 4]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["keep=0"], "option keep of reducer evit is 0.0; expected rates above 0, up to 1"),
        (["keep=nan"], "option keep of reducer evit is nan; expected rates above 0, up to 1"),
        (
            ["at=6,3"],
            "option at of reducer evit is 6,3; expected layers from 0 in ascending order, such as "
            "3,6,9",
        ),
        (["at=3,6"], "option at of reducer evit has layer 6; the model has layers 0 to 5"),
        (
            ["keep=0.7,0.5"],
            "option keep of reducer evit has 2 rates for 3 layers (1,3,4); give one for all, or "
            "one for each",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        digit_model(reducer_from_text("evit", options), None)
