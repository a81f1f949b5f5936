"""Write the measured figures of README and docs from the rows in benchmarks/results.

python scripts/measured.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARKS = ("<!-- measured by scripts/measured.py -->\n", "<!-- end of measured -->")
REDUCED = ("<!-- compared by scripts/measured.py -->\n", "<!-- end of compared -->")
STATUS = ("<!-- status by scripts/measured.py -->\n", "<!-- end of status -->")
ATTENTION = ("<!-- attention by scripts/measured.py -->\n", "<!-- end of attention -->")
GPU_ATTENTION = ("<!-- attention on a GPU by scripts/measured.py -->\n", "<!-- end of that -->")
HEADLINE = ("<!-- headline by scripts/measured.py -->\n", "<!-- end of headline -->")
TUNED = ("<!-- tuned by scripts/measured.py -->\n", "<!-- end of tuned -->")
EVALUATED = ("<!-- evaluated by scripts/measured.py -->\n", "<!-- end of evaluated -->")

PIPELINE = ("<!-- pipeline by scripts/measured.py -->\n", "<!-- end of pipeline -->")
SCALED = ("<!-- scaled by scripts/measured.py -->\n", "<!-- end of scaled -->")
RAW = ("<!-- raw pixels by scripts/measured.py -->\n", "<!-- end of raw pixels -->")


def rows(name: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Environment and rows of one result file."""
    content = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return content["environment"], content["rows"]


NEVER = "**never**"

STAGES = (
    (
        "patching, schedules, export to ONNX",
        "tested, against the libraries and the paper's code",
        ("models-64", "models-other"),
    ),
    (
        "decisions and outputs of the exported graph in ONNX Runtime",
        "tested, on the CPU provider",
        ("ort-fused", "ort-parts", "ort-r13"),
    ),
    (
        "kernels of match and merge",
        "run by an interpreter; their machine code assembled for six GPU architectures",
        ("kernels-right", "kernels-fast"),
    ),
    (
        "speed of whole models, merged over unmerged",
        "measured, in ONNX Runtime and PyTorch",
        ("models-64", "models-other"),
    ),
    (
        "plugins in TensorRT",
        "declared to TensorRT's Python layer and plugin registry",
        (),
    ),
    ("TensorRT engines", "cannot be built without a GPU", ()),
    ("TensorRT-RTX engines", "built", ()),
    (
        "Triton Inference Server",
        "tested, on a server with a stand-in for the ONNX Runtime backend",
        (),
    ),
    ("trained weights", "`vit_digits`, and DINOv2 ViT-S/14 with a saliency decoder", ()),
)
"""What the project does; what of it has run without a GPU; the parts of ``benchmarks/gpu`` that run
it on one."""


def status() -> str:
    """The README's table of what has run where, between its marks."""
    path = ROOT / "benchmarks" / "results" / "gpu.json"
    found = json.loads(path.read_text())["rows"] if path.exists() else []
    lines = ["| | on a CPU | on a GPU |", "|---|---|---|"]
    lines += [f"| {what} | {cpu} | {on_gpu(found, parts)} |" for what, cpu, parts in STAGES]
    return "\n".join(lines) + "\n"


def on_gpu(found: list[dict[str, Any]], parts: tuple[str, ...]) -> str:
    """What the rows of some parts of the GPU benchmark say."""
    own = [row for row in found if row["part"] in parts and row["benchmark"] != "part"]
    if not own:
        return NEVER
    wrong = sum(row.get("passed") is False or "error" in row for row in own)
    return f"{len(own)} rows, {wrong} failed"


