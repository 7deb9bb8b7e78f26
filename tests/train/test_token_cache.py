"""Training with a token cache: the run without it, bit for bit, whether its codes are computed, found or damaged.

This tokenizer's codes of a frame do not depend on the frames beside it, on a CPU: equality is exact.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_resume import same_weights
from test_step import WORLD, Counting, Waits, trainer
from tiny import TORCHRUN, changed, command, figures, output, train_rows
from torch import Tensor

from bevt import tokenizers
from bevt.config import Config, ConfigError, check
from bevt.data.batch import Batch
from bevt.models.bevt import MaskedInput
from bevt.tokenizers.cache import HEADER, TokenCache
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train.metrics import Display
from bevt.train.pretrain import pretrain
from bevt.train.step import masked_inputs

RECORD = 4 * 4 * 2 + 4
CLIPS, IMAGES = 14, 20
"""Views: two of each file of the embedded dataset."""
DECIDES: dict[str, tuple[dict[str, Any], int]] = {"clips": ({"files": "a"}, 5), "images": ({"files": "b"}, 10)}
"""What decides the views of a cache that knows no loader, and how many there are."""


@pytest.fixture
def batch() -> Batch:
    """Clips 4 and 2, of 4 frames in two steps each, and images 9, 0 and 3; in the second clip one step is masked."""
    rng = torch.Generator().manual_seed(0)
    clip_masks = torch.rand(2, 2, 4, 4, generator=rng) < 0.5
    clip_masks[1, 0] = False
    return Batch(
        clips=torch.randint(256, (2, 4, 64, 64, 3), generator=rng, dtype=torch.uint8),
        clip_masks=clip_masks,
        images=torch.randint(256, (3, 64, 64, 3), generator=rng, dtype=torch.uint8),
        image_masks=torch.rand(3, 4, 4, generator=rng) < 0.5,
        image_jitter=torch.tensor([[1.1, 0.9, 1.2, 2.0, 0.0, 1.0]]).repeat(3, 1),
        clip_slots=torch.tensor([4, 2]),
        image_slots=torch.tensor([9, 0, 3]),
    )


@pytest.fixture
def kept(config: Config, tmp_path: Path) -> TokenCache:
    """An empty cache for it."""
    config = changed(config, tokenizer={"cache": str(tmp_path)})
    tokenizer = tokenizers.build(config.tokenizer, WORLD.device)
    return TokenCache.open(config, tokenizer, "vq", WORLD.device, DECIDES)


def counting(config: Config) -> Any:
    """The run's tokenizer, which remembers how many frames each call had."""
    return Counting(tokenizers.build(config.tokenizer, WORLD.device))


def same(got: dict[str, MaskedInput], expected: dict[str, MaskedInput]) -> bool:
    """Bit for bit."""
    return got.keys() == expected.keys() and all(
        torch.equal(getattr(got[stream], name), getattr(expected[stream], name))
        for stream in expected
        for name in ("pixels", "mask", "codes")
    )


def test_only_masked_frames_that_are_not_there_are_tokenised(config: Config, batch: Batch, kept: TokenCache) -> None:
    """4 + 2 frames and 3 images at first, then none; under other masks those that no mask has covered yet."""
    tokenizer = counting(config)
    expected = masked_inputs(batch, tokenizer, config, WORLD.device)
    for _ in range(2):
        assert same(masked_inputs(batch, tokenizer, config, WORLD.device, kept), expected)
    assert tokenizer.frames == [9, 9, 0]
    assert batch.clip_masks is not None
    other = replace(batch, clip_masks=batch.clip_masks.flip(0))
    expected = masked_inputs(other, tokenizer, config, WORLD.device)
    assert same(masked_inputs(other, tokenizer, config, WORLD.device, kept), expected)
    assert tokenizer.frames == [9, 9, 0, 9, 2]
    assert kept.share() == (9 + 7) / 27
    kept.close()


def test_a_frame_is_found_in_any_batch(config: Config, batch: Batch, kept: TokenCache) -> None:
    """By the number of its view: whatever its place, and whatever is beside it."""
    tokenizer = counting(config)
    masked_inputs(batch, tokenizer, config, WORLD.device, kept)
    turned = {name: value.flip(0) for name, value in vars(batch).items() if isinstance(value, Tensor)}
    moved = replace(batch, **turned)
    expected = masked_inputs(moved, tokenizer, config, WORLD.device)
    assert same(masked_inputs(moved, tokenizer, config, WORLD.device, kept), expected)
    assert tokenizer.frames == [9, 9, 0]
    kept.close()


