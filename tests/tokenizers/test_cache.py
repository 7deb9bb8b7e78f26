"""The token store: what it keeps, what it notices, who may write, and what happens when the disk is full."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import room

from bevt.config import Config, ConfigError, DataConfig, TokenizerConfig
from bevt.tokenizers import cache
from bevt.tokenizers.cache import HEADER, TokenCache, TokenStore

ROOT = Path(__file__).parents[2]
IDENTITY = {"stream": "clips", "views": "0123", "weights": "vq 4567", "tokenizer precision": "float32"}
SLOTS, FRAMES, GRID = 5, 4, (2, 3)
RECORD = 2 * 2 * 3 + 4


def opened(path: Path, **changes: Any) -> TokenStore:
    """The store at `path`."""
    return TokenStore(path, {**IDENTITY, **changes}, SLOTS, FRAMES, GRID)


def codes(count: int, seed: int = 0) -> np.ndarray:
    """(count, h, w), from 0 to 65535, both in the first."""
    out = np.random.default_rng(seed).integers(0, 1 << 16, (count, *GRID))
    out[0, 0, :2] = 0, (1 << 16) - 1
    return out


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a store, in a folder that does not exist yet."""
    return tmp_path / "codes" / "clips.tokens"


def test_size(path: Path) -> None:
    """16 frames of 14x14 codes take 6272 bytes of codes and 64 of checksums, on the disk from the start."""
    TokenStore(path, IDENTITY, 3, 16, (14, 14)).close()
    assert path.stat().st_size == HEADER + 3 * (6272 + 64)
    assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_codes_come_back(path: Path) -> None:
    """Only those that were written, in any order, of this opening and of the next."""
    written = np.array([7, 19, 3, 4, 5])
    expected = {number: code for number, code in zip(written.tolist(), codes(5))}
    expected[3][:] = 0  # all codes 0 are not an empty record
    store = opened(path)
    everything = np.arange(SLOTS * FRAMES)[::-1]
    assert not store.read(everything)[1].any()
    store.write(written, np.stack(list(expected.values())))
    for _ in range(2):
        found, known = store.read(everything)
        assert sorted(everything[known]) == sorted(expected)
        for number, code in zip(everything[known].tolist(), found[known]):
            assert np.array_equal(code, expected[number])
        store.close()
        store = opened(path)
    store.close()


def test_a_checksum_of_zero(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes that had it would look like a record that was never written, and the other way round."""
    monkeypatch.setattr(cache.zlib, "crc32", lambda *_: 0)
    store = opened(path)
    store.write(np.array([1]), codes(1))
    assert store.read(np.arange(3))[1].tolist() == [False, True, False]
    store.close()


def test_a_flipped_byte_is_noticed(path: Path) -> None:
    """Each byte of a record, in turn: that record is not there, its neighbours are; written again, it is."""
    store, numbers = opened(path), np.arange(8, 11)
    store.write(numbers, codes(3))
    whole = path.read_bytes()
    for at in range(HEADER + 9 * RECORD, HEADER + 10 * RECORD):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([whole[at] ^ 16]))
        assert store.read(numbers)[1].tolist() == [True, False, True], at - HEADER - 9 * RECORD
        store.write(numbers[1:2], codes(3)[1:2])
        assert path.read_bytes() == whole
    store.close()


@pytest.mark.parametrize(
    ("source", "length"), [(8, RECORD), (8, RECORD // 2), (9, RECORD // 2)], ids=["misplaced", "mixed", "torn"]
)
def test_a_write_that_went_wrong_is_noticed(path: Path, source: int, length: int) -> None:
    """A record's bytes in another's place; the first half of them over another's; half of its own, the rest empty."""
    store, numbers = opened(path), np.arange(8, 10)
    store.write(numbers, codes(2))
    whole = path.read_bytes()
    start, target = HEADER + source * RECORD, HEADER + 9 * RECORD
    rest = bytes(RECORD - length) if source == 9 else whole[target + length : target + RECORD]
    with path.open("r+b") as file:
        file.seek(target)
        file.write(whole[start : start + length] + rest)
    assert store.read(numbers)[1].tolist() == [True, False]
    store.close()


WRITER = f"""
import sys
from pathlib import Path
import numpy as np
from bevt.tokenizers.cache import TokenStore

sys.stdin.read(1)  # both at once, the making of the file included
store = TokenStore(Path(sys.argv[1]), {IDENTITY!r}, 20, 16, (14, 14))
numbers = np.arange(20 * 16)
for turn in range(100):
    store.write(numbers, np.full((len(numbers), 14, 14), int(sys.argv[2]) + turn))
"""


def test_two_processes_write_at_once(path: Path) -> None:
    """The same records, with different codes: whatever is read, then and at the end, one of them wrote as a whole."""
    words = [sys.executable, "-c", WRITER, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    writers = [
        subprocess.Popen([*words, str(first)], stdin=subprocess.PIPE, cwd=ROOT, env=environment)
        for first in (1000, 2000)
    ]
    numbers, reads = np.arange(20 * 16), 0
    try:
        for process in writers:
            assert process.stdin is not None
            process.stdin.write(b"x")
            process.stdin.flush()
        store = TokenStore(path, IDENTITY, 20, 16, (14, 14))
        while any(process.poll() is None for process in writers):
            found, known = store.read(numbers)
            assert bool((found[known] == found[known][:, :1, :1]).all()), "a mixture passed for whole"
            reads += bool(known.any())
        assert [process.returncode for process in writers] == [0, 0]
    finally:
        for process in writers:
            process.kill()
            process.communicate()
    found, known = store.read(numbers)
    store.close()
    assert known.all()
    assert set(found[:, 0, 0].tolist()) <= {1099, 2099}
    assert reads, "nothing was read while they wrote"
    assert [entry.name for entry in sorted(path.parent.iterdir())] == ["clips.lock", "clips.tokens"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"views": "8901"}, "views was '0123', is '8901'"),
        ({"weights": "vq 9999"}, "weights was 'vq 4567', is 'vq 9999'"),
        ({"tokenizer precision": "float16"}, "tokenizer precision was 'float32', is 'float16'"),
        ({"linear_argmax": "native"}, "linear_argmax was None, is 'native'"),
    ],
)
def test_codes_of_something_else_are_refused(path: Path, changes: dict[str, str], says: str) -> None:
    """Both values are named, what is the same is not, and the file stays as it is."""
    opened(path).close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=rf"{re.escape(str(path))} .*: {says}\. Name another folder, delete"):
        opened(path, **changes)
    assert path.read_bytes() == before


