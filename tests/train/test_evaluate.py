"""Held-out figures: against a direct computation, for any choice of streams, and without side effects."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import changed

from bevt import tokenizers
from bevt.config import Config
from bevt.data import shapes
from bevt.data.build import eval_batches
from bevt.evaluate.masked_tokens import constant_prediction, evaluate
from bevt.models.bevt import BEVT
from bevt.tokenizers import Tokenizer
from bevt.train import checkpoint
from bevt.train.metrics import read_rows
from bevt.train.pretrain import build_model, pretrain
from bevt.train.step import masked_inputs

CPU = torch.device("cpu")
NAMES = ("val_loss", "val_accuracy", "entropy", "commonest", "codes")


@pytest.fixture(scope="module")
def held_out(config: Config, dataset: shapes.ShapesPaths) -> Config:
    """With 3 clips and 5 images to score, in batches that do not divide them."""
    return changed(
        config,
        data={"val_clips": dataset.val_clips, "val_images": dataset.val_images},
        train={"clips": 4, "micro_clips": 2},
    )


@pytest.fixture(scope="module")
def tokenizer(config: Config) -> Tokenizer:
    """The seeded one."""
    return tokenizers.build(config.tokenizer, torch.device("cpu"))


@pytest.fixture(scope="module")
def model(held_out: Config, tokenizer: Tokenizer) -> BEVT:
    """Of both streams, with a head that is not near zero."""
    torch.manual_seed(0)
    model = build_model(held_out, tokenizer.vocab_size, CPU)
    torch.nn.init.normal_(model.head.weight)
    return model


def test_against_a_direct_computation(held_out: Config, model: BEVT, tokenizer: Tokenizer) -> None:
    """Logits of all positions, picked by the mask, all samples pooled."""
    got = evaluate(held_out, model, tokenizer, CPU)
    pooled: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"clips": [], "images": []}
    model.eval()
    with torch.no_grad():
        for batch in eval_batches(held_out):
            for stream, x in masked_inputs(batch, tokenizer, held_out, CPU).items():
                mask = x.mask.repeat_interleave(2, dim=1) if stream == "clips" else x.mask
                logits = model.head(model.decode(stream, x.pixels, x.mask))  # type: ignore[arg-type]
                pooled[stream].append((logits[mask], x.codes[mask]))
    model.train()
    for stream, parts in pooled.items():
        logits, codes = (torch.cat(part) for part in zip(*parts))
        counts = codes.bincount(minlength=tokenizer.vocab_size)
        share = counts[counts > 0].double() / len(codes)
        assert got[f"val_loss_{stream}"] == pytest.approx(float(F.cross_entropy(logits, codes)), rel=1e-5)
        accuracy = (logits.argmax(-1) == codes).double().mean()
        assert got[f"val_accuracy_{stream}"] == pytest.approx(float(accuracy), abs=1e-6)
        assert got[f"entropy_{stream}"] == pytest.approx(float(-(share * share.log()).sum()))
        assert got[f"commonest_{stream}"] == pytest.approx(float(share.max()))
        assert got[f"codes_{stream}"] == len(share)


def test_constant_prediction() -> None:
    """Counts 4, 2, 2, 0: 1.5 bits, half, three codes."""
    found = constant_prediction(torch.tensor([4, 2, 2, 0]))
    assert found == {"entropy": pytest.approx(1.5 * math.log(2)), "commonest": 0.5, "codes": 3.0}
    assert constant_prediction(torch.tensor([0, 9])) == {"entropy": 0.0, "commonest": 1.0, "codes": 1.0}


@pytest.mark.parametrize(("stream", "other"), [("clips", "images"), ("images", "clips")])
def test_one_stream(held_out: Config, tokenizer: Tokenizer, stream: str, other: str) -> None:
    """A model of one stream is scored on that one, also where held-out data of both is named."""
    config = changed(held_out, train={other: 0})
    found = evaluate(config, build_model(config, tokenizer.vocab_size, CPU), tokenizer, CPU)
    assert set(found) == {f"{name}_{stream}" for name in NAMES}


def test_no_side_effects(held_out: Config, model: BEVT, tokenizer: Tokenizer) -> None:
    """Twice the same figures; weights, gradients, mode and, of the model's device, nothing else changes."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = evaluate(held_out, model, tokenizer, CPU)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert evaluate(held_out, model, tokenizer, CPU) == first


def test_the_mode_comes_back_after_an_error(held_out: Config, model: BEVT, tokenizer: Tokenizer) -> None:
    """Held-out data that does not exist."""
    with pytest.raises(ValueError, match="nowhere"):
        evaluate(changed(held_out, data={"val_images": "nowhere"}), model, tokenizer, CPU)
    assert model.training


def test_precision_is_that_of_training(held_out: Config, model: BEVT, tokenizer: Tokenizer) -> None:
    """The implementations were chosen for it: bfloat16 differs a little from float32, and not much."""
    full = evaluate(held_out, model, tokenizer, CPU)
    half = evaluate(changed(held_out, train={"precision": "bfloat16"}), model, tokenizer, CPU)
    assert half["val_loss_clips"] != full["val_loss_clips"]
    assert half["val_loss_clips"] == pytest.approx(full["val_loss_clips"], rel=0.02)
    assert half["entropy_clips"] == full["entropy_clips"]


def test_at_the_end_of_a_run(held_out: Config, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Figures in the result and once in the metrics, of the last checkpoint's weights; a second resume repeats them."""
    short = changed(held_out, optim={"max_steps": 2})
    result = pretrain(short, tmp_path, quiet=True)
    assert set(result.evaluation) == {f"{name}_{stream}" for name in NAMES for stream in ("clips", "images")}
    again = pretrain(short, tmp_path, resume=True, quiet=True)
    assert again.evaluation == result.evaluation
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if row["event"] == "eval"]
    assert rows == [{"event": "eval", "step": 2, **json.loads(json.dumps(result.evaluation))}]
    trained = build_model(short, tokenizer.vocab_size, CPU)
    trained.load_state_dict(checkpoint.load(result.checkpoint)["model"])
    assert evaluate(short, trained, tokenizer, CPU) == result.evaluation
