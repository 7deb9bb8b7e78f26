"""Tile sizes of the Triton kernels: a table that ships, by architecture and class of shapes.

`configs.json` holds what `python -m benchmarks.tune` measured on a GPU, a section an architecture; a class that is not
in it gets `default`. Nothing is tuned while a model runs: a keyed `triton.autotune` times launches inside a training
step, and under torch.compile has been seen to keep one configuration for every shape.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

PATH = Path(__file__).with_name("configs.json")

KERNELS = ("forward", "grad_q", "grad_kv", "grad_bias")


class Config(NamedTuple):
    """How one kernel is cut up."""

    block_q: int
    """Queries a tile."""
    block_k: int
    """Keys a tile."""
    group: int
    """Boxes that share one look-up of the bias; in grad_bias, boxes that one program adds up."""
    warps: int
    stages: int
    """Of software pipelining."""


class ShapeClass(NamedTuple):
    """What the best sizes depend on, coarsely."""

    bits: int
    """16 or 32, of the activations."""
    channels: int
    """Of a head, rounded up to a power of two, at least 16."""
    tokens: int
    """Of a window, rounded up to 16, 32, 64, 512 or 1024; more are 1024."""

    @property
    def name(self) -> str:
        return f"{self.bits}-bit, {self.channels} channels, {self.tokens} tokens"


def shape_class(dtype: torch.dtype, head_dim: int, tokens: int) -> ShapeClass:
    """The class of windows of `tokens` tokens and heads of `head_dim` channels."""
    bucket = next((size for size in (16, 32, 64, 512) if tokens <= size), 1024)
    return ShapeClass(8 * dtype.itemsize, max(16, 1 << (head_dim - 1).bit_length()), bucket)


def default(kernel: str, shape: ShapeClass, architecture: str) -> Config:
    """Sizes for what nobody has tuned; on a GPU those of 16 bits have machine code that hardly spills (LOG.md).

    Registers are the limit: a program keeps block x channels numbers for each box of its group.
    """
    if architecture == "interpreter":  # pays by the program
        block = min(shape.tokens, 128)
        return Config(block, block, 64 if kernel == "grad_bias" else 2, 1, 1)
    if shape.bits == 32:  # products without tensor cores
        block = min(shape.tokens, 32)
        return Config(block, block, 64 if kernel == "grad_bias" else 1, 4, 1)
    block = min(shape.tokens, 64)
    if kernel == "grad_bias":
        return Config(block, block, 64, 4, 2)
    group = {"forward": 4, "grad_q": 4, "grad_kv": 2}[kernel]
    return Config(block, block, max(1, group * 32 // max(32, shape.channels)), 4, 2 if shape.channels <= 32 else 1)


@cache
def _tuned() -> dict[str, dict[str, dict[str, list[int]]]]:
    """{architecture: {kernel: {class: sizes}}}, as in the file."""
    return json.loads(PATH.read_text()) if PATH.is_file() else {}


_forced: dict[str, Config] = {}


@contextmanager
def forced(kernel: str, sizes: Config) -> Iterator[None]:
    """Inside, `kernel` is cut up by `sizes`, whatever the shape: to measure them."""
    _forced[kernel] = sizes
    try:
        yield
    finally:
        del _forced[kernel]


@cache
def _config(kernel: str, shape: ShapeClass, architecture: str) -> Config:
    sizes = _tuned().get(architecture, {}).get(kernel, {}).get(shape.name)
    return Config(*sizes) if sizes else default(kernel, shape, architecture)


def config(kernel: str, dtype: torch.dtype, head_dim: int, tokens: int, architecture: str) -> Config:
    """The sizes of `kernel` (one of KERNELS) for windows of `tokens` and heads of `head_dim` on e.g. "sm_90"."""
    return _forced.get(kernel) or _config(kernel, shape_class(dtype, head_dim, tokens), architecture)
