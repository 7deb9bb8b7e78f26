"""`bevt tokenizer check`: what it prints, and its exit status."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bevt import cli
from bevt.data import shapes
from bevt.evaluate.agreement import Agreement
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer


@pytest.fixture
def vq(tmp_path: Path) -> Path:
    """A seeded tokenizer; its codes mean nothing."""
    model = VQModel(VQConfig(image_size=32, vocab_size=32, code_dim=4, width=4, blocks=0))
    torch.nn.init.normal_(model.codebook, generator=torch.Generator().manual_seed(0))
    VQTokenizer(model).save(tmp_path / "vq.safetensors")
    return tmp_path / "vq.safetensors"


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(word) for word in ("tokenizer", "check", *words)])
    return ended.value.code  # type: ignore[return-value]


def test_it_says_what_was_compared(vq: Path, dataset: shapes.ShapesPaths, capsys: pytest.CaptureFixture[str]) -> None:
    source = ("--data.images", dataset.train_images, "--data.workers", 0, "--data.crop", 64)
    status = run("--tokenizer.kind", "vq", "--tokenizer.path", vq, *source, "--data.short-side", 64, 80, "--frames", 6)
    out = capsys.readouterr().out
    assert status == 0, out
    assert "tokenizer precision float" in out
    assert "% of 128 codes are those of float32 (wanted: 99.5 %)" in out  # 6 frames in fours


def test_data_must_be_named(vq: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--tokenizer.kind", "vq", "--tokenizer.path", vq) == 2
    assert "name the frames to compare on" in capsys.readouterr().err


@pytest.mark.parametrize(("equal", "passed"), [(1.0, True), (0.995, True), (0.9949, False)])
def test_the_bar(equal: float, passed: bool) -> None:
    assert Agreement(1000, equal, torch.tensor([0.25]), 1.5).passed is passed


def test_gaps_are_told() -> None:
    text = str(Agreement(1000, 0.997, torch.tensor([0.125, 0.25, 0.5]), 1.5))
    assert text.startswith("99.70 % of 1000 codes")
    assert "0.25 apart (median), 0.5 at most" in text
