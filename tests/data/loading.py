"""What tests of the loader share: configurations with other keys, and batches side by side."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import torch

from bevt.config import Config
from bevt.data.batch import Batch
from bevt.data.build import build_loader


def with_data(config: Config, **changes: Any) -> Config:
    """`config` with other keys of its data group."""
    return replace(config, data=replace(config.data, **changes))


def with_train(config: Config, **changes: Any) -> Config:
    """`config` with other keys of its train group."""
    return replace(config, train=replace(config.train, **changes))


def take(config: Config, count: int, **options: Any) -> list[Batch]:
    """The first micro-batches."""
    loader = build_loader(config, **options)
    try:
        return list(itertools.islice(loader, count))
    finally:
        loader.close()


def assert_same(first: Batch, second: Batch) -> None:
    """Every field, bit for bit."""
    for field in fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name
