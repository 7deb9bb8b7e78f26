"""Masked linear cross-entropy in plain PyTorch: the specification every implementation is judged against.

`masked_linear_cross_entropy` is the specification: differentiable, all logits at once. `forward` is the op: the same by
formula (README.md), gradients included, a few rows at a time, so the (K, V) logits are never whole: a chunk holds about
2**20 of them on the CPU, 2**24 elsewhere (`registration.chunks`). Products are in the dtype of `hidden`, as the linear
layer's would be; sums, softmax and the gradients' accumulators are float32 (float64 for float64, and for the losses).

Letters: M rows, C channels, V classes, K slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from bevt_kernels.registration import chunks, statistics_dtype


def masked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The specification; shapes as in `bevt_kernels.masked_linear_cross_entropy`. Copies the used rows, so it syncs."""
    used = index != -1
    logits = F.linear(hidden[index[used]], weight.to(hidden.dtype), bias.to(hidden.dtype)).to(
        statistics_dtype(hidden.dtype)
    )
    count = used.sum().clamp(min=1)
    loss = F.cross_entropy(logits, targets[used], reduction="sum") / count
    return loss, (logits.argmax(1) == targets[used]).sum() / count.to(loss.dtype)


def forward(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor, output_mask: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The op: loss (), accuracy (), and the gradients of the sum of the slots' losses that `output_mask` asks for."""
    dtype = statistics_dtype(hidden.dtype)
    low, low_bias = weight.to(hidden.dtype), bias.to(hidden.dtype)
    used = index != -1
    if hidden.device.type == "cpu":  # where it costs no sync, unused slots are left out
        index, targets, used = index[used], targets[used], used[used]
    index, targets, unused = index.where(used, 0), targets.where(used, 0), ~used[:, None]
    losses, correct = hidden.new_empty(len(index), dtype=dtype), hidden.new_zeros((), dtype=dtype)
    grad_hidden, grad_weight, grad_bias = (
        torch.zeros(x.shape if wanted else (0,), dtype=dtype, device=x.device)
        for x, wanted in zip((hidden, weight, bias), output_mask)
    )
    for slots in chunks(len(index), len(weight), hidden.device):
        # Zeros for an unused slot, so that nothing in `hidden` (NaN, say) reaches a sum through it.
        rows = hidden.new_zeros(len(index[slots]), hidden.shape[1])
        if len(hidden):
            rows = hidden.index_select(0, index[slots]).masked_fill_(unused[slots], 0)
        logits = torch.addmm(low_bias, rows, low.t()).to(dtype)
        target, empty = targets[slots, None], unused[slots]
        losses[slots] = logits.log_softmax(1).gather(1, target).neg_().masked_fill_(empty, 0)[:, 0]
        correct += (logits.argmax(1, keepdim=True) == target).masked_fill_(empty, False).sum()
        if not any(output_mask):
            continue
        grad = logits.softmax(1)  # not exp(logits - lse): lse's rounding would break the error rule in float32
        grad.scatter_add_(1, target, grad.new_full((len(rows), 1), -1)).masked_fill_(empty, 0)
        if output_mask[2]:
            grad_bias += grad.sum(0)
        grad = grad.to(hidden.dtype)
        if output_mask[1]:  # a product in a half dtype would round what is added up
            grad_weight += grad.t().to(dtype) @ rows.to(dtype)
        if output_mask[0] and len(hidden):
            grad_hidden.index_add_(0, index[slots], (grad @ low).to(dtype))
    count = used.sum().clamp(min=1)
    loss = losses.sum(dtype=torch.float64) / count  # in float32 off by units in the last place
    return loss.to(dtype), correct / count, grad_hidden.to(hidden.dtype), grad_weight, grad_bias
