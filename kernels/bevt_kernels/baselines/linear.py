"""Rivals of the linear layer: functions (x, weight, bias, case) -> out. Letters: M rows, C channels, N outputs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_kernels.baselines.common import Baseline
from bevt_kernels.select import Spec, float_reasons
from bevt_kernels.testing import LinearCase


def eager(x: Tensor, weight: Tensor, bias: Tensor, case: LinearCase) -> Tensor:
    """Torch's own: MKL on CPUs."""
    return F.linear(x, weight, bias)


class _OneDNN(torch.autograd.Function):
    """By oneDNN where torch hands it float32: its inner product, and for the weight a 1x1 convolution's gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        grad_x = torch.ops.mkldnn._linear_pointwise(grads[0], weight.t(), None, "none", [], "")
        grad_image, image = (t.view(1, len(t), 1, -1).permute(0, 3, 1, 2) for t in (grads[0], x))  # channels-last
        _, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad_image,
            image,
            weight[:, :, None, None],
            [len(weight)],
            [1, 1],
            [0, 0],
            [1, 1],
            False,
            [0, 0],
            1,
            [False, True, False],
        )
        return grad_x, grad_weight[:, :, 0, 0], grads[0].sum(0)  # the convolution adds up 25,088 rows one by one


def onednn(x: Tensor, weight: Tensor, bias: Tensor, case: LinearCase) -> Tensor:
    """The other library of torch's CPU builds; the dispatcher gives it float32 products in convolutions alone."""
    return _OneDNN.apply(x, weight, bias)


def _onednn_reasons(spec: Spec) -> list[str]:
    found = float_reasons(spec)
    if spec.device != "cpu" or spec.dtype != torch.float32:
        found.append(f"is asked for float32 on CPUs, not {spec.dtype} on {spec.device}")
    if not torch.backends.mkldnn.is_available():
        found.append("this torch was built without oneDNN")
    return found


LINEAR: dict[str, Baseline] = {
    "eager": Baseline(eager, float_reasons),
    "onednn": Baseline(onednn, _onednn_reasons),
}
