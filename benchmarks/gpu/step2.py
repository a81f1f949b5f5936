"""Step 2: the fp16 graphs through ONNX Runtime's CUDA provider.

python -m benchmarks.gpu.step2 --prepared FOLDER
"""

from __future__ import annotations

import sys

from benchmarks.gpu.parts import BenchmarkStep, Part, run_step

STEP = BenchmarkStep(
    2,
    165.0,
    (
        Part(
            "ort-fused",
            "run_onnxruntime:fused",
            60,
            85,
            "Does the provider load; ViT-B/16 r = 16 with the Attention operator: right, how fast?",
            exact_gpu=True,
        ),
        Part(
            "ort-parts",
            "run_onnxruntime:in_parts",
            30,
            50,
            "The same with attention in parts?",
            exact_gpu=True,
        ),
        Part(
            "ort-r13",
            "run_onnxruntime:r_13",
            40,
            60,
            "r = 13, where layers have 132 tokens, in both forms?",
            exact_gpu=True,
        ),
        Part(
            "ort-tf32",
            "run_onnxruntime:tf32",
            25,
            40,
            "What does TF32, the provider's default, change?",
            exact_gpu=True,
        ),
    ),
)

if __name__ == "__main__":
    sys.exit(run_step(STEP))
