"""Two processes under torchrun do what one does."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from tiny import ENVIRONMENT, ROOT, TORCHRUN, changed, command, train_rows

from bevt.config import Config
from bevt.train import checkpoint
from bevt.train.loop import pretrain

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")


def torchrun(words: list[str]) -> str:
    """The output of a command."""
    done = subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_equal_one(config: Config, tmp_path: Path) -> None:
    """The same global batches: 4 + 8 samples in two micro-batches of one process, or in one of each of two.

    Without drop path, which draws by process. Sums are taken in another order: 1e-5 relative on the first losses, and
    the same weights at the end up to Adam's amplification of that rounding.
    """
    config = changed(
        config,
        model={"drop_path": 0.0},
        optim={"max_steps": 4},
        train={"clips": 4, "images": 8, "micro_clips": 2, "micro_images": 4},
    )
    pretrain(config, tmp_path / "one", quiet=True)
    output = torchrun(command(config, tmp_path / "two", python=TORCHRUN))
    assert "4 steps of 4 clips + 8 images, 1.8 steps an epoch, 1 micro-batches a step and process" in output
    one, two = train_rows(tmp_path / "one"), train_rows(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3, 4]
    for a, b in zip(one, two):
        for key in ("loss", "loss_clips", "loss_images", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=1e-5 if a["step"] == 1 else 1e-3), (key, a["step"])
    weights = [checkpoint.load(tmp_path / run / "checkpoints" / "last")["model"] for run in ("one", "two")]
    for name, value in weights[0].items():
        assert (weights[1][name] - value).abs().max() < 1e-3, name


SCRIPT = """
import torch
from bevt.train.distributed import join_world

world = join_world()
one, both = world.rank == 1, True
assert (world.size, world.main) == (2, not one)
assert (world.any(one), world.any(False)) == (True, False)
assert (bool(world.all(torch.tensor(one))), bool(world.all(torch.tensor(both)))) == (False, True)
assert world.mean(torch.tensor([world.rank, 3.0])).tolist() == [0.5, 3.0]
world.barrier()
world.close()
"""


def test_what_the_processes_agree_on(tmp_path: Path) -> None:
    """A signal or a loss that is not finite on one process counts on both."""
    (tmp_path / "script.py").write_text(SCRIPT)
    torchrun([*TORCHRUN, str(tmp_path / "script.py")])
