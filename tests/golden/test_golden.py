"""Every path trains as the golden curves do, up to its rounding.

The rule is the kernels' (`bevt_kernels.testing`): a float32 path may be off from the float64 curve by twice what plain
float32 PyTorch, the reference path, is off, here in the mean square over 200 steps, plus a rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from curves import SERIES, curve, golden, recipes

from bevt.config import Config

EPSILON = 2.0**-23
"""float32's."""

Run = Callable[[str, Config], dict[str, float]]


def float32(config: Config, path: str = "fused") -> Config:
    return replace(config, path=path, train=replace(config.train, precision="float32", threads=1))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Root mean square, over the steps, of how far a run's series are from the golden ones, relative to those."""

    def run(name: str, config: Config) -> dict[str, float]:
        found, wanted = curve(config, tmp_path_factory.mktemp("run") / name), golden(name)
        return {
            series: math.sqrt(sum((a / b - 1) ** 2 for a, b in zip(found[series], wanted[series], strict=True)) / 200)
            for series in SERIES
        }

    return run


@pytest.fixture(scope="module")
def plain(errors: Run) -> dict[str, dict[str, float]]:
    """Those of the reference path."""
    return {name: errors(name, float32(config, "reference")) for name, config in recipes().items()}


@pytest.mark.parametrize("name", list(recipes()))
def test_reference_path(plain: dict[str, dict[str, float]], name: str) -> None:
    """Losses to a few units in the last place: measured 1.2; gradients' norms, in which errors add up, to more."""
    assert plain[name]["loss"] < 8 * EPSILON, plain[name]
    assert plain[name]["grad_norm"] < 128 * EPSILON, plain[name]


def within(found: dict[str, float], plain: dict[str, float]) -> None:
    """Assert the rule."""
    for series in SERIES:
        assert found[series] <= 2 * plain[series] + EPSILON, (series, found, plain)


@pytest.mark.parametrize("name", list(recipes()))
def test_fused_path(errors: Run, plain: dict[str, dict[str, float]], name: str) -> None:
    """The kernels, only masked positions, one stream at a time, the fused optimizer."""
    within(errors(name, float32(recipes()[name])), plain[name])


def test_compiled(errors: Run, plain: dict[str, dict[str, float]]) -> None:
    """torch.compile around the kernels."""
    config = float32(recipes()["joint_stage"])
    within(errors("joint_stage", replace(config, train=replace(config.train, compile="yes"))), plain["joint_stage"])


def test_micro_batches(errors: Run, plain: dict[str, dict[str, float]]) -> None:
    """Steps in two micro-batches with unequally many masked positions."""
    config = float32(recipes()["joint_stage"])
    split = replace(config, train=replace(config.train, micro_clips=1, micro_images=2))
    within(errors("joint_stage", split), plain["joint_stage"])


def test_a_wrong_step_is_noticed(errors: Run, plain: dict[str, dict[str, float]], tmp_path: Path) -> None:
    """A learning rate that is off by a thousandth breaks the rule."""
    config = float32(recipes()["video_only"])
    found = errors("video_only", replace(config, optim=replace(config.optim, lr=1.001e-3)))
    with pytest.raises(AssertionError):
        within(found, plain["video_only"])
