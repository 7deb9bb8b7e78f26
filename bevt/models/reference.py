"""The reference path: BEVT computed the way the official code does, eagerly and whole.

Attention rolls, partitions and materialises every score; decoders and head run on all positions and keep all logits,
of which the masked ones are then selected. It is what the project's speed and memory are measured against, and what
its loss curves are compared with (`tests/golden`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from bevt_kernels.baselines.window_attention import constants, eager_attention
from bevt_kernels.registration import statistics_dtype
from bevt_kernels.testing import WindowCase
from torch import Tensor

from bevt.config import ModelConfig, plain
from bevt.models.bevt import BEVT, MaskedInput, Stream
from bevt.models.video_swin import PATCH, WindowAttention3D


class MaterialisedAttention:
    """`bevt_kernels.window_attention` by roll, partition, product, softmax and product; its constants are made once."""

    def __init__(self) -> None:
        self._constants: dict[tuple[WindowCase, torch.dtype, torch.device], tuple[Tensor, Tensor | None]] = {}

    def __call__(
        self,
        qkv: Tensor,
        bias_table: Tensor,
        *,
        num_heads: int,
        window_size: tuple[int, int, int],
        shift: tuple[int, int, int],
        table_window: tuple[int, int, int],
        impl: str,
    ) -> Tensor:
        """As the op; `impl` is not looked at."""
        batch, depth, height, width, channels = qkv.shape
        head_dim = channels // (3 * num_heads)
        case = WindowCase(batch, (depth, height, width), window_size, shift, table_window, num_heads, head_dim)
        key = (replace(case, batch=1), qkv.dtype, qkv.device)
        if key not in self._constants:
            self._constants[key] = constants(*key)
        return eager_attention(qkv, bias_table, case, *self._constants[key])


class ReferenceBEVT(BEVT):
    """`BEVT`, built like it, with the same parameters and results up to rounding."""

    def __init__(self, config: ModelConfig, *arguments: Any, **keywords: Any) -> None:
        super().__init__(plain(config), *arguments, **keywords)
        self.implementations = dict.fromkeys(self.implementations, "materialised")
        attend = MaterialisedAttention()
        for module in self.modules():
            if isinstance(module, WindowAttention3D):
                module.attend = attend  # type: ignore[assignment]

    def stream_loss(self, stream: Stream, inputs: MaskedInput) -> tuple[Tensor, Tensor]:
        """As `BEVT.stream_loss`; on a GPU it waits for the mask, as the official code does."""
        logits = self.head(self.decode(stream, inputs.pixels, inputs.mask, inputs.drop)).flatten(0, -2)
        masked = self.masked_positions(stream, inputs)
        logits, targets = logits.index_select(0, masked), inputs.codes.flatten().index_select(0, masked)
        logits = logits.to(statistics_dtype(logits.dtype))
        count = max(len(masked), 1)
        loss = F.cross_entropy(logits, targets, reduction="sum") / count
        return loss, (logits.argmax(1) == targets).sum() / count

    def masked_positions(self, stream: Stream, inputs: MaskedInput) -> Tensor:
        """(n,) numbers of the masked positions among all of the micro-batch."""
        mask = inputs.mask.repeat_interleave(PATCH[0], 1) if stream == "clips" else inputs.mask
        return mask.flatten().nonzero().squeeze(1)
