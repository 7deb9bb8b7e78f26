"""Rivals of linear argmax: functions (x, weight, bias, case) -> codes. Letters: M rows, V classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_kernels.baselines.common import Baseline, compile_reasons, compiled
from bevt_kernels.select import Spec, float_reasons
from bevt_kernels.testing import ArgmaxCase


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if x.dtype.itemsize == 2 and x.is_cuda:  # half operands, float32 sums and logits: no copy of either in float32
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32).add_(bias)
    else:
        logits = F.linear(*(t if t.dtype.itemsize > 2 else t.float() for t in (x, weight, bias)))
    return logits.argmax(1)


def eager(x: Tensor, weight: Tensor, bias: Tensor, case: ArgmaxCase) -> Tensor:
    """All logits in float32, then their argmax."""
    return _eager(x, weight, bias)


def eager_compiled(x: Tensor, weight: Tensor, bias: Tensor, case: ArgmaxCase) -> Tensor:
    """`eager` under torch.compile."""
    return compiled(_eager)(x, weight, bias)


def eager_half(x: Tensor, weight: Tensor, bias: Tensor, case: ArgmaxCase) -> Tensor:
    """As models write it, logits in the dtype of `x`: rounding makes ties, and the lowest of the tied classes wins."""
    return F.linear(x, weight, bias).argmax(1)


def _half_reasons(spec: Spec) -> list[str]:
    half = spec.dtype in (torch.bfloat16, torch.float16)
    return float_reasons(spec) + ([] if half else [f"is eager itself in {spec.dtype}"])


LINEAR_ARGMAX: dict[str, Baseline] = {
    "eager": Baseline(eager, float_reasons),
    "eager compiled": Baseline(eager_compiled, compile_reasons, compiles=True),
    "eager half": Baseline(eager_half, _half_reasons),
}
