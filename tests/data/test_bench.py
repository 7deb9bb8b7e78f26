"""`bevt data bench`: what is measured, what is named, and that the parts are those it says. No speed is asserted."""

from __future__ import annotations

import io
import itertools
import shutil
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from bevt.cli import main
from bevt.config import Config, ConfigError, DataConfig, TrainConfig
from bevt.data import DataError, bench, build, pyav, shapes
from bevt.data.cut import Places
from bevt.data.decoding import Decoded, Masks, Plan
from bevt.data.files import ReadError
from bevt.data.manifest import index
from bevt.data.sampling import Request, Sampler

pytest.importorskip("av", reason="PyAV is not installed: pip install av")

BLINK = 0.02
"""Seconds of a measurement."""


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch) -> DataConfig:
    """Small clips and images, decoded in this process; `auto` makes up its mind fast."""
    monkeypatch.setattr(build, "TRIAL_SECONDS", BLINK)
    return DataConfig(frames=4, stride=2, short_side=(64, 80), crop=64, workers=0)


def assert_sane(row: bench.Row) -> None:
    """Something was measured, and no part is negative."""
    assert row.rate > 0
    assert row.megabytes > 0
    assert row.parts.decode > 0
    assert min(row.parts) >= 0


def shown(report: bench.Report) -> str:
    """What a person reads, each run of spaces as one."""
    out = io.StringIO()
    Console(file=out, width=300).print(report)
    return " ".join(out.getvalue().split())


def test_clips(data: DataConfig, dataset: shapes.ShapesPaths) -> None:
    """Both yardsticks; a worker's hand-over; what cannot read the files is named, with the reason."""
    report = bench.bench(dataset.train_clips, "clips", replace(data, workers=1), batch=2, seconds=BLINK)
    assert_sane(report.rows["pyav"])
    assert report.rows["pyav"].parts.hand_over > 0
    assert list(report.bare) == ["bare PyAV, decode to the last frame", "bare PyAV, and its frames to rgb24"]
    assert min(report.bare.values()) > 0
    assert not report.bad
    assert set(report.rows) | set(report.refused) == set(build.BACKENDS)
    assert report.choice.name in report.rows
    text = shown(report)
    assert f"data.backend: {report.choice.name}" in text
    for reason in report.refused.values():
        assert text.count(" ".join(reason.split())) == 1


def test_images_of_every_backend(data: DataConfig, dataset: shapes.ShapesPaths) -> None:
    """DALI reads them too: its row has the same parts."""
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'bevt[dali]'")
    report = bench.bench(dataset.train_images, "images", data, batch=4, seconds=BLINK)
    for name in ("dali", "pyav"):
        assert_sane(report.rows[name])
    assert list(report.bare) == ['bare Pillow, open(path).convert("RGB")']


def test_a_named_backend_is_measured_alone(data: DataConfig, dataset: shapes.ShapesPaths) -> None:
    report = bench.bench(dataset.train_images, "images", replace(data, backend="pyav"), batch=4, seconds=BLINK)
    assert list(report.rows) == ["pyav"]
    assert shown(report).endswith("data.backend: pyav (as configured)")


@pytest.mark.parametrize(("batch", "seconds"), [(0, 1.0), (8, 0.0)])
def test_numbers_out_of_range(data: DataConfig, dataset: shapes.ShapesPaths, batch: int, seconds: float) -> None:
    with pytest.raises(ConfigError, match=f"must be above 0, got {batch} and {seconds}"):
        bench.bench(dataset.train_images, "images", data, batch=batch, seconds=seconds)


@pytest.fixture
def damaged(dataset: shapes.ShapesPaths, tmp_path: Path) -> Callable[[int], str]:
    """A manifest of five images, the first few of which became text after they were indexed; brackets in the names."""

    def make(count: int) -> str:
        paths = [tmp_path / f"[{number}].jpg" for number in range(5)]
        for path, image in zip(paths, sorted(Path(dataset.train_images).glob("*.jpg")), strict=False):
            shutil.copy(image, path)
        index(str(tmp_path), "images", cache=tmp_path / "m.jsonl", workers=1)
        for path in paths[:count]:
            path.write_text("no image")
        return str(tmp_path / "m.jsonl")

    return make


def test_bad_files_are_named_and_not_fatal(data: DataConfig, damaged: Callable[[int], str]) -> None:
    report = bench.bench(damaged(2), "images", replace(data, backend="pyav"), batch=5, seconds=BLINK)
    assert {Path(path).name for path in report.bad} == {"[0].jpg", "[1].jpg"}
    assert set(report.bad.values()) == {"not an image that Pillow recognises"}
    assert_sane(report.rows["pyav"])
    assert "2 files cannot be read" in shown(report)
    assert "[1].jpg: not an image" in shown(report)


def test_no_readable_file_is_an_error(data: DataConfig, damaged: Callable[[int], str]) -> None:
    with pytest.raises(DataError, match=r"none of the 5 images that were tried can be decoded:\n.*\[\d\].jpg: not an"):
        bench.bench(damaged(5), "images", replace(data, backend="pyav"), batch=5, seconds=BLINK)


@pytest.fixture
def image(data: DataConfig, dataset: shapes.ShapesPaths) -> Request:
    """A request of the embedded images."""
    return Sampler(index(dataset.train_images, "images", workers=1), data, "images", 0).request(0)


