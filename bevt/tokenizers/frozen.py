"""What the tokenizers share once their weights are there: precision, memory format, compilation, encoding in pieces.

A tokenizer is a stack of convolutions whose output vectors (rows) meet the V rows of a weight; the code is the place of
the largest product (`bevt_kernels.linear_argmax`). Letters: M frames, H x W pixels, h = H/8, w = W/8 codes, C numbers a
row, V codes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TypeVar

import torch
from bevt_kernels import Spec, linear_argmax, resolve
from torch import Tensor, nn

from bevt.config import ConfigError, TokenizerConfig
from bevt.tokenizers import common

T = TypeVar("T", bound="FrozenTokenizer")

AUTO = TokenizerConfig()
"""Implementation, precision and compilation as the device has it."""

PIECE = {"cpu": 2**25, "cuda": 2**29}
"""Bytes of the widest activation in one piece of frames; about four of them are alive at once, whatever the batch.

CPU: 2 frames of the DALL-E encoder in float32 with direct convolutions; 1 and 2 were equally fast on one core, 4 a
seventh slower. With native ones 20 frames go through its last group at a time, and 2 through its first.
CUDA, by arithmetic: 83 frames of it in float16, so that its smallest product (196 rows a frame, 512 columns) is 508
tiles of 128x128 for 132 multiprocessors; 2 GiB alive.
"""


class FrozenTokenizer(ABC):
    """A `Tokenizer` but for its name, its weights and what is computed with them.

    `config` says implementation, precision and compilation; its kind and path are not looked at. Before `to` settles
    them for a device, `encode` computes in the type of the weights, eagerly.
    """

    name: str
    vocab_size: int
    downsample = 8
    compiled_on: tuple[str, ...] = ()
    """Device types on which `tokenizer.compile` "auto" means "yes"."""

    def __init__(self, module: nn.Module, config: TokenizerConfig) -> None:
        self.module = module.eval().requires_grad_(False)
        self.config = config
        self.impl: str = config.impl
        self.precision = torch.float32
        self.implementations: dict[str, str] = {}
        self._features: Callable[[Tensor], Tensor] = self.features

    @abstractmethod
    def features(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) float32 in [0, 1] -> rows (M, h, w, C). What is compiled."""

    @property
    @abstractmethod
    def tail(self) -> tuple[Tensor, Tensor]:
        """Weight (V, C), in the dtype of the rows or float32, and bias (V,) float32 of the product with the rows."""

    @property
    @abstractmethod
    def width(self) -> float:
        """Numbers a pixel of the widest activation."""

    @property
    @abstractmethod
    def rounded(self) -> list[nn.Parameter]:
        """The parameters that are kept in the tokenizer's precision."""

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """As `Tokenizer.decode`."""

    @abstractmethod
    def metadata(self) -> dict[str, str]:
        """What `save` writes beside the weights."""

    def save(self, path: str | Path) -> None:
        """Write the weights as safetensors. OSError where that cannot be done; ValueError where `to` rounded them."""
        if self.precision != torch.float32:
            raise ValueError(f"`to` has rounded the weights to {self.precision}: save the tokenizer before that")
        common.write_safetensors(path, self.module.state_dict(), self.metadata())

    def to(self: T, device: torch.device | str) -> T:
        """Move the weights and settle what `config` leaves open, for the device, once; returns the same tokenizer.

        Raises `bevt_kernels.NoImplementation` where the implementation that was asked for cannot serve, ValueError
        where an earlier call has rounded the weights.
        """
        if self.precision != torch.float32:
            raise ValueError(f"`to` has rounded the weights to {self.precision} already: load the tokenizer again")
        kind = torch.device(device).type
        compiled = self.compiles(kind)
        self.module.to(device)
        chosen = self.settle(kind)
        self.impl = resolve("linear_argmax", self.config.impl, Spec(kind, self.tail[0].dtype))
        self._features = _compiled(self.features) if compiled else self.features
        self.implementations = {
            "linear_argmax": self.impl,
            "tokenizer precision": str(self.precision).removeprefix("torch."),
            "tokenizer": "compiled" if compiled else "eager",
            **chosen,
        }
        return self

    def compiles(self, device: str) -> bool:
        """Whether `to` compiles for a device of this type."""
        asked = self.config.compile
        return asked == "yes" or (asked == "auto" and device in self.compiled_on)

    def settle(self, device: str) -> dict[str, str]:
        """Settle the precision for a type of device and round the weights to it, wherever they are.

        Returns what a tokenizer chooses beside that, for `implementations`.
        """
        name = self.config.precision
        if name == "auto":
            name = "float16" if device == "cuda" else "float32"
        self.precision = getattr(torch, name)
        for p in self.rounded:
            layout = torch.channels_last if p.ndim == 4 else torch.preserve_format
            p.data = p.to(self.precision, memory_format=layout)
        return {}

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) float in [0, 1] -> (M, h, w) int64. ValueError and TypeError as `check_pixels` says.

        Computes in its own precision under any autocast, so that codes do not depend on the precision of training;
        logits are summed and compared in float32. Raises ConfigError where it is to be compiled and cannot be.
        """
        common.check_pixels(pixels, self.downsample)
        m, _, h, w = pixels.shape
        codes = torch.empty(m, h // self.downsample, w // self.downsample, dtype=torch.int64, device=pixels.device)
        frames = self.piece(codes.device.type, h, w)
        weight, bias = self.tail
        for start in range(0, m, frames):
            piece = codes[start : start + frames]
            rows = self.rows(pixels[start : start + frames])
            piece.copy_(linear_argmax(rows, weight, bias, impl=self.impl).view_as(piece))
        return codes

    def piece(self, device: str, height: int, width: int) -> int:
        """Frames of this size in pixels that are encoded at a time on a device of this type."""
        return max(1, int(PIECE.get(device, PIECE["cpu"]) / (self.width * height * width * self.precision.itemsize)))

    @torch.no_grad()
    def rows(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) float in [0, 1] -> (M * h * w, C), what meets the weight of `tail`; in one piece."""
        with torch.autocast(pixels.device.type, enabled=False), _without_tf32(pixels.device):
            return self._features(pixels.float()).flatten(0, 2)


def _compiled(features: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    compiled = torch.compile(features, fullgraph=True)

    def run(pixels: Tensor) -> Tensor:
        # The number of frames changes every step. Compilations: one for a single frame, one for more; on the CPU one
        # of 2 to 15 frames and one of more, for which PyTorch's convolution takes another way.
        torch._dynamo.maybe_mark_dynamic(pixels, 0)
        try:
            return compiled(pixels)
        except (torch._dynamo.exc.BackendCompilerFailed, torch._dynamo.exc.ShortenTraceback) as error:
            raise ConfigError(
                "tokenizer.compile: torch.compile fails here; install a C++ compiler (and triton, for CUDA), "
                f"or set it to 'no'. {str(error).strip().splitlines()[0]}"
            ) from error

    return run


def _without_tf32(device: torch.device) -> AbstractContextManager[None]:
    """Convolutions of float32 in float32: CUDA's default rounds their factors to TF32, as coarse as float16."""
    if device.type != "cuda":
        return nullcontext()
    now = torch.backends.cudnn
    return now.flags(enabled=now.enabled, benchmark=now.benchmark, deterministic=now.deterministic, allow_tf32=False)
