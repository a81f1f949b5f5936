"""Run a TensorRT engine in a process that knows nothing but TensorRT and torch's memory.

python benchmarks/gpu_fresh_engine.py ENGINE PIXELS.npy OUTPUT.npy
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tensorrt as trt
import torch


def main(engine_path: str, pixels_path: str, output_path: str) -> int:
    logger = trt.Logger(trt.Logger.WARNING)
    engine = trt.Runtime(logger).deserialize_cuda_engine(Path(engine_path).read_bytes())
    if engine is None:
        print("the engine was not deserialised; TensorRT's own log is above", file=sys.stderr)
        return 1
    context = engine.create_execution_context()
    pixels = torch.from_numpy(np.load(pixels_path)).cuda()
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
    (source,) = inputs
    (target,) = (name for name in names if name not in inputs)
    wanted = trt.nptype(engine.get_tensor_dtype(source))
    pixels = pixels.to(getattr(torch, np.dtype(wanted).name)).contiguous()
    context.set_input_shape(source, tuple(pixels.shape))
    kind = np.dtype(trt.nptype(engine.get_tensor_dtype(target))).name
    output = torch.full(
        tuple(context.get_tensor_shape(target)),
        float("nan"),
        dtype=getattr(torch, kind),
        device="cuda",
    )
    context.set_tensor_address(source, pixels.data_ptr())
    context.set_tensor_address(target, output.data_ptr())
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    if not context.execute_async_v3(stream.cuda_stream):
        print("the engine did not run; TensorRT's own log is above", file=sys.stderr)
        return 1
    stream.synchronize()
    np.save(output_path, output.float().cpu().numpy())
    ours = sorted(name for name in sys.modules if name.startswith("tome_export"))
    if ours or "tensorrt.plugin" in sys.modules:
        print(f"modules were imported that make the proof void: {ours}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
