"""The linear layers of the models."""

from __future__ import annotations

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