def headline() -> str:
    """The README's table: two models on a CPU, and large batches on a GPU."""
    where, cpu = rows("cpu")
    on_cpu = f"ONNX Runtime, fp32, {where['cores']} cores of {where['cpu']}"
    lines = ["| model | on | batch | MACs ratio | speed-up |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['model']}, r = {row['r']} | {on_cpu} | {row['batch']} | {row['macs_ratio']:.2f} "
        f"| {row['speedup']['onnxruntime']:.2f} |"
        for row in cpu
        if row["batch"] > 1
    ]
    where, found = rows("trained")
    large = [row for row in found if row["part"] == "speed" and row["size"] == 518]
    middle = sorted(large, key=lambda row: int(row["tome_r"]))[len(large) // 2]
    cores = "one core" if middle["threads"] == 1 else f"{middle['threads']} cores"
    on_cpu = f"ONNX Runtime, fp32, {cores} of {where['cpu']}"
    lines.append(
        f"| dinov2_s14 (trained, 518 pixels), r = {middle['tome_r']} | {on_cpu} | 1 "
        f"| {middle['macs_ratio']:.2f} | {middle['speedup']['p50']:.2f} |"
    )
    path = ROOT / "benchmarks" / "results" / "gpu.json"
    content = json.loads(path.read_text()) if path.exists() else {"rows": []}
    for row in content["rows"]:
        if row["benchmark"] == "end to end" and "case" not in row and row["batch"] == 64:
            gpu = content["environment"]["step 1"]["gpu"]
            lines.append(
                f"| {row['model']}, r = {row['r']} | PyTorch, fp16, {gpu} | {row['batch']} "
                f"| {row['macs_ratio']:.2f} | {row['speedup']['merged']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def measured() -> str:
    """The figures of docs/measurements.md, between the marks."""
    where, cpu = rows("cpu")
    lines = [
        f"On {where['cores']} cores of {where['cpu']}, ONNX Runtime "
        f"{where['versions']['onnxruntime']}, fp32 (`benchmarks/results/cpu.json`):",
        "",
        "| model | batch | MACs ratio | ONNX speed-up | of the MACs ratio | PyTorch speed-up |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['model']}, r = {row['r']} | {row['batch']} | {row['macs_ratio']:.2f} "
        f"| {row['speedup']['onnxruntime']:.2f} "
        f"| {row['speedup_over_macs_ratio']['onnxruntime']:.2f} | {row['speedup']['torch']:.2f} |"
        for row in cpu
    ]
    lines += ["", *(parity_line(name) for name in ("recipes", "recipes_full")), registry_line()]
    lines += [families_line(), llava_line(), *serving_lines(), soak_line(), sizes_line()]
    lines += [*cascade_lines(), *video_lines(), *gpu_lines()]
    return "\n".join(lines) + "\n"


def evaluation_table() -> str:
    """The table of accuracy of docs/which-r.md, between its marks."""
    found = rows("digits")[1]
    first = found[0]
    return "\n".join(
        [
            f"So it prints, for {first['model']} on its {first['images']} test images "
            f"(`benchmarks/results/digits.json`, intervals of {first['confidence']:.0%}):",
            "",
            "| r | MACs | saved | top-1 |",
            "|---|---|---|---|",
            *(
                f"| {row['r']} | {row['macs'] / 1e6:.2f} M | {1 - row['macs'] / first['macs']:.0%} "
                f"| {100 * row['top1']['share']:.2f} % [{100 * row['top1']['low']:.2f}, "
                f"{100 * row['top1']['high']:.2f}] |"
                for row in found
            ),
            "",
        ]
    )


def tuned_table() -> str:
    """What tuning a trained tower gains over a constant r, for docs/which-r.md."""
    (row,) = rows("tuned")[1]
    other, held_out, data = row["other_photographs"], row["held_out"], row["data"]
    constant = row["constant"][0]

    def interval(found: dict[str, float], sign: str = "") -> str:
        mean, low, high = (format(found[key], f"{sign}.4f") for key in ("mean", "low", "high"))
        return f"{mean} [{low}, {high}]"

    def line(name: str, kind: str, held: dict[str, float]) -> str:
        share = row["macs"][kind] / row["macs"]["unmerged"]
        own = other[kind]
        return (
            f"| {name} | {share:.1%} | {interval(held)} | {interval(own)} | {own['lowest']:.3f} |"
        )

    return "\n".join(
        [
            "For the trained DINOv2 ViT-S/14 ([weights](trained-weights.md)), ToMe and at most "
            f"{row['share']} % of the MACs, {row['search']['schedules']} schedules were searched "
            f"on {data['search']} crops of photographs and chosen with {data['validation']} more "
            "(`benchmarks/results/tuned.json`). Mean cosine to the unmerged features, with its "
            "interval, on "
            f"{held_out['images']} held-out crops of the same photographs, and on "
            f"{other['images']} crops of photographs that the search never saw:",
            "",
            "| schedule | MACs | held-out crops | other photographs | lowest of these |",
            "|---|---|---|---|---|",
            line(f"best constant r, {constant}", "constant", held_out["best_constant"]),
            line("tuned", "tuned", held_out),
            "",
            f"The difference, image by image, is {interval(held_out['over_constant'], '+')} and "
            f"{interval(other['over_constant'], '+')}. The schedule is "
            f"`{','.join(map(str, row['schedule']))}`. Crops of one photograph are "
            "alike, so these intervals are rather too narrow.",
            "",
        ]
    )


def parity_line(name: str) -> str:
    """One line on a file of parity rows."""
    cases = rows(name)[1]
    exact = [case for case in cases if case["precision"] == "fp32"]
    half = [case for case in cases if case["precision"] == "fp16"]
    recipes = len({case["recipe"] for case in cases})
    depth = "full depth" if name.endswith("full") else "reduced depth"
    engines = sum(case["engine_bytes"] is not None for case in cases)
    built = f"; {engines} engines built by TensorRT-RTX" if engines else ""
    return (
        f"- {recipes} recipes at {depth} under 5 schedules, {len(cases)} cases "
        f"(`benchmarks/results/{name}.json`): {sum(case['passed'] for case in cases)} pass, "
        f"{sum(case['defects'] for case in cases)} defects in "
        f"{sum(case['decisions'] for case in cases)} merge decisions. fp32: "
        f"{sum(case['disagreements'] for case in exact)} decisions flipped by rounding, relative "
        f"error on equal plans at most {max(case['led_relative_error'] for case in exact):.1e}. "
        f"fp16: {sum(case['disagreements'] for case in half)} flipped, cosine at least "
        f"{min(case['cosine'] for case in half):.7f}{built}."
    )


def registry_line() -> str:
    """One line on the sweep of timm's registry."""
    entries = rows("registry")[1]
    equal = sum(entry["verdict"] == "equal" for entry in entries)
    refused = sum(entry["verdict"] == "refused" for entry in entries)
    return (
        f"- {len(entries)} of timm's models (`benchmarks/results/registry.json`): patched with "
        f"r = 0, {equal} give timm's own output to 1e-6, {refused} are refused, "
        f"{len(entries) - equal - refused} are wrong."
    )


def families_line() -> str:
    """One line on one tiny model of every family."""
    families = rows("families")[1]

    def total(precision: str, key: str) -> int:
        return sum(row[precision][key] for row in families)

    return (
        f"- {len(families)} tiny models, each from its own library, from patching to a model "
        "repository (`benchmarks/results/families.json`): "
        f"{sum(not row['failures'] for row in families)} pass. Without merging they differ from "
        f"the library by at most {max(row['r0_relative_error_onnx'] for row in families):.1e}. "
        f"Merged in fp32, {total('fp32', 'disagreements')} of {total('fp32', 'decisions')} "
        f"decisions differ from PyTorch's; in fp16 {total('fp16', 'disagreements')}, with "
        f"{total('fp16', 'defects')} defects; "
        f"{sum(bool(row['engine_bytes']) for row in families)} engines built by TensorRT-RTX."
    )


def llava_line() -> str:
    """One line on LLaVA's tower at full size."""
    (row,) = rows("llava")[1]
    macs, built = row["macs"], row["build"]
    return (
        f"- {row['model']}, r = {row['r']}, {row['precision']}, batch 1, random weights "
        f"(`benchmarks/results/llava.json`): {row['tower']['tokens']} features, "
        f"{macs['unmerged'] / 1e9:.1f} G to {macs['merged'] / 1e9:.1f} G MACs "
        f"(ratio {macs['ratio']:.2f}), {row['speedup']['p50']:.2f} times as fast in ONNX Runtime; "
        f"the build takes {built['peak_gib']:.1f} GiB of memory at most."
    )


def serving_lines() -> list[str]:
    """The speed-up of merging as a client of the server sees it."""
    served = rows("serving")[1]
    first = served[0]
    kept = ", ".join(
        f"{row['speedup']:.2f} at concurrency {row['concurrency']} "
        f"({row['share_of_speedup_alone']:.2f} of what ONNX Runtime alone shows)"
        for row in served
    )
    return [
        f"- {first['model']}, r = {first['r']}, fp32, served on CPUs by the stand-in for the "
        "ONNX Runtime backend (`benchmarks/results/serving.json`): merged over unmerged throughput "
        f"{kept}."
    ]


def pipeline_table() -> str:
    """What a served pipeline answers, and what its parts cost, before and after."""
    environment, found = rows("serving_pipeline")
    first = found[0]
    names = [*first["images_per_second"]]
    lines = [
        f"{first['model']}, r = {first['r']}, fp32, random weights, {first['cores']} cores"
        f"{', stand-in for the ONNX Runtime backend' * first['stand_in']}; medians of "
        f"{first['rounds']} rounds in which the pipelines took turns "
        "(`benchmarks/results/serving_pipeline.json`). «before» is what `serve --preprocess` wrote "
        "before, «after» now, «sized» with "
        f"`--instances {first['cores']} --threads 1`, «scaled» with `--scaled-decoding` too. CPU "
        "is the time of a processor per image; preprocessing's part of the time of a request has "
        "the wait for a decoder in it.",
        "",
        "| photographs | at once | | images/s | ratio | p50 | p99 | CPU of the model | of decoding "
        "| preprocessing's part of the time |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found:
        for name in names:
            cpu, latency = row["cpu_ms"][name], row["latency_ms"][name]
            lines.append(
                f"| {row['photographs']} | {row['concurrency']} | {name} | "
                f"{row['images_per_second'][name]:.1f} | {row['ratio'].get(name, 1):.2f} | "
                f"{latency['p50']:.0f} ms | {latency['p99']:.0f} ms | {cpu['model']:.0f} ms | "
                f"{cpu['decoder'] + cpu['preprocess']:.1f} ms | "
                f"{row['preprocess_share'][name]:.0%} |"
            )
    return "\n".join(lines) + f"\n\nMeasured on {environment['cpu']}.\n"


def decoding_table() -> str:
    """What other ways of decoding cost, and how far their pixels are off."""
    _, found = rows("decoding")
    ways = {"scaled": "`--scaled-decoding`", "simd": "pillow-simd", "dali": "DALI, on a CPU"}
    lines = [
        "One image on one core, and levels (of 255) by which the pixels differ from the library's "
        "(`benchmarks/results/decoding.json`):",
        "",
        f"| photographs | exact | {' | '.join(ways.values())} |",
        f"|---|--:|{'--:|' * len(ways)}",
    ]
    for row in found:
        cells = [
            f"{row['cpu_ms'][way]:.1f} ms, mean {levels['mean']:.3f}, at most {levels['max']}"
            for way in ways
            for levels in [row["levels"][way]]
        ]
        lines.append(
            f"| {row['photographs']} | {row['cpu_ms']['exact']:.1f} ms | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


def soak_line() -> str:
    """What became of many requests while versions changed, beside garbage."""
    _, row = rows("serving_soak")[1]
    return (
        f"- {row['requests']} requests for images at concurrency {row['concurrency']} during "
        f"{row['reloads']} deployments of new versions, beside {row['garbage']} requests of "
        f"{row['garbage_kinds']} kinds of garbage and with one process killed "
        f"(`benchmarks/results/serving_soak.json`): {row['wrong']} wrong, {row['lost']} lost "
        "outside the restart, 99th percentile "
        f"{row['p99_over_that_without_garbage']:.1f} times that without garbage."
    )


def sizes_line() -> str:
    """What became of many requests to a router of several image sizes."""
    (row,) = rows("serving_sizes")[1]
    several = row["requests_by_kind"]["images of several sizes"]
    return (
        f"- {row['requests']} requests for pixels and images at concurrency {row['concurrency']} "
        f"to a router of {len(row['sizes'])} image sizes x {len(row['r'])} r, {several} of them "
        "with images that go to several sizes (`benchmarks/results/serving_sizes.json`): "
        f"{row['wrong']} wrong, {row['lost']} lost; {row['files_of_weights']} models, whose "
        f"weights are stored {'once' if row['stored_files_of_weights'] == 1 else 'apart'}."
    )


def gpu_lines() -> list[str]:
    """What the rows of ``benchmarks/gpu`` say of whole models; none where there are none."""
    path = ROOT / "benchmarks" / "results" / "gpu.json"
    if not path.exists():
        return []
    content = json.loads(path.read_text())
    where = content["environment"]["step 1"]
    models = [row for row in content["rows"] if row["benchmark"] == "end to end"]
    alone = [row for row in models if "case" not in row]
    served = [row for row in models if "case" in row and not row["use_tf32"]]
    lines = [
        "",
        f"On an {where['gpu']}, fp16, random weights (`benchmarks/results/gpu.json`), merged by "
        f"the plugins' kernels in PyTorch {where['versions']['torch']}, replayed as CUDA graphs; "
        "unmerged is the library's model with fused attention:",
        "",
        "| model | batch | MACs ratio | unmerged, images/s | merged, images/s | speed-up |",
        "|---|---|---|---|---|---|",
    ]
    for row in alone:
        rate = {name: row["batch"] / times["p50"] for name, times in row["seconds"].items()}
        lines.append(
            f"| {row['model']}, r = {row['r']} | {row['batch']} | {row['macs_ratio']:.2f} "
            f"| {rate['unmerged']:.0f} | {rate['merged']:.0f} | {row['speedup']['merged']:.2f} |"
        )
    told = "; ".join(
        f"{row['case']}, r = {row['r']}: {row['speedup']['merged']:.2f} "
        f"({1e3 * row['seconds']['unmerged']['p50']:.1f} to "
        f"{1e3 * row['seconds']['merged']['p50']:.1f} ms)"
        for row in served
    )
    lines += [
        "",
        f"- ONNX Runtime {served[0]['onnxruntime']}'s CUDA provider on the same GPU, "
        f"{served[0]['model']}, fp16, batch {served[0]['batch']}, speed-up over the unmerged graph "
        f"in the same form: {told}. Decisions: {sum(row['defects'] for row in served)} defects in "
        f"{sum(row['decisions'] for row in served)}.",
    ]
    return lines


def gpu_attention_lines() -> str:
    """What the bias costs in PyTorch's fused attention on a GPU, for docs/attention.md."""
    path = ROOT / "benchmarks" / "results" / "gpu.json"
    content = json.loads(path.read_text())
    where = content["environment"]["step 3"]
    lines = [
        f"{where['gpu']}, PyTorch {where['versions']['torch']}, fp16, 12 heads of 64, microseconds "
        "(`benchmarks/results/gpu.json`; PyTorch's own choice of kernel):",
        "",
        "| tokens | batch | no bias | mask | channels | channels, joined at every call |",
        "|---|---|---|---|---|---|",
    ]
    forms = ("none", "mask", "channels", "channels, joined here")
    for row in content["rows"]:
        if row["benchmark"] == "attention" and row["case"] == "as PyTorch chooses":
            times = (f"{1e6 * row['seconds'][form]['p50']:.1f}" for form in forms)
            lines.append(f"| {row['tokens']} | {row['batch']} | {' | '.join(times)} |")
    return "\n".join(lines) + "\n"


ALLOWED = 0.01
"""Share of the images that may be wrong beyond the unmerged model's, in the table of reducers."""


def reducers_lines() -> str:
    """The table of docs/reducers.md, between its marks."""
    where, found = rows("reducers")
    accuracy = [row for row in found if row["part"] == "accuracy"]
    speed = {row["reducer"]: row for row in found if row["part"] == "speed"}
    unmerged, images = accuracy[0]["unmerged_macs"], accuracy[0]["images"]
    wanted = images * (1 - ALLOWED)
    one = speed["tome"]
    lines = [
        f"`benchmarks/results/reducers.json`: the fewest MACs at which each has {ALLOWED:.0%} of "
        f"the {images} images wrong or fewer (unmerged: {unmerged / 1e6:.2f} M), and its time over "
        f"ToMe's at ToMe's MACs ({one['model']}, {one['tome_macs'] / 1e9:.2f} G, batch "
        f"{one['batch']}, ONNX Runtime {where['versions']['onnxruntime']} on {where['cores']} "
        f"cores; median of {one['rounds']} rounds [p20-p80]).",
        "",
        "| reducer | fewest MACs | saved | right | time over ToMe's | MACs over ToMe's |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in speed.items():
        good = [r for r in accuracy if r["reducer"] == name and r["correct"] >= wanted]
        best = min(good, key=lambda r: r["macs"], default=None)
        ratio = row["time_over_tome"]
        shown = "none tried |  | " if best is None else (
            f"{best['macs'] / 1e6:.2f} M | {1 - best['macs'] / unmerged:.0%} | {best['correct']}"
        )  # fmt: skip
        lines.append(
            f"| `{name}` | {shown} | {ratio['p50']:.2f} [{ratio['p20']:.2f}-{ratio['p80']:.2f}] "
            f"| {row['macs'] / row['tome_macs']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def cascade_lines() -> list[str]:
    """What a budget per image saves, served, and where it does not."""
    found = [row for row in rows("cascade")[1] if row["kind"] == "served"]
    halves = [row for row in found if row["calibrated_on"] == "halves"]
    sure = [row for row in halves if row["policy"] == "confidence"]
    best = sorted(sure, key=lambda row: -row["saved"])[:2]
    shown = " and ".join(
        f"{row['saved']:.1%} fewer MACs than r = {row['single']['r']}, the best single r, at "
        f"{row['top1']['correct']} of {row['top1']['images']} right"
        for row in sorted(best, key=lambda row: row["macs"])
    )
    low, high = (f(row["saved"] for row in sure if row not in best) for f in (min, max))
    others = max(row["saved"] for row in halves if row["policy"] != "confidence")
    members = ", ".join(map(str, best[0]["members"]))
    return [
        f"- A cascade of vit_digits at r = {members}, by confidence, "
        f"calibrated on other images and served (`benchmarks/results/cascade.json`): {shown}; at "
        f"lower budgets {low:.1%} to {high:.1%}. Budgets by complexity or a learned head save "
        f"{others:.1%} at most."
    ]


def attention_lines() -> str:
    """What the log-size bias costs and loses as a mask and as channels, for docs/attention.md."""
    found = rows("attention")[1]
    biases = ("mask", "one channel", "two channels")
    errors = {
        (row["library"], row["bias"]): f"{row['rms_error']:.1e}"
        for row in found
        if row["question"] == "exactness" and row["precision"] == "fp16"
    }
    exact = "; ".join(
        f"{library}: " + ", ".join(f"{bias} {errors[library, bias]}" for bias in biases)
        for library in ("PyTorch", "ONNX Runtime")
    )
    timed = [row["over_mask"] for row in found if row["question"] == "time"]
    folded = [ratio for row in timed for bias, ratio in row.items() if "channel" in bias]
    bare = [row["none"] for row in timed]
    return (
        f"- **Exactness** (sizes 1 to 197, fp16, rms error against float64). {exact}. Two channels "
        "hold the rounded\n  value and the rest, and are better because what rounds is log(size) "
        "itself; parity does not need it.\n"
        f"- **Time** (ONNX Runtime's CPU): {min(folded):.2f} to {max(folded):.2f} times the "
        f"mask's; no bias at all takes {min(bare):.2f} to {max(bare):.2f} of it.\n"
    )


def video_lines() -> list[str]:
    """What merging across frames saves and gains."""
    found = rows("video")[1]
    lines = []
    for model in dict.fromkeys(row["model"] for row in found):
        mine = {row["variant"]: row for row in found if row["model"] == model}
        told = "; ".join(
            f"{name}: {row['macs']['merged'] / 1e9:.1f} G, ratio {row['macs']['ratio']:.2f}, "
            f"{row['speedup']['p50']:.2f} times as fast"
            for name, row in mine.items()
            if name != "unmerged"
        )
        lines.append(
            f"- {model}, {mine['unmerged']['frames']} frames, fp32, random weights, ONNX Runtime "
            f"(`benchmarks/results/video.json`), {mine['unmerged']['macs']['merged'] / 1e9:.1f} G "
            f"MACs per video unmerged; merged {told}."
        )
    return lines


def raw_pixels_table() -> str:
    """What pixels in uint8 save, for docs/raw-pixels.md."""
    found = rows("raw_pixels")[1]
    stand_in = any(row["part"] == "wire" and row["stand_in"] for row in found)
    lines = [
        "Pixels in uint8 over float32 (`benchmarks/results/raw_pixels.json`); the graph alone in "
        "one thread of ONNX Runtime, the server "
        + "by the stand-in for the ONNX Runtime backend, " * stand_in
        + "one image a request over gRPC:",
        "",
        "| model | the graph's time, by batch | the same, folded | largest difference of logits "
        "| folded | served throughput, by concurrency |",
        "|---|---|---|---|---|---|",
    ]
    for model in dict.fromkeys(row["model"] for row in found):
        own = [row for row in found if row["model"] == model]
        graph = {
            kind: [row for row in own if row["part"] == "graph" and row["input"] == kind]
            for kind in ("uint8", "uint8, folded")
        }
        wire = [row for row in own if row["part"] == "wire" and row["input"] == "uint8"]
        times = [
            ", ".join(f"{row['batch']}: {row['time_over_float32']:.3f}" for row in part)
            for part in graph.values()
        ]
        apart = [
            f"{max(row['relative_difference'] for row in part):.1e}" for part in graph.values()
        ]
        served = ", ".join(
            f"{row['concurrency']}: {row['throughput_over_float32']:.2f}" for row in wire
        )
        lines.append(f"| {model}, r = {own[0]['r']} | {' | '.join((*times, *apart, served))} |")
    return "\n".join(lines) + "\n"


README, DOCS = ROOT / "README.md", ROOT / "docs"


def pages() -> dict[Path, str]:
    """The pages with all their marked parts made anew."""
    parts = (
        (README, STATUS, status()),
        (README, HEADLINE, headline()),
        (DOCS / "measurements.md", MARKS, measured()),
        (DOCS / "which-r.md", EVALUATED, evaluation_table()),
        (DOCS / "which-r.md", TUNED, tuned_table()),
        (DOCS / "reducers.md", REDUCED, reducers_lines()),
        (DOCS / "attention.md", ATTENTION, attention_lines()),
        (DOCS / "serving-throughput.md", PIPELINE, pipeline_table()),
        (DOCS / "serving-throughput.md", SCALED, decoding_table()),
        (DOCS / "attention.md", GPU_ATTENTION, gpu_attention_lines()),
        (DOCS / "raw-pixels.md", RAW, raw_pixels_table()),
    )
    texts = {path: path.read_text() for path, _, _ in parts}
    for path, (start, end), made in parts:
        pattern = re.escape(start) + ".*?" + re.escape(end)
        made = start + made.replace("\\", r"\\") + end
        texts[path] = re.sub(pattern, made, texts[path], flags=re.DOTALL)
    return texts


def main() -> None:
    for path, text in pages().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
