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
        # On a GPU there: a CPU draws 43 million a second, and a case may take 0.8 billion.
        drawn_on = "cuda" if device.startswith("cuda") and dtype != torch.float64 else "cpu"
        generator = torch.Generator(drawn_on).manual_seed(seed)
        wide = torch.float64 if drawn_on == "cpu" else torch.float32

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=wide, device=drawn_on).to(device)

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


@dataclass(frozen=True)
class LossCase:
    """One problem of masked linear cross-entropy; letters as in `masked_linear_cross_entropy/README.md`."""

    rows: int
    channels: int
    classes: int
    slots: int
    used: int
    """Slots that hold a row, anywhere among them; the others are -1 with a target out of range."""
    duplicates: bool = False
    """Rows are drawn with replacement, so that some are in several slots; without, each once and in order."""
    scale: float = 1.0
    """Standard deviation of a logit without its bias."""

    def inputs(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
        """hidden, weight, bias, targets, index, and a random gradient of the loss (0-dim, float32 or float64).

        A third of the rows lean towards a class that is the target in all of their slots, so that accuracy says
        something; the other targets are random. All floating tensors but the last are in `dtype`.
        """
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64)

        def below(bound: int, *shape: int) -> Tensor:
            return torch.randint(max(1, bound), shape, generator=g)

        weight = normal(self.classes, self.channels) * self.scale / max(1, self.channels) ** 0.5
        label, leans = below(self.classes, self.rows), below(3, self.rows) == 0
        # By |w|^2 = scale^2 this adds 12 times the standard deviation to the label's logit.
        hidden = normal(self.rows, self.channels) + leans[:, None] * weight[label] * 12 / self.scale
        if self.duplicates:
            taken = below(self.rows, self.used)
        else:
            taken = torch.randperm(self.rows, generator=g)[: self.used].sort().values
        where = torch.randperm(self.slots, generator=g)[: self.used].sort().values
        index = torch.full((self.slots,), -1).index_copy_(0, where, taken)
        chosen = torch.where(leans[taken], label[taken], below(self.classes, self.used))
        targets = torch.full((self.slots,), 10**9).index_copy_(0, where, chosen)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        floats = hidden, weight, normal(self.classes) * self.scale
        grad = normal().to(dtype).to(device, wide)  # so that a rival whose loss is in `dtype` gets the same one
        return *(x.to(device, dtype) for x in floats), targets.to(device), index.to(device), grad


_CLASSES = (1, 2, 3, 31, 32, 33, 127, 129, 512, 513, 1000, 1300, 2049)


