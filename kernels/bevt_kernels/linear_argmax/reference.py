"""Linear argmax in plain PyTorch: the specification. Letters: M rows, C channels, V classes."""

from __future__ import annotations

import torch
from torch import Tensor

from bevt_kernels.registration import chunks, statistics_dtype


def linear_argmax(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(M,) int64: products, sums and comparison in float32 (float64 for float64), a chunk of rows at a time."""
    dtype = statistics_dtype(x.dtype)
    weight, bias = weight.to(dtype).t(), bias.to(dtype)
    codes = torch.empty(len(x), dtype=torch.int64, device=x.device)
    for rows in chunks(len(x), len(bias), x.device):
        codes[rows] = torch.addmm(bias, x[rows].to(dtype), weight).argmax(1)
    return codes
