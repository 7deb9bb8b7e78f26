"""The loader: the same samples whatever decodes them, from any step on, and loud about what it cannot read."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loading import assert_same, take, with_data, with_train

from bevt.config import Config, ConfigError
from bevt.data import DataError, shapes
from bevt.data.batch import BadFile, Batch
from bevt.data.build import _refused, build_loader, eval_batches, frame_batches
from bevt.data.decoding import READERS, Masks, Plan, Processes
from bevt.data.manifest import index
from bevt.data.sampling import Request, Sampler, Stream

pytest.importorskip("av", reason="PyAV is not installed: pip install av")


def rows(batches: list[Batch]) -> dict[str, Any]:
    """Id -> (pixels, mask) of every clip and image."""
    found = {}
    for batch in batches:
        assert batch.clips is not None
        assert batch.images is not None
        for i, name in enumerate(batch.clip_ids):
            found[name] = (batch.clips[i].numpy().tobytes(), batch.clip_masks[i].numpy().tobytes())
        for i, name in enumerate(batch.image_ids):
            found[name] = (batch.images[i].numpy().tobytes(), batch.image_jitter[i].numpy().tobytes())
    return found


def test_shapes_and_types(config: Config) -> None:
    """What `Batch` promises."""
    batch = take(config, 1)[0]
    assert batch.clips.shape == (2, 4, 64, 64, 3)
    assert batch.clip_masks.shape == (2, 2, 4, 4)
    assert batch.images.shape == (4, 64, 64, 3)
    assert batch.image_masks.shape == (4, 4, 4)
    assert batch.image_jitter.shape == (4, 6)
    assert (batch.clips.dtype, batch.clip_masks.dtype, batch.image_jitter.dtype) == (
        torch.uint8,
        torch.bool,
        torch.float32,
    )
    assert len(batch.clip_ids) == 2
    assert len(batch.image_ids) == 4


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_samples(config: Config, workers: int) -> None:
    """Six micro-batches, over the end of an epoch of clips."""
    for alone, helped in zip(take(config, 6), take(with_data(config, workers=workers), 6), strict=True):
        assert_same(alone, helped)


@pytest.mark.parametrize(("world_size", "micro"), [(2, 1), (1, 4), (2, 2)])
def test_a_step_does_not_depend_on_devices_or_micro_batches(config: Config, world_size: int, micro: int) -> None:
    """The union over the ranks of a step, against one device's."""
    expected = rows(take(config, 2))
    other = with_train(config, micro_clips=micro, micro_images=2 * micro)
    got: dict[str, Any] = {}
    for rank in range(world_size):
        own = rows(take(other, 4 // (micro * world_size), rank=rank, world_size=world_size))
        assert not set(own) & set(got)
        got |= own
    assert got == expected


def test_resume(config: Config) -> None:
    """From the state of a loader stopped in step 3: the uninterrupted sequence."""
    expected = take(config, 8)[6:]
    stopped = build_loader(config)
    list(itertools.islice(stopped, 7))  # in the middle of step 3
    resumed = build_loader(config)
    resumed.load_state_dict(stopped.state_dict())
    for batch, other in zip(expected, resumed, strict=False):
        assert_same(batch, other)


def test_state_of_another_run_is_refused(config: Config) -> None:
    """Another seed, another batch, other files: each is named."""
    state = build_loader(config).state_dict()
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        build_loader(with_train(config, seed=1)).load_state_dict(state)
    with pytest.raises(ValueError, match="clips a step was 4, is 8; images a step was 8, is 16"):
        build_loader(with_train(config, clips=8, images=16)).load_state_dict(state)
    with pytest.raises(ValueError, match="clips in the source was 7, is 3; fingerprint of the clips was"):
        build_loader(with_data(config, clips=config.data.val_clips)).load_state_dict(state)


def test_lengths(config: Config) -> None:
    """An epoch is a pass over the clips, or over the images where there are no clips."""
    loader = build_loader(config)
    assert (loader.accumulation, loader.clips, loader.images, loader.steps_per_epoch) == (2, 7, 10, 7 / 4)
    assert build_loader(with_train(config, clips=0)).steps_per_epoch == 10 / 8
    batch = take(with_train(config, clips=0), 1)[0]
    assert batch.clips is None
    assert batch.clip_masks is None


def test_batches_that_do_not_divide(config: Config) -> None:
    """The message has the numbers."""
    with pytest.raises(ConfigError, match=r"train\.clips = 4 is not a multiple of .* = 2 \* 3"):
        build_loader(config, world_size=3)
    with pytest.raises(ConfigError, match=r"clips make 2 \(4 / \(2 \* 1\)\) and images 1 \(8 / \(8 \* 1\)\)"):
        build_loader(with_train(config, micro_images=8))


def test_unknown_backend(config: Config) -> None:
    """Names what exists."""
    with pytest.raises(ConfigError, match="'nvdec' does not exist; known: 'auto', 'dali', 'pyav', 'torchcodec'"):
        build_loader(with_data(config, backend="nvdec"))


@pytest.mark.parametrize("key", ["clip_mask", "image_mask"])
def test_a_mask_that_does_not_fit(config: Config, key: str) -> None:
    """An error of the configuration, before anything is decoded; not where the stream takes no part."""
    wrong = replace(config, **{key: replace(getattr(config, key), min_block=100)})
    with pytest.raises(ConfigError, match=rf"{key}\.min_block = 100 must lie in 1\.\."):
        build_loader(wrong)
    with pytest.raises(ConfigError, match=rf"{key}\.min_block = 100 must lie in 1\.\."):
        eval_batches(wrong)
    build_loader(with_train(wrong, clips=0) if key == "clip_mask" else with_train(wrong, images=0))
    next(frame_batches(wrong, 2, seed=0))


@pytest.fixture
def damaged(dataset: shapes.ShapesPaths, config: Config, tmp_path: Path) -> Iterator[Config]:
    """Two of ten images turn unreadable after they were indexed."""
    folder = tmp_path / "images"
    shutil.copytree(dataset.train_images, folder, ignore=shutil.ignore_patterns(".*"))
    index(str(folder), "images", cache=tmp_path / "images.jsonl")
    for name in ("0002.jpg", "0005.jpg"):
        status = (folder / name).stat()
        (folder / name).write_bytes(b"damaged".ljust(status.st_size))
        os.utime(folder / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # so that nothing but decoding shows it
    return with_data(config, images=str(tmp_path / "images.jsonl"), val_images=str(tmp_path / "images.jsonl"))


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_files_are_replaced_and_reported(
    damaged: Config, config: Config, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """By the next readable file of the epoch's order, in the batch and the log; masks stay."""
    batches = take(with_data(damaged, workers=workers), 2)
    healthy = take(with_data(damaged, images=config.data.images), 2)
    reports = [report for batch in batches for report in batch.bad]
    assert reports
    assert all(f"{report.path}: {report.error}" in caplog.text for report in reports)
    names = [Path(name).name for batch in healthy for name in batch.image_ids]
    for report in reports:
        assert Path(report.path).name in ("0002.jpg", "0005.jpg")
        assert report.error == "not an image that Pillow recognises"
        assert report.stream == "images"
    for position, name in enumerate(name for batch in batches for name in batch.image_ids):
        bad = [report for report in reports if report.position == position]
        assert bool(bad) == (names[position] in ("0002.jpg", "0005.jpg"))
        assert Path(name).name == (Path(bad[-1].replaced_by).name if bad else names[position])
    for batch, sound in zip(batches, healthy, strict=True):
        assert torch.equal(batch.image_masks, sound.image_masks)
        assert batch.images.flatten(1).any(1).all()


def test_too_many_unreadable_files(damaged: Config, tmp_path: Path) -> None:
    """Nothing left to read at a position: an error that lists the files."""
    for path in (tmp_path / "images").glob("*.jpg"):
        path.write_text("damaged")
    with pytest.raises(DataError, match=r"10 files in a row cannot be read, at position 0 of the images"):
        take(damaged, 1)


@pytest.fixture
def known_damage(damaged: Config, tmp_path: Path) -> Config:
    """The same, with a manifest that knows them."""
    index(str(tmp_path / "images"), "images", cache=tmp_path / "known.jsonl")
    return with_data(damaged, images=str(tmp_path / "known.jsonl"))


def test_files_known_to_be_unreadable(known_damage: Config, damaged: Config, config: Config, tmp_path: Path) -> None:
    """They are reported once, not decoded; the epoch and the samples are those of files that turn out unreadable."""
    loader = build_loader(known_damage)
    assert loader.unreadable == tuple(
        BadFile(
            "images",
            -1,
            str(tmp_path / "images" / name),
            "not an image that Pillow recognises",
            "the next readable file of the epoch",
        )
        for name in ("0002.jpg", "0005.jpg")
    )
    assert build_loader(config).unreadable == ()
    assert (loader.images, build_loader(with_train(known_damage, clips=0)).steps_per_epoch) == (10, 10 / 8)
    for known, found in zip(take(known_damage, 4), take(damaged, 4), strict=True):
        assert known.bad == ()
        assert_same(known, replace(found, bad=()))
    first, second = (next(frame_batches(with_data(c, clips=""), 10, seed=0)) for c in (known_damage, damaged))
    assert torch.equal(first, second)


def test_held_out_data(config: Config) -> None:
    """Each file once, clips first, then images, the last batch smaller; the same in every call."""
    first, second = list(eval_batches(config)), list(eval_batches(config, micro_images=5))
    assert [len(batch.clip_ids) for batch in first] == [2, 1, 0, 0]
    assert [len(batch.image_ids) for batch in first] == [0, 0, 4, 1]
    assert [len(batch.image_ids) for batch in second] == [0, 0, 5]
    assert_same(first[0], second[0])
    assert sum(len(batch.image_ids) for batch in eval_batches(with_train(config, eval_clips=0, eval_images=2))) == 2


def test_held_out_data_is_never_replaced(damaged: Config, tmp_path: Path) -> None:
    """Neither a file that turns out unreadable nor one that the index already knows to be."""
    listed = r"(?s)2 of 10 files cannot be read; .* never replaced.*0002\.jpg: not an image.*0005\.jpg: not an image"
    with pytest.raises(DataError, match=listed):
        list(eval_batches(with_train(damaged, eval_clips=0, eval_images=10)))
    with pytest.raises(DataError, match=listed):
        eval_batches(with_data(damaged, val_images=str(tmp_path / "images")))


def test_unreadable_files_are_counted_once() -> None:
    """Whatever failed in how many of their views."""
    bad = [("a.mp4", "frame 12"), ("b.mp4", "no video"), ("a.mp4", "frame 90")]
    said = _refused(bad, 3)
    assert said.startswith("2 of 3 files cannot be read")
    assert said.splitlines()[1:] == ["  a.mp4: frame 12", "  b.mp4: no video"]


@pytest.mark.parametrize(("clips", "images"), [(True, True), (True, False), (False, True)])
def test_frames_for_the_tokenizer(config: Config, clips: bool, images: bool) -> None:
    """Deterministic, of the size asked for, from either source or both."""
    source = with_data(
        config, clips=config.data.clips if clips else "", images=config.data.images if images else "", workers=0
    )
    first = list(itertools.islice(frame_batches(source, 7, seed=3), 3))
    again = list(itertools.islice(frame_batches(source, 7, seed=3), 3))
    other = next(frame_batches(source, 7, seed=4))
    assert first[0].shape == (7, 64, 64, 3)
    assert first[0].dtype == torch.uint8
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other)
    assert len(np.unique(first[0].flatten(1).numpy(), axis=0)) == 7


def kill_a_worker() -> int:
    """Its process id."""
    pid = multiprocessing.active_children()[0].pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    return pid


def test_a_killed_worker_is_named_and_replaced(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    """Twice; not one sample is lost, doubled or changed."""
    loader = build_loader(with_data(config, workers=2, prefetch=1))
    killed = []
    try:
        for number, (batch, expected) in enumerate(zip(loader, take(config, 12), strict=False)):
            assert_same(batch, expected)
            if number in (2, 7):
                killed.append(kill_a_worker())
    finally:
        loader.close()
    for pid in killed:
        assert f"the decoding process {pid} died (SIGKILL): killed from outside, out of memory" in caplog.text
    assert re.search(r"It was the turn of \S+\.\w+, .* more; \d micro-batches that were begun are decoded", caplog.text)
    assert not multiprocessing.active_children()


def test_a_killed_worker_can_end_the_run(config: Config) -> None:
    """With `worker_death="stop"`: an error within seconds, which says what happened."""
    loader = build_loader(with_data(config, workers=1, prefetch=1, worker_death="stop"))
    batches = iter(loader)
    try:
        next(batches)
        pid = kill_a_worker()
        start = time.monotonic()
        with pytest.raises(DataError, match=rf"the decoding process {pid} died \(SIGKILL\): .*out of memory"):
            list(itertools.islice(batches, 10))
        assert time.monotonic() - start < 30
    finally:
        loader.close()
    assert not multiprocessing.active_children()


class DeadlyMasks(Masks):
    """In a worker, what a decoder's crash looks like: the process ends at one of the files."""

    def __call__(self, stream: Stream, requests: list[Request]) -> torch.Tensor | None:
        """The masks, but for 0003.jpg."""
        if any(request.path.endswith("0003.jpg") for request in requests):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(stream, requests)


def test_a_file_that_kills_every_worker_ends_the_run(config: Config, dataset: shapes.ShapesPaths) -> None:
    """The first death is answered by a new process; the second at the same micro-batch is an error that names it."""
    sampler = Sampler(index(dataset.train_images, "images"), config.data, "images", 0, train=False)
    plans = [Plan([], [sampler.request(number)]) for number in range(6)]
    served = []
    backend = Processes("pyav", replace(config.data, workers=1))
    with pytest.raises(DataError, match=r"died \(SIGSEGV\).*turn of \S+0003\.jpg, at which another had died"):
        served.extend(plan for plan, _ in backend.decode(plans, DeadlyMasks(config, ["images"])))
    assert served == plans[:3]
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_defect_in_a_worker_is_an_error(config: Config, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the worker's traceback, the names of the samples, and no process left behind."""
    real = Sampler.request

    def outside(sampler: Sampler, position: int, substitute: int = 0, cut: int = 0) -> Request:
        return replace(real(sampler, position, substitute, cut), crop=(10**6, 0))

    monkeypatch.setattr(Sampler, "request", outside)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)one of .*\.jpg.*in _pixels.*RuntimeError: "):
        take(with_data(config, workers=workers), 1)
    assert time.monotonic() - begin < 30
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), r"\.\w+: not enough memory to decode it; lower data\.workers"),
        (DataError("no PyAV"), "^no PyAV$"),
    ],
)
def test_an_error_for_the_user_stays_one(
    config: Config, error: Exception, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever it was decoded."""

    def read(requests: Sequence[Request], into: Sequence[torch.Tensor]) -> None:
        raise error

    monkeypatch.setitem(READERS, "pyav", read)
    with pytest.raises(DataError, match=message):
        take(config, 1)


SCRIPT = """
import multiprocessing, os, signal, sys, time
from dataclasses import replace
from bevt.config import Config, DataConfig, MaskConfig, TrainConfig
from bevt.data.build import build_loader
from bevt.data.sampling import Sampler

if __name__ == "__main__":
    if sys.argv[2] == "defect":
        real = Sampler.request
        Sampler.request = lambda self, position, cut: replace(
            real(self, position), crop=(0, 0) if position < 10 else (10**6, 0)
        )
    if sys.argv[2] == "defect here":
        real = Sampler.request
        Sampler.request = lambda self, position, cut: real(self, position if position < 10 else "ten")
    signal.signal(signal.SIGTERM, lambda *_: print("told", file=sys.stderr))
    loader = build_loader(Config(
        image_mask=MaskConfig(kind="block", min_block=4),
        data=DataConfig(images=sys.argv[1], crop=64, short_side=(64, 64), workers=1, backend="pyav"),
        train=TrainConfig(clips=0, images=2, micro_images=2),
    ))
    batches = iter(loader)
    next(batches)
    print(multiprocessing.active_children()[0].pid, flush=True)
    if sys.argv[2] == "wait":
        time.sleep(60)
    if sys.argv[2] == "signal":
        os.killpg(0, signal.SIGTERM)
        for _ in range(8):
            next(batches)
    if sys.argv[2].startswith("defect"):
        while True:
            next(batches)
    raise RuntimeError("the end")
"""


def start(tmp_path: Path, config: Config, mode: str) -> tuple[subprocess.Popen[str], int]:
    """A process that trains, in a process group of its own, and the id of its worker."""
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py"), config.data.images, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline())


def assert_ends(pid: int) -> None:
    """The process is gone, or a zombie, within 30 seconds."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return
        except (ProcessLookupError, FileNotFoundError):
            return
        time.sleep(0.1)
    pytest.fail(f"worker {pid} outlives its parent")


def test_an_exception_ends_the_workers(config: Config, tmp_path: Path) -> None:
    """A loader that nobody closed does not keep the interpreter from ending."""
    process, worker = start(tmp_path, config, "raise")
    _, err = process.communicate(timeout=60)
    assert "RuntimeError: the end" in err
    assert_ends(worker)


@pytest.mark.parametrize(
    ("mode", "message"),
    [("defect", "RuntimeError: a defect of bevt, met while decoding one of"), ("defect here", "TypeError: ")],
)
def test_a_defect_ends_the_process(config: Config, tmp_path: Path, mode: str, message: str) -> None:
    """In a worker; and in the parent below torch's iterator, which its traceback then keeps from ending the worker."""
    process, worker = start(tmp_path, config, mode)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert message in err
    assert_ends(worker)


def test_sigterm_to_the_group_leaves_the_workers(config: Config, tmp_path: Path) -> None:
    """A scheduler signals every process; the training process can still finish its step."""
    process, worker = start(tmp_path, config, "signal")
    _, err = process.communicate(timeout=60)
    assert err.startswith("told\n")
    assert "RuntimeError: the end" in err
    assert_ends(worker)


def test_a_killed_parent_ends_the_workers(config: Config, tmp_path: Path) -> None:
    """Kill -9 of the training process leaves nothing behind."""
    process, worker = start(tmp_path, config, "wait")
    process.kill()
    process.communicate(timeout=60)
    assert_ends(worker)
