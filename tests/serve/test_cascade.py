"""A served cascade: on the real server, with real members, and its folder before it is written."""

from __future__ import annotations

import asyncio
import json
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
from server_rules import problems

from tome_export.artifact import Artifact
from tome_export.artifact.cascade import ConfidencePolicy
from tome_export.artifact.goal import Goal
from tome_export.cascade import policy
from tome_export.cascade.main import CascadeRequest, cascade, members_of
from tome_export.data.samples import digits_test
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.models.facts import DATA
from tome_export.progress import Silent
from tome_export.serve import cascade as cascade_module
from tome_export.serve import main as serve_module
from tome_export.serve.cascade import (
    OUTPUTS,
    CascadeServeRequest,
    cascade_folder,
    check_cascade,
    serve_cascade,
)
from tome_export.serve.client import connect
from tome_export.serve.config import (
    ModelFolder,
    ServeOptions,
    config_from_text,
    file_folder,
)
from tome_export.serve.ensemble import pipeline_folders
from tome_export.serve.model_file import model_file_from_artifact
from tome_export.serve.names import check_chosen_name
from tome_export.serve.python_models import cascade as served_model
from tome_export.serve.repository import write
from tome_export.serve.server import RunRequest, running

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")

NAME = "vit_digits_cascade"
RS = (32, 16, 8)
COUNT = 48
NEAR = 1e-5
"""Distance to a threshold that does not count: other batches may round otherwise."""


POLICY = Path(policy.__file__)


def result_of(members, thresholds=(0.5,), macs=0):
    """What is read of a calibrated cascade."""
    return SimpleNamespace(
        settings=ConfidencePolicy(measure="max", thresholds=thresholds),
        policy_macs=macs,
        members=[SimpleNamespace(macs=one) for one in members],
    )


@pytest.fixture(scope="module")
def sessions(digit_members):
    return [
        onnxruntime.InferenceSession(
            str(digit_members[r] / "model.onnx"), providers=["CPUExecutionProvider"]
        )
        for r in RS
    ]


@pytest.fixture(scope="module")
def pixels():
    return digits_test()[0][:COUNT]


def logits_of(session, pixels):
    return session.run(["logits"], {"pixel_values": pixels})[0]


def served(members, repository, policy="confidence", **more):
    """Calibrate and serve, as the command does; the document, with what was served."""
    opened = members_of([*members.values()])
    request = CascadeServeRequest(repository, opened, **more)
    check_cascade(request)
    goal = Goal.target_macs("60%")
    found = cascade(CascadeRequest(opened, ("samples",), policy, goal, limit=80))
    made = serve_cascade(request, found, POLICY, Silent())
    return found.model_copy(update={"served": made})


@pytest.fixture(scope="module")
def calibrated(digit_members, tmp_path_factory):
    """The repository of a cascade by confidence, with a pipeline, and the result."""
    folder = tmp_path_factory.mktemp("cascade")
    return folder, served(digit_members, folder, preprocess=True, self_test=None)


@pytest.fixture(scope="module")
def server(request, calibrated):
    request.getfixturevalue("installation")
    with running(RunRequest(calibrated[0], gpu=False, control="explicit", load=["*"])) as made:
        yield made
        made.stop(0)


@pytest.fixture
def client(server):
    with connect(server.grpc) as made:
        yield made


@pytest.fixture
def grpc(server):
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(server.grpc) as made:
        yield made


def expected_of(settings, sessions, pixels, macs):
    """Image by image: logits, budget, MACs, and whether a number lies near a threshold."""
    rows, near = [], []
    for image in pixels[:, None]:
        budget = int(policy.first_budgets(settings, image)[0])
        cost, close = settings.policy_macs + macs[budget], False
        logits = logits_of(sessions[budget], image)
        while policy.goes_on(settings, budget, logits)[0]:
            budget += 1
            cost += macs[budget]
            logits = logits_of(sessions[budget], image)
        if settings.policy == "confidence":
            for index, threshold in enumerate(settings.thresholds):
                sure = policy.confidence(logits_of(sessions[index], image), settings.measure)[0]
                close |= abs(sure - threshold) < NEAR
        rows.append((logits[0], budget, cost))
        near.append(close)
    return [*map(np.array, zip(*rows, strict=True))], np.array(near)


