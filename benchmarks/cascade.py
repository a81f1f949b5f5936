"""How many MACs does a budget per image save over the best single r, at equal accuracy?

vit_digits on its 450 test images. Cascades of r = 32, 16 and 8 are calibrated by
``tome-export cascade`` for mean costs between those of the lowest and the highest, served by a real
server, and asked for every image as a PNG file; accuracy and MACs are those of the server's
answers. No image is reported that its thresholds were calibrated on:

- ``halves``: calibrated on one half of the test images, measured on the other, and the other way
  round, so that each image is measured once;
- ``training``: calibrated on the 1,347 images that the weights were trained on, measured on all.

The baseline is every constant r from 8 to 32 on the same 450 images, in PyTorch. A cascade is held
against the cheapest that is at least as accurate, nothing interpolated. It is picked on the very
images that are reported, which favours the baseline. Rows ``seeds`` repeat ``halves`` for other
splits without a server, from the sweep that the command writes.

    python -m benchmarks.cascade [--seeds 5] [--no-write]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tritonclient.grpc as grpc
from numpy.typing import NDArray
from PIL import Image

from benchmarks.harness import write_rows
from tome_export.artifact import Artifact
from tome_export.artifact.cascade import Cascade, PolicyName
from tome_export.artifact.goal import Goal
from tome_export.build import BuildRequest, build
from tome_export.cascade import policy as policies
from tome_export.cascade.main import CascadeRequest, cascade, members_of
from tome_export.data.metrics import share_of
from tome_export.data.samples import digits_test
from tome_export.merge.schedule import Schedule
from tome_export.models import resolve
from tome_export.models.facts import DATA
from tome_export.patch import patch
from tome_export.progress import Silent
from tome_export.serve.cascade import CascadeServeRequest, serve_cascade
from tome_export.serve.client import connect
from tome_export.serve.names import CASCADE
from tome_export.serve.server import RunRequest, running

MODEL = "vit_digits"
MEMBERS = (32, 16, 8)
SINGLE = tuple(range(8, 33))
POLICIES: tuple[tuple[PolicyName, str], ...] = (
    ("confidence", "max"),
    ("complexity", ""),
    ("learned", ""),
)
"""And the measure of the confidence; all served."""

MORE: tuple[tuple[PolicyName, str], ...] = (("confidence", "margin"),)
"""In the rows without a server too."""

SHARES = (42, 46, 50, 55, 60, 70)
"""Targets, in percent of the highest member's MACs."""

BATCH = 32


@dataclass(frozen=True)
class Fold:
    """Folders of images with a sub-folder for each class.

    Attributes:
        data: Calibrated on.
        test: Measured on.
    """

    data: Path
    test: Path


@dataclass(frozen=True)
class Answers:
    """What a server said of each test image: whether that is right, its MACs, its budget."""

    right: NDArray[np.bool_]
    macs: NDArray[np.int64]
    budget: NDArray[np.int32]


def write_images(folder: Path, images: NDArray[np.uint8], labels: NDArray[Any]) -> Path:
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        path = folder / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def training_images() -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Those of scripts/train_vit_digits.py: scikit-learn's digits without the test images."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    with np.load(DATA / "digits_test.npz") as archive:
        test = {image.tobytes() for image in archive["images"]}
    kept = [index for index, image in enumerate(images) if image.tobytes() not in test]
    return images[kept], digits.target[kept]


def halves(folder: Path, seed: int) -> list[Fold]:
    """Both ways to take one half of the test images for calibration, drawn within each class."""
    with np.load(DATA / "digits_test.npz") as archive:
        images, labels = archive["images"], archive["labels"]
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    first, second = (
        write_images(folder / f"{seed}_{name}", images[rows], labels[rows])
        for name, rows in (("even", order[::2]), ("odd", order[1::2]))
    )
    return [Fold(first, second), Fold(second, first)]


def calibrated(
    members: tuple[Artifact, ...], fold: Fold, policy: tuple[PolicyName, str], goal: Goal
) -> Cascade:
    more: dict[str, Any] = {"measure": policy[1]} if policy[0] == "confidence" else {}
    more["test"] = (str(fold.test),)
    return cascade(CascadeRequest(members, (str(fold.data),), policy[0], goal, **more))


@contextmanager
def server_of(
    members: tuple[Artifact, ...], fold: Fold, folder: Path
) -> Iterator[Callable[[tuple[PolicyName, str], int], Answers]]:
    """A server on a repository, whose cascade is calibrated and loaded anew for each call."""
    repository = folder / f"repository_{fold.test.name}"

    serving = CascadeServeRequest(repository, members, preprocess=True, force=True)

    def served(policy: tuple[PolicyName, str], share: int) -> str:
        found = calibrated(members, fold, policy, Goal.target_macs(f"{share}%"))
        return serve_cascade(serving, found, Path(policies.__file__), Silent()).entry

    paths = sorted(fold.test.rglob("*.png"))
    truth = np.array([path.parent.name.encode() for path in paths], np.object_)
    entry = served(POLICIES[0], SHARES[0])
    with (
        running(RunRequest(repository, gpu=False, control="explicit", load=["*"])) as server,
        connect(server.grpc, seconds=300) as client,
        grpc.InferenceServerClient(server.grpc) as control,
    ):

        def ask(policy: tuple[PolicyName, str], share: int) -> Answers:
            served(policy, share)
            control.load_model(f"{MODEL}{CASCADE}")
            answers = []
            for first in range(0, len(paths), BATCH):
                data = [[path.read_bytes()] for path in paths[first : first + BATCH]]
                answers.append(client.infer(entry, {"image": np.array(data, np.object_)}))
            label, macs, budget = (
                np.concatenate([answer[name][:, 0] for answer in answers])
                for name in ("label", "macs", "budget")
            )
            return Answers(label == truth, macs, budget)

        yield ask
        server.stop(0)


