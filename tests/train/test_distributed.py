"""Two processes under torchrun do what one does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from tiny import TORCHRUN, changed, command, output

from bevt.config import Config
from bevt.train import checkpoint
from bevt.train.metrics import read_rows
from bevt.train.pretrain import pretrain

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")


@pytest.fixture(scope="module")
def exact(config: Config) -> Config:
    """4 + 8 samples a step in two micro-batches of one process, or in one or two of each of two; drop path, float64."""
    return changed(
        config,
        model={"drop_path": 0.3},
        data={"val_clips": config.data.clips, "val_images": config.data.images},
        optim={"max_steps": 6},
        train={
            **{"clips": 4, "images": 8, "micro_clips": 2, "micro_images": 4},
            **{"precision": "float64", "checkpoint_every": 3, "threads": 1},
        },
    )


@pytest.fixture(scope="module")
def alone(exact: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run by one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    pretrain(exact, out, quiet=True)
    return out


@pytest.fixture(scope="module")
def sharded(exact: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same by two, which share one model."""
    out = tmp_path_factory.mktemp("runs") / "sharded"
    output(command(changed(exact, train={"parallel": "fsdp"}), out, python=TORCHRUN))
    return out


def assert_same(run: Path, expected: Path) -> None:
    """Rows, held-out figures and weights, up to float64's rounding: 1e-10, where float32 would leave 1e-7."""
    rows = [read_rows(out / "metrics.jsonl") for out in (run, expected)]
    assert [row["step"] for row in rows[0]] == [1, 2, 3, 4, 5, 6, 6]
    for got, wanted in zip(*rows):
        figures = [key for key in wanted if re.match("(val_)?(loss|accuracy)|grad_norm", key)]
        assert len(figures) > 3, wanted
        for key in figures:
            assert got[key] == pytest.approx(wanted[key], rel=1e-10), (key, got["step"])
    got, wanted = (checkpoint.load(out / "checkpoints" / "last") for out in (run, expected))
    for name, value in wanted["model"].items():
        torch.testing.assert_close(got["model"][name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_two_processes_equal_one(exact: Config, alone: Path, tmp_path: Path) -> None:
    """DDP, in two micro-batches each."""
    smaller = changed(exact, train={"micro_clips": 1, "micro_images": 2})
    printed = output(command(smaller, tmp_path / "two", python=TORCHRUN))
    assert "6 steps of 4 clips + 8 images, 1.8 steps an epoch, 2 micro-batches a step and process" in printed
    assert_same(tmp_path / "two", alone)


def test_two_processes_that_share_a_model_equal_one(sharded: Path, alone: Path) -> None:
    """FSDP2."""
    assert_same(sharded, alone)


def cut(run: Path, out: Path) -> Path:
    """A copy of `run` as it was after its third step."""
    shutil.copytree(run, out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    (out / "checkpoints" / "last").unlink()
    return out


def test_one_process_goes_on_where_two_were(exact: Config, sharded: Path, alone: Path, tmp_path: Path) -> None:
    """From shards to a whole model."""
    out = cut(sharded, tmp_path / "run")
    pretrain(exact, out, resume=True, quiet=True)
    assert_same(out, alone)


def test_two_processes_go_on_where_one_was(exact: Config, alone: Path, tmp_path: Path) -> None:
    """From a whole model to shards."""
    out = cut(alone, tmp_path / "run")
    output(command(changed(exact, train={"parallel": "fsdp"}), out, "--resume", python=TORCHRUN))
    assert_same(out, alone)


SCRIPT = """
import torch
from bevt.train.distributed import join_world

world = join_world()
one, both = world.rank == 1, True
assert (world.size, world.main) == (2, not one)
assert (world.any(one), world.any(False)) == (True, False)
assert (bool(world.all(torch.tensor(one))), bool(world.all(torch.tensor(both)))) == (False, True)
assert world.mean(torch.tensor([world.rank, 3.0])).tolist() == [0.5, 3.0]
assert world.concatenate(torch.tensor([[world.rank], [2]]), 1).tolist() == [[0, 1], [2, 2]]
assert world.gather({"rank": world.rank, "values": [1.5] * world.rank}) == [
    {"rank": 0, "values": []}, {"rank": 1, "values": [1.5]}
]
world.barrier()
world.close()
"""


def test_what_the_processes_agree_on(tmp_path: Path) -> None:
    """A signal or a loss that is not finite on one process counts on both; what each has found, both learn."""
    (tmp_path / "script.py").write_text(SCRIPT)
    output([*TORCHRUN, str(tmp_path / "script.py")])
