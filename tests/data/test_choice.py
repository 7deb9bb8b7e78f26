"""Which backend decodes: the one that is named, or the fastest of those that can."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Generator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest
from loading import take, with_data

from bevt.config import Config, ConfigError
from bevt.data import DataError, build, shapes
from bevt.data.build import build_loader, choose_backend
from bevt.data.decoding import Decoded, Masks, Plan, Processes
from bevt.data.manifest import index
from bevt.data.sampling import Sampler, Stream

pytest.importorskip("av", reason="PyAV is not installed: pip install av")


@pytest.fixture
def samplers(config: Config, dataset: shapes.ShapesPaths) -> dict[Stream, Sampler]:
    """Images alone: every backend can read them."""
    return {"images": Sampler(index(dataset.train_images, "images"), config.data, "images", 0)}


class Slow(Processes):
    """A backend that waits before every micro-batch."""

    seconds: ClassVar = {"dali": 0.02, "pyav": 0.01}

    def decode(self, plans: Iterable[Plan], masks: Masks) -> Generator[tuple[Plan, Decoded], None, None]:
        """As fast as `seconds` says."""
        for plan in plans:
            time.sleep(self.seconds[self.name])
            yield plan, Decoded(None, None, None, None, [])


def test_auto_takes_the_fastest(
    config: Config, samplers: dict[Stream, Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says how fast each was."""
    monkeypatch.setattr(build, "refusal", lambda name, manifests: "")
    monkeypatch.setattr(build, "make_backend", Slow)
    monkeypatch.setattr(build, "TRIAL_SECONDS", 0.4)
    choice = choose_backend(with_data(config, backend="auto"), samplers)
    assert choice.name == "pyav"
    order = [word for word in choice.why.replace(",", " ").split() if word in Slow.seconds]
    assert choice.why.startswith("fastest on this data, samples a second: pyav ")
    assert order == ["pyav", "dali"]


def test_auto_times_nothing_where_only_one_can(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """H.264 on a machine without a GPU, or DALI missing: PyAV, with the reason against the others."""
    monkeypatch.setitem(sys.modules, "nvidia", None)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setattr(build, "_trial", lambda *_: pytest.fail("timed"))
    loader = build_loader(with_data(config, backend="auto"))
    assert loader.choice.name == "pyav"
    assert loader.choice.why.startswith("the only one that can read this data here; not dali: DALI does not import")
    assert "pip install 'bevt[dali]'" in loader.choice.why


def test_auto_on_real_files(config: Config, dataset: shapes.ShapesPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    """With DALI: each is timed on the stills, whoever wins, and the loader serves them."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'bevt[dali]'")
    monkeypatch.setattr(build, "TRIAL_SECONDS", 0.3)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    images = with_data(config, backend="auto", clips="", val_clips="", workers=1)
    images = replace(images, train=replace(images.train, clips=0))
    loader = build_loader(images)
    assert loader.choice.name in ("dali", "pyav")
    assert {"dali", "pyav"} <= set(loader.choice.why.replace(",", " ").split())
    assert len(list(itertools.islice(loader, 2))) == 2
    loader.close()


def test_nothing_can(config: Config, samplers: dict[Stream, Sampler], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every reason is named."""
    monkeypatch.setattr(build, "refusal", lambda name, manifests: f"{name} is broken")
    with pytest.raises(
        DataError, match="nothing here can decode this data; not dali: dali is broken; not pyav: pyav is broken"
    ):
        choose_backend(with_data(config, backend="auto"), samplers)
    with pytest.raises(ConfigError, match="'pyav' cannot read this data: pyav is broken; nor can any other"):
        choose_backend(config, samplers)


def test_a_named_backend_is_not_timed(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pyav` is what it says."""
    monkeypatch.setattr(build, "_trial", lambda *_: pytest.fail("timed"))
    assert build_loader(config).choice == ("pyav", "as configured")
    assert Path(take(config, 1)[0].clip_ids[0].partition("@")[0]).exists()