def single_rows() -> list[dict[str, Any]]:
    """Every constant r alone, in PyTorch, on all test images."""
    pixels, labels = digits_test()
    module = resolve(MODEL).load(weights="pretrained").module
    rows = []
    for r in SINGLE:
        model = patch(module, Schedule(r)).eval()
        with torch.inference_mode():
            best = model(torch.from_numpy(pixels)).argmax(dim=1).numpy()
        rows.append(
            {
                "benchmark": "cascade",
                "kind": "single",
                "r": r,
                "per_layer": [layer.r for layer in model.layers],
                "macs": model.macs(),
                "top1": share_of(best == labels).model_dump(),
            }
        )
    return rows


def against(single: Sequence[Mapping[str, Any]], share: float, macs: float) -> dict[str, Any]:
    """The cheapest single r that is at least as accurate, and what is saved."""
    able = min((s for s in single if s["top1"]["share"] >= share), key=lambda s: s["macs"])
    best = {"r": able["r"], "macs": able["macs"], "top1": able["top1"]["share"]}
    return {"single": best, "saved": 1 - macs / able["macs"]}


def served_rows(
    members: tuple[Artifact, ...],
    splits: Mapping[str, Sequence[Fold]],
    single: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[dict[str, Any]]:
    rows = []
    for name, folds in splits.items():
        with ExitStack() as stack:
            asks = [stack.enter_context(server_of(members, fold, folder)) for fold in folds]
            for policy, share in itertools.product(POLICIES, SHARES):
                found = [ask(policy, share) for ask in asks]
                right = np.concatenate([one.right for one in found])
                macs = np.concatenate([one.macs for one in found])
                budget = np.concatenate([one.budget for one in found])
                mean, top1 = float(macs.mean()), share_of(right).model_dump()
                rows.append(
                    {
                        "benchmark": "cascade",
                        "kind": "served",
                        "calibrated_on": name,
                        "calibration_images": sum(
                            len([*fold.data.rglob("*.png")]) for fold in folds
                        ),
                        "policy": policy[0],
                        "measure": policy[1] if policy[0] == "confidence" else None,
                        "members": MEMBERS,
                        "target_percent": share,
                        "macs": mean,
                        "top1": top1,
                        "budgets": np.bincount(budget, minlength=len(MEMBERS)).tolist(),
                        **against(single, top1["share"], mean),
                    }
                )
                show(rows[-1])
    return rows


def seed_rows(
    members: tuple[Artifact, ...],
    seeds: Sequence[int],
    single: Sequence[Mapping[str, Any]],
    folder: Path,
) -> list[dict[str, Any]]:
    """Means over the splits: of each the setting that the target would have chosen."""
    rows = []
    folds = [fold for seed in seeds for fold in halves(folder, seed)]
    for policy in (*POLICIES, *MORE):
        goal = Goal.min_accuracy("1")
        sweeps = [calibrated(members, fold, policy, goal) for fold in folds]
        for share in SHARES:
            picked = [
                [p for p in found.sweep if p.calibration.macs <= most][-1].test
                for found in sweeps
                for most in [share / 100 * found.members[-1].macs]
            ]
            mean = float(np.mean([one.macs for one in picked]))
            correct = sum(one.correct or 0 for one in picked)  # of a classifier it is never None
            images = sum(one.images for one in picked)
            rows.append(
                {
                    "benchmark": "cascade",
                    "kind": "seeds",
                    "calibrated_on": "halves",
                    "policy": policy[0],
                    "measure": policy[1] if policy[0] == "confidence" else None,
                    "members": MEMBERS,
                    "target_percent": share,
                    "splits": len(folds),
                    "macs": mean,
                    "top1": {"share": correct / images, "correct": correct, "images": images},
                    **against(single, correct / images, mean),
                }
            )
            show(rows[-1])
    return rows


def show(row: Mapping[str, Any]) -> None:
    name = f"{row['policy']} {row['measure'] or ''}"
    print(
        f"{row['kind']:6s} {row['calibrated_on']:8s} {name:17s} {row['target_percent']:3d} %  "
        f"{row['macs'] / 1e6:6.2f} M  {row['top1']['correct']}/{row['top1']['images']}  "
        f"r={row['single']['r']} {row['single']['macs'] / 1e6:.2f} M  saved {row['saved']:+.1%}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="splits of the rows without a server")
    parser.add_argument("--no-write", action="store_true", help="print only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        requests = [
            BuildRequest(MODEL, folder / f"r{r}", Schedule(r), engine="none", check=False)
            for r in MEMBERS
        ]
        members = members_of([build(request).path for request in requests])
        single = single_rows()
        for row in single:
            print(f"r={row['r']:2d}  {row['macs'] / 1e6:6.2f} M  {row['top1']['correct']}")
        test = halves(folder, 0)
        with np.load(DATA / "digits_test.npz") as archive:
            whole = write_images(folder / "test", archive["images"], archive["labels"])
        training = write_images(folder / "training", *training_images())
        splits = {"halves": test, "training": [Fold(training, whole)]}
        rows = [
            *single,
            *served_rows(members, splits, single, folder),
            *seed_rows(members, range(arguments.seeds), single, folder),
        ]
    if not arguments.no_write:
        print(write_rows("cascade", rows))


if __name__ == "__main__":
    main()
