"""Rivals of masked linear cross-entropy: functions (hidden, weight, bias, targets, index, case) -> (loss, accuracy).

All work on the used rows alone, and are told how many there are (`case.used`): so none computes a row too much, and
none waits for the device to learn it, which is more than a training step could give them. A rival that knows no
accuracy returns None for it, and its entry says so.

Letters: U used slots, C channels, V classes.
"""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_kernels.baselines.common import Baseline, compile_reasons, compiled, package_reasons
from bevt_kernels.masked_linear_cross_entropy import ops
from bevt_kernels.masked_linear_cross_entropy.autograd import scaled
from bevt_kernels.select import Spec, float_reasons, resolve
from bevt_kernels.testing import LossCase

Result = tuple[Tensor, Tensor | None]


def _used(hidden: Tensor, targets: Tensor, index: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """(U, C) rows and (U,) classes of the used slots."""
    if used < len(index):
        slots = torch.nonzero_static(index >= 0, size=used).squeeze(1)
        targets, index = targets[slots], index[slots]
    return hidden.index_select(0, index), targets


def _eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, used: int) -> Result:
    rows, labels = _used(hidden, targets, index, used)
    logits = F.linear(rows, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).to(logits.dtype).mean()


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, case: LossCase) -> Result:
    """Gather the used rows, linear, cross-entropy in float32."""
    return _eager(hidden, weight, bias, targets, index, case.used)


def eager_compiled(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, case: LossCase
) -> Result:
    """`eager` under torch.compile."""
    return compiled(_eager)(hidden, weight, bias, targets, index, case.used)


def torch_chunked(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, case: LossCase
) -> Result:
    """PyTorch's linear_cross_entropy with its chunks, their size and accumulators chosen by itself."""
    rows, labels = _used(hidden, targets, index, case.used)
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(rows, weight, labels, linear_bias=bias, options=options), None


def liger(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, case: LossCase) -> Result:
    """Liger's fused linear cross-entropy; the gradients of weight and bias are added up in float32."""
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    rows, labels = _used(hidden, targets, index, case.used)
    out = liger_fused_linear_cross_entropy(
        rows, weight, labels, bias=bias, accum_dtype=torch.float32, return_token_accuracy=True
    )
    return out.loss, out.token_accuracy


def cut_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, case: LossCase, impl: str = "cce"
) -> Result:
    """Apple's Cut Cross-Entropy, which recomputes logits tile by tile; "cce" skips tiles of tiny gradients."""
    from cut_cross_entropy import linear_cross_entropy

    rows, labels = _used(hidden, targets, index, case.used)
    return linear_cross_entropy(rows, weight, labels, bias=bias, impl=impl), None


def cut_cross_entropy_exact(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, case: LossCase
) -> Result:
    """`cut_cross_entropy` without skipping."""
    return cut_cross_entropy(hidden, weight, bias, targets, index, case, "cce_exact")


def quack(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, case: LossCase) -> Result:
    """QuACK's chunked linear cross-entropy.

    It takes no bias (with one, QuACK itself writes all logits): here the bias is a channel of the weight beside a
    channel of ones, with seven of zeros for its alignment to 8. It wants a multiple of 8 rows: the rest is ignored.
    """
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    rows, labels = _used(hidden, targets, index, case.used)
    missing = -len(rows) % 8
    wide = torch.cat([weight, bias[:, None], weight.new_zeros(len(weight), 7)], 1)
    one = torch.eye(1, 8, dtype=rows.dtype, device=rows.device).expand(len(rows), 8)
    rows = F.pad(torch.cat([rows, one], 1), (0, 0, 0, missing))
    return chunked_linear_cross_entropy(rows, wide, F.pad(labels, (0, missing), value=-100), ignore_index=-100), None


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        *tensors, impl = inputs
        ctx.save_for_backward(*tensors)
        ctx.impl = impl
        loss, accuracy, *_ = ops.forward(*tensors, (False, False, False), impl)
        ctx.mark_non_differentiable(accuracy)
        return loss, accuracy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, index = ctx.saved_tensors
        _, _, *found = ops.forward(hidden, weight, bias, targets, index, ctx.needs_input_grad[:3], ctx.impl)
        scale = grads[0] / (index != -1).sum().clamp(min=1)
        results = (scaled(g, scale, x.dtype, in_place=True) for g, x in zip(found, (hidden, weight, bias)))
        return *results, None, None, None


def recompute(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, case: LossCase) -> Result:
    """Our own kernels in the other form: no gradient in the forward, all logits a second time in the backward.

    Four products in place of three; between the passes nothing is kept but the inputs.
    """
    impl = resolve(
        "masked_linear_cross_entropy", "auto", Spec(hidden.device.type, hidden.dtype, True, classes=case.classes)
    )
    return _Recompute.apply(hidden, weight, bias, targets, index, impl)


def _torch_reasons(spec: Spec) -> list[str]:
    reasons = float_reasons(spec)
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        reasons.append(f"torch {torch.__version__} has no chunked linear_cross_entropy: pip install 'torch>=2.13'")
    return reasons


def _cut_reasons(spec: Spec) -> list[str]:
    source = "git+https://github.com/apple/ml-cross-entropy"
    reasons = package_reasons("cut_cross_entropy", source)(spec) + _half_reasons(spec)
    if importlib.util.find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy

        if "bias" not in inspect.signature(linear_cross_entropy).parameters:
            reasons.append(f"this version takes no bias: pip install {source}")
    return reasons


def _quack_reasons(spec: Spec) -> list[str]:
    reasons = package_reasons("quack", "quack-kernels")(spec) + _half_reasons(spec)
    if spec.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0):
        reasons.append("needs compute capability 9.0")
    return reasons


def _half_reasons(spec: Spec) -> list[str]:
    return [] if spec.dtype in (torch.bfloat16, torch.float16) else [f"takes bfloat16 and float16, not {spec.dtype}"]


MASKED_LINEAR_CROSS_ENTROPY: dict[str, Baseline] = {
    "ours, recomputing": Baseline(recompute, float_reasons, "bevt"),
    "eager": Baseline(eager, float_reasons),
    "eager compiled": Baseline(eager_compiled, compile_reasons, compiles=True),
    "torch linear_cross_entropy": Baseline(torch_chunked, _torch_reasons, lacks="accuracy"),
    "liger": Baseline(liger, package_reasons("liger_kernel", "liger-kernel"), "liger-kernel"),
    "cut cross-entropy": Baseline(cut_cross_entropy, _cut_reasons, "cut-cross-entropy", "accuracy"),
    "cut cross-entropy exact": Baseline(cut_cross_entropy_exact, _cut_reasons, "cut-cross-entropy", "accuracy"),
    "quack": Baseline(quack, _quack_reasons, "quack-kernels", "accuracy"),
}
