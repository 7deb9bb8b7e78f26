"""Checkpoints: whole or absent, written while training goes on, and refused in one clear line."""

from __future__ import annotations

import json
import logging
import os
import pickle
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tiny import ENVIRONMENT, ROOT, room, same_tensors, trained
from torch import nn

from bevt.train import checkpoint
from bevt.train.checkpoint import CheckpointError, Checkpoints
from bevt.train.distributed import World

ONE = World(0, 1, torch.device("cpu"))


def save(folder: Path, step: int, value: float = 1.0, keep: int = 3) -> Path:
    """A checkpoint whose one parameter has that value throughout, before the first step of the optimizer."""
    model = nn.ParameterDict({"w": torch.full((100,), value)})
    writer = Checkpoints(folder, ONE, keep)
    path = writer.save(step, model, torch.optim.AdamW(model.parameters()), {"config": {"window": [1, 2]}})
    writer.wait()
    return path


def names(folder: Path) -> list[str]:
    """What lies there."""
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    """Weights, optimizer and plain data, bit for bit, by the folder's name and by `last`."""
    model, optimizer = trained(seed=0)
    plain = {"config": {"window": [1, 2]}, "floats": [0.1 + 0.2, 1e-320, float(torch.tensor(0.1))]}
    writer = Checkpoints(tmp_path / "new", ONE, keep=3)
    path = writer.save(7, model, optimizer, plain)
    writer.wait()
    assert path.name == "step_00000007"
    for name in (path, tmp_path / "new" / "last"):
        saved = checkpoint.load(name)
        assert {key: saved[key] for key in ("step", *plain)} == {"step": 7, **plain}
        same_tensors(saved, model, optimizer)
        assert checkpoint.read_state(name) == {"format": checkpoint.FORMAT, "step": 7, **plain}
    other = trained(seed=1)
    checkpoint.restore(path, *other)
    same_tensors(saved, *other)
    assert checkpoint.load(path, optimizer=False)["optimizer"] == {}


def test_an_optimizer_before_its_first_step(tmp_path: Path) -> None:
    """It has no state, and saving and restoring give it none: one of zeros would count as a step."""
    model, optimizer = trained(seed=0, steps=0)
    writer = Checkpoints(tmp_path, ONE, keep=1)
    path = writer.save(0, model, optimizer, {})
    writer.wait()
    other = trained(seed=1, steps=0)
    checkpoint.restore(path, *other)
    same_tensors(checkpoint.load(path), *other)
    assert not optimizer.state
    assert not other[1].state


def test_another_model_is_refused(tmp_path: Path) -> None:
    """One tensor of another shape, one that it lacks: before anything is read."""
    path = save(tmp_path, 1)
    model = nn.ParameterDict({"v": torch.zeros(1), "w": torch.zeros(99)})
    says = r"step_00000001 is of another model: 2 tensors differ, the first is model\.v, none for \(1,\)"
    with pytest.raises(CheckpointError, match=says):
        checkpoint.restore(path, model, torch.optim.AdamW(model.parameters()))
    assert model["w"].eq(0).all()


