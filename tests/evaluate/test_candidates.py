"""The models that are compared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tome_export.errors import InputError
from tome_export.evaluate import candidates
from tome_export.progress import Silent


def test_a_schedule_is_refused_before_anything_is_exported(monkeypatch):
    model = SimpleNamespace(layers=[SimpleNamespace(r=2)], macs=lambda: 1)

    def rescheduled(_model, schedule):
        if schedule.r == 4:
            raise InputError("no such schedule")
        return SimpleNamespace(layers=[SimpleNamespace(r=schedule.r)], macs=lambda: 1)

    monkeypatch.setattr(candidates, "model_from_artifact", lambda *_: None)
    monkeypatch.setattr(candidates, "rescheduled", rescheduled)
    monkeypatch.setattr(candidates, "exported_variant", lambda *_: pytest.fail("exported"))
    with (
        pytest.raises(InputError, match="no such schedule"),
        candidates.candidates_of(None, model, "ort-cpu", ["unmerged"], [4], Silent()),
    ):
        pass
