"""Cascades of artifacts that give features or a map: calibrated, told, and behind a server."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import onnxruntime
import pytest
from PIL import Image

from tome_export.artifact import Artifact
from tome_export.artifact.cascade import Cascade
from tome_export.artifact.goal import Goal
from tome_export.build import BuildRequest, build
from tome_export.cascade import policy
from tome_export.cascade.main import CascadeRequest, cascade, check_kind, members_of
from tome_export.cli.main import main
from tome_export.data.preprocess import find_images, load_images
from tome_export.errors import InputError, UsageError
from tome_export.merge.schedule import Schedule
from tome_export.models.facts import DATA
from tome_export.serve.client import connect
from tome_export.serve.server import RunRequest, running
from tome_export.spec import BatchRange

pytest.importorskip("transformers", reason="the hf extra is not installed")

TOWER = """
from towers import live
from transformers import Dinov2Model
from whole_models import backbone_config, on_dinov2

def tower():
    return live(Dinov2Model(backbone_config()))
"""
RS = (9, 2)


@pytest.fixture(scope="module", params=["tower", "on_dinov2"])
def paths(request, tmp_path_factory):
    """Two artifacts of a tower, or of a model with a dense head: of much merging and of little."""
    folder = tmp_path_factory.mktemp("towers")
    (folder / f"similar_{request.param}.py").write_text(TOWER)
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(folder)
        for r in RS:
            made = BuildRequest(
                f"similar_{request.param}:{request.param}",
                folder / str(r),
                schedule=Schedule(r),
                batch=BatchRange(1, 4, 8),
                engine="none",
                check=False,
            )
            build(made)
    return [folder / str(r) for r in RS]


@pytest.fixture(scope="module")
def members(paths):
    return members_of(paths)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Crops of photographs to calibrate on, in folders that classes could be, and to test on."""
    rng = np.random.default_rng(0)
    photographs = [Image.open(path).convert("RGB") for path in sorted(DATA.glob("*.jpg"))]
    folder = tmp_path_factory.mktemp("crops")
    for part, count in (("data/one", 15), ("data/two", 15), ("test", 16)):
        (folder / part).mkdir(parents=True)
        for index in range(count):
            image = photographs[index % len(photographs)]
            left, top = rng.integers(0, image.width - 130), rng.integers(0, image.height - 130)
            cut = image.crop((left, top, left + 130, top + 130))
            cut.save(folder / part / f"{index:02d}.png")
    return folder / "data", folder / "test"


def outputs_of(members, pixels):
    """Of each member its output ``[B, C]`` in one row, by ONNX Runtime; of maps less the mean."""
    found = []
    for one in members:
        session = onnxruntime.InferenceSession(str(one.model_path))
        parts = [
            session.run(None, {"pixel_values": pixels[i : i + 1]})[0] for i in range(len(pixels))
        ]
        flat = np.concatenate(parts).reshape(len(pixels), -1).astype(np.float64)
        found.append(
            flat if one.manifest.output_kind == "features" else flat - flat.mean(1)[:, None]
        )
    return found


def request_of(members, folders, name, goal):
    data, test = folders
    return CascadeRequest(members, (str(data),), name, goal, test=(str(test),))


@pytest.mark.parametrize("name", ["complexity", "learned"])
def test_what_is_told_is_the_similarity_to_the_highest(members, folders, name):
    found = cascade(request_of(members, folders, name, Goal.target_macs("85%")))
    assert (found.metric, found.policy) == ("similarity", name)
    assert Cascade.parse(found.json_bytes(), folders[0]) == found
    pixels = load_images(find_images(folders[1]), members[0].manifest.preprocessing)
    low, high = outputs_of(members, pixels)
    cosine = (low * high).sum(1) / np.linalg.norm(low, axis=1) / np.linalg.norm(high, axis=1)
    scores = np.stack([np.clip(cosine, 0, 1), np.ones(len(pixels))])
    assert [one.test.share for one in found.members] == pytest.approx(scores.mean(1), abs=1e-5)
    assert found.members[0].test.low < found.members[0].test.share < found.members[0].test.high
    budget = policy.first_budgets(found.settings, pixels)
    assert found.chosen.test.budgets == tuple(np.bincount(budget, minlength=2))
    share = scores[budget, np.arange(len(budget))].mean()
    assert found.chosen.test.share == pytest.approx(share, abs=1e-5)
    assert found.chosen.test.correct is found.chosen.test.difference_to_highest is None
    assert found.chosen.calibration.macs <= 0.85 * members[-1].manifest.macs.merged