def test_decode_and_augment_are_apart(monkeypatch: pytest.MonkeyPatch, image: Request) -> None:
    """Two sleeps of known length: each lands in its own part, and the two make the whole."""

    def picture(requests: list[Request]) -> np.ndarray:
        time.sleep(0.01)
        return np.zeros((80, 80, 3), np.uint8)

    def cut(pixels: np.ndarray, into: Places) -> None:
        time.sleep(0.03)

    monkeypatch.setattr(pyav, "picture", picture)
    monkeypatch.setattr(bench, "cut", cut)
    begin = time.perf_counter()
    decode, augment = bench._read("pyav", image, torch.zeros(64, 64, 3, dtype=torch.uint8))
    wall = time.perf_counter() - begin
    assert decode >= 0.01
    assert augment >= 0.03
    assert decode + augment <= wall


@pytest.mark.parametrize("stream", ["clips", "images"])
def test_the_clock_changes_no_pixel(data: DataConfig, dataset: shapes.ShapesPaths, stream: Any) -> None:
    """What is timed is what the backend does."""
    source = dataset.train_clips if stream == "clips" else dataset.train_images
    request = Sampler(index(source, stream, workers=1), data, stream, 0).request(1)
    mine, other = (torch.zeros(bench.shape([request])[1:], dtype=torch.uint8) for _ in range(2))
    bench._read("pyav", request, mine)
    pyav.read([request], [other])
    assert mine.any()
    assert torch.equal(mine, other)


def test_of_two_goes_the_quicker_counts(image: Request) -> None:
    """A sample on which a task fails counts for none of them; a task that always fails is an error."""
    goes = itertools.cycle([(0.004, 0.001), (0.002, 0.001)])
    fails = itertools.cycle([False, False, True])

    def steady(request: Request, into: torch.Tensor) -> tuple[float, float]:
        return next(goes)

    def broken(always: bool, request: Request, into: torch.Tensor) -> tuple[float, float]:
        if always or next(fails):
            raise ReadError(request.path, "broken")
        return 0.001, 0.0

    found = bench._per_core({"fails": partial(broken, False), "steady": steady}, [image], BLINK)
    assert found["fails"] == pytest.approx((1.0, 0.0))
    assert found["steady"] == pytest.approx((2.0, 1.0))
    with pytest.raises(DataError, match="no file that each of always can read"):
        bench._per_core({"always": partial(broken, True)}, [image], BLINK)


class _Slow:
    """A backend that takes 20 ms a micro-batch, of which it loses the last row."""

    name = "slow"

    def read(self, requests: Any, into: Any) -> None:
        raise NotImplementedError

    def decode(self, plans: Iterable[Plan], masks: Masks) -> Generator[tuple[Plan, Decoded], None, None]:
        for plan in plans:
            time.sleep(0.02)
            yield plan, Decoded(None, None, torch.zeros(3), None, [("images", 2, "lost")])


def test_rate_of_the_whole_path(data: DataConfig, dataset: shapes.ShapesPaths) -> None:
    """Two of three samples every 20 ms or more, and the bytes of those two."""
    sampler = Sampler(index(dataset.train_images, "images", workers=1), data, "images", 0)
    config = Config(data=data, train=TrainConfig(images=3))
    bad: dict[str, str] = {}
    (rate, megabytes), good = bench._whole(config, sampler, _Slow(), 0.1, bad)
    assert 0 < rate <= 2 / 0.02
    sizes = [Path(request.path).stat().st_size for request in good[2:]]  # the first micro-batch warms up
    assert megabytes / rate == pytest.approx(sum(sizes) / len(sizes) / 1e6)
    assert set(bad.values()) == {"lost"}
    assert [request.position % 3 for request in good] == [0, 1] * (len(good) // 2)


def test_dali_without_the_cut(data: DataConfig, dataset: shapes.ShapesPaths) -> None:
    """What is timed as decoding gives the decoded pictures, of the samples of that moment."""
    dali = pytest.importorskip("bevt.data.dali")
    pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'bevt[dali]'")
    sampler = Sampler(index(dataset.train_images, "images", workers=1), data, "images", 0)
    backend = dali.Pipelines(replace(data, workers=1, prefetch=1), None)
    samples: list[Any] = []
    pipeline = backend.pipeline("images", itertools.repeat(samples), 1, 0)
    for position in range(3):
        request = sampler.request(position)
        samples[:] = [dali.load(request)]
        found = np.asarray(pipeline.run()[0].at(0)).astype(int)
        assert np.abs(found - pyav.picture([request])).mean() < 1.5


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`bevt ARGS`: exit status, stdout, stderr."""

    def call(*args: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(args)
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, out, err

    return call


def test_command(run: Callable[..., tuple[int, str, str]], dataset: shapes.ShapesPaths) -> None:
    """The report, and a run's own sources refused."""
    cut = ("--data.crop", "64", "--data.short-side", "64", "80")
    fast = ("--data.workers", "0", "--data.backend", "pyav", "--seconds", "0.02")
    status, out, _ = run("data", "bench", dataset.train_images, *cut, *fast)
    assert status == 0
    for word in ("images of ", "hand-over", "on one core", "data.backend: pyav (as configured)"):
        assert word in out
    status, _, err = run("data", "bench", dataset.train_images, "--data.images", "elsewhere")
    assert status == 2
    assert "the files to read are the SOURCE" in err
