"""A model with a second input through everything that runs an artifact."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tome_export
from tome_export.artifact import Artifact
from tome_export.artifact.manifest import Tensor, read_manifest
from tome_export.bench.main import BenchRequest, bench
from tome_export.build import BuildRequest, build
from tome_export.data.preprocess import find_images
from tome_export.errors import InputError, MissingComponentError, UsageError
from tome_export.evaluate.main import EvalRequest, evaluate
from tome_export.models.facts import DATA
from tome_export.parity.main import CheckRequest, check
from tome_export.predict import PredictRequest, predict
from tome_export.report.main import ReportRequest, report
from tome_export.runtime.inputs import extra_inputs, inputs_from_file
from tome_export.runtime.torch import TorchRunner
from tome_export.serve.config import config_from_text
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.query import QueryRequest, query
from tome_export.spec import INPUT_NAME
from tome_export.visualize.main import InspectRequest, inspect

DIGIT = DATA / "digit.png"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    path = tmp_path_factory.mktemp("query") / "artifact"
    options = ("weights=random", "width=24")
    return build(
        BuildRequest("vit_digits", path, reducer="query", reducer_options=options, engine="none")
    )


@pytest.fixture
def vector(tmp_path):
    np.save(tmp_path / "query.npy", np.linspace(-1, 1, 24))
    return tmp_path / "query.npy"


def test_the_manifest_lists_it(artifact):
    query = Tensor(name="query", dtype="float32", shape=("batch", 24))
    assert artifact.manifest.inputs[1:] == (query,)
    assert extra_inputs(artifact.manifest) == {"query": (24,)}
    assert read_manifest(artifact.path).parity.passed


def test_check(artifact):
    result = check(CheckRequest(artifact.path))
    assert result.passed
    assert result.accuracy is None


@pytest.mark.parametrize("backend", ["ort-cpu", "torch"])
def test_bench(artifact, backend):
    result = bench(BenchRequest(artifact.path, (2,), rounds=1, warmup=1, backends=(backend,)))
    assert result.bench.rows[0].merged.peak_memory_bytes > 0
    assert "Given for query: random vectors of unit length" in result.bench.notes
    assert len(result.bench.profile) == (backend == "ort-cpu")


def test_eval_and_report_say_that_they_cannot(artifact):
    with pytest.raises(InputError, match="takes query with every image, which 'tome-export eval'"):
        evaluate(EvalRequest(artifact.path, ("samples",)))
    written = report(ReportRequest(artifact.path, samples=1))
    assert "which 'tome-export report' cannot give" in written.note


def test_inspect_draws_what_a_query_keeps(artifact, vector, tmp_path):
    drawn = []
    for sign in (1, -1):
        np.save(vector, sign * np.linspace(-1, 1, 24))
        output = tmp_path / f"drawn{sign}"
        result = inspect(InspectRequest(artifact.path, (DIGIT,), output=output, query=vector))
        drawn.append((output / result.pictures[0].file).read_bytes())
    assert drawn[0] != drawn[1]
    with pytest.raises(UsageError, match=r"^the model takes query \[24\] with every image; give "):
        inspect(InspectRequest(artifact.path, (DIGIT,), output=tmp_path / "none"))


def test_load_and_predict_take_it(artifact, vector, tmp_path):
    given = np.load(vector)
    with tome_export.load(artifact.path) as model:
        with pytest.raises(
            UsageError, match=r"^the model takes query \[24\] with every image; giv"
        ):
            model(DIGIT)
        with pytest.raises(InputError, match=r"^query has shape \[24, 1\]; expected 2 rows, one p"):
            model([DIGIT, DIGIT], query=given[:, None])
        one = model(DIGIT, query=np.float32(given)).labels[0]
        rows = np.float32([given, -given])
        two = model([DIGIT, DIGIT], query=rows).labels
    assert (two[0] == one, two[1] == one) == (True, False)
    assert predict(PredictRequest(artifact.path, (DIGIT,), query=vector)).answers[0].labels == one
    # What is left of a batch keeps its own rows.
    (tmp_path / "broken.png").write_text("no image")
    np.save(tmp_path / "three.npy", rows[[0, 0, 1]])
    images = (DIGIT, tmp_path / "broken.png", DIGIT)
    found = predict(PredictRequest(artifact.path, images, query=tmp_path / "three.npy"))
    assert [answer.labels for answer in found.answers] == two
    with pytest.raises(UsageError, match=r"the model takes query \[24\] with every image; give it"):
        predict(PredictRequest(artifact.path, (DIGIT,)))


def test_served_models_take_it(artifact, tmp_path):
    pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")
    options = ServeOptions(name="digits", preprocess=True)
    serve(ServeRequest((artifact.path,), tmp_path / "models", options))
    for name, images in (("digits", INPUT_NAME), ("digits_pipeline", "image")):
        text = (tmp_path / "models" / name / "config.pbtxt").read_text()
        config = config_from_text(text, name)
        assert [(one.name, list(one.dims)) for one in config.input][1:] == [("query", [24])]
        assert config.input[0].name == images
    assert dict(config.ensemble_scheduling.step[1].input_map) == {
        INPUT_NAME: INPUT_NAME,
        "query": "query",
    }


def test_a_server_answers_to_image_and_query(artifact, vector, tmp_path):
    from tome_export.runtime.model import reference_model
    from tome_export.serve.installation import find
    from tome_export.serve.server import RunRequest, running

    pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")
    try:
        find()
    except MissingComponentError as error:
        pytest.skip(str(error))
    options = ServeOptions(name="digits", preprocess=True)
    serve(ServeRequest((artifact.path,), tmp_path / "models", options))
    with running(RunRequest(tmp_path / "models", gpu=False)) as server:
        url = f"grpc://{server.grpc}"
        answer = query(QueryRequest(url, (DIGIT,), query=vector)).answers[0]
        with pytest.raises(UsageError, match=r"the model takes query \[24\] with every image"):
            query(QueryRequest(url, (DIGIT,)))
    model, recipe = reference_model(Artifact.open(artifact.path))
    from tome_export.data.preprocess import load_images

    pixels = load_images(find_images(DIGIT), recipe.preprocessing)
    given = inputs_from_file({"query": (24,)}, vector, 1)
    logits = TorchRunner(model, "logits").infer({INPUT_NAME: pixels, **given})["logits"][0]
    share = np.exp(logits - logits.max())
    assert answer.labels[0].index == logits.argmax()
    assert answer.labels[0].score == pytest.approx(share.max() / share.sum(), abs=1e-4)


def write(path, content):
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)


@pytest.mark.parametrize(
    ("shapes", "content", "error", "message"),
    [
        ({}, np.ones(2), UsageError, "--query is {}, but the model takes images only; leave it "
         "out"),
        ({"query": (2,)}, None, InputError, "query file {} cannot be read (No such file or "
         "directory)"),
        ({"query": (2,)}, b"no numpy", InputError, "query file {} holds no array of numbers; write "
         "one with numpy.save"),
        ({"query": (2,)}, np.ones((2, 2)), InputError, "query file {} holds float64 [2, 2]; "
         "expected finite numbers of shape [2], or [3, 2] for 3 images"),
        ({"query": (2,)}, np.array([1, np.nan]), InputError, "query file {} holds float64 [2]; "
         "expected finite numbers of shape [2], or [3, 2] for 3 images"),
        ({"query": (2,)}, np.array(["a", "b"]), InputError, "query file {} holds <U1 [2]; expected "
         "finite numbers of shape [2], or [3, 2] for 3 images"),
    ],
)  # fmt: skip
def test_bad_files(tmp_path, shapes, content, error, message):
    path = tmp_path / "query.npy"
    if content is not None:
        write(path, content)
    with pytest.raises(error, match=f"^{re.escape(message.format(path))}$"):
        inputs_from_file(shapes, path, 3)


def test_files_of_one_vector_or_one_per_image(tmp_path):
    path = tmp_path / "query.npy"
    for array in (np.arange(2), np.arange(6).reshape(3, 2)):
        np.save(path, array)
        found = inputs_from_file({"query": (2,)}, path, 3)["query"]
        assert (found.shape, found.dtype) == ((3, 2), np.float32)
        assert (found == array).all()
