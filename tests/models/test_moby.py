"""MoBY: the loss against a slow computation, the key branch, the queues, and who gets gradients."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bevt.config import ModelConfig, UserError
from bevt.models.bevt import BEVT
from bevt.models.moby import FEATURES, Head, MoBY, key_momentum

TINY = ModelConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(1, 3, 3), drop_path=0.0)
QUEUE = 12


def _views(count: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 64, 64, generator=g), torch.randn(count, 3, 64, 64, generator=g)


def _model(dtype: torch.dtype = torch.float32) -> MoBY:
    """With a key branch that is no copy of the online one, and a temperature that is not the default."""
    torch.manual_seed(0)
    model = MoBY(TINY, queue=QUEUE, temperature=0.3, dtype=dtype).to(dtype)
    with torch.no_grad():
        for p in model.key.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def _head(x: np.ndarray, head: Head) -> np.ndarray:
    """A head by its formula: the batch's own mean and (biased) variance, epsilon 1e-5."""
    weights = {name: p.detach().numpy() for name, p in head.named_parameters()}
    x = x @ weights["fc1.weight"].T + weights["fc1.bias"]
    x = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) * weights["norm.weight"] + weights["norm.bias"]
    return np.maximum(x, 0) @ weights["fc2.weight"].T + weights["fc2.bias"]


def _features(model: nn.Module, images: Tensor, drop: Tensor | None = None) -> np.ndarray:
    """Mean over tokens of the normed last stage."""
    with torch.no_grad():
        tokens = model.norm(model.encoder(model.patch_embed_2d(images), drop)[-1])
    return tokens.numpy().reshape(len(images), -1, tokens.shape[-1]).mean(1)


def test_the_loss_is_the_sum_of_both_directions() -> None:
    """Heads, cosines and logarithms one by one, in float64; drop path in the first view's queries alone."""
    model = _model(torch.float64)
    views = [view.double() for view in _views()]
    drops = (0.8 + 0.4 * torch.rand(5, 2, 4).double(), None)
    out = model(*views, drops)
    loss, hits = 0.0, 0
    for mine, other in ((0, 1), (1, 0)):
        queries = _head(_head(_features(model, views[mine], drops[mine]), model.projector), model.predictor)
        keys = _head(_features(model.key, views[other]), model.key.projector)
        for query, key in zip(queries, keys):
            candidates = [key / np.linalg.norm(key), *model.queues[other].numpy()]
            logits = [float(query @ c) / np.linalg.norm(query) / 0.3 for c in candidates]
            loss += (math.log(sum(map(math.exp, logits))) - logits[0]) / len(queries)
            hits += logits[0] == max(logits)
    assert out["loss_images"].item() == pytest.approx(loss, rel=1e-9)
    assert out["accuracy_images"].item() == hits / 8
    assert 0 < hits < 8, "a case in which accuracy says something"


@pytest.mark.parametrize("autocast", [False, True])
def test_the_loss_of_a_still_dictionary(autocast: bool) -> None:
    """One vector for all queries and keys, and one at cosine 0.96 to it in the queue, neither of which bfloat16 holds.

    2 log(1 + K exp((0.96 - 1) / temperature)): similarities are no matter of autocast's.
    """
    model = _model()
    for head in (model.projector, model.predictor, model.key.projector):
        nn.init.zeros_(head.fc2.weight)
        nn.init.zeros_(head.fc2.bias)
        head.fc2.bias.detach()[:2] = torch.tensor([3.0, 4.0])
    model.queues.zero_()[..., :2] = torch.tensor([0.8, 0.6])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(*_views())["loss_images"]
    assert loss.item() == pytest.approx(2 * math.log1p(QUEUE * math.exp(-0.04 / 0.3)), rel=1e-6)


def test_gradients_reach_every_online_parameter_and_nothing_of_the_keys() -> None:
    model = _model()
    out = model(*_views())
    out["loss_images"].backward()
    got = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert got == {name for name, _ in model.named_parameters() if not name.startswith("key.")}
    assert not any(t.requires_grad for t in (out["keys"], model.queues, *model.key.parameters()))


def test_the_key_branch_begins_as_a_copy() -> None:
    model = MoBY(TINY, queue=QUEUE)
    online = dict(model.named_parameters())
    assert all(torch.equal(p, online[name]) for name, p in model.key.named_parameters())


def test_the_key_branch_follows() -> None:
    model = _model()
    old = {name: p.clone() for name, p in model.named_parameters()}
    model.update_keys(0.75)
    for name, p in model.named_parameters():
        mine = name.removeprefix("key.")
        expected = old[name] if name == mine else 0.75 * old[name] + 0.25 * old[mine]
        torch.testing.assert_close(p, expected, msg=lambda m, n=name: f"{n}: {m}")


def test_momentum_rises_to_one_by_cosine() -> None:
    assert [key_momentum(step, 300, 0.9) for step in (0, 100, 150, 300)] == pytest.approx([0.9, 0.925, 0.95, 1.0])


def test_queues_hold_the_keys_of_the_last_steps() -> None:
    """Four keys a step, twelve places: after five steps those of steps 3, 4 and 2, for each view its own."""
    model = _model()
    keys = torch.randn(5, 2, 4, FEATURES)
    for step, added in enumerate(keys):
        model.enqueue(added, step)
    assert torch.equal(model.queues, torch.cat([keys[3], keys[4], keys[2]], dim=1))


def test_a_key_that_is_not_finite_is_not_kept() -> None:
    model = _model()
    before = model.queues.clone()
    keys = torch.randn(2, 4, FEATURES)
    broken = keys.clone()
    broken[0, 1, 7], broken[1, 2, 9] = math.nan, math.inf
    model.enqueue(broken, 1)
    expected = torch.cat([before[:, :4], keys, before[:, 8:]], dim=1)
    expected[0, 5], expected[1, 6] = before[0, 5], before[1, 6]
    assert torch.equal(model.queues, expected)


def test_a_step_that_does_not_divide_the_queue_is_refused() -> None:
    with pytest.raises(UserError, match="5 images of a step do not divide MoBY's queue of 12 keys"):
        _model().enqueue(torch.randn(2, 5, FEATURES), 0)


def test_several_processes_without_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="2 processes on cpu: train with one"):
        MoBY(TINY, processes=2)


def test_the_encoder_has_the_names_and_shapes_of_the_image_stage() -> None:
    """So that a video model starts from either."""
    parts = ("patch_embed_2d.", "encoder.", "norm.")
    ours, theirs = (
        {name: value.shape for name, value in model.state_dict().items() if name.startswith(parts)}
        for model in (_model(), BEVT(TINY, 50, ["images"]))
    )
    assert ours == theirs


def test_no_value_is_read_back() -> None:
    """A step's parts run where there are no values to read."""
    model = _model()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        model.update_keys(0.99)
        out = model(torch.empty(4, 3, 64, 64), torch.empty(4, 3, 64, 64))
        out["loss_images"].backward()
        model.enqueue(out["keys"], 1)
