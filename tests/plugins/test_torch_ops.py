"""What the kernels' launchers refuse, and what happens where kernels cannot start."""

from __future__ import annotations

import re

import pytest
import torch

from tome_export.plugins import torch_ops

REFUSED = {
    "float64": (
        torch.zeros(1, 1, 8, 8, dtype=torch.float64),
        2,
        0,
        "keys are float64; the TomeMatch kernel takes float32, float16, bfloat16",
    ),
    "tokens": (
        torch.zeros(1, 4097, 1),
        2,
        0,
        "a layer has 4097 tokens; the TomeMatch kernel takes at most 4096",
    ),
    "width": (
        torch.zeros(1, 2, 1025),
        1,
        0,
        "heads are 1025 wide; the TomeMatch kernel takes at most 1024",
    ),
    "r above": (torch.zeros(1, 9, 4), 5, 0, "r is 5; expected 0 to 4 for 9 tokens"),
    "r above with prefix": (torch.zeros(1, 9, 4), 4, 2, "r is 4; expected 0 to 3 for 9 tokens"),
    "r below": (torch.zeros(1, 9, 4), -1, 0, "r is -1; expected 0 to 4 for 9 tokens"),
    "prefix above": (torch.zeros(1, 2, 4), 0, 3, "prefix is 3; expected 0 to 2 for 2 tokens"),
    "prefix below": (torch.zeros(1, 2, 4), 0, -1, "prefix is -1; expected 0 to 2 for 2 tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_kernel_cannot_take_is_refused(case):
    keys, r, prefix, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        torch_ops.match(keys, r, prefix, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a trial launch works on this GPU")
def test_a_gpu_on_which_the_kernels_do_not_start_runs_eagerly_and_says_why():
    torch_ops._works_on.cache_clear()
    device = torch.device("cuda:0")
    with pytest.warns(RuntimeWarning, match=r"run PyTorch's own operations on cuda:0, which is sl"):
        assert not torch_ops._works_on(device)
    # Once per GPU: warnings are errors here.
    assert not torch_ops._works_on(device)
    torch_ops._works_on.cache_clear()
