"""``tome-export cascade``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tome_export.cli.options import FILE, order_option, output_options, self_test_option
from tome_export.cli.output import Terminal, fields, macs, percent, table
from tome_export.cli.progress import working
from tome_export.cli.text import RANDOM
from tome_export.cli.tune import goal_from_option, the_target, thinned
from tome_export.errors import ExportError, InputError, UsageError

if TYPE_CHECKING:
    from tome_export.artifact.cascade import Cascade, CascadeScore

ROWS = 14
"""Most rows of the sweep, besides the chosen one."""


@click.command("cascade", short_help="A budget for each image, out of several artifacts.")
@click.argument("artifacts", nargs=-1, required=True, type=FILE, metavar="LOW HIGH [MORE]...")
@click.option(
    "--data",
    multiple=True,
    required=True,
    metavar="FOLDER|SHARDS|samples",
    help="Images: accuracy with class sub-folders, else agreement with the highest artifact.",
)
@click.option(
    "--policy",
    type=click.Choice(["complexity", "confidence", "learned"]),
    default="confidence",
    show_default=True,
    help="What decides which artifact an image gets.",
)
@click.option(
    "--target-macs",
    metavar="50%|8.7G",
    help="A mean of at most so many MACs per image, or of the highest artifact's.",
)
@click.option(
    "--min-accuracy",
    metavar="-0.5|97.2",
    help="-0.5: at most half a point below the highest artifact; 97.2: percent.",
)
@click.option(
    "--test",
    multiple=True,
    metavar="FOLDER|SHARDS|samples",
    help="Measure on these images.  [default: a part of --data]",
)
@click.option("--labels", type=FILE, metavar="FILE", help="Labels for a folder of --data.")
@click.option("--test-labels", type=FILE, metavar="FILE", help="Labels for one of --test.")
@order_option
@click.option(
    "--calibration",
    default=0.5,
    show_default=True,
    metavar="SHARE",
    help="Share of --data that is calibrated on, without --test.",
)
@click.option(
    "--measure",
    type=click.Choice(["max", "margin"]),
    default="max",
    show_default=True,
    help="Confidence: the largest probability, or its lead over the second.",
)
@click.option(
    "--lambda",
    "strength",
    default=1.0,
    show_default=True,
    help="Learned: weight of the squared distance from the target cost in training.",
)
@click.option("--limit", type=int, metavar="N", help="Most images.  [default: 2048]")
@click.option("--seed", default=0, show_default=True, help="Of the split of the images.")
@click.option("--backend", default="ort-cpu", show_default=True, help="What runs the artifacts.")
@click.option(
    "-o", "--output", type=FILE, default="cascade.json", show_default=True, metavar="FILE"
)
@click.option(
    "--repository", type=FILE, metavar="DIR", help="Serve the cascade from this repository."
)
@click.option("--name", help="What the names of its models begin with.  [default: <model>]")
@click.option(
    "--preprocess", is_flag=True, help="Also a pipeline from JPEG or PNG bytes to labels."
)
@self_test_option
@click.option("--force", is_flag=True, help="Replace existing files.")
@output_options
@click.pass_obj
def command(
    terminal: Terminal,
    /,
    artifacts: tuple[Path, ...],
    output: Path,
    repository: Path | None,
    name: str | None,
    preprocess: bool,
    self_test: bool | None,
    force: bool,
    **given: Any,
) -> None:
    """Calibrate which of several artifacts of one model an image gets; give exactly one target.

    complexity chooses by the differences of neighbouring pixels. confidence starts at the lowest
    artifact and goes on to the next while it is unsure. learned chooses by a linear head on the
    pooled patch embedding.
    """
    target = the_target(given, "target_macs", "min_accuracy")
    page = output.with_suffix(".html")
    with working(terminal) as progress:
        from tome_export.artifact.files import check_new_file, write_whole, writing_to
        from tome_export.cascade import policy
        from tome_export.cascade.main import CascadeRequest, cascade, members_of
        from tome_export.report.page import render_cascade
        from tome_export.serve.cascade import CascadeServeRequest, check_cascade, serve_cascade

        goal = goal_from_option(target, given[target])
        kept = {k: v for k, v in given.items() if k not in ("target_macs", "min_accuracy")}
        if repository is None and (preprocess or name is not None or self_test):
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
        serving = None
        if repository is not None:
            serving = CascadeServeRequest(repository, members, name, preprocess, force, self_test)
            check_cascade(serving)
        found = cascade(CascadeRequest(members, goal=goal, **kept), progress)
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
    where = "" if unrecorded else ", ".join(files.values())
    terminal.recorded(values, cascade_lines(found, where), unrecorded)


def cascade_lines(found: Cascade, files: str) -> list[str]:
    """All a person wants to know of a cascade, and the files that hold it, if any do."""
    data, served, test = found.data, found.served, found.chosen.test
    unreadable = len(data.unreadable)
    fitted = f"{data.fitted} to train, " if data.fitted else ""
    images = (
        f"{data.source}: {fitted}{data.calibration} to calibrate; "
        f"{data.test_source or data.source}: {data.test} to test (seed {data.seed})"
    )
    return [
        *([RANDOM] if found.random_weights else []),
        *fields(
            [
                ("Model", found.model),
                ("Policy", _policy(found)),
                ("Target", found.target.text),
                ("Images", images),
                ("Calibration", _score(found.chosen.calibration, found.metric)),
                (
                    "Test",
                    f"{_score(test, found.metric)} [{percent(test.low)}, {percent(test.high)}], "
                    f"{100 * test.difference_to_highest.share:+.2f} points against the highest",
                ),
                ("One for all", _single(found)),
            ]
        ),
        "",
        *_members(found),
        "",
        *_sweep(found),
        "",
        *([] if test.met else ["Note: the target is missed on the test images"]),
        *([f"Note: {unreadable} images could not be read"] if unreadable else []),
        *(f"Note: {note}" for note in data.notes),
        *([f"Result: {files}"] if files else []),
        *([f"Served: {served.entry} in {served.repository}"] if served else []),
        *(f"Note: {note}" for note in (served.notes if served else ())),
    ]


def _policy(found: Cascade) -> str:
    policy = found.settings
    cost = f"; takes {macs(found.policy_macs)} MACs itself" if found.policy_macs else ""
    if policy.policy == "learned":
        return f"learned, price {policy.price:.4g}{cost}"
    limits = ", ".join(f"{value:.4g}" for value in policy.thresholds)
    measure = f" ({policy.measure})" if policy.policy == "confidence" else ""
    return f"{policy.policy}{measure}, thresholds {limits}{cost}"


def _score(score: CascadeScore, metric: str) -> str:
    word = "top-1" if metric == "top1" else "agreement"
    return f"{macs(score.macs)} MACs on average, {word} {percent(score.share)}"


def _single(found: Cascade) -> str:
    single = found.single
    if single is None:
        return "no artifact alone is as accurate on the test images"
    word = "saves" if single.saved >= 0 else "costs"
    return (
        f"{macs(single.macs)} MACs at {percent(single.share)}: the cascade {word} "
        f"{percent(abs(single.saved))}"
    )


def _members(found: Cascade) -> list[str]:
    rows = [
        (
            str(index),
            one.schedule,
            macs(one.macs),
            percent(one.test.share),
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
            macs(one.calibration.macs),
            percent(one.calibration.share),
            macs(one.test.macs),
            percent(one.test.share),
        )
        for one in thinned(found.sweep, ROWS)
    ]
    return table(["", "calibration MACs", "right", "test MACs", "right"], rows, "lrrrr")
