"""The 3x3 convolution in plain PyTorch: the specification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """(M, C, H, W), (N, C, 3, 3), (N,) -> (M, N, H, W): stride 1, zeros around, of max(x, 0) if `relu`."""
    return F.conv2d(F.relu(x) if relu else x, weight, bias, padding=1)
