"""What the models are put together from: linear layers, MLPs, residual branches."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from bevt_kernels import linear
from torch import Tensor, nn

from bevt.config import Impl


class Linear(nn.Linear):
    """`nn.Linear`, by the implementation `impl` of `bevt_kernels.linear`."""

    def __init__(self, channels: int, outputs: int, *, bias: bool = True, impl: Impl = "auto") -> None:
        super().__init__(channels, outputs, bias=bias)
        self.impl = impl

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., N)."""
        return linear(x, self.weight, self.bias, impl=self.impl)


class MLP(nn.Module):
    """Linear, GELU, Linear. `gelu`: by the error function, or by its approximation with tanh."""

    def __init__(self, dim: int, hidden: int, *, gelu: Literal["none", "tanh"] = "none", impl: Impl = "auto") -> None:
        super().__init__()
        self.gelu = gelu
        self.fc1 = Linear(dim, hidden, impl=impl)
        self.fc2 = Linear(hidden, dim, impl=impl)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


def scaled(branch: Tensor, factor: Tensor | None) -> Tensor:
    """A residual branch (B, ..., C) times each sample's `factor` (B,), drop path's; None: 1."""
    return branch if factor is None else branch * _spread(factor, branch)


def add_branch(x: Tensor, branch: Tensor, factor: Tensor | None) -> Tensor:
    """`x` and a residual branch, both (B, ..., C), the latter times each sample's `factor` (B,), drop path's."""
    return x + branch if factor is None else torch.addcmul(x, branch, _spread(factor, x))


def _spread(factor: Tensor, x: Tensor) -> Tensor:
    return factor.view(-1, *[1] * (x.ndim - 1))


def init_weights(module: nn.Module) -> None:
    """BEVT's official rule, for `Module.apply`: linear weights truncated normal (0.02), their biases zero."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