def check(answer, settings, sessions, pixels, macs):
    (logits, budget, cost), near = expected_of(settings, sessions, pixels, macs)
    assert near.mean() < 0.1
    assert answer["budget"].dtype == np.int32
    assert answer["budget"].shape == answer["macs"].shape == (len(pixels), 1)
    np.testing.assert_array_equal(answer["budget"][~near, 0], budget[~near])
    np.testing.assert_array_equal(answer["macs"][~near, 0], cost[~near])
    np.testing.assert_allclose(answer["logits"][~near], logits[~near], atol=1e-4)
    return budget


def settings_in(repository):
    return policy.settings_from_json((repository / NAME / "1" / "cascade.json").read_text())


def macs_in(settings):
    return [member.macs for member in settings.members]


def test_only_the_unsure_go_on_each_group_in_one_request(
    calibrated, client, grpc, sessions, pixels, counts
):
    settings = settings_in(calibrated[0])
    assert tuple(settings.thresholds) == calibrated[1].settings.thresholds
    names = [member.model for member in settings.members]
    assert names == [f"vit_digits_r{r}" for r in RS]
    before = [counts(grpc, name) for name in names]
    given = pixels[:32]
    answer = client.infer(NAME, {"pixel_values": given})
    budget = check(answer, settings, sessions, given, macs_in(settings))
    assert len({*budget}) > 1
    for index, name in enumerate(names):
        images, batches = counts(grpc, name) - before[index]
        assert images == (answer["budget"] >= index).sum()
        assert batches == min(1, images)


def test_requests_that_come_together_are_kept_apart(calibrated, grpc, sessions, pixels):
    from tritonclient.grpc import InferInput

    done: list[queue.Queue] = [queue.Queue() for _ in range(12)]
    for index in range(12):
        given = pixels[3 * index : 3 * index + 1 + index % 3]
        tensor = InferInput("pixel_values", list(given.shape), "FP32")
        tensor.set_data_from_numpy(given)
        grpc.async_infer(
            NAME, [tensor], lambda result, error, i=index: done[i].put(error or result)
        )
    settings = settings_in(calibrated[0])
    for index, one in enumerate(done):
        result = one.get(timeout=60)
        given = pixels[3 * index : 3 * index + 1 + index % 3]
        answer = {name: result.as_numpy(name) for name in ("logits", "budget", "macs")}
        (_, budget, cost), near = expected_of(settings, sessions, given, macs_in(settings))
        assert answer["macs"][~near, 0].tolist() == cost[~near].tolist()
        assert answer["budget"][~near, 0].tolist() == budget[~near].tolist()


def test_only_the_outputs_asked_for_are_given(grpc, pixels):
    from tritonclient.grpc import InferInput, InferRequestedOutput

    tensor = InferInput("pixel_values", [2, 1, 32, 32], "FP32")
    tensor.set_data_from_numpy(pixels[:2])
    answer = grpc.infer(NAME, [tensor], outputs=[InferRequestedOutput("budget")])
    assert answer.as_numpy("budget").shape == (2, 1)
    assert answer.as_numpy("logits") is None


def test_images_go_through_the_pipeline(calibrated, client):
    assert calibrated[1].served.entry == client.pipeline() == f"{NAME}_pipeline"
    data = (DATA / "digit.png").read_bytes()
    answer = client.infer(f"{NAME}_pipeline", {"image": np.array([[data]] * 2, np.object_)})
    direct = client.infer(NAME, {"pixel_values": digits_test()[0][:1]})
    best = int(direct["logits"].argmax())
    assert answer["label"][:, 0].tolist() == [str(best).encode()] * 2
    assert answer["budget"].tolist() == direct["budget"].tolist() * 2
    assert answer["macs"].tolist() == direct["macs"].tolist() * 2
    with pytest.raises(InputError, match="image is not a JPEG or PNG file"):
        client.infer(f"{NAME}_pipeline", {"image": np.array([[b"hello"]], np.object_)})


