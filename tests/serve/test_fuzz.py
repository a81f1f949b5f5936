"""Whatever is in a repository, a URL, a request's parameters or a log: one line, or an answer."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tome_export.errors import InputError, UsageError
from tome_export.serve.client import parse_url
from tome_export.serve.config import HEADER, ServeOptions
from tome_export.serve.main import ServeRequest, serve
from tome_export.serve.python_models.router import BadRequestError, chosen_route
from tome_export.serve.server_log import (
    LIMIT,
    asked_to_stop,
    failed_models,
    last_words,
    port_in_use,
)

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "40"))
"""More in a longer run."""

fuzzed = settings(
    max_examples=EXAMPLES,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["routes", "model", "r", "ms", "schema", ""]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@st.composite
def damaged(draw, content):
    """Bytes with some cut out, overwritten, doubled or put in."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data)))
        end = draw(st.integers(at, min(len(data), at + 40)))
        data[at:end] = draw(st.binary(max_size=20) | st.just(bytes(data[at:end]) * 2))
    return bytes(data)


@pytest.fixture
def repository(make_artifact, tmp_path):
    """A repository of a router over two models, and what is served into it once more."""
    pytest.importorskip("tritonclient.grpc", reason="the serve extra is not installed")
    made = [
        make_artifact(model="two", r=[r], schedule=f"r={r} constant", batch=batch)
        for r, batch in ((0, "1:4:8"), (4, "1:4:8"), (8, "1:4:8"))
    ]
    folder = tmp_path / "repository"
    serve(ServeRequest(tuple(made[:2]), folder, ServeOptions(preprocess=True)))
    return folder, made[2]


FILES = (
    "two_r0/config.pbtxt",
    "two_router/config.pbtxt",
    "two_r4_pipeline/config.pbtxt",
    "two_router/1/routes.json",
    "two_router_pipeline/1/routes.json",
)


def test_what_lies_in_a_repository(repository):
    folder, artifact = repository
    whole = {name: (folder / name).read_bytes() for name in FILES}
    request = ServeRequest((artifact,), folder, ServeOptions(preprocess=True))

    @fuzzed
    @given(st.data())
    def check(data):
        name = data.draw(st.sampled_from(FILES))
        content = data.draw(
            damaged(whole[name])
            | st.binary(max_size=60).map(lambda tail: HEADER.encode() + tail)
            | JSON.map(lambda value: json.dumps(value).encode())
        )
        (folder / name).write_bytes(content)
        try:
            serve(request)
        except InputError as error:
            assert "\n" not in str(error)  # noqa: PT017
        finally:
            (folder / name).write_bytes(whole[name])

    check()


@fuzzed
@given(
    st.text(max_size=60)
    | st.builds(
        "".join,
        st.lists(
            st.sampled_from(
                ["http://", "grpc://", ":", "8001", "h", "/", "[::1]", "٣", "²", "9" * 5000]
            )
        ),
    ),
    st.sampled_from([None, "grpc", "http"]),
)
def test_urls(url, protocol):
    try:
        address, used, _ = parse_url(url, protocol)
    except UsageError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        port = address.rpartition(":")[2]
        assert used in ("grpc", "http")
        assert port.isascii()
        assert 0 < int(port) < 1 << 16


@fuzzed
@given(st.dictionaries(st.sampled_from(["r", "max_ms", "x"]), JSON, max_size=3))
def test_parameters_of_a_request(parameters):
    routes = [{"model": "a", "r": 0, "ms": 2.0}, {"model": "b", "r": 8, "ms": None}]
    try:
        assert chosen_route(routes, parameters) in routes
    except BadRequestError as error:
        assert str(error)  # noqa: PT017


@fuzzed
@given(
    st.lists(
        st.text(max_size=80)
        | st.sampled_from(
            [
                "E1120 17:26:27.054440 28583 m.cc:642] failed to load 'a' version 1: Internal: x",
                "[libprotobuf ERROR text_format.cc:1] Error parsing text proto",
                "Signal (99999) received.",
                "Signal (15) received.",
                "error: NVML",
                "+--+",
            ]
        ),
        max_size=8,
    ).map("\n".join)
)
def test_logs(log):
    for model, why in failed_models(log).items():
        assert model
        assert len(why) <= LIMIT + 1
    assert len(last_words(log)) <= LIMIT + 1
    assert asked_to_stop(log) is None or port_in_use(log) is not None