def test_a_file_in_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "codes").write_text("")
    with pytest.raises(ConfigError, match=r"tokenizer\.cache: .*codes is a file; name a folder$"):
        opened(tmp_path / "codes" / "clips.tokens")


@pytest.mark.parametrize(
    ("size", "says"),
    [
        ((6, FRAMES, GRID), "slots was 5, is 6"),
        ((SLOTS, 8, GRID), "frames was 4, is 8"),
        ((SLOTS, FRAMES, (2, 2)), r"grid was \[2, 3\], is \[2, 2\]"),
    ],
)
def test_another_size_is_refused(path: Path, size: Any, says: str) -> None:
    opened(path).close()
    with pytest.raises(ConfigError, match=says):
        TokenStore(path, IDENTITY, *size)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not start as a token store does"),
        (b"\xff" * 5000, "does not start as a token store does"),
        (b"[1]", "does not start as a token store does"),
        (b'{"format": "bevt tokens 0"}', "does not start as a token store does"),
        (None, r"has 4415 bytes, not 4416: it was cut short; delete it"),
    ],
    ids=["empty", "no text", "JSON", "another format", "cut"],
)
def test_a_damaged_file_is_refused(path: Path, content: bytes | None, says: str) -> None:
    opened(path).close()
    path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    with pytest.raises(ConfigError, match=says):
        opened(path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot open .*: (Not a directory|File exists); make room, name a folder"):
        opened(tmp_path / "file" / "codes" / "clips.tokens")


def test_no_room_at_the_start(path: Path) -> None:
    """Said with the size, before the run; no part of a file is left, and later there may be room."""
    with room(HEADER + 100), pytest.raises(ConfigError, match=r"\(4.42e-06 GB\): File too large; make room"):
        opened(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["clips.lock"]
    opened(path).close()


class Late:
    """Stands in for the event behind a copy from a GPU."""

    def __init__(self) -> None:
        self.passed = False

    def query(self) -> bool:
        """Whether the codes are here."""
        return self.passed

    def synchronize(self) -> None:
        """Wait for them."""
        self.passed = True


def test_no_room_in_the_run(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where space cannot be reserved (some file systems): one warning, what was kept stays, nothing more is written."""
    store = opened(path)
    kept = TokenCache({"clips": store}, {"clips": FRAMES})
    slots, every = torch.arange(SLOTS), np.arange(SLOTS * FRAMES)
    caplog.set_level(logging.WARNING)
    with room(HEADER + 8 * RECORD + 5):
        kept.add({"clips": every[:4]}, torch.from_numpy(codes(20)[:4]))
        for part in (slice(4, 12), slice(12, 16)):
            kept._underway.append(({"clips": every[part]}, torch.from_numpy(codes(20)[part]), Late()))  # type: ignore[arg-type]
        kept.flush()
    kept.add({"clips": every[16:]}, torch.from_numpy(codes(20)[16:]))
    kept.flush()
    assert [record.message for record in caplog.records] == [
        f"tokenizer.cache: {path} cannot be written (File too large): the run goes on with the codes that are there, "
        "and tokenises the other frames each time"
    ]
    held = kept.find("clips", slots, every)
    assert held.known.tolist() == [True] * 8 + [False] * 12
    assert np.array_equal(held.codes, codes(20)[:8])
    kept.close()


def test_codes_are_written_once_they_have_arrived(path: Path) -> None:
    """By a later step, never by waiting; `flush` waits."""
    store = opened(path)
    kept = TokenCache({"clips": store}, {"clips": FRAMES})
    numbers, event = np.arange(6), Late()
    kept._underway.append(({"clips": numbers[:2]}, torch.from_numpy(codes(6)[:2]), event))  # type: ignore[arg-type]
    kept.add({"clips": numbers[2:4]}, torch.from_numpy(codes(6)[2:4]))
    assert not store.read(numbers)[1].any()
    event.passed = True
    kept.add({"clips": numbers[:0]}, torch.from_numpy(codes(6)[:0]))
    assert store.read(numbers)[1].tolist() == [True] * 4 + [False] * 2
    late = Late()
    kept._underway.append(({"clips": numbers[4:]}, torch.from_numpy(codes(6)[4:]), late))  # type: ignore[arg-type]
    kept.flush()
    assert late.passed
    found, known = store.read(numbers)
    assert known.all()
    assert np.array_equal(found, codes(6))
    kept.close()


def test_share(path: Path) -> None:
    """Frames found over frames needed since it was last asked for."""
    kept = TokenCache({"clips": opened(path)}, {"clips": FRAMES})
    assert kept.share() == 1.0
    kept.add({"clips": np.arange(8, 12)}, torch.from_numpy(codes(4)))
    kept.find("clips", torch.tensor([2, 0]), np.array([1, 2, 3, 4]))
    kept.find("clips", torch.tensor([0, 2]), np.array([5]))
    assert kept.share() == 4 / 5
    assert kept.share() == 1.0
    kept.close()


@pytest.mark.parametrize("slots", [None, torch.arange(2, device="meta")])
def test_views_without_numbers_on_the_cpu_are_refused(path: Path, slots: torch.Tensor | None) -> None:
    kept = TokenCache({"clips": opened(path)}, {"clips": FRAMES})
    with pytest.raises(ValueError, match="needs the numbers of the batch's clips views, on the CPU"):
        kept.find("clips", slots, np.arange(3))
    kept.close()


def test_a_view_that_the_store_does_not_have(path: Path) -> None:
    """Is an error, not somebody else's codes."""
    kept = TokenCache({"clips": opened(path)}, {"clips": FRAMES})
    with pytest.raises(IndexError):
        kept.find("clips", torch.tensor([SLOTS]), np.arange(3))
    kept.close()


def test_sizes_of_a_run(tmp_path: Path) -> None:
    """Clips have `data.frames` records a view, images one; the file says what they depend on.

    Where one stream is refused, no file stays open.
    """
    config = Config(data=DataConfig(frames=16, crop=224), tokenizer=TokenizerConfig(cache=str(tmp_path)))
    tokenizer: Any = SimpleNamespace(vocab_size=1 << 16, downsample=8, implementations={"linear_argmax": "native"})
    views: dict[str, tuple[dict[str, Any], int]] = {"clips": ({"data.crop": 224}, 3), "images": ({"data.crop": 2}, 7)}
    device = torch.device("cpu")
    TokenCache.open(config, tokenizer, "vq 1", device, views).close()
    sizes = {entry.name: entry.stat().st_size - HEADER for entry in tmp_path.glob("*.tokens")}
    assert sizes == {"clips.tokens": 3 * 16 * 396, "images.tokens": 7 * 396}
    assert json.loads((tmp_path / "images.tokens").read_bytes()[:HEADER]) == {
        "format": "bevt tokens 2",
        "stream": "images",
        "data.crop": 2,
        "digest of the tokenizer": "vq 1",
        "linear_argmax": "native",
        "device": "cpu",
        "slots": 7,
        "frames": 1,
        "grid": [14, 14],
    }
    files = os.listdir("/proc/self/fd")
    with pytest.raises(ConfigError, match=r"images.tokens .*: data.crop was 2, is 4\.") as refused:
        TokenCache.open(config, tokenizer, "vq 1", device, {**views, "images": ({"data.crop": 4}, 7)})
    assert len(os.listdir("/proc/self/fd")) == len(files), refused  # whose traceback would keep them open
    tokenizer.vocab_size += 1
    with pytest.raises(ConfigError, match=r"codes in 16 bits, but the tokenizer has 65537"):
        TokenCache.open(config, tokenizer, "vq 1", device, views)
