"""PyTorch as a runner."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from tome_export.runtime.torch import TorchRunner


class Recorder(nn.Module):
    """Notes the process's settings while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))
        self.seen: list[tuple[bool, bool]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark))
        return x * self.weight


def test_fp32_is_computed_in_fp32(monkeypatch):
    """PyTorch allows TF32 in convolutions by default, such as that of the patch embedding."""
    assert torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    module = Recorder()
    with TorchRunner(module, "logits") as runner:
        runner.infer({"pixel_values": np.ones((2, 1), np.float32)})
    assert module.seen == [(False, True)]
    assert torch.backends.cudnn.allow_tf32
