"""Pixels in uint8 on a real server: the answers of float32, and one line for anything else."""

from __future__ import annotations

import io

import numpy as np
import pytest
from google.protobuf import text_format
from PIL import Image

from tome_export.data.samples import digits_test
from tome_export.errors import InputError, MissingComponentError
from tome_export.merge.schedule import Schedule
from tome_export.serve.client import connect
from tome_export.serve.config import ServeOptions
from tome_export.serve.installation import find
from tome_export.serve.main import ServeRequest, serve
from tome_export.serve.query import QueryRequest, query
from tome_export.serve.server import RunRequest, running

pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")

COUNT = 6


@pytest.fixture(scope="module")
def artifacts(built_artifact):
    given = {"schedule": Schedule(8), "check": False}
    raw = built_artifact(**given, input="uint8")
    return {"raw": raw.path, "plain": built_artifact(**given).path}


@pytest.fixture(scope="module")
def repository(artifacts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for name, path in artifacts.items():
        serve(ServeRequest((path,), folder, ServeOptions(name=name, preprocess=True)))
    return folder


@pytest.fixture(scope="module")
def server(repository):
    try:
        find()
    except MissingComponentError as error:
        pytest.skip(str(error))
    with running(RunRequest(repository, gpu=False)) as made:
        yield made
        made.stop(0)


@pytest.fixture(scope="module")
def pixels():
    """``[B, 32, 32, 1]`` uint8."""
    floats = digits_test()[0][:COUNT]
    return np.rint((floats * 0.5 + 0.5) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def png(image):
    stream = io.BytesIO()
    Image.fromarray(image[..., 0]).save(stream, "PNG")
    return stream.getvalue()


def config_of(repository, model):
    from tritonclient.grpc.model_config_pb2 import ModelConfig

    return text_format.Parse((repository / model / "config.pbtxt").read_text(), ModelConfig())


def test_configs_hand_on_a_quarter_of_the_bytes(repository):
    from tritonclient.grpc.model_config_pb2 import TYPE_FP32, TYPE_UINT8

    for given in (
        config_of(repository, "raw").input[0],
        config_of(repository, "raw_preprocess").output[0],
    ):
        assert (given.name, given.data_type) == ("pixel_values", TYPE_UINT8)
        assert [*given.dims] == [32, 32, 1]
    (warmup, *_) = config_of(repository, "raw").model_warmup
    assert warmup.inputs["pixel_values"].data_type == TYPE_UINT8
    assert config_of(repository, "plain_preprocess").output[0].data_type == TYPE_FP32


def test_answers_are_those_of_float32(server, pixels):
    floats = digits_test()[0][:COUNT]
    with connect(server.grpc) as client:
        found = client.infer("raw", {"pixel_values": pixels})["logits"]
        expected = client.infer("plain", {"pixel_values": floats})["logits"]
        np.testing.assert_array_equal(found, expected)
        image = np.array([[png(one)] for one in pixels], np.object_)
        answers, others = (
            client.infer(f"{name}_pipeline", {"image": image}) for name in ("raw", "plain")
        )
        for name, array in answers.items():
            np.testing.assert_array_equal(array, others[name])


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_wrong_pixels_are_refused_in_one_line(server, pixels, protocol):
    cases = [
        ("raw", pixels.astype(np.float32), "data-type is 'FP32', but model 'raw' expects 'UINT8'"),
        ("raw", pixels.transpose(0, 3, 1, 2), r"Expected \[-1,32,32,1\], got \[6,1,32,32\]"),
        ("raw", pixels[:, :16], r"Expected \[-1,32,32,1\], got \[6,16,32,1\]"),
        ("plain", pixels.transpose(0, 3, 1, 2), "is 'UINT8', but model 'plain' expects 'FP32'"),
    ]
    with connect(getattr(server, protocol), protocol) as client:
        for model, given, expected in cases:
            with pytest.raises(InputError, match=expected) as error:
                client.infer(model, {"pixel_values": np.ascontiguousarray(given)})
            assert "\n" not in str(error.value)
        # It goes on answering.
        assert client.infer("raw", {"pixel_values": pixels})["logits"].shape == (COUNT, 10)


def test_query_sends_files(server, pixels, tmp_path):
    file = tmp_path / "digit.png"
    file.write_bytes(png(pixels[0]))
    answers = {
        name: query(QueryRequest(server.grpc, [file], name)).answers[0].labels
        for name in ("raw", "plain")
    }
    assert answers["raw"] == answers["plain"]
