"""Choice of attention kernels."""

from __future__ import annotations

import pytest
import torch

from vlpet_lightning.attention import attention_kernels


@pytest.mark.parametrize(
    ("device", "length", "cudnn"), [("cuda", 56, False), ("cuda", 127, False), ("cuda", 128, True), ("cpu", 56, True)]
)
def test_short_inputs_on_a_gpu_do_without_cudnns_kernels(device, length, cudnn):
    before = torch.backends.cuda.cudnn_sdp_enabled()
    assert before
    with attention_kernels(length, torch.device(device)):
        assert torch.backends.cuda.cudnn_sdp_enabled() == cudnn
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
        assert torch.backends.cuda.math_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
