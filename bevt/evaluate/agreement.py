"""Does a tokenizer's precision change its codes? Measured on real frames and the weights that will be used."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from bevt import tokenizers
from bevt.config import Config, check_frames, tokenizer_settings
from bevt.data import augment
from bevt.data.build import frame_batches
from bevt.tokenizers import Tokenizer

LEAST = 0.995
"""Share of equal codes that a precision must reach."""

FRAMES = 4
"""Frames at a time, whose logits are written whole: 26 MB of 8192 codes."""


@dataclass(frozen=True)
class Agreement:
    """Codes of a tokenizer against those of the same weights in float32, eager, by the reference implementation.

    The unit of logits is the standard deviation of the float32 logits of one position over its codes.
    """

    tokens: int
    equal: float
    """Share of equal codes."""
    gaps: Tensor
    """(different codes,) float32 logit of the float32 code minus that of the other, where they differ."""
    margin: float
    """Median over all positions of the largest float32 logit minus the next one."""

    @property
    def passed(self) -> bool:
        """Whether the share is at least `LEAST`."""
        return self.equal >= LEAST

    def __str__(self) -> str:
        lines = [f"{100 * self.equal:.2f} % of {self.tokens} codes are those of float32 (wanted: {100 * LEAST:g} %)"]
        if len(self.gaps):
            lines.append(
                f"where they differ, the float32 logits of the two are {float(self.gaps.median()):.2g} apart (median), "
                f"{float(self.gaps.max()):.2g} at most; the best and the second code of all positions: "
                f"{self.margin:.2g} (median), in standard deviations of a position's logits"
            )
        return "\n".join(lines)


@torch.no_grad()
def agreement(tested: Tokenizer, exact: Tokenizer, batches: Iterable[Tensor]) -> Agreement:
    """Compare on `batches`, each (M, 3, H, W) float in [0, 1] on the device of both, which hold the same weights."""
    gaps, margins, tokens = [], [], 0
    weight, bias = (tensor.float() for tensor in exact.tail)
    for pixels in (piece for batch in batches for piece in batch.split(FRAMES)):
        codes = tested.encode(pixels).flatten()
        logits = torch.addmm(bias, exact.rows(pixels).float(), weight.T)
        best, second = logits.topk(2).values.T
        spread = logits.std(1)
        differ = codes != logits.argmax(1)
        gaps.append(((best - logits.gather(1, codes[:, None])[:, 0]) / spread)[differ])
        margins.append((best - second) / spread)
        tokens += len(codes)
    different = torch.cat(gaps)
    return Agreement(tokens, 1 - len(different) / tokens, different, float(torch.cat(margins).median()))


def check_tokenizer(config: Config, frames: int) -> tuple[Agreement, dict[str, str]]:
    """The tokenizer that `config` names, as training on this machine would use it, on frames of its data.

    Also what was settled for this machine (`Tokenizer.implementations`). Raises ConfigError, DataError, TokenizerError
    and FileNotFoundError as a run would.
    """
    check_frames(config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain = replace(config.tokenizer, impl="reference", precision="float32", compile="no")
    tested, exact = tokenizers.build(tokenizer_settings(config), device), tokenizers.build(plain, device)
    with closing(frame_batches(config, FRAMES, config.train.seed)) as batches:
        some = islice(batches, -(-frames // FRAMES))
        views = (augment.tokenizer_view(batch.to(device), config.data.crop // 2) for batch in some)
        return agreement(tested, exact, views), tested.implementations
