"""A calibrated cascade as lines of text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tome_export.cli.output import fields, macs, percent, table
from tome_export.cli.text import RANDOM
from tome_export.cli.tune_text import spread

ROWS = 14
"""Most rows of the sweep, besides the chosen one."""


def cascade_lines(values: Mapping[str, Any]) -> list[str]:
    """All a person wants to know of a cascade."""
    data, chosen = values["data"], values["chosen"]
    served = values.get("served")
    unreadable = len(data["unreadable"])
    return [
        *([RANDOM] if values["random_weights"] else []),
        *fields(
            [
                ("Model", values["model"]),
                ("Policy", _policy(values)),
                ("Target", values["target"]["text"]),
                ("Images", _images(data)),
                ("Calibration", _result(chosen["calibration"], values["metric"])),
                ("Test", _test(values)),
                ("One for all", _single(values["single"])),
            ]
        ),
        "",
        *_members(values),
        "",
        *_sweep(values),
        "",
        *([] if chosen["test"]["met"] else ["Note: the target is missed on the test images"]),
        *([f"Note: {unreadable} images could not be read"] if unreadable else []),
        f"Result: {values['file']}, {values['page']}",
        *([f"Served: {served['entry']} in {served['repository']}"] if served else []),
        *(f"Note: {note}" for note in (served or {}).get("notes", ())),
    ]


def _policy(values: Mapping[str, Any]) -> str:
    settings, own = values["settings"], values["policy_macs"]
    cost = f"; takes {macs(own)} MACs itself" if own else ""
    if values["policy"] == "learned":
        return f"learned, price {settings['price']:.4g}{cost}"
    limits = ", ".join(f"{value:.4g}" for value in settings["thresholds"])
    measure = f" ({settings['measure']})" if values["policy"] == "confidence" else ""
    return f"{values['policy']}{measure}, thresholds {limits}{cost}"


def _images(data: Mapping[str, Any]) -> str:
    fitted = f"{data['fitted']} to train, " if data["fitted"] else ""
    test = data["test_source"] or data["source"]
    return (
        f"{data['source']}: {fitted}{data['calibration']} to calibrate; {test}: {data['test']} to "
        f"test (seed {data['seed']})"
    )


def _result(found: Mapping[str, Any], metric: str) -> str:
    word = "top-1" if metric == "top1" else "agreement"
    return f"{macs(found['macs'])} MACs on average, {word} {percent(found['share'])}"


def _test(values: Mapping[str, Any]) -> str:
    found = values["chosen"]["test"]
    change = found["difference_to_highest"]
    return (
        f"{_result(found, values['metric'])} [{percent(found['low'])}, {percent(found['high'])}], "
        f"{100 * change['share']:+.2f} points against the highest"
    )


def _single(single: Mapping[str, Any] | None) -> str:
    if single is None:
        return "no artifact alone is as accurate on the test images"
    word = "saves" if single["saved"] >= 0 else "costs"
    return (
        f"{macs(single['macs'])} MACs at {percent(single['share'])}: the cascade {word} "
        f"{percent(abs(single['saved']))}"
    )


def _members(values: Mapping[str, Any]) -> list[str]:
    budgets, images = values["chosen"]["test"]["budgets"], values["data"]["test"]
    rows = [
        (
            str(index),
            one["schedule"],
            macs(one["macs"]),
            percent(one["test"]["share"]),
            percent(count / images),
            one["artifact"],
        )
        for index, (one, count) in enumerate(zip(values["members"], budgets, strict=True))
    ]
    headers = ["budget", "schedule", "MACs", "alone", "end here", "artifact"]
    return table(headers, rows, "llrrrl")


def _sweep(values: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            "*" if one["chosen"] else "",
            macs(one["calibration"]["macs"]),
            percent(one["calibration"]["share"]),
            macs(one["test"]["macs"]),
            percent(one["test"]["share"]),
        )
        for one in spread(values["sweep"], ROWS)
    ]
    return table(["", "calibration MACs", "right", "test MACs", "right"], rows, "lrrrr")