def test_more_similarity_costs_more(members, folders):
    lowest = cascade(request_of(members, folders, "complexity", Goal.target_macs("99%"))).members[0]
    goals = [Goal.min_similarity(1 - part * (1 - lowest.calibration.share)) for part in (0.7, 0.2)]
    costs = []
    for goal in goals:
        found = cascade(request_of(members, folders, "complexity", goal))
        assert found.chosen.calibration.share >= goal.value
        assert found.target.text == f"similarity of at least {goal.value:g}"
        cheaper = [p for p in found.sweep if p.calibration.macs < found.chosen.calibration.macs]
        assert all(point.calibration.share < goal.value for point in cheaper)
        costs.append(found.chosen.calibration.macs)
    assert costs[0] < costs[1]


def test_what_makes_no_sense_is_refused(members, digit_members):
    name = members[0].manifest.output.name
    for chosen, goal, message in (
        (
            "confidence",
            Goal.target_macs("80%"),
            f"the artifacts give {name}, not classes, of which none is confident; choose --policy "
            "complexity or learned",
        ),
        (
            "complexity",
            Goal.min_accuracy("-1"),
            f"the artifacts give {name}, not classes, and have no accuracy; give --min-similarity "
            "or --target-macs",
        ),
    ):
        with pytest.raises(UsageError) as caught:
            check_kind(members, chosen, goal)
        assert str(caught.value) == message
    digits = [Artifact.open(digit_members[r]) for r in (32, 8)]
    with pytest.raises(UsageError, match=r"^the artifacts give classes, and --min-similarity is "):
        check_kind(digits, "complexity", Goal.min_similarity(0.9))
    with pytest.raises(InputError, match=r"^minimum similarity is 1\.5; expected"):
        Goal.min_similarity(1.5)


@pytest.fixture(scope="module")
def repository(paths, folders, tmp_path_factory):
    """What the command prints, and the repository that it writes."""
    folder = tmp_path_factory.mktemp("repository")
    options = ["--data", str(folders[0]), "--target-macs", "85%", "--policy", "complexity"]
    options += ["-o", str(folder / "cascade.json"), "--repository", str(folder / "models")]
    options += ["--name", "own", "--preprocess", "--no-self-test"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["cascade", *map(str, paths), *options]) == 0
    return folder, printed.getvalue()


def test_the_document_what_is_printed_and_the_page(repository):
    repository, printed = repository
    found = Cascade.read(repository / "cascade.json")
    page = (repository / "cascade.html").read_text()
    share = f"{found.chosen.test.share:.4f}"
    assert f"MACs on average, similarity {share} [" in printed
    assert f"{share} similarity to the highest artifact" in page
    assert "accura" not in page.partition("<section")[2]
    assert found.served.entry == "own_cascade_pipeline"
    assert found.served.models == (
        "own_r9",
        "own_r2",
        *(f"own_cascade{end}" for end in ("", "_preprocess", "_pipeline")),
    )


def test_a_server_gives_each_image_the_answer_of_its_member(request, repository, members, folders):
    request.getfixturevalue("installation")
    repository, _ = repository
    found = Cascade.read(repository / "cascade.json")
    files = find_images(folders[1])
    pixels = load_images(files, members[0].manifest.preprocessing)
    budget = policy.first_budgets(found.settings, pixels)
    assert {*budget.tolist()} == {0, 1}
    output = members[0].manifest.output.name
    with running(RunRequest(repository / "models", gpu=False)) as server:
        with connect(server.grpc) as client:
            given = client.infer("own_cascade", {"pixel_values": pixels[:4]})
            encoded = np.array([[files[0].read_bytes()]], object)
            whole = client.infer("own_cascade_pipeline", {"image": encoded})
        server.stop(0)
    assert given["budget"].reshape(-1).tolist() == budget[:4].tolist()
    macs = [one.macs + found.policy_macs for one in found.members]
    assert given["macs"].reshape(-1).tolist() == [macs[member] for member in budget[:4]]
    for row in range(4):
        session = onnxruntime.InferenceSession(str(members[budget[row]].model_path))
        (expected,) = session.run([output], {"pixel_values": pixels[row : row + 1]})
        np.testing.assert_allclose(given[output][row], expected[0], atol=1e-4)
    np.testing.assert_allclose(whole[output][0], given[output][0], atol=1e-4)