def test_a_damaged_record_is_tokenised_again(config: Config, batch: Batch, kept: TokenCache) -> None:
    """That frame alone, to the same codes; after that it is there again."""
    tokenizer = counting(config)
    expected = masked_inputs(batch, tokenizer, config, WORLD.device, kept)
    path = kept.stores["clips"].path
    whole = path.read_bytes()
    with path.open("r+b") as file:  # frame 2 of view 4
        file.seek(HEADER + (4 * 4 + 2) * RECORD + 7)
        file.write(bytes([whole[file.tell()] ^ 1]))
    for _ in range(2):
        assert same(masked_inputs(batch, tokenizer, config, WORLD.device, kept), expected)
    assert tokenizer.frames == [9, 1, 0]
    assert path.read_bytes() == whole
    kept.close()


def test_nothing_waits_for_the_device(config: Config, batch: Batch, kept: TokenCache) -> None:
    """In steps that find nothing and everything; the figure is there."""
    _, step = trainer(config)
    step.cache = kept
    for share in (0.0, 1.0):
        with Waits() as waits:
            result = step(1e-3, [batch])
        assert waits.found == []
        assert float(result.values["tokens_cached"]) == share
    kept.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_waits_for_a_gpu(config: Config, batch: Batch, tmp_path: Path) -> None:
    """Codes come and go beside the step, by PyTorch's own account of waits; they are those without a cache."""
    device = torch.device("cuda")
    config = changed(config, tokenizer={"cache": str(tmp_path)})
    tokenizer = tokenizers.build(config.tokenizer, device)
    kept = TokenCache.open(config, tokenizer, "vq", device, DECIDES)
    pinned = {name: value.pin_memory() for name, value in vars(batch).items() if isinstance(value, Tensor)}
    batch = replace(batch, **pinned)
    expected = masked_inputs(batch, tokenizer, config, device)
    for share in (0.0, 1.0):
        torch.cuda.set_sync_debug_mode("error")
        try:
            got = masked_inputs(batch, tokenizer, config, device, kept)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        kept.flush()
        assert same(got, expected)
        assert kept.share() == share
    kept.close()


def test_it_needs_fixed_views(config: Config) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer.cache .* data.views = 0 .*: set data.views"):
        check(changed(config, tokenizer={"cache": "codes"}))


@pytest.fixture(scope="module")
def fixed(config: Config) -> Config:
    """Twelve steps over two views of each file, more than three epochs of clips."""
    return changed(config, data={"views": 2}, optim={"max_steps": 12}, train={"threads": 1, "checkpoint_every": 5})


