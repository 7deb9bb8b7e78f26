"""Every path trains as the golden curves do, up to its rounding.

The rule is the kernels' (`bevt_kernels.testing`): a float32 path may be off from the float64 curve by twice what plain
float32 PyTorch, the reference path, is off, here in the mean square over all steps, plus a rounding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from curves import SERIES, STEPS, curve, golden, recipes

from bevt.config import Config

EPSILON = 2.0**-23
"""float32's."""

Errors = dict[str, float]


def float32(name: str, path: Literal["fused", "reference"] = "fused") -> Config:
    config = recipes()[name]
    return replace(config, path=path, train=replace(config.train, precision="float32", threads=1))


def errors(name: str, config: Config, folder: Path) -> Errors:
    """Root mean square, over the steps, of how far a run's series are from the golden ones, relative to those."""
    found, wanted = curve(config, folder / name), golden(name)
    return {
        series: math.sqrt(sum((a / b - 1) ** 2 for a, b in zip(found[series], wanted[series], strict=True)) / STEPS)
        for series in SERIES
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Errors]:
    """Those of the reference path, by recipe."""
    return functools.cache(lambda name: errors(name, float32(name, "reference"), tmp_path_factory.mktemp("reference")))


def within(found: Errors, plain: Errors) -> None:
    """Assert the rule."""
    for series in SERIES:
        assert found[series] <= 2 * plain[series] + EPSILON, (series, found, plain)


@pytest.mark.parametrize("name", list(recipes()))
def test_reference_and_fused_path(plain: Callable[[str], Errors], tmp_path: Path, name: str) -> None:
    """Plain PyTorch; then the kernels, only masked positions, one stream at a time, the fused optimizer.

    Of the former's rounding: losses to a few units in the last place, measured up to 2; the gradients' norms, in which
    errors add up, up to 18.
    """
    assert plain(name)["loss"] < 8 * EPSILON, plain(name)
    assert plain(name)["grad_norm"] < 72 * EPSILON, plain(name)
    within(errors(name, float32(name), tmp_path), plain(name))


def test_compiled(plain: Callable[[str], Errors], tmp_path: Path) -> None:
    """torch.compile around the kernels."""
    config = float32("joint_stage")
    compiled = replace(config, train=replace(config.train, compile="yes"))
    within(errors("joint_stage", compiled, tmp_path), plain("joint_stage"))


def test_a_wrong_step_is_noticed(plain: Callable[[str], Errors], tmp_path: Path) -> None:
    """A weight decay of 0.0501 in place of 0.05 breaks the rule."""
    config = float32("image_stage")
    found = errors("image_stage", replace(config, optim=replace(config.optim, weight_decay=0.0501)), tmp_path)
    with pytest.raises(AssertionError):
        within(found, plain("image_stage"))
