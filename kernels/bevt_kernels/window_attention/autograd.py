"""The derivative of `window_attention_forward`: its backward op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bevt_kernels.registration import differentiable, refuse_second_derivative
from bevt_kernels.window_attention import ops

forward = ops.forward


class WindowAttention(torch.autograd.Function):
    """(qkv, bias_table, static arguments...) -> (out, lse); lse takes no gradient."""

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias_table: Tensor, *static: Any) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = ops.forward(qkv, bias_table, *static)
        ctx.save_for_backward(qkv, bias_table, out, lse)
        ctx.static = static
        ctx.mark_non_differentiable(lse)
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative("window_attention")
        if grads[0] is None:  # nothing depends on out
            return (None,) * (2 + len(ctx.static))
        *static, impl = ctx.static
        train_table = ctx.needs_input_grad[1]
        grad_qkv, grad_table = ops.backward(grads[0], *ctx.saved_tensors, *static, train_table, impl)
        return grad_qkv, grad_table if train_table else None, *[None] * len(ctx.static)


differentiable(ops.forward, WindowAttention)
