"""Frozen tokenizers: images in, discrete codes out. `build` makes the one a configuration names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from bevt_kernels import NoImplementation
from torch import Tensor

from bevt.config import ConfigError, TokenizerConfig

if TYPE_CHECKING:
    from bevt.tokenizers.frozen import FrozenTokenizer


@runtime_checkable
class Tokenizer(Protocol):
    """What the training step needs of a tokenizer.

    Letters: M frames, H x W pixels, g = `downsample`.
    """

    name: str
    vocab_size: int
    downsample: int
    """Pixels along one side of a code's cell; 8 for every tokenizer here."""
    implementations: dict[str, str]
    """What `to` settled: implementation of `bevt_kernels.linear_argmax`, precision, compiled or eager."""

    def encode(self, pixels: Tensor) -> Tensor:
        """(M, 3, H, W) float in [0, 1], RGB, H and W multiples of g -> (M, H/g, W/g) int64 codes. No gradient."""

    def rows(self, pixels: Tensor) -> Tensor:
        """The same pixels -> (M * H/g * W/g, C): a code is the place of the largest product with the rows of `tail`."""

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Weight (V, C) and bias (V,)."""

    def decode(self, codes: Tensor) -> Tensor:
        """(M, h, w) codes -> (M, 3, h*g, w*g) float in [0, 1]. Raises NotImplementedError where there is no decoder."""

    def to(self, device: torch.device) -> Tokenizer:
        """The tokenizer on another device."""


def digest(config: TokenizerConfig) -> str:
    """Kind, and 16 hex digits of the SHA-256 of the weights' file: what a model's targets depend on."""
    sha = hashlib.sha256()
    with open(config.path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return f"{config.kind} {sha.hexdigest()[:16]}"


def build(config: TokenizerConfig, device: torch.device) -> Tokenizer:
    """The tokenizer `config` names, with its weights, frozen, on `device`.

    Raises ConfigError (which key, what to do) for a missing path or an implementation that cannot serve,
    FileNotFoundError and TokenizerError (the file, what is wrong with it) for weights that are absent or of another
    model.
    """
    if not config.path:
        raise ConfigError(
            "tokenizer.path is empty: give the weights of the DALL-E encoder (kind 'dalle'), "
            "or train one with `bevt tokenizer fit` (kind 'vq')"
        )
    if config.kind == "dalle":
        from bevt.tokenizers.dalle import DalleTokenizer

        load: Callable[[str, TokenizerConfig], FrozenTokenizer] = DalleTokenizer.load
    else:
        from bevt.tokenizers.vq import VQTokenizer

        load = VQTokenizer.load
    try:
        return load(config.path, config).to(device)
    except NoImplementation as error:
        raise ConfigError(f"tokenizer: {error}") from error
