"""Step 3: the marked tests, every memory access watched, and what steps 1 and 2 left.

python -m benchmarks.gpu.step3 --prepared FOLDER --earlier ROWS
"""

from __future__ import annotations

import sys

from benchmarks.gpu import step1, step2
from benchmarks.gpu.parts import BenchmarkStep, Part, run_step

STEP = BenchmarkStep(
    3,
    165.0,
    (
        Part(
            "tests",
            "run_tools:marked_tests",
            60,
            90,
            "Do the tests that are marked to need a GPU pass?",
        ),
        Part(
            "memcheck",
            "run_tools:memcheck",
            40,
            60,
            "Does compute-sanitizer see a wrong access of one match or one merge?",
        ),
        Part(
            "profile",
            "time_models:profile_64",
            25,
            45,
            "Which attention does PyTorch take, and what takes the time?",
        ),
        Part(
            "attention",
            "time_attention:main",
            20,
            45,
            "What does the log-size bias cost, as a mask and as channels?",
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(run_step(STEP, left=(*step1.STEP.parts, *step2.STEP.parts)))
