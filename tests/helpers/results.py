"""Results of bench, eval and tune as their files hold them, made up."""

from __future__ import annotations

from typing import Any

ENVIRONMENT = {
    "cpu": "Some CPU <b>bold</b>",
    "cores": 2,
    "gpu": None,
    "driver": None,
    "machine": "x86_64",
    "python": "3.11.9",
    "versions": {"onnxruntime": "1.31.1", "torch": "2.15.0"},
    "date": "2026-11-21T12:00:00+00:00",
}


def timed(p50: float, batch: int) -> dict[str, Any]:
    """One side of a row of ``bench.json``."""
    return {
        "latency_ms": {"p20": 0.96 * p50, "p50": p50, "p80": 1.07 * p50},
        "throughput": 1000 * batch / p50,
        "peak_memory_bytes": 48_000_000 + 900_000 * batch,
    }


def bench_report() -> dict[str, Any]:
    """``bench.json`` of two backends."""
    rows = []
    for backend, factor in (("ort-cpu", 1.0), ("torch", 1.9)):
        for batch, merged, against in ((1, 0.61, 0.83), (8, 3.1, 4.9), (32, 11.7, 19.4)):
            speedup = against / merged
            rows.append(
                {
                    "backend": backend,
                    "batch": batch,
                    "merged": timed(merged * factor, batch),
                    "against": timed(against * factor, batch),
                    "speedup": {"p20": 0.97 * speedup, "p50": speedup, "p80": 1.03 * speedup},
                    "share_of_macs_limit": speedup / 1.67,
                }
            )
    groups = {"attention": 0.9, "mlp": 1.2, "norm": 0.2, "embedding": 0.1, "head": 0.03}
    merging = {"match": 0.21, "merge": 0.12, "layout": 0.05, "other": 0.02}
    whole = {"total_ms": 2.9, "attributed_share": 0.985}
    models = {
        "merged": groups | merging,
        "against": {name: 1.7 * value for name, value in groups.items()} | {"other": 0.02},
    }
    profile = {"backend": "ort-cpu", "batch": 8, **whole}
    for name, groups_ms in models.items():
        layers = [{"layer": 0, "attention": groups_ms["attention"]}]
        runs = {"run_ms": 3.1, "runs": 10, "nodes": 90}
        profile[name] = {**whole, **runs, "groups_ms": groups_ms, "layers": layers}
    return {
        "latency_ms": {"ort-cpu": 0.61},
        "environment": ENVIRONMENT,
        "against": "unmerged",
        "macs_ratio": 1.67,
        "rounds": 50,
        "warmup": 5,
        "images": "samples",
        "notes": [],
        "rows": rows,
        "profile": [profile],
    }


def share(correct: int, images: int = 450) -> dict[str, Any]:
    """A share with an interval of about the right width."""
    value = correct / images
    return {
        "correct": correct,
        "images": images,
        "share": value,
        "low": max(0.0, value - 0.011),
        "high": min(1.0, value + 0.006),
    }


def difference(gained: int, images: int = 450) -> dict[str, Any]:
    """A difference with an interval of about the right width."""
    value = gained / images
    limits = {"low": value - 0.008, "high": value + 0.004}
    return {"share": value, **limits, "gained": max(gained, 0), "lost": max(-gained, 0)}


def eval_report() -> dict[str, Any]:
    """``eval.json`` of labelled images."""
    names = (
        ("merged", "ort-cpu", 13_462_912, 446),
        ("unmerged", "ort-cpu", 22_480_256, 450),
        ("torch", "torch", 13_462_912, 446),
        ("r=2", "ort-cpu", 20_100_000, 450),
        ("r=4", "ort-cpu", 17_800_000, 449),
    )
    candidates = [
        {
            "name": name,
            "r": [8] * 6,
            "backend": backend,
            "macs": macs,
            "top1": share(correct),
            "top5": share(450),
            "agreement_with_unmerged": None if name == "unmerged" else share(correct),
            "difference_to_unmerged": None if name == "unmerged" else difference(correct - 450),
            "not_finite": 0,
        }
        for name, backend, macs, correct in names
    ]
    return {
        "data": {
            "source": "/somebody/data & <script>alert(1)",
            "kind": "folder",
            "images": 450,
            "labelled": True,
            "notes": [],
            "unreadable": [{"name": "<img src=x onerror=alert(1)>.jpg", "reason": "cut short"}],
            "unreadable_count": 1,
        },
        "batch": 8,
        "classes": 10,
        "methods": {"share": "one", "difference": "another"},
        "candidates": candidates,
        "confidence": 0.95,
        "environment": ENVIRONMENT,
    }