@pytest.fixture(scope="module")
def plain(fixed: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run, without a cache."""
    out = tmp_path_factory.mktemp("runs") / "plain"
    pretrain(fixed, out, quiet=True)
    return out


def cached(config: Config, folder: Path, **groups: dict[str, Any]) -> Config:
    """`config` with a cache in `folder`."""
    return changed(config, tokenizer={"cache": str(folder)}, **groups)


def losses(out: Path) -> list[dict[str, Any]]:
    """All figures of a run but the cache's."""
    return [{key: value for key, value in row.items() if key != "tokens_cached"} for row in figures(out)]


def shares(out: Path) -> list[float]:
    """What the cache had, step by step."""
    return [row["tokens_cached"] for row in train_rows(out)]


def test_losses_are_those_without_it(fixed: Config, plain: Path, tmp_path: Path) -> None:
    """While it fills, and in a later run that finds all; a run with another seed finds the same views."""
    config = cached(fixed, tmp_path / "codes")
    pretrain(config, tmp_path / "first", quiet=True)
    assert shares(tmp_path / "first")[0] == 0.0
    assert 0 < shares(tmp_path / "first")[-1] < 1
    pretrain(config, tmp_path / "second", quiet=True)
    assert shares(tmp_path / "second") == [1.0] * 12
    for run in ("first", "second"):
        assert losses(tmp_path / run) == losses(plain), run
        assert same_weights(tmp_path / run, plain), run
    sizes = {entry.name: entry.stat().st_size - HEADER for entry in (tmp_path / "codes").glob("*.tokens")}
    assert sizes == {"clips.tokens": CLIPS * 4 * RECORD, "images.tokens": IMAGES * RECORD}

    pretrain(changed(config, train={"seed": 7}), tmp_path / "third", quiet=True)
    pretrain(changed(fixed, train={"seed": 7}), tmp_path / "other", quiet=True)
    assert shares(tmp_path / "third")[0] > 0.3
    assert losses(tmp_path / "third") == losses(tmp_path / "other") != losses(plain)


def test_resumed(fixed: Config, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is stopped after 3 steps and continued, and one whose cache is lost, or begins, in between."""

    def stop(self: Display, steps: int) -> None:
        if steps == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    folders = {"kept": ("a", "a"), "lost": ("b", "c"), "begun": ("", "d"), "ended": ("e", "")}
    for name, (before, after) in folders.items():
        out, here = tmp_path / name, [str(tmp_path / folder) if folder else "" for folder in (before, after)]
        with monkeypatch.context() as patch:
            patch.setattr(Display, "step", stop)
            assert pretrain(changed(fixed, tokenizer={"cache": here[0]}), out, quiet=True).step == 3
        assert pretrain(changed(fixed, tokenizer={"cache": here[1]}), out, resume=True, quiet=True).finished
        assert losses(out) == losses(plain), name
        assert same_weights(out, plain), name


def test_a_checkpoint_waits_for_the_codes(fixed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those still on their way from a GPU, here never there by themselves: the next run finds every one."""
    config = cached(fixed, tmp_path / "codes")
    late = SimpleNamespace(query=lambda: False, synchronize=lambda: None)
    with monkeypatch.context() as patch:
        patch.setattr(TokenCache, "add", lambda self, records, codes: self._underway.append((records, codes, late)))
        pretrain(config, tmp_path / "first", quiet=True)
    assert shares(tmp_path / "first")[:5] == [0.0] * 5  # up to the first checkpoint
    pretrain(config, tmp_path / "second", quiet=True)
    assert shares(tmp_path / "second") == [1.0] * 12


def test_two_ranks_fill_one_cache(fixed: Config, plain: Path, tmp_path: Path) -> None:
    """Both make, write and read the same files; a run of one process finds all of their codes in its first steps."""
    config = cached(fixed, tmp_path / "codes")
    two = changed(config, train={"clips": 4, "images": 8, "micro_clips": 1, "micro_images": 2})
    output(command(two, tmp_path / "two", python=TORCHRUN))
    assert shares(tmp_path / "two")[-1] > 0.5
    pretrain(config, tmp_path / "one", quiet=True)
    assert min(shares(tmp_path / "one")) > 0.5
    assert losses(tmp_path / "one") == losses(plain)


def test_another_tokenizer_or_other_views_are_refused(fixed: Config, tmp_path: Path) -> None:
    """Before a step is done; both values are named."""
    short = cached(fixed, tmp_path / "codes", optim={"max_steps": 1})
    pretrain(short, tmp_path / "run", quiet=True)
    torch.manual_seed(1)
    VQTokenizer(VQModel(VQConfig(image_size=32, vocab_size=32, code_dim=4, width=4, blocks=0))).save(tmp_path / "vq")
    for groups, says in (
        ({"tokenizer": {"path": str(tmp_path / "vq")}}, "digest of the tokenizer was 'vq [0-9a-f]{16}', is 'vq "),
        ({"tokenizer": {"precision": "bfloat16"}}, "tokenizer precision was 'float32', is 'bfloat16'"),
        ({"data": {"flip": 0.0}}, "data.flip was 0.5, is 0.0"),
        ({"data": {"views": 3}}, "data.views was 2, is 3; slots was 14, is 21"),
        ({"data": {"stride": 3}}, "data.stride was 2, is 3"),
    ):
        with pytest.raises(ConfigError, match=rf"clips.tokens holds the codes of other views or .*: .*{says}"):
            pretrain(changed(short, **groups), tmp_path / "refused", quiet=True)
        assert not (tmp_path / "refused" / "metrics.jsonl").exists()


def test_a_full_disk(
    fixed: Config, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the 20th write on: said once, and the run is the run."""
    wrote = 0

    def pwrite(file: int, data: bytes, at: int, write: Callable[..., int] = os.pwrite) -> int:
        nonlocal wrote
        wrote += 1
        if wrote >= 20:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(file, data, at)

    monkeypatch.setattr(os, "pwrite", pwrite)
    pretrain(cached(fixed, tmp_path / "codes"), tmp_path / "run", quiet=True)
    assert wrote == 20
    assert sum("No space left on device" in record.message for record in caplog.records) == 1
    assert losses(tmp_path / "run") == losses(plain)
