"""Modules that are compiled each by itself, and whose activations can be made again in the backward pass.

By region and not as a whole: equal blocks share their code, gradients of late blocks travel while early ones are
computed, and a sharded model gathers its parameters in the hooks around each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VARIANTS = 64
"""Most variants of one piece of code: 7 kinds of block, two streams, and room for what users build of them."""


class Region(nn.Module):
    """A module whose `forward` calls its `body`, compiled or not; hooks stay outside.

    Without gradients, as in evaluation, the plain body runs: batches of any size then compile nothing.
    """

    recompute = False
    """Keep only the inputs for the backward pass, and run the body again in it."""
    compiled: Callable[..., Tensor] | None = None

    def forward(self, *inputs: Tensor | None) -> Tensor:
        """As `body`."""
        if not torch.is_grad_enabled():
            return self.body(*inputs)
        body = self.compiled or self.body
        if self.recompute:  # nothing in a body is random
            return checkpoint(body, *inputs, use_reentrant=False, preserve_rng_state=False)
        return body(*inputs)

    def body(self, *inputs: Any) -> Tensor:
        """What the module computes."""
        raise NotImplementedError


def compile_regions(model: nn.Module, *, cuda_graphs: bool = False) -> None:
    """Compile every region of `model`, on its first call with inputs of a new shape; a graph break is an error.

    With `cuda_graphs` each becomes a CUDA graph (not yet run on a GPU).
    """
    # A limit of torch's that guards against shapes without end; `fullgraph` makes exceeding it an error.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    # It would cut a region where DDP's buckets end, to exchange gradients early; regions do that by themselves.
    torch._dynamo.config.optimize_ddp = False
    mode = "reduce-overhead" if cuda_graphs else None
    for module in model.modules():
        if isinstance(module, Region):
            module.compiled = torch.compile(module.body, fullgraph=True, dynamic=False, mode=mode)