def test_the_newest_are_kept(tmp_path: Path) -> None:
    """Two of four, by step and not by time; files of other names stay."""
    (tmp_path / "step_best.pt").write_text("mine")
    for step in (3, 10, 200, 100000000 - 1):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["last", "step_00000200", "step_99999999", "step_best.pt"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step_99999999"
    assert os.readlink(tmp_path / "last") == "step_99999999"


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    """As where a run is stopped right after its checkpoint."""
    save(tmp_path, 5, value=1.0)
    assert save(tmp_path, 5, value=2.0) == tmp_path / "step_00000005"
    assert checkpoint.load(tmp_path / "last")["model"]["w"].eq(1.0).all()


def test_latest_of_nothing(tmp_path: Path) -> None:
    """No folder, and a folder with a part of a checkpoint only."""
    assert checkpoint.latest(tmp_path / "absent") is None
    (tmp_path / "step_00000001.part").mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_latest_where_all_are_of_the_old_format(tmp_path: Path) -> None:
    """A run is not begun anew in silence."""
    (tmp_path / "step_00000002.pt").write_text("")
    with pytest.raises(
        CheckpointError, match=r"step_00000002\.pt is of format 1, a single file, which is no longer read"
    ):
        checkpoint.latest(tmp_path)


def test_training_goes_on_while_the_files_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and optimizer change after `save`, before a byte is written: what is written are the values before."""
    changed, original = threading.Event(), torch.save

    def blocked(*arguments: Any) -> None:
        assert changed.wait(60), "saving blocks training"
        original(*arguments)

    monkeypatch.setattr("torch.save", blocked)
    model, optimizer = trained(seed=0)
    before = trained(seed=0)
    writer = Checkpoints(tmp_path, ONE, keep=1)
    writer.save(1, model, optimizer, {})
    with torch.no_grad():
        for parameter, state in optimizer.state.items():
            for tensor in (parameter, *state.values()):
                tensor.add_(1)
    assert checkpoint.latest(tmp_path) is None
    changed.set()
    writer.wait()
    same_tensors(checkpoint.load(tmp_path / "last"), *before)


def test_a_disk_that_takes_no_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A real refusal in the middle of a file, told where the next is refused too; what was written goes, the one before
    stays.
    """
    model, optimizer = trained(seed=0)
    writer = Checkpoints(tmp_path, ONE, keep=1)
    writer.save(1, model, optimizer, {})
    writer.wait()
    with room(2000):
        writer.save(2, model, optimizer, {})
        with pytest.raises(CheckpointError, match=r"cannot write .*step_00000003: File too large; make room"):
            writer.save(3, model, optimizer, {})
        assert names(tmp_path) == ["last", "step_00000001"]
        same_tensors(checkpoint.load(tmp_path / "last"), model, optimizer)
        writer.save(4, model, optimizer, {})
        with caplog.at_level(logging.WARNING):
            writer.close()  # the run ends for another reason
    assert "step_00000004: File too large" in caplog.text
    with room(2000):
        writer.save(5, model, optimizer, {})
        while not writer.failed:
            assert writer.writing
    writer.save(6, model, optimizer, {})  # there is room again: nothing but step 5 is lost
    assert names(tmp_path) == ["last", "step_00000006"]
    assert "step_00000005: File too large" in caplog.text
    assert not writer.writing


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.mkdir", "pathlib.Path.write_text", "pathlib.Path.rename"])
def test_a_failing_write_leaves_the_older_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    """A disk that fills up while the second is written."""
    save(tmp_path, 1, keep=1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(moment, full)
        with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002: No space left on device; "):
            save(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["last", "step_00000001"]
    assert checkpoint.load(tmp_path / "last")["step"] == 1
    save(tmp_path, 2, keep=1)
    assert checkpoint.load(tmp_path / "last")["step"] == 2


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from torch import nn
from bevt.train import checkpoint
from bevt.train.distributed import World

folder, moments, orphans = Path(sys.argv[1]), random.Random(0), 0
writer = checkpoint.Checkpoints(folder, World(0, 1, torch.device("cpu")), keep=2)

def save(step):
    model = nn.ParameterDict({str(i): torch.full((10**5,), float(step)) for i in range(10)})
    writer.save(step, model, torch.optim.AdamW(model.parameters()), {})

save(1)
writer.wait()  # what torch imports late is imported once, and no thread is left to fork
for _ in range(12):
    begin = checkpoint.latest(folder)
    child = os.fork()
    if not child:
        for step in range(int(begin.name[5:]) + 1, 10**6):
            save(step)
    deadline = time.monotonic() + 60
    while checkpoint.latest(folder) == begin:
        assert time.monotonic() < deadline, "nothing is saved"
        time.sleep(0.001)
    time.sleep(0.1 * moments.random())
    seen = checkpoint.latest(folder)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoint.latest(folder)
    assert found >= seen, (found, seen)
    orphans += bool(list(folder.glob("*.part")))
    for path in (found, folder / "last"):
        saved = checkpoint.load(path)
        assert all((value == saved["step"]).all() for value in saved["model"].values()), saved["step"]
    assert saved["step"] in (int(found.name[5:]), int(found.name[5:]) - 1)  # killed before `last` was switched
assert orphans, "no kill hit a write"
print(f"{orphans} of 12 kills hit a write, at the end step {found.name}")
"""


def test_kills_while_saving(tmp_path: Path) -> None:
    """SIGKILL at twelve random moments of processes that do nothing but save: the newest checkpoint is always whole."""
    words = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    left = [path for path in tmp_path.glob("*.part") if path.name != "last.part"]
    save(tmp_path, 10**7)
    assert not list(tmp_path.glob("*.part")), left


class Code:
    """Pickles as a call."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("ran",)


def edit_metadata(path: Path, change: Callable[[Any], Any]) -> None:
    """Write what `change` makes of the metadata."""
    (path / ".metadata").write_bytes(pickle.dumps(change(pickle.loads((path / ".metadata").read_bytes()))))


def misplaced(metadata: Any) -> Any:
    """The tensors lie in a file of another folder."""
    for place in metadata.storage_data.values():
        place.relative_path = "../step_00000001/__0_0.distcp"
    return metadata


def incomplete(metadata: Any) -> Any:
    """The tensor has no parts."""
    metadata.state_dict_metadata["model.w"].chunks.clear()
    return metadata


def damage(path: Path, how: str) -> None:
    """Make `path`, a checkpoint, something that is none."""
    shard = path / "__0_0.distcp"
    data = shard.read_bytes()
    edits: dict[str, Callable[[], object]] = {
        "absent": lambda: path.rename(path.with_name("elsewhere")),
        "file": lambda: (path.rename(path.with_name("elsewhere")), path.write_text("no checkpoint")),
        "old": lambda: (path.rename(path.with_name("elsewhere")), torch.save({"format": 1}, path)),
        "no state": (path / "state.json").unlink,
        "state cut": lambda: (path / "state.json").write_text('{"format": 2, "st'),
        "state list": lambda: (path / "state.json").write_text("[2]"),
        "format": lambda: (path / "state.json").write_text('{"format": 3}'),
        "no metadata": (path / ".metadata").unlink,
        "metadata cut": lambda: (path / ".metadata").write_bytes((path / ".metadata").read_bytes()[:200]),
        "metadata text": lambda: (path / ".metadata").write_text("no metadata"),
        "metadata list": lambda: (path / ".metadata").write_bytes(pickle.dumps([1])),
        "code": lambda: (path / ".metadata").write_bytes(pickle.dumps(Code())),
        "blobs": lambda: dcp.save({"a": Code()}, storage_writer=dcp.FileSystemWriter(path), no_dist=True),
        "other file": lambda: edit_metadata(path, misplaced),
        "no parts": lambda: edit_metadata(path, incomplete),
        "no shard": shard.unlink,
        "shard cut": lambda: shard.write_bytes(data[:-1]),
        "one bit": lambda: shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1])),
        "zeros": lambda: shard.write_bytes(bytes(400) + data[400:]),
        "code in shard": lambda: shard.write_bytes((call := pickle.dumps(Code(), 2)) + data[len(call) :]),
    }
    edits[how]()
    if how in ("zeros", "code in shard"):  # whoever does this on purpose mends the checksum too
        state = json.loads((path / "state.json").read_text())
        state["files"][shard.name] = zlib.crc32(shard.read_bytes())
        (path / "state.json").write_text(json.dumps(state))


