"""The script that compares two runs, on real ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import compare_losses

GOLDEN = Path(__file__).parents[1] / "golden"


def flags() -> list[str]:
    """The golden joint recipe, smaller still, as flags of `bevt pretrain`."""
    data = GOLDEN / "data"
    return [
        *("--tokenizer.kind", "vq", "--tokenizer.path", str(data / "tokenizer.safetensors")),
        *("--data.clips", str(data / "clips"), "--data.images", str(data / "images"), "--data.backend", "pyav"),
        *("--data.frames", "4", "--data.stride", "2", "--data.short-side", "112", "112", "--data.crop", "64"),
        *("--data.workers", "0", "--model.embed-dim", "16", "--model.depths", "1", "1", "1", "1"),
        *("--model.num-heads", "1", "2", "4", "8", "--model.window-size", "2", "4", "4", "--train.threads", "1"),
        *("--image-mask.min-block", "4", "--clip-mask.min-block", "4", "--train.precision", "float32"),
        *("--train.clips", "1", "--train.micro-clips", "1", "--train.images", "2", "--train.micro-images", "2"),
    ]


def test_two_paths(capfd: pytest.CaptureFixture[str]) -> None:
    """Apart by rounding; not bit for bit, which the exit status says."""
    words = ["joint_stage", "--left", "--path reference", "--steps", "3", "--", *flags()]
    assert compare_losses.main(words) == 0
    out = capfd.readouterr().out
    assert "--path reference" in out
    assert [line.split()[0] for line in out.splitlines() if line.lstrip()[:1] in "123" and "e-" in line] == [
        "1",
        "2",
        "3",
    ]
    assert "the same: at most" in out


def test_a_figure_that_moved(capsys: pytest.CaptureFixture[str]) -> None:
    """The step and by how much."""
    rows = [{"step": step, "loss": 2.0, "grad_norm": 1.0} for step in (1, 2, 3)]
    moved = [*rows[:2], {**rows[2], "loss": 2.02}]
    assert compare_losses.compare(moved, rows)["loss"] == [0.0, 0.0, pytest.approx(0.01)]
    assert "1.0e-02" in compare_losses.report(moved, rows)
    with pytest.raises(ValueError, match="the runs have other steps"):
        compare_losses.compare(rows[:2], rows)


def test_a_commit(tmp_path: Path) -> None:
    """A checkout of its own, which is gone afterwards."""
    seen = []
    with compare_losses.tree("HEAD") as root:
        seen.append(root)
        assert (root / "bevt" / "train" / "loop.py").exists()
        assert root != compare_losses.ROOT
        assert (root / compare_losses.LIBRARY).exists() == (compare_losses.ROOT / compare_losses.LIBRARY).exists()
    assert not seen[0].exists()
