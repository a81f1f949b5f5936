"""Step 1: the carried kernels, and whole models with them.

python -m benchmarks.gpu.step1 --prepared FOLDER
"""

from __future__ import annotations

import sys

from benchmarks.gpu.parts import BenchmarkStep, Part, run_step

STEP = BenchmarkStep(
    1,
    270.0,
    (
        Part(
            "kernels-right",
            "check_kernels:main",
            45,
            80,
            "Are the carried kernels right: plans against exact ones, sums against float64?",
        ),
        Part(
            "kernels-fast",
            "time_kernels:main",
            45,
            70,
            "How fast are they at N = 197, 577 and 1,025 and batch 64, 8 and 1, beside PyTorch's "
            "operations and a copy's bandwidth?",
        ),
        Part(
            "models-64",
            "time_models:batch_64",
            40,
            70,
            "ViT-B/16 r = 16 and ViT-L/16 r = 8 at batch 64: unmerged, merged, speed-up over the "
            "MACs ratio?",
        ),
        Part(
            "models-other",
            "time_models:other_batches",
            60,
            90,
            "The same at batch 1 and 256, and ViT-L/16@384 r = 23?",
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(run_step(STEP))