@pytest.mark.filterwarnings("ignore:Detected an existing checkpoint")
@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("absent", "no checkpoint at "),
        ("file", "is no checkpoint: it is a file and not a folder"),
        ("old", r"a file and not a folder\. .* BEVT's pretraining only with checkpoints"),
        ("no state", r"is no checkpoint, or was cut short: it has no file state\.json"),
        ("state cut", "cannot be read as a checkpoint: Unterminated string"),
        ("state list", "is no checkpoint of this project"),
        ("format", r"is no checkpoint of this project \(format 2\)"),
        ("no metadata", r"is no checkpoint, or was cut short: it has no file \.metadata"),
        ("metadata cut", "cannot be read as a checkpoint|is damaged"),
        ("metadata text", "cannot be read as a checkpoint|is damaged"),
        ("metadata list", "cannot be read as a checkpoint"),
        ("code", r"\.metadata asks for posix\.mkdir, .* pickled code is never run"),
        ("blobs", r"\.metadata asks for .*BytesStorageMetadata, .* pickled code is never run"),
        ("other file", r"is damaged: \.metadata names a file '\.\./step_00000001/__0_0\.distcp'"),
        ("no parts", r"is damaged: its parts of model\.w are not the whole tensor"),
        ("no shard", r"is damaged: it has no file __0_0\.distcp"),
        ("shard cut", r"is damaged: __0_0\.distcp was cut short \(\d+ bytes\)"),
        ("one bit", r"is damaged: __0_0\.distcp is not as it was written"),
        ("zeros", "cannot be read as a checkpoint"),
        ("code in shard", "cannot be read as a checkpoint"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, why: str) -> None:
    """One plain line that names it; nothing in it is run."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    damage(path, how)
    with pytest.raises(CheckpointError, match=why) as caught:
        checkpoint.load(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_nothing_names_the_machine(tmp_path: Path) -> None:
    """A checkpoint that is passed on tells no paths, and loads under every version of Python."""
    path = save(tmp_path, 1)
    assert b"pathlib" not in (path / ".metadata").read_bytes()
    assert str(tmp_path).encode() not in b"".join(file.read_bytes() for file in path.iterdir())
    assert set(json.loads((path / "state.json").read_text())) == {"format", "step", "config", "files"}
