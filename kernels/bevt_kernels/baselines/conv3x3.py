"""Rivals of the 3x3 convolution: functions (x, weight, bias, case) -> out."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from bevt_kernels.baselines.common import Baseline
from bevt_kernels.select import float_reasons
from bevt_kernels.testing import ConvCase


def eager(x: Tensor, weight: Tensor, bias: Tensor, case: ConvCase) -> Tensor:
    """Torch's own: oneDNN's direct convolution on CPUs, for which x is channels-last, behind a ReLU where asked."""
    return F.conv2d(x.relu() if case.relu else x, weight, bias, padding=1)


CONV3X3: dict[str, Baseline] = {"eager": Baseline(eager, float_reasons)}
