"""Masked linear cross-entropy in plain PyTorch: the specification every implementation is judged against.

`masked_linear_cross_entropy` is the specification: differentiable, all logits at once. `forward` and `backward` are the
same by formula (README.md), a few rows at a time, so the (K, V) logits are never whole: a chunk holds about 2**20 of
them on the CPU, 2**24 elsewhere (`registration.chunks`). Products are in the dtype of `hidden`, as the linear layer's
would be; sums, softmax and the gradients' accumulators are float32 (float64 for float64).

Letters: M rows, C channels, V classes, K slots.
"""

from __future__ import annotations

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


def _check_on_cpu(hidden: Tensor, weight: Tensor, targets: Tensor, index: Tensor) -> None:
    """Raise ValueError for an index or target out of range in a used slot, where looking does not cost a sync."""
    if hidden.device.type != "cpu":
        return
    bad = (index != -1) & ((index < 0) | (index >= len(hidden)) | (targets < 0) | (targets >= len(weight)))
    if bad.any():
        slot = int(bad.nonzero()[0])
        raise ValueError(
            f"slot {slot} has index {int(index[slot])} and target {int(targets[slot])}: an index must be -1 (unused) "
            f"or a row 0..{len(hidden) - 1} of hidden, a target a class 0..{len(weight) - 1}"
        )


class _Rows:
    """What `forward` and `backward` share: which slots are used, and the logits of a chunk of slots."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor) -> None:
        used = index != -1
        self.hidden, self.weight, self.bias = hidden, weight.to(hidden.dtype), bias.to(hidden.dtype)
        self.unused = ~used
        self.index, self.targets = index.where(used, 0), targets.where(used, 0)
        self.count = used.sum().clamp(min=1)

    def chunks(self) -> list[slice]:
        return list(chunks(len(self.index), len(self.weight), self.hidden.device))

    def rows(self, slots: slice) -> Tensor:
        """(k, C): zeros for an unused slot, so that nothing in `hidden` reaches a sum through it."""
        if len(self.hidden) == 0:
            return self.hidden.new_zeros(slots.stop - slots.start, self.hidden.shape[1])
        return self.hidden.index_select(0, self.index[slots]).masked_fill_(self.unused[slots, None], 0)

    def logits(self, rows: Tensor) -> Tensor:
        """(k, V) in the statistics' dtype."""
        return torch.addmm(self.bias, rows, self.weight.t()).to(statistics_dtype(rows.dtype))


def forward(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The op's forward: loss () and accuracy ()."""
    _check_on_cpu(hidden, weight, targets, index)
    x = _Rows(hidden, weight, bias, targets, index)
    dtype = statistics_dtype(hidden.dtype)
    losses, correct = hidden.new_empty(len(index), dtype=dtype), torch.empty_like(x.unused)
    for slots in x.chunks():
        logits = x.logits(x.rows(slots))
        target = x.targets[slots, None]
        losses[slots] = logits.logsumexp(1) - logits.gather(1, target).squeeze(1)
        correct[slots] = (logits.argmax(1, keepdim=True) == target).squeeze(1)
    loss = losses.masked_fill_(x.unused, 0).sum() / x.count
    return loss, (correct & ~x.unused).sum() / x.count.to(dtype)


def backward(
    grad_loss: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The op's backward: gradients to `hidden`, `weight` and `bias`, each in its own dtype. Logits are recomputed."""
    x = _Rows(hidden, weight, bias, targets, index)
    dtype = statistics_dtype(hidden.dtype)
    grad_hidden, grad_weight, grad_bias = (torch.zeros_like(t, dtype=dtype) for t in (hidden, weight, bias))
    per_row = (grad_loss / x.count).expand(len(index)).masked_fill(x.unused, 0).unsqueeze(1)
    for slots in x.chunks():
        rows = x.rows(slots)
        grad = x.logits(rows).softmax(1)  # not exp(logits - lse): lse's rounding would break the error rule in float32
        grad.scatter_add_(1, x.targets[slots, None], grad.new_full((len(rows), 1), -1)).mul_(per_row[slots])
        grad_bias += grad.sum(0)
        grad = grad.to(hidden.dtype)
        grad_weight += grad.t() @ rows
        if len(hidden):
            grad_hidden.index_add_(0, x.index[slots], (grad @ x.weight).to(dtype))
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype)
