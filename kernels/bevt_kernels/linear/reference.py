"""The linear layer in plain PyTorch: the specification."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's own: (..., C), (N, C), (N,) or none -> (..., N)."""
    return F.linear(x, weight, bias)
