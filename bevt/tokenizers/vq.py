"""A small VQ tokenizer that is trained here, on the user's own frames, and that can also draw what its codes stand for.

Every 8x8 cell gives one vector: its D lowest cosine coefficients (DCT-II; red, green, blue of each in turn) plus what
three stride-2 convolutions add. The vector is replaced by the nearest of V codes; the decoder sums the same cosines and
adds what its mirrored convolutions say. Both convolution branches start at zero, so the first step already quantises
colours and slopes, and the scale of the vectors is fixed by the pixels. (Without the cosines, 250 steps end on one of
several plateaus, by the seed: mean errors of 25 to 34 of 255, where this gives 20 to 21.)

Loss: mean absolute error of the pixels + `commitment` * mean squared distance to the code, with the straight-through
gradient of van den Oord et al. (arXiv 1711.00937); the codes follow their vectors by exponential moving averages (its
appendix A.1), from k-means on the first batch. A code that is used less than `min_use` times the mean use (in the
moving average, so after about log(min_use) / log(decay) steps without a use) takes the place of a random vector of the
current batch; in the last fifth of the steps codes only follow the averages, so that they settle.

The nearest code is argmin |x - e|^2 = argmax (x . e - |e|^2 / 2): `linear_argmax` with the codebook as the weight and
-|e|^2 / 2 as the bias, the same op as the DALL-E encoder's last layer.

Letters: M frames, H x W pixels, h = H/8, w = W/8, N = M h w vectors of D numbers, V codes.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from bevt_kernels import linear_argmax
from torch import Tensor, nn
from torch.nn import functional as F

from bevt.config import ConfigError, TokenizerConfig, from_dict, to_dict
from bevt.tokenizers import common
from bevt.tokenizers.frozen import AUTO, FrozenTokenizer

FORMAT = "bevt-vq-1"


@dataclass(frozen=True)
class VQConfig:
    """The tokenizer and how it is trained."""

    image_size: int = 112
    """Side of the square training images in pixels, a multiple of 8: the tokenizer's view of a crop, half its side."""
    vocab_size: int = 512
    """Codes V."""
    code_dim: int = 16
    """Numbers D in a code."""
    width: int = 64
    """Channels after the first convolution; doubled by each of the next two."""
    blocks: int = 2
    """Residual 3x3 blocks at code resolution, in encoder and decoder; with 0 a code sees the 22x22 pixels around it."""
    steps: int = 5000
    """Training steps."""
    batch: int = 64
    """Images in a step."""
    lr: float = 2e-3
    """AdamW's peak learning rate; cosine to 0."""
    commitment: float = 0.25
    """Weight of the distance between vectors and their codes."""
    decay: float = 0.98
    """Of the codebook's moving averages, a step."""
    min_use: float = 0.05
    """A code used less than this share of the mean use is dead."""
    eval_batches: int = 8
    """Fresh batches on which the codebook's use is measured at the end."""
    seed: int = 0
    """Everything random in the fit follows from it (and from the batches)."""

    def __post_init__(self) -> None:
        """Raise ConfigError, naming the key, where a value cannot be used."""
        for name in ("vocab_size", "code_dim", "width", "steps", "batch", "eval_batches"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if self.image_size < 8 or self.image_size % 8:
            raise ConfigError(f"image_size must be a multiple of 8, got {self.image_size}")
        if self.code_dim > 192:
            raise ConfigError(f"code_dim must be at most the 192 numbers of a cell, got {self.code_dim}")
        if self.blocks < 0:
            raise ConfigError(f"blocks must be 0 or more, got {self.blocks}")
        if self.lr <= 0:
            raise ConfigError(f"lr must be above 0, got {self.lr}")
        for name in ("decay", "min_use"):
            if not 0 < getattr(self, name) < 1:
                raise ConfigError(f"{name} must lie in (0, 1), got {getattr(self, name)}")
        if self.commitment < 0:
            raise ConfigError(f"commitment must be 0 or more, got {self.commitment}")


@dataclass(frozen=True)
class FitReport:
    """What a fit gave; everything but `steps` and `seconds` is measured on fresh batches at its end."""

    steps: int
    seconds: float
    tokens: int
    """Codes counted."""
    codes_used: int
    """Different codes among them."""
    entropy: float
    """Of their frequencies, in nats."""
    perplexity: float
    """exp(entropy): the equally frequent codes that would have the same entropy."""
    top_share: float
    """Share of the commonest code."""
    error: float
    """Mean absolute difference of rebuilt and true pixels, of 255."""


class _Residual(nn.Module):
    """x + two 3x3 convolutions, each after a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_2(F.gelu(self.conv_1(F.gelu(x))))


def cosines(count: int) -> Tensor:
    """(count, 3, 8, 8): the `count` lowest orthonormal cosines of an 8x8 cell, red, green, blue of each in turn."""
    place = (torch.arange(8) + 0.5) * math.pi / 8
    waves = torch.stack([torch.ones(8) / 8**0.5, *((k * place).cos() / 2 for k in range(1, 8))])
    order = sorted(((u, v) for u in range(8) for v in range(8)), key=lambda uv: (sum(uv), uv))
    planes = [torch.outer(waves[u], waves[v]) for u, v in order]
    return torch.einsum("khw,cd->kcdhw", torch.stack(planes), torch.eye(3)).flatten(0, 1)[:count]


class VQModel(nn.Module):
    """Encoder, codebook and decoder."""

    codebook: Tensor
    cosines: Tensor

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        w, d = config.width, config.code_dim
        self.encoder = nn.Sequential(
            nn.Conv2d(3, w, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(w, 2 * w, 4, 2, 1),
            nn.GELU(),
            nn.Conv2d(2 * w, 4 * w, 4, 2, 1),
            *(_Residual(4 * w) for _ in range(config.blocks)),
            nn.GELU(),
            nn.Conv2d(4 * w, d, 1),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(d, 4 * w, 3, padding=1),
            *(_Residual(4 * w) for _ in range(config.blocks)),
            nn.GELU(),
            nn.ConvTranspose2d(4 * w, 2 * w, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(2 * w, w, 4, 2, 1),
            nn.GELU(),
            nn.ConvTranspose2d(w, 3, 4, 2, 1),
        )
        self.register_buffer("codebook", torch.zeros(config.vocab_size, d))
        self.register_buffer("cosines", cosines(d), persistent=False)
        for last in (self.encoder[-1], self.decoder[-1]):  # the convolutions start silent
            for parameter in last.parameters():
                nn.init.zeros_(parameter)

    def vectors(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) float32 in [0, 1] -> (M, h, w, D) float32, whatever the encoder's weights are rounded to."""
        x = 4 * pixels - 2
        z = self.encoder(x.to(next(self.encoder.parameters()).dtype))
        return (F.conv2d(x, self.cosines / 8, stride=8) + z).permute(0, 2, 3, 1)

    def pixels(self, vectors: Tensor) -> Tensor:
        """(M, h, w, D) -> (M, 3, H, W), not clamped."""
        z = vectors.permute(0, 3, 1, 2)
        return (F.conv_transpose2d(z, 8 * self.cosines, stride=8) + self.decoder(z)) / 4 + 0.5


def nearest(vectors: Tensor, codebook: Tensor) -> Tensor:
    """(N, D), (V, D) -> (N,) int64: each vector's nearest code, ties to the lowest."""
    return linear_argmax(vectors, *_products(codebook))


def _products(codebook: Tensor) -> tuple[Tensor, Tensor]:
    """Weight (V, D) and bias (V,) of the product that is largest for the nearest code."""
    return codebook, codebook.square().sum(1) / -2


class VQTokenizer(FrozenTokenizer):
    """The `Tokenizer` of a fitted `VQModel`. Frozen.

    A lower precision is that of the encoder's convolutions; cosines, vectors and codebook stay float32.
    """

    name = "vq"

    def __init__(self, model: VQModel, config: TokenizerConfig = AUTO) -> None:
        super().__init__(model, config)
        self.model = model
        self.vocab_size = model.config.vocab_size

    @classmethod
    def load(cls, path: str | Path, config: TokenizerConfig = AUTO) -> VQTokenizer:
        """From a file of `save`; `config` as in `FrozenTokenizer`. FileNotFoundError; TokenizerError: another file."""
        tensors, metadata = common.read_safetensors(path)
        if metadata.get("format") != FORMAT:
            raise common.TokenizerError(
                f"{path} is no VQ tokenizer of this project: its metadata lacks format = {FORMAT}"
            )
        try:
            size: VQConfig = from_dict(json.loads(metadata["config"]), VQConfig)
        except (KeyError, ValueError) as error:
            raise common.TokenizerError(f"{path}: the configuration in its metadata cannot be read: {error}") from error
        model = VQModel(size)
        expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
        common.check_weights(tensors, expected, path, "its own configuration")
        model.load_state_dict(tensors, assign=True)
        return cls(model, config)

    def metadata(self) -> dict[str, str]:
        return {"format": FORMAT, "config": json.dumps(to_dict(self.model.config))}

    @property
    def width(self) -> float:
        return max(3, self.model.config.width / 4)

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        return _products(self.model.codebook)

    @property
    def rounded(self) -> list[nn.Parameter]:
        return list(self.model.encoder.parameters())

    def features(self, pixels: Tensor) -> Tensor:
        return self.model.vectors(pixels)

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """(M, h, w) int64 -> (M, 3, 8h, 8w) float32 in [0, 1]. ValueError: shape, type, or a code not in 0..V-1."""
        if codes.ndim != 3 or codes.dtype != torch.int64:
            raise ValueError(f"codes must be (M, h, w) int64, got {tuple(codes.shape)} {codes.dtype}")
        if codes.numel() and not (codes.min() >= 0 and codes.max() < self.vocab_size):
            raise ValueError(f"codes must lie in 0..{self.vocab_size - 1}, got {int(codes.min())}..{int(codes.max())}")
        with torch.autocast(codes.device.type, enabled=False):
            return self.model.pixels(self.model.codebook[codes]).clamp(0, 1)


class MovingCodebook:
    """A codebook in training: k-means start, moving averages, revival. No call reads the device.

    `use` (V,) and `total` (V, D) are moving averages of how many vectors took each code, and of their sum.
    """

    def __init__(self, vectors: Tensor, config: VQConfig, generator: torch.Generator) -> None:
        """Ten rounds of k-means on `vectors` (N, D), from random ones of them."""
        self.config = config
        self.generator = generator
        self.codes = self._draw(vectors)
        self.use = torch.zeros(config.vocab_size, device=vectors.device)
        self.total = torch.zeros_like(self.codes)
        for _ in range(10):
            self.update(vectors, nearest(vectors, self.codes), revive=True, decay=0.0)

    def update(self, vectors: Tensor, indices: Tensor, *, revive: bool, decay: float | None = None) -> None:
        """Follow one batch: `vectors` (N, D) took the codes `indices` (N,)."""
        decay = self.config.decay if decay is None else decay
        # A product with one-hot rows: unlike index_add_, it adds in the same order every time on a GPU as well.
        taken = torch.zeros(len(vectors), len(self.codes), device=vectors.device).scatter_(1, indices[:, None], 1.0)
        self.use = decay * self.use + (1 - decay) * taken.sum(0)
        self.total = decay * self.total + (1 - decay) * (taken.T @ vectors)
        if revive:
            mean = len(vectors) / len(self.codes)
            dead = self.use < self.config.min_use * mean
            self.use = torch.where(dead, mean, self.use)
            self.total = torch.where(dead[:, None], mean * self._draw(vectors), self.total)
        self.codes = self.total / self.use.clamp_min(1e-6)[:, None]

    def _draw(self, vectors: Tensor) -> Tensor:
        """V random rows of `vectors`, different ones where there are enough."""
        rows = torch.randperm(len(vectors), generator=self.generator)[: self.config.vocab_size]
        rows = rows.repeat(-(-self.config.vocab_size // len(rows)))[: self.config.vocab_size]
        return vectors[rows.to(vectors.device)]


def fit(
    batches: Iterator[Tensor],
    config: VQConfig,
    *,
    device: torch.device | str = "cpu",
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    log_every: int = 20,
) -> tuple[VQTokenizer, FitReport]:
    """Train a tokenizer on `batches`, each (config.batch, 3, image_size, image_size) float in [0, 1].

    `on_step(step, metrics)` is called every `log_every` steps and after the last: `loss`, `error` (mean absolute, of
    255) and `codes` (that the batch used). Only there is the device read.
    Raises ValueError for a batch of another shape or an iterator that ends early, FloatingPointError (naming the step)
    where the loss is not finite.
    """
    started = time.perf_counter()
    device = torch.device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = VQModel(config)
    model.to(device).train()
    generator = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.steps)
    book: MovingCodebook | None = None
    bad_step = torch.zeros((), dtype=torch.int64, device=device)

    def draw(what: str) -> Tensor:
        batch = next(batches, None)
        if batch is None:
            raise ValueError(f"the images ended at {what}; give an endless iterator")
        expected = (config.batch, 3, config.image_size, config.image_size)
        if tuple(batch.shape) != expected or not batch.is_floating_point():
            raise ValueError(f"a batch must be {expected} float, got {tuple(batch.shape)} {batch.dtype} at {what}")
        return batch.to(device, torch.float32, non_blocking=True)

    for step in range(1, config.steps + 1):
        pixels = draw(f"step {step} of {config.steps}")
        z = model.vectors(pixels)
        rows = z.detach().flatten(0, 2)
        if book is None:
            book = MovingCodebook(rows, config, generator)
        indices = nearest(rows, book.codes)
        code = book.codes[indices].view_as(z)
        error = F.l1_loss(model.pixels(z + (code - z).detach()), pixels)
        loss = error + config.commitment * F.mse_loss(z, code)
        book.update(rows, indices, revive=step <= 0.8 * config.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        bad_step = torch.where((bad_step == 0) & ~loss.detach().isfinite(), step, bad_step)
        if step % log_every == 0 or step == config.steps:
            if bad := int(bad_step):
                raise FloatingPointError(f"the loss is not finite at step {bad}: lower lr or check the images")
            if on_step is not None:
                on_step(step, {"loss": loss.item(), "error": 255 * error.item(), "codes": len(indices.unique())})

    assert book is not None  # config.steps is 1 or more
    model.codebook.copy_(book.codes)
    tokenizer = VQTokenizer(model)
    counts = torch.zeros(config.vocab_size, dtype=torch.int64, device=device)
    errors = []
    for i in range(config.eval_batches):
        pixels = draw(f"batch {i + 1} of {config.eval_batches} for the report")
        codes = tokenizer.encode(pixels)
        counts += torch.bincount(codes.flatten(), minlength=config.vocab_size)
        errors.append(F.l1_loss(tokenizer.decode(codes), pixels))
    share = counts.double() / counts.sum()
    entropy = float(-torch.special.xlogy(share, share).sum())
    return tokenizer, FitReport(
        steps=config.steps,
        seconds=time.perf_counter() - started,
        tokens=int(counts.sum()),
        codes_used=int((counts > 0).sum()),
        entropy=entropy,
        perplexity=float(torch.tensor(entropy).exp()),
        top_share=float(share.max()),
        error=255 * float(torch.stack(errors).mean()),
    )
