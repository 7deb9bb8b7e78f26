"""The whole BEVT model on the implementations of attention and loss: trained, and with a compiled encoder."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from bevt_kernels import native
from bevt_kernels.testing import assert_within_budget

from bevt.config import ModelConfig, plain
from bevt.models.bevt import BEVT, MaskedInput

CONFIG = ModelConfig(embed_dim=16, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), window_size=(4, 3, 3), drop_path=0.0)
CODES = 50

pytestmark = pytest.mark.skipif(not native.loaded(), reason=f"native library {native.status()}")


def inputs(dtype: torch.dtype, seed: int = 0) -> dict[str, MaskedInput]:
    g = torch.Generator().manual_seed(seed)
    clip_mask = torch.rand(2, 4, 4, 4, generator=g) < 0.4
    image_mask = torch.rand(3, 4, 4, generator=g) < 0.4
    clips = torch.randn(2, 3, 8, 64, 64, generator=g).to(dtype)
    images = torch.randn(3, 3, 64, 64, generator=g).to(dtype)
    return {
        "clips": MaskedInput(clips, clip_mask, torch.randint(CODES, (2, 8, 4, 4), generator=g), 2 * 8 * 16),
        "images": MaskedInput(images, image_mask, torch.randint(CODES, (3, 4, 4), generator=g), 3 * 16),
    }


def models() -> dict[str, BEVT]:
    """By implementation, with equal weights; "oracle" is the reference in float64."""
    torch.manual_seed(0)
    reference = BEVT(plain(CONFIG), CODES)
    ours = BEVT(replace(CONFIG, attention_impl="native", loss_impl="native", linear_impl="native"), CODES)
    ours.load_state_dict(reference.state_dict())
    return {"native": ours, "reference": reference, "oracle": copy.deepcopy(reference).double()}


def test_twenty_steps_have_the_losses_of_the_reference() -> None:
    losses = {}
    for name, model in models().items():
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        x, steps = inputs(next(model.parameters()).dtype), []
        for _ in range(20):
            found = model(**x)
            loss = found["loss_clips"] + found["loss_images"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            steps.append(loss.detach())
        losses[name] = torch.stack(steps)
    assert losses["oracle"][-1] < losses["oracle"][0] - 0.1, "it does not learn"
    assert_within_budget(losses["native"], losses["reference"], losses["oracle"], "losses of 20 steps")


def test_compiled_encoder_has_no_graph_break_and_the_same_gradients() -> None:
    """Traced whole, forward and backward; by aot_eager, since what inductor does to other ops is not the question."""
    torch._dynamo.reset()
    results: dict[str, dict[str, torch.Tensor]] = {}
    for name, model in models().items():
        if name == "native":
            model.encoder.compile(fullgraph=True, backend="aot_eager")
        draws = []
        for seed in range(8):  # judged together: of a hundred small gradients some largest error is always bad luck
            found = model(**inputs(next(model.parameters()).dtype, seed))
            model.zero_grad()
            (found["loss_clips"] + found["loss_images"]).backward()
            missing = [key for key, p in model.named_parameters() if p.grad is None]
            assert not missing, f"no gradient: {missing}"
            grads = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
            draws.append({"loss_clips": found["loss_clips"].detach(), **grads})
        results[name] = {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}
    for key, got in results["native"].items():
        assert_within_budget(got, results["reference"][key], results["oracle"][key], key)
