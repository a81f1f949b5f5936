"""``tome-export cascade``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from tome_export.cli.format import RANDOM, fields, table
from tome_export.cli.options import FILE, LabelsGroup, SelfTestGroup, grouped_command, option
from tome_export.cli.output import Terminal
from tome_export.cli.progress import working
from tome_export.cli.tune import Targets, thinned
from tome_export.display import percent, scored, short_macs
from tome_export.errors import ExportError, InputError, UsageError

if TYPE_CHECKING:
    from tome_export.artifact.cascade import Cascade, CascadeScore

ROWS = 14
"""Most rows of the sweep, besides the chosen one."""


class CascadeOptions(Targets, LabelsGroup, SelfTestGroup):
    """Target."""

    target_macs: str | None = option(
        metavar="50%|8.7G",
        help="A mean of at most so many MACs per image, or of the highest artifact's.",
    )
    min_accuracy: str | None = option(
        metavar="-0.5|97.2",
        help="-0.5: at most half a point below the highest artifact; 97.2: percent.",
    )
    min_similarity: float | None = option(
        metavar="0.98",
        help="Of features or maps: mean similarity to those of the highest artifact, 0 to 1.",
    )
    data: tuple[str, ...] = option(
        heading="Images",
        required=True,
        metavar="FOLDER|SHARDS|samples",
        help="Images: accuracy with class sub-folders, else agreement with the highest artifact; "
        "similarity to its features or maps.",
    )
    test: tuple[str, ...] = option(
        heading="Images",
        metavar="FOLDER|SHARDS|samples",
        help="Measure on these images.  [default: a part of --data]",
    )
    test_labels: Path | None = option(
        heading="Images", metavar="FILE", help="Labels for one of --test."
    )
    calibration: float = option(
        heading="Images",
        default=0.5,
        metavar="SHARE",
        help="Share of --data that is calibrated on, without --test.",
    )
    limit: int | None = option(heading="Images", metavar="N", help="Most images.  [default: 2048]")
    seed: int = option(
        heading="Images", default=0, show_default=True, help="Of the split of the images."
    )
    policy: Literal["complexity", "confidence", "learned"] = option(
        heading="Policy", default="confidence", help="What decides which artifact an image gets."
    )
    measure: Literal["max", "margin"] = option(
        heading="Policy",
        default="max",
        help="Confidence: the largest probability, or its lead over the second.",
    )
    strength: float = option(
        "--lambda",
        heading="Policy",
        default=1.0,
        help="Learned: weight of the squared distance from the target cost in training.",
    )
    backend: str = option(heading="Engine", default="ort-cpu", help="What runs the artifacts.")
    repository: Path | None = option(
        heading="Server", metavar="DIR", help="Serve the cascade from this repository."
    )
    name: str | None = option(
        heading="Server", help="What the names of its models begin with.  [default: <model>]"
    )
    preprocess: bool = option(
        heading="Server", help="Also a pipeline from JPEG or PNG bytes to labels."
    )
    output: Path = option(
        "-o", "--output", heading="Output", default="cascade.json", metavar="FILE"
    )
    force: bool = option(heading="Output", help="Replace existing files.")


@grouped_command(
    "cascade",
    "A budget for each image, out of several artifacts.",
    example="tome-export cascade vit_b16-r16 vit_b16-r8 --data imagenet/val --target-macs 60%",
)
@click.argument("artifacts", nargs=-1, required=True, type=FILE, metavar="LOW HIGH [MORE]...")
def command(terminal: Terminal, /, artifacts: tuple[Path, ...], options: CascadeOptions) -> None:
    """Calibrate which of several artifacts of one model an image gets; give exactly one target.

    complexity chooses by the differences of neighbouring pixels. confidence starts at the lowest
    artifact and goes on to the next while it is unsure. learned chooses by a linear head on the
    pooled patch embedding. Artifacts that give features or maps have complexity and learned.
    """
    output, repository, force = options.output, options.repository, options.force
    page = output.with_suffix(".html")
    with working(terminal) as progress:
        goal = options.goal("target_macs", "min_accuracy", "min_similarity")
        from tome_export.artifact.files import check_new_file, write_whole, writing_to
        from tome_export.cascade import policy
        from tome_export.cascade.main import CascadeRequest, cascade, check_kind, members_of
        from tome_export.report.page import render_cascade
        from tome_export.serve.cascade import CascadeServeRequest, check_cascade, serve_cascade

        request = options.request(CascadeRequest, members=(), goal=goal)
        request.check()  # before the artifacts, which take longer
        if repository is None and (
            options.preprocess or options.name is not None or options.self_test
        ):
            raise UsageError(
                "--preprocess, --name and --self-test are for what is served; give --repository too"
            )
        if output == page:
            raise UsageError(
                f"output is {page}, which is the page's name; give one such as a .json"
            )
        check_new_file(output, force=force)
        check_new_file(page, force=force)
        progress.stage("Verify the artifacts")
        members = members_of(artifacts)
        check_kind(members, options.policy, goal)
        serving = None
        if repository is not None:
            serving = options.request(CascadeServeRequest, members=members)
            check_cascade(serving)
        found = cascade(replace(request, members=members), progress)
        unrecorded = None
        try:
            if serving is not None:
                served = serve_cascade(serving, found, Path(policy.__file__), progress)
                found = found.model_copy(update={"served": served})
            # The page first: where the result is, its page is too.
            contents = {page: render_cascade(found).encode(), output: found.json_bytes()}
            for path, content in contents.items():
                with writing_to(path, "file"):
                    write_whole(path, content)
        except (InputError, ExportError) as error:
            unrecorded = str(error)
    files = {"file": str(output), "page": str(page)}
    values = {**files, **found.model_dump(mode="json")}
    values |= {"unrecorded": unrecorded} if unrecorded else {}
    terminal.recorded(values, _lines(found, {} if unrecorded else files), unrecorded)


def _lines(found: Cascade, files: Mapping[str, str]) -> list[str]:
    """All a person wants to know of a cascade, and the files that hold it, if any do."""
    data, served, test = found.data, found.served, found.chosen.test
    fitted = f"{data.fitted} to train, " if data.fitted else ""
    images = f"{data.source}: {fitted}{data.calibration} to calibrate; "
    images += f"{data.test_source or data.source}: {data.test} to test (seed {data.seed})"
    interval = f"[{scored(test.low, found.metric)}, {scored(test.high, found.metric)}]"
    change = ""
    if test.difference_to_highest is not None:
        change = f", {100 * test.difference_to_highest.share:+.2f} points against the highest"
    facts = {
        "Model": found.model,
        "Policy": _policy(found),
        "Target": found.target.text,
        "Images": images,
        "Calibration": _score(found.chosen.calibration, found.metric),
        "Test": f"{_score(test, found.metric)} {interval}{change}",
        "One for all": _single(found),
    }
    lines = [RANDOM] if found.random_weights else []
    lines += [*fields(facts), "", *_members(found), "", *_sweep(found), ""]
    if not test.met:
        lines.append("Note: the target is missed on the test images")
    if data.unreadable:
        first = data.unreadable[0]
        lines.append(
            f"Note: {len(data.unreadable)} images could not be used; the first is {first.name}: "
            f"{first.reason}"
        )
    lines += [f"Note: {note}" for note in data.notes]
    if files:
        lines.append(f"Result: {', '.join(files.values())}")
    if served:
        lines.append(f"Served: {served.entry} in {served.repository}")
        lines += [f"Note: {note}" for note in served.notes]
    return lines


def _policy(found: Cascade) -> str:
    policy = found.settings
    cost = f"; takes {short_macs(found.policy_macs)} MACs itself" if found.policy_macs else ""
    if policy.policy == "learned":
        return f"learned, price {policy.price:.4g}{cost}"
    limits = ", ".join(f"{value:.4g}" for value in policy.thresholds)
    measure = f" ({policy.measure})" if policy.policy == "confidence" else ""
    return f"{policy.policy}{measure}, thresholds {limits}{cost}"


def _score(score: CascadeScore, metric: str) -> str:
    word = "top-1" if metric == "top1" else metric
    return f"{short_macs(score.macs)} MACs on average, {word} {scored(score.share, metric)}"


def _single(found: Cascade) -> str:
    single = found.single
    if single is None:
        word = "similar" if found.metric == "similarity" else "accurate"
        return f"no artifact alone is as {word} on the test images"
    word = "saves" if single.saved >= 0 else "costs"
    score = scored(single.share, found.metric)
    cost = f"{short_macs(single.macs)} MACs at {score}"
    return f"{cost}: the cascade {word} {percent(abs(single.saved))}"


def _members(found: Cascade) -> list[str]:
    rows = [
        (
            str(index),
            one.schedule,
            short_macs(one.macs),
            scored(one.test.share, found.metric),
            percent(count / found.data.test),
            one.artifact,
        )
        for index, (one, count) in enumerate(
            zip(found.members, found.chosen.test.budgets, strict=True)
        )
    ]
    headers = ["budget", "schedule", "MACs", "alone", "end here", "artifact"]
    return table(headers, rows, "llrrrl")


def _sweep(found: Cascade) -> list[str]:
    rows = [
        (
            "*" if one.chosen else "",
            short_macs(one.calibration.macs),
            scored(one.calibration.share, found.metric),
            short_macs(one.test.macs),
            scored(one.test.share, found.metric),
        )
        for one in thinned(found.sweep, ROWS)
    ]
    word = "similarity" if found.metric == "similarity" else "right"
    return table(["", "calibration MACs", word, "test MACs", word], rows, "lrrrr")
