"""Measures of classifiers of one logit, of several yes and no, and of regressions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conftest import small_vit
from tome_export.artifact.schedule import TuneData
from tome_export.cascade import policy
from tome_export.data.labels import Classes
from tome_export.data.metrics import deviations
from tome_export.data.scores import top_k
from tome_export.errors import InputError
from tome_export.evaluate.records import TOP, as_classes, ranked
from tome_export.models import resolve
from tome_export.parity.compare import _output_parity
from tome_export.patch import patch
from tome_export.spec import answers
from tome_export.tune.images import TuneImages, tuning_source
from tome_export.tune.measure import ClassMeasure
from tome_export.tune.score import Scorer

LOGITS = np.array([[2.0], [-1.0], [np.nan]])


def test_one_logit_says_no_or_yes():
    found = ranked(LOGITS, "sigmoid")
    assert found[:, [0, 2, 3]].tolist() == [[1, 1, 0], [0, 0, 1], [-1, -1, -1]]
    np.testing.assert_allclose(found[:2, 1], 1 / (1 + np.exp(-LOGITS[:2, 0])))
    classes = ranked(as_classes(LOGITS, "sigmoid"), "softmax")
    assert classes.tolist() == found[:, -TOP:].tolist()
    assert answers(LOGITS[:2], "sigmoid").tolist() == [[True], [False]]


def test_several_yes_and_no_are_compared_as_a_set():
    logits = np.array([[3.0, 1.0, -1], [3.0, -1.0, -1], [1.0, 3.0, -1], [np.inf, 1, 1]])
    found = ranked(logits, "sigmoid")
    assert found.shape == (4, 1 + TOP)
    assert found[:3, 1:4].tolist() == [[0, 1, 2], [0, 1, 2], [1, 0, 2]]
    # The best class of the first two is the same, and that of the third is another.
    assert found[0, 0] == found[2, 0] != found[1, 0]
    assert (found[3] == -1).all()


def test_softmax_of_the_two_is_the_sigmoid():
    two = policy.two_classes(LOGITS[:2])
    p = np.exp(policy.log_softmax(two))[:, 1]
    np.testing.assert_allclose(p, 1 / (1 + np.exp(-LOGITS[:2, 0])))
    np.testing.assert_allclose(policy.confidence(LOGITS[:2], "max"), np.maximum(p, 1 - p))
    np.testing.assert_allclose(policy.confidence(LOGITS[:2], "margin"), np.abs(2 * p - 1))
    three = np.zeros((1, 3))
    assert policy.two_classes(three) is three


@pytest.mark.parametrize(
    ("activation", "logits", "k", "index", "score"),
    [
        ("sigmoid", [[0.5]], 1, [0], [1 / (1 + np.exp(-0.5))]),
        ("sigmoid", [[-800.0]], 1, [0], [0.0]),
        ("sigmoid", [[-1.0, 2.0, 0.0]], 2, [1, 2], [1 / (1 + np.exp(-2.0)), 0.5]),
        ("none", [[-3.0, 7.5]], 2, [0, 1], [-3.0, 7.5]),
        ("softmax", [[0.0, 0.0]], 1, [0], [0.5]),
    ],
)
def test_scores_that_are_served(activation, logits, k, index, score):
    found = top_k(np.array(logits, np.float32), k, activation)
    assert found[0].tolist() == [index]
    np.testing.assert_allclose(found[1], [score], rtol=1e-6, atol=1e-30)
    assert (found[0].dtype, found[1].dtype) == (np.int32, np.float32)


def test_parity_tells_other_answers_of_one_logit():
    a, b = np.array([[0.1], [0.2]], np.float32), np.array([[0.1], [-0.2]], np.float32)
    assert _output_parity(a, b, "sigmoid").top1_agreement == 0.5
    assert _output_parity(a, b, "none").top1_agreement is None
    assert _output_parity(a, b, None).top1_agreement is None


def test_classes_of_one_logit_are_two():
    assert (Classes.of_outputs(1, None).count, Classes.of_outputs(1, ("LABEL",)).count) == (2, 2)
    assert Classes.of_outputs(1, ("hot dog",)).by_name == {"not hot dog": 0, "hot dog": 1}
    assert Classes.of_outputs(3, ("a",)).names is None


def test_deviations_leave_out_what_is_not_finite():
    found = deviations(np.array([[1.0], [5.0], [np.nan]]), np.array([[2.0], [4.5], [0.0]]))
    assert (found.mean, found.max, found.spread) == (0.75, 1.0, 1.25)
    assert deviations(np.array([[np.nan]]), np.array([[1.0]])) is None


def images_of(model, labels=None, count=8):
    pixels = np.random.default_rng(0).standard_normal((count, *model.input_size), np.float32)
    data = TuneData(
        source="mine",
        available=count,
        search=4,
        validation=2,
        held_out=count - 6,
        unreadable_count=0,
        notes=(),
    )
    return TuneImages(pixels, labels, data)


def centred(classes: int):
    """A model whose logits on these images are on both sides of 0."""
    model = patch(small_vit(depth=2, num_classes=classes), 0)
    pixels = torch.from_numpy(images_of(model).pixels)
    with torch.no_grad():
        torch.nn.init.normal_(model.model.head.weight)
        model.model.head.bias -= model(pixels).median(dim=0).values - 1e-3
    return model, pixels


@pytest.mark.parametrize("classes", [1, 3])
def test_a_sigmoid_is_tuned_by_what_can_fail(classes):
    model, pixels = centred(classes)
    r = (6, 6)
    with Scorer(model, images_of(model), ClassMeasure("sigmoid")) as scorer:
        score, right = scorer.counted(r, 0, 4)
        assert scorer.images.data.notes == ()
    with torch.no_grad():
        plain, merged = model(pixels)[:4].double(), patch(model, list(r))(pixels)[:4].double()
    np.testing.assert_array_equal(right, ((plain > 0) == (merged > 0)).all(dim=1).numpy())
    p = plain.sigmoid()
    damage = p * (p / merged.sigmoid()).log() + (1 - p) * ((1 - p) / (1 - merged.sigmoid())).log()
    assert score.damage == pytest.approx(float(damage.sum(dim=1).mean()), rel=1e-3)
    assert score.damage > 0


def test_labels_of_one_logit_are_no_and_yes():
    model, pixels = centred(1)
    with torch.no_grad():
        yes = (model(pixels)[:, 0] > 0).numpy().astype(np.int64)
    yes[0] = 1 - yes[0]
    with Scorer(model, images_of(model), ClassMeasure("sigmoid", yes)) as scorer:
        assert scorer.unmerged.tolist() == [False] + [True] * 7


def test_agreement_with_one_answer_is_no_target():
    model, _ = centred(1)
    with torch.no_grad():
        model.model.head.bias += 1000
    images = images_of(model)
    with pytest.raises(InputError, match=r"says the same of all 8 images.*; give images with"):
        Scorer(model, images, ClassMeasure("sigmoid"), targeted=True)
    with Scorer(model, images, ClassMeasure("sigmoid")) as scorer:
        assert "told apart by damage" in scorer.images.data.notes[0]
    labelled = ClassMeasure("sigmoid", np.zeros(8, np.int64))
    with Scorer(model, images, labelled, targeted=True) as scorer:
        assert scorer.images.data.notes == ()


def test_the_samples_labels_are_for_the_recipes_own_classes():
    recipe = resolve("vit_digits")
    own = Classes.of_outputs(10, recipe.output.label_names(10))
    assert tuning_source(recipe, own, ("samples",), None).labels is not None
    for other in (Classes.of_outputs(1, None), Classes.of_outputs(3, recipe.output.label_names(3))):
        assert tuning_source(recipe, other, ("samples",), None).labels is None
