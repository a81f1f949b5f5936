"""Choosing instances and queue delay by measurement."""

from __future__ import annotations

import json

import pytest

from tome_export.errors import InputError, UsageError
from tome_export.serve import analyze
from tome_export.serve.analyze import Setting, serve_analyzed
from tome_export.serve.load import Load
from tome_export.serve.main import ServeOptions, ServeRequest, serve
from tome_export.serve.repository import config_of


def load_of(concurrency, rate, p99):
    return Load(concurrency, 10, rate, {"p50": p99 / 2, "p95": p99, "p99": p99}, 0.1)


@pytest.mark.parametrize(
    ("rates", "p99s", "best", "fits"),
    [
        # More load gives more answers until the limit is passed.
        ([10, 20, 40], [10, 20, 60], 2, True),
        # More load gives no more answers: the rest is not measured.
        ([10, 20, 20.5, 20.4], [10, 20, 30, 40], 4, True),
        ([10, 20, 19, 18], [10, 20, 30, 40], 2, True),
        # One that gives no more may be a moment's.
        ([10, 9, 20, 60, 60, 60], [10, 20, 30, 40, 45, 49], 8, True),
        ([10], [60], 1, False),
    ],
)
def test_load_grows_until_it_gives_no_more(rates, p99s, best, fits):
    measured = []

    def measure(concurrency):
        at = len(measured)
        measured.append(concurrency)
        return load_of(concurrency, rates[at], p99s[at])

    load, found = analyze._most_within(measure, 50)
    assert (load.concurrency, found) == (best, fits)
    assert measured == list(analyze.CONCURRENCY[: len(rates)])


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(limit, make_artifact, tmp_path):
    request = ServeRequest((make_artifact(),), tmp_path / "repository")
    with pytest.raises(UsageError, match=r"p99 is .* ms; expected a number above 0"):
        serve_analyzed(request, limit)


def test_what_the_repository_refuses_is_said_before_anything_is_measured(
    make_artifact, tmp_path, monkeypatch
):
    monkeypatch.setattr(analyze, "_measure", None)
    options = ServeOptions(name="m")
    serve(ServeRequest((make_artifact(size=(8, 16)),), tmp_path / "models", options))
    with pytest.raises(InputError, match=r"m has version 1 with another platform"):
        serve_analyzed(ServeRequest((make_artifact(),), tmp_path / "models", options), 500)


def test_settings_share_the_cores(make_artifact, tmp_path, monkeypatch):
    from tome_export.serve.main import serve

    written = serve(ServeRequest((make_artifact(),), tmp_path / "repository"))
    monkeypatch.setattr(analyze.os, "sched_getaffinity", lambda _: range(4))
    found = analyze.settings_of_this_machine(written.repository, written)
    assert {(one.instances, one.threads) for one in found} == {(1, None), (2, 2), (4, 1)}
    assert {one.max_queue_delay_us for one in found} == {*analyze.QUEUE_DELAYS_US}
    one = make_artifact(batch="1:1:1")
    single = serve(ServeRequest((one,), tmp_path / "single"))
    found = analyze.settings_of_this_machine(single.repository, single)
    assert {one.max_queue_delay_us for one in found} == {0}


@pytest.mark.slow
@pytest.mark.usefixtures("installation")
def test_the_best_setting_is_written(make_artifact, tmp_path):
    """On the real server: two settings are measured, and one of them is what is served."""
    settings = [Setting(1, None, 0), Setting(2, 1, 500)]
    options = ServeOptions(name="m", preprocess=True)
    request = ServeRequest((make_artifact(),), tmp_path / "repository", options)
    done = serve_analyzed(request, 60_000, seconds=0.2, settings=settings)
    assert done.analysis is not None
    assert done.entry == done.analysis.model == "m_pipeline"
    assert [one.setting for one in done.analysis.results] == settings
    best = max(done.analysis.results, key=lambda one: one.load.images_per_second)
    assert done.analysis.chosen == best.setting
    assert all(one.fits and one.load.requests >= 2 for one in done.analysis.results)
    config = config_of(tmp_path / "repository" / "m")
    assert config.instance_group[0].count == best.setting.instances
    delay = config.dynamic_batching.max_queue_delay_microseconds
    assert delay == best.setting.max_queue_delay_us
    assert json.loads(json.dumps(done.to_dict()))["analysis"]["chosen"] == vars(best.setting)
    # No setting fits: nothing is written.
    request = ServeRequest((make_artifact(),), tmp_path / "other", options)
    with pytest.raises(InputError, match=r"no setting keeps the 99th percentile at 0\.001 ms .* n"):
        serve_analyzed(request, 0.001, seconds=0.1, settings=settings[:1])
    assert not (tmp_path / "other").exists()