def random_loss_case(seed: int, products: int = 2**24) -> LossCase:
    """A case of its own for each seed, of at most `products` multiply-adds forward: 0.1 s on a CPU with its oracle.

    Often no row, one, or an odd number of them; a number of classes that no tile divides; no used slot, or all.
    """
    rng = random.Random(seed)
    classes = rng.choice(_CLASSES) if rng.random() < 2 / 3 else rng.randint(1, 3000)
    channels = rng.choice((1, 3, 8, 16, 40, 64, 100, 128)) if rng.random() < 2 / 3 else rng.randint(1, 160)
    most = max(1, min(700, products // (classes * channels)))
    slots = rng.choice((0, 1, 2, 63, 64, 65, 127)) if rng.random() < 1 / 2 else rng.randint(0, 700)
    slots = min(slots, most)
    duplicates = rng.random() < 1 / 3
    rows = rng.choice((0, 1, 2 * rng.randint(0, 60) + 1)) if duplicates or not slots else slots + rng.randint(0, 40)
    most_used = slots if rows else 0
    used = rng.choice((0, most_used)) if rng.random() < 1 / 3 else rng.randint(0, most_used)
    return LossCase(rows, channels, classes, slots, used, duplicates, scale=rng.choice((0.1, 1.0, 1.0, 10.0)))


@dataclass(frozen=True)
class ArgmaxCase:
    """One problem of linear argmax: M rows of C channels, V classes."""

    rows: int
    channels: int
    classes: int

    def inputs(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """x, weight and bias, in `dtype`; logits of variance 2."""
        g = torch.Generator().manual_seed(seed)
        x, weight, bias = (
            torch.randn(shape, generator=g, dtype=torch.float64)
            for shape in ((self.rows, self.channels), (self.classes, self.channels), (self.classes,))
        )
        return x.to(device, dtype), (weight / max(1, self.channels) ** 0.5).to(device, dtype), bias.to(device, dtype)


@dataclass(frozen=True)
class ConvCase:
    """One 3x3 convolution: M images of H x W pixels, C channels in, N out."""

    images: int
    height: int
    width: int
    channels: int
    outputs: int
    relu: bool = True

    def inputs(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Channels-last x, weight and bias; outputs of variance 1 or 2."""
        g = torch.Generator().manual_seed(seed)
        x, weight, bias = (
            torch.randn(shape, generator=g, dtype=torch.float64)
            for shape in (
                (self.images, self.height, self.width, self.channels),
                (self.outputs, self.channels, 3, 3),
                (self.outputs,),
            )
        )
        weight /= max(1, 9 * self.channels) ** 0.5
        return x.permute(0, 3, 1, 2).to(device, dtype), weight.to(device, dtype), bias.to(device, dtype)


def random_conv_case(seed: int, products: int = 2**22) -> ConvCase:
    """A case of its own for each seed, of at most `products` multiply-adds (or one pixel's): odd maps and channels."""
    rng = random.Random(seed)
    channels, outputs = (rng.choice((1, 3, 8, 15, 16, 17, 32, 33, 48, 64, 96, rng.randint(1, 100))) for _ in range(2))
    if rng.random() < 1 / 6:
        channels = rng.choice((255, 256, 257, 300))  # on and off a block of channels
    left, sizes = max(1, products // (9 * channels * outputs)), []
    for most in (28, 28, 5):
        sizes.append(rng.randint(1, min(most, left)))
        left //= sizes[-1]
    height, width, images = sizes
    return ConvCase(0 if rng.random() < 1 / 30 else images, height, width, channels, outputs, rng.random() < 1 / 2)


WINOGRAD_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
WINOGRAD_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
WINOGRAD_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))
"""B^T, G and A^T of F(4x4, 3x3) (Lavin and Gray, arXiv 1509.09308, section 4.3)."""


def eager_winograd(x: Tensor, weight: Tensor, bias: Tensor, relu: bool) -> Tensor:
    """`conv3x3` as Winograd's F(4x4, 3x3) in plain PyTorch, in the dtype of `x`."""
    into, kernel, out = (x.new_tensor(m) for m in (WINOGRAD_INPUT, WINOGRAD_KERNEL, WINOGRAD_OUTPUT))
    height, width = x.shape[2:]
    padded = F.pad(x.relu() if relu else x, (1, 1 - width % -4, 1, 1 - height % -4))
    tiles = padded.unfold(2, 6, 4).unfold(3, 6, 4)  # (M, C, rows, columns, 6, 6)
    v = into @ tiles @ into.t()
    u = kernel @ weight @ kernel.t()
    y = out @ torch.einsum("ncij,mcrsij->mnrsij", u, v) @ out.t()
    return y.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)[..., :height, :width] + bias[:, None, None]


@dataclass(frozen=True)
class LinearCase:
    """One linear layer: M rows of C channels, N outputs."""

    rows: int
    channels: int
    outputs: int
    bias: bool = True

    def inputs(self, dtype: torch.dtype, seed: int = 0, device: str = "cpu") -> tuple[Tensor, ...]:
        """x, weight, bias if there is one, and a random gradient of the output; outputs of variance 1 or 2."""
        g = torch.Generator().manual_seed(seed)
        shapes = [(self.rows, self.channels), (self.outputs, self.channels), *[(self.outputs,)] * self.bias]
        x, weight, *bias, grad = (
            torch.randn(shape, generator=g, dtype=torch.float64) for shape in (*shapes, (self.rows, self.outputs))
        )
        weight /= max(1, self.channels) ** 0.5
        return tuple(t.to(device, dtype) for t in (x, weight, *bias, grad))


def random_linear_case(seed: int, products: int = 2**22) -> LinearCase:
    """A case of its own for each seed, of at most `products` multiply-adds: sizes 0, 1, odd, on and off every tile."""
    rng = random.Random(seed)
    sizes = [rng.choice((1, 2, 7, 8, 9, 24, 31, 32, 33, 64, 96, rng.randint(1, 300))) for _ in range(3)]
    if rng.random() < 1 / 2:  # one long axis: of rows, of sums, or of outputs
        sizes[rng.randrange(3)] = rng.choice((255, 256, 257, 513, rng.randint(300, 3000)))
    if rng.random() < 1 / 10:
        sizes[rng.randrange(3)] = 0
    largest = sizes.index(max(sizes))
    sizes[largest] = min(sizes[largest], max(1, products // max(1, sizes[largest - 1] * sizes[largest - 2])))
    rows, channels, outputs = sizes
    return LinearCase(rows, channels, outputs, rng.random() < 2 / 3)


def random_argmax_case(seed: int, products: int = 2**24) -> ArgmaxCase:
    """A case of its own for each seed, of at most `products` multiply-adds: rows 0, 1, odd; V that no tile divides."""
    case = random_loss_case(seed, products)
    return ArgmaxCase(case.slots, case.channels, case.classes)


def eager_masked_linear_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss as models write it: gather the used rows, linear, cross-entropy in float32 at least."""
    rows, labels = index[index >= 0], targets[index >= 0]
    if not len(rows):
        zero = 0 * (hidden.sum() + weight.sum() + bias.sum())
        zero = zero if zero.dtype == torch.float64 else zero.float()
        return zero, zero.detach()
    logits = F.linear(hidden[rows], weight.to(hidden.dtype), bias.to(hidden.dtype))
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).to(logits.dtype).mean()


def assert_within_budget(actual: Tensor, eager: Tensor, oracle: Tensor, name: str, times: float = 2) -> None:
    """Fail unless the errors of `actual` against the float64 `oracle` are at most `times` those of `eager` + rounding.

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
        got, limit = float(measure(error)), times * float(measure(allowed)) + ulp
        assert got <= limit, (
            f"{name}: {measure.__name__} error {got:.3e} exceeds {limit:.3e} ({times:g}x eager + rounding)"
        )


def _rounding(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,) what float32 (float64) sums may be off, in any order.

    n roundings of the sum of magnitudes at most, and about their square root where signs are random: eight times that
    (Higham and Mary 2019, doi 10.1137/18M1226312, theorem 2.4). Magnitudes by Cauchy and Schwarz.
    """
    terms = x.shape[1] + 1
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    return min(terms, 8 * terms**0.5) * unit * (x.norm(dim=1) * weight.norm(dim=1).amax() + bias.abs().amax())


def assert_argmax(codes: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Fail unless each of `codes` is its row's largest logit, up to the rounding of float32 sums in any order."""
    assert codes.shape == x.shape[:1], f"codes: shape {tuple(codes.shape)}, expected {tuple(x.shape[:1])}"
    assert codes.dtype == torch.int64, f"codes: dtype {codes.dtype}, expected torch.int64"
    outside = int(((codes < 0) | (codes >= len(weight))).sum())
    assert not outside, f"codes: {outside} are no class 0..{len(weight) - 1}"
    wide = weight.double(), bias.double()
    for rows in torch.arange(len(x), device=x.device).split(1024):  # 64 MB of float64 logits at 8192 classes
        exact = torch.addmm(wide[1], x[rows].double(), wide[0].t())
        short = exact.amax(1) - exact.gather(1, codes[rows, None]).squeeze(1)
        wrong = short > 2 * _rounding(x[rows].double(), *wide, x.dtype)
        assert not wrong.any(), (
            f"codes: {int(wrong.sum())} of rows {int(rows[0])}..{int(rows[-1])} are not the largest logit; "
            f"row {int(rows[wrong][0])} is {float(short[wrong][0]):.3e} below it"
        )


def assert_accuracy(
    accuracy: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, index: Tensor
) -> None:
    """Fail unless `accuracy` is a count of used slots over their number, and rounding of the logits can explain it.

    Where sums in float32, and rounding to a half dtype of `hidden`, cannot tell a slot's target from another class, the
    slot may count or not; all others are certain.
    """
    targets, index = targets[index >= 0], index[index >= 0]
    wide = weight.double(), bias.double()
    coarse = torch.finfo(hidden.dtype).eps if hidden.dtype.itemsize < 4 else 0.0
    least = most = 0
    for slots in torch.arange(len(index), device=index.device).split(1024):
        rows = hidden[index[slots]].double()
        exact = torch.addmm(wide[1], rows, wide[0].t())
        # A product and the bias added to it may each be rounded.
        margin = _rounding(rows, *wide, hidden.dtype) + coarse * (exact.abs().amax(1) + 2 * wide[1].abs().amax())
        target = targets[slots, None]
        own = exact.gather(1, target).squeeze(1)
        lead = own - exact.scatter_(1, target, -math.inf).amax(1)
        least, most = least + int((lead > 2 * margin).sum()), most + int((lead >= -2 * margin).sum())
    slots_used = max(1, len(index))
    got = float(accuracy) * slots_used
    assert abs(got - round(got)) <= 1e-6 * slots_used, f"accuracy: {float(accuracy)} is no multiple of 1/{slots_used}"
    assert least <= round(got) <= most, f"accuracy: {round(got)} of {slots_used} slots, expected {least} to {most}"