@pytest.mark.parametrize("name", ["complexity", "learned"])
def test_the_other_policies_group_images_by_budget(
    name, calibrated, digit_members, client, grpc, sessions, pixels, counts
):
    """Calibrated into the same repository, and loaded by the server that runs."""
    repository = calibrated[0]
    before = {path: path.stat().st_mtime_ns for path in repository.glob("*_r*/1/model.onnx")}
    done = served(digit_members, repository, name, force=True)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert done.served.entry == NAME
    grpc.load_model(NAME)
    settings = settings_in(repository)
    names = [member.model for member in settings.members]
    seen = [counts(grpc, one) for one in names]
    given = pixels[:32]
    answer = client.infer(NAME, {"pixel_values": given})
    budget = check(answer, settings, sessions, given, macs_in(settings))
    assert len({*budget}) > 1
    for index, one in enumerate(names):
        images, batches = counts(grpc, one) - seen[index]
        assert (images, batches) == ((budget == index).sum(), (budget == index).any())


# Without a server.


def kept(repository):
    return {path: path.read_bytes() for path in repository.rglob("*") if path.is_file()}


def test_another_calibration_is_replaced_by_force_only(calibrated, digit_members):
    repository = calibrated[0]
    before = kept(repository)
    few = {r: digit_members[r] for r in (32, 8)}
    with pytest.raises(InputError) as failure:
        served(few, repository)
    assert str(failure.value) == (
        f"{repository / NAME} is there, with the thresholds of its own calibration; give another "
        "--name, or --force to replace it"
    )
    assert kept(repository) == before


@pytest.mark.parametrize("end", ["", "_pipeline"])
def test_a_foreign_folder_is_found_before_the_calibration(end, digit_members, tmp_path):
    theirs = tmp_path / "repository" / f"{NAME}{end}" / "config.pbtxt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    members = members_of([*digit_members.values()])
    with pytest.raises(InputError, match=r"is there and its config\.pbtxt is not one that"):
        check_cascade(CascadeServeRequest(tmp_path / "repository", members, preprocess=True))
    assert kept(tmp_path) == {theirs: b"mine"}


def test_all_of_a_cascade_is_written_or_nothing(digit_members, tmp_path):
    """Somebody else takes its name while it is calibrated."""
    theirs = tmp_path / "repository" / NAME / "config.pbtxt"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("mine")
    members = members_of([*digit_members.values()])
    result = result_of([one.manifest.macs.merged for one in members], (0.5, 0.5))
    with pytest.raises(InputError, match=r"is there and its config\.pbtxt is not one that"):
        serve_cascade(
            CascadeServeRequest(tmp_path / "repository", members), result, POLICY, Silent()
        )
    assert kept(tmp_path) == {theirs: b"mine"}


@pytest.mark.usefixtures("installation")
def test_a_cascade_that_does_not_answer_is_not_written(digit_members, tmp_path, monkeypatch):
    def broken(*given):
        made = cascade_folder(*given)
        return ModelFolder(made.name, made.config, {**made.files, "1/policy.py": b"import nowhere"})

    monkeypatch.setattr(cascade_module, "cascade_folder", broken)
    said = rf"the self-test failed and nothing was written: .*{NAME}.*nowhere"
    with pytest.raises(InputError, match=said):
        served(digit_members, tmp_path / "repository", preprocess=True, self_test=True)
    assert list(tmp_path.iterdir()) == []


def test_a_self_test_without_a_server_is_refused_before_the_calibration(
    digit_members, tmp_path, monkeypatch
):
    def missing():
        raise MissingComponentError("no server")

    monkeypatch.setattr(serve_module, "find", missing)
    request = CascadeServeRequest(tmp_path, members_of([*digit_members.values()]), self_test=True)
    with pytest.raises(MissingComponentError, match=r"^no server; leave --self-test out$"):
        check_cascade(request)
    done = served(digit_members, tmp_path / "repository", self_test=None)
    assert "No self-test: no server" in done.served.notes


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_is_that_of_the_images_it_is_about(failing, sessions, pixels):
    given = pixels[:8]
    low = policy.confidence(logits_of(sessions[0], given), "max")
    settings = SimpleNamespace(
        policy="confidence",
        measure="max",
        thresholds=[float(np.median(low))],
        members=[SimpleNamespace(model="a", macs=5), SimpleNamespace(model="b", macs=9)],
        policy_macs=1,
    )

    async def ask(member, part):
        if member == failing:
            raise served_model.MemberError("not today")
        return {"logits": logits_of(sessions[member], part)}

    found, errors = asyncio.run(served_model.run_cascade(policy, settings, given, ask))
    unsure = np.flatnonzero(low < np.median(low)).tolist()
    assert 0 < len(unsure) < 8
    assert {*errors} == ({*range(8)} if failing == 0 else {*unsure})
    assert {*errors.values()} == {"not today"}
    sound = [index for index in range(8) if index not in errors]
    assert found["macs"][sound, 0].tolist() == [6] * len(sound)