def schedule_report(depth: int = 6) -> dict[str, Any]:
    """``schedule.json`` of a search that took the latency into account."""
    front = []
    for index, method in enumerate(("constant", "decreasing", "increasing", "free")):
        front += [
            {
                "schedule": [r] * depth,
                "method": method,
                "macs": 22_480_256 - 1_180_000 * r - 150_000 * index,
                "latency_ms": 0.83 - 0.03 * r - 0.004 * index,
                "accuracy": 1 - 0.0004 * r * r - 0.001 * index * (index < 3),
                "correct": 440,
                "damage": 0.01,
                "entropy": 0.97,
                "chosen": method == "free" and r == 8,
            }
            for r in (2, 4, 6, 8, 10)
        ]
    chosen = next(point for point in front if point["chosen"])
    return {
        "format": 1,
        "model": "vit_digits",
        "schedule": chosen["schedule"],
        "tokens_in": 65,
        "weights": {"kind": "bundled", "source": "digits"},
        "reducer": {"name": "tome"},
        "objective": {
            "kind": "min-accuracy",
            "value": 0.97,
            "relative": False,
            "metric": "top1",
            "text": "accuracy at least 0.97",
        },
        "found": {
            **chosen,
            "predicted_latency_ms": 0.6,
            "search_accuracy": 0.98,
            "validation_accuracy": 0.98,
            "estimate": None,
        },
        "best_constant": None,
        "unmerged": {
            "macs": 22_480_256,
            "latency_ms": 0.83,
            "predicted_latency_ms": 0.83,
            "accuracy": 1.0,
            "correct": 450,
            "search_accuracy": 1.0,
        },
        "front": front,
        "cost_table": None,
        "images": 450,
        "data": {
            "source": "samples",
            "available": 450,
            "search": 300,
            "validation": 150,
            "held_out": 0,
            "unreadable_count": 0,
            "notes": [],
        },
        "search": {
            "schedules": 40,
            "min_entropy": None,
            "over_merged": 0,
            "validation_looks": 5,
            "ended_by_time_limit": False,
        },
        "confidence": 0.95,
        "seconds": 71.3,
        "environment": ENVIRONMENT,
    }


def tower_report(depth: int = 6) -> dict[str, Any]:
    """``schedule.json`` of a search by the similarity of maps."""
    made = schedule_report(depth)

    def alike(point: dict[str, Any]) -> dict[str, Any]:
        kept = {k: v for k, v in point.items() if "accuracy" not in k and k != "correct"}
        mean = point["accuracy"]
        lowest = 3 * mean - 2
        similarity = {"mean": mean, "lowest": lowest, "mean_absolute_difference": 0.02}
        return {**kept, "similarity": similarity}

    found = alike(made["found"])
    found["search_similarity"] = found["validation_similarity"] = found["similarity"]
    found["estimate"] = {
        "on": "held out",
        "images": 150,
        "mean": 0.9731,
        "low": 0.9702,
        "high": 0.9755,
        "lowest": 0.8803,
        "mean_absolute_difference": 0.02,
        "best_constant": {"mean": 0.9711, "low": 0.9689, "high": 0.9741},
        "over_constant": {"mean": 0.002, "low": 0.001, "high": 0.003},
    }
    return {
        **made,
        "objective": {
            **made["objective"],
            "kind": "min-similarity",
            "metric": "similarity",
            "text": "similarity of at least 0.97",
        },
        "front": [alike(point) for point in made["front"]],
        "found": found,
        "best_constant": alike(made["front"][3]),
        "unmerged": {
            k: made["unmerged"][k] for k in ("macs", "latency_ms", "predicted_latency_ms")
        },
    }


REPORTS = {
    "bench.json": bench_report,
    "eval.json": eval_report,
    "schedule.json": schedule_report,
}
