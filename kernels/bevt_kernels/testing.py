"""Oracles, input factories and the error rule, for tests and benchmarks alike.

The oracle of an op is its eager form in float64 on the inputs as rounded to the tested dtype. The eager forms are
written as models write them, apart from the references: two ways of saying the same thing that check each other.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class WindowCase:
    """One problem of window attention; letters as in `window_attention/README.md`."""

    batch: int
    grid: Size3
    window: Size3
    shift: Size3 = (0, 0, 0)
    table_window: Size3 | None = None
    heads: int = 2
    head_dim: int = 8

    @property
    def table(self) -> Size3:
        return self.table_window or self.window

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def inputs(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """qkv, bias_table and a random gradient of the output. The table is float32, or float64 for float64."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(device)

        channels = self.heads * self.head_dim
        qkv, grad = (normal(self.batch, *self.grid, c).to(dtype) for c in (3 * channels, channels))
        table = normal(math.prod(2 * t - 1 for t in self.table), self.heads)
        return qkv, table.to(torch.float64 if dtype == torch.float64 else torch.float32), grad

    def keywords(self) -> dict[str, object]:
        """Keyword arguments of `bevt_kernels.window_attention`."""
        return {
            "num_heads": self.heads,
            "window_size": self.window,
            "shift": self.shift,
            "table_window": self.table_window,
        }


_WINDOWS = ((8, 7, 7), (1, 7, 7), (2, 7, 7), (4, 4, 4), (3, 5, 2), (1, 1, 1))


def random_window_case(seed: int, windows: int = 64) -> WindowCase:
    """A case of its own for each seed: half of the windows are those of known models, up to 1024 tokens.

    At most `windows` windows, each head's counted, and 2**18 scores (2**20 in one window of 1024 tokens): 0.1 s
    on a CPU, float64 oracle included.
    """
    rng = random.Random(seed)
    kind = rng.random()
    if kind < 0.04:
        window = rng.choice(((16, 7, 7), (16, 8, 8)))
    elif kind < 0.5:
        window = rng.choice(_WINDOWS)
    else:
        window = (rng.randint(1, 6), rng.randint(1, 8), rng.randint(1, 10))
    left, counts = max(1, min(windows, 2**18 // math.prod(window) ** 2)), {}
    for name, most in rng.sample([("batch", 2), ("heads", 4), ("d", 3), ("h", 3), ("w", 3)], 5):
        counts[name] = rng.randint(1, min(most, left))
        left //= counts[name]
    (d, h, w), (nd, nh, nw) = window, (counts["d"], counts["h"], counts["w"])
    table = (d + rng.randint(0, 7 if d == 1 else 2), h + rng.randint(0, 2), w + rng.randint(0, 2))
    return WindowCase(
        counts["batch"],
        (nd * d, nh * h, nw * w),
        window,
        (rng.randrange(d), rng.randrange(h), rng.randrange(w)) if rng.random() < 2 / 3 else (0, 0, 0),
        table if rng.random() < 1 / 2 else None,
        counts["heads"],
        rng.choice((8, 16, 24, 32, 40, 64, 96, 128)),
    )


def relative_index(window: Size3, table_window: Size3) -> Tensor:
    """(N, N) rows of the bias table, from coordinates: query i minus key j on each axis."""
    tokens = torch.tensor(list(itertools.product(*map(range, window))))
    offset = tokens[:, None] - tokens[None] + torch.tensor(table_window) - 1
    _, h, w = (2 * t - 1 for t in table_window)
    return (offset[..., 0] * h + offset[..., 1]) * w + offset[..., 2]


def eager_window_attention(qkv: Tensor, bias_table: Tensor, case: WindowCase) -> Tensor:
    """Window attention as models write it: roll, partition, matmul, bias, mask, softmax, all in the dtype of `qkv`."""
    (b, *grid, _), window, h, c = qkv.shape, case.window, case.heads, case.head_dim
    counts = [size // w for size, w in zip(grid, window)]
    split = [x for pair in zip(counts, window) for x in pair]  # nd, wd, nh, wh, nw, ww

    def cut(x: Tensor) -> Tensor:
        """(..., D, H, W) -> (..., windows, N)."""
        lead = x.dim() - 3
        x = x.unflatten(-1, split[4:]).unflatten(-3, split[2:4]).unflatten(-5, split[:2])
        return x.permute(*range(lead), *(lead + i for i in (0, 2, 4, 1, 3, 5))).flatten(-3).flatten(-4, -2)

    rolled = qkv.roll([-s for s in case.shift], (1, 2, 3))
    q, k, v = cut(rolled.movedim(-1, 1)).unflatten(1, (3, h, c)).movedim(3, -1).unbind(1)  # each (b, h, windows, N, c)
    bias = bias_table.to(qkv.dtype)[relative_index(window, case.table).to(qkv.device)].permute(2, 0, 1)
    scores = (q * case.scale) @ k.transpose(-1, -2) + bias[:, None]
    if any(case.shift):
        for axis, (size, s) in enumerate(zip(grid, case.shift)):
            # Where rolled tokens come from: those from before `shift` wrapped around, to behind the others.
            source = (torch.arange(size, device=qkv.device) + s) % size
            wrapped = cut((source < s).view([-1 if a == axis else 1 for a in range(3)]).expand(*grid))
            scores = scores.masked_fill(wrapped[:, :, None] != wrapped[:, None], -math.inf)
    out = (scores.softmax(-1) @ v).movedim(1, 3).reshape(b, *counts, *window, h * c)
    return out.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, *grid, h * c).roll(case.shift, (1, 2, 3))


def eager_masked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss as models write it: gather the used rows, linear, cross-entropy in float32 at least."""
    rows, labels = index[index >= 0], targets[index >= 0]
    if not len(rows):
        zero = 0 * (hidden.sum() + weight.sum() + bias.sum())
        return zero, zero.detach()
    logits = F.linear(hidden[rows], weight.to(hidden.dtype), bias.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).to(logits.dtype).mean()


def assert_within_budget(actual: Tensor, eager: Tensor, oracle: Tensor, name: str) -> None:
    """Fail unless the errors of `actual` against the float64 `oracle` are at most twice those of `eager` + rounding.

    Mean and largest absolute error are judged; `eager` is plain PyTorch in the dtype of `actual`, and the rounding term
    is one unit in the last place of the oracle's mean and largest magnitude.
    """
    assert actual.shape == oracle.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    assert bool(actual.isfinite().all()), f"{name}: {int((~actual.isfinite()).sum())} values are not finite"
    if not actual.numel():
        return
    error, allowed = (actual.double() - oracle).abs(), (eager.double() - oracle).abs()
    for measure in (torch.mean, torch.max):
        ulp = torch.finfo(actual.dtype).eps * float(measure(oracle.abs()))
        got, limit = float(measure(error)), 2 * float(measure(allowed)) + ulp
        assert got <= limit, f"{name}: {measure.__name__} error {got:.3e} exceeds {limit:.3e} (2x eager + rounding)"