def test_the_copy_beside_the_model_is_the_calibrations_own_file(calibrated):
    copy = calibrated[0] / NAME / "1" / "policy.py"
    assert copy.read_bytes() == Path(policy.__file__).read_bytes()
    own = served_model.policy_from_file(copy)
    assert own.confidence(np.zeros((1, 2)), "max").tolist() == [0.5]


@pytest.fixture
def member(make_artifact):
    def make(model, **changes):
        artifact = Artifact.open(make_artifact(**changes))
        return file_folder(model_file_from_artifact(artifact), model, ServeOptions()), artifact

    return make


def test_the_folder_of_a_cascade_is_valid(member):
    (low, artifact), (high, _) = member("low"), member("high", batch="1:2:4")
    options = ServeOptions()
    folder = cascade_folder("x_cascade", [low, high], result_of((3, 8), macs=2), POLICY, options)
    assert {*folder.files} == {"1/model.py", "1/cascade.json", "1/policy.py"}
    assert folder.config.max_batch_size == 4
    assert [t.name for t in folder.config.output] == ["logits", "budget", "macs"]
    content = json.loads(folder.files["1/cascade.json"])
    assert content == {
        "policy": "confidence",
        "measure": "max",
        "thresholds": [0.5],
        "policy_macs": 2,
        "members": [{"model": "low", "macs": 3}, {"model": "high", "macs": 8}],
    }
    around = pipeline_folders(artifact, "x_cascade", options, 4, OUTPUTS)
    names = [one.name for one in around]
    assert names == [f"x_cascade_{end}" for end in ("preprocess", "postprocess", "pipeline")]
    assert [t.name for t in around[-1].config.output][-2:] == ["budget", "macs"]
    for one in (folder, *around):
        assert [*problems(one.config, one, {"x_cascade", *names})] == []


@pytest.mark.usefixtures("installation")
def test_a_member_that_fails_many_requests_at_once_leaves_the_server(member, by_hand, tmp_path):
    asked = [member(name)[0] for name in ("low", "high")]
    folder = cascade_folder("x_cascade", asked, result_of((3, 8)), POLICY, ServeOptions())
    folder.config.instance_group[0].count = 1
    folder.config.dynamic_batching.max_queue_delay_microseconds = 200_000
    repository = tmp_path / "repository"
    write(repository, [folder])
    for model in ("low", "high"):
        by_hand.write_refusing(repository, model)
    with running(RunRequest(repository)) as server:

        def ask(part):
            with connect(server.grpc) as client, pytest.raises(InputError, match="not today"):
                client.infer("x_cascade", {"pixel_values": part})

        with ThreadPoolExecutor(4) as pool:
            for _ in range(3):
                assert len([*pool.map(ask, np.zeros((4, 1, 3, 8, 8), np.float32))]) == 4
        assert server.is_alive()
        server.stop(0)


def test_a_repository_keeps_other_thresholds(member, tmp_path):
    asked = [member(name)[0] for name in ("low", "high")]
    options = ServeOptions()
    first, other = (
        cascade_folder("x_cascade", asked, result_of((3, 8), (one,)), POLICY, options)
        for one in (0.5, 0.9)
    )
    assert write(tmp_path, [first])[0].status == "written"
    assert write(tmp_path, [first])[0].status == "unchanged"
    before = kept(tmp_path)
    with pytest.raises(InputError, match="with the thresholds of its own calibration"):
        write(tmp_path, [other])
    assert kept(tmp_path) == before
    assert write(tmp_path, [other], force=True)[0].status == "written"


def test_members_that_make_no_cascade(member):
    low, _ = member("low")
    text = str(low.config).replace('name: "logits"', 'name: "features"')
    other = ModelFolder("other", config_from_text(text, "other"))
    with pytest.raises(InputError, match="models low and other have different inputs or outputs"):
        cascade_folder("x", [low, other], result_of((3, 8)), POLICY, ServeOptions())


def test_the_end_of_the_name_is_reserved():
    with pytest.raises(UsageError, match="names that end in _cascade are given to models made"):
        check_chosen_name("mine_cascade")
