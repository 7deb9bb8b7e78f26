"""One optimizer step: how micro-batches add up, what is skipped, and that nothing in it waits for the device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from stepping import WORLD, gradients, split, trainer
from tiny import changed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bevt import masking, tokenizers
from bevt.config import Config
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.tokenizers import Tokenizer
from bevt.train.step import NO_TOKEN, drop_factors, masked_inputs, slots_for


@pytest.mark.parametrize("parts", [2, 4])
def test_micro_batches_add_up(plain: Config, batch: Batch, parts: int) -> None:
    """Equal counts of masked positions: the mean of the micro-batches' means is the batch's mean.

    Rounding: 1e-5 of the largest element of each gradient; a share's missing factor would be 1/2 or more.
    """
    whole, expected = gradients(plain, [batch])
    result, got = gradients(plain, split(batch, parts))
    for name, value in whole.values.items():
        torch.testing.assert_close(result.values[name], value, rtol=1e-5, atol=1e-6)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        error = (got[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, (name, error)


def test_every_masked_position_weighs_the_same(plain: Config, batch: Batch) -> None:
    """Unequal counts in the micro-batches: loss, accuracy and gradients are the whole batch's all the same."""
    assert batch.image_masks is not None
    assert batch.clip_masks is not None
    few, none = batch.image_masks.clone(), batch.clip_masks.clone()
    few[:4, 2:], none[2:] = False, False  # half of the images' positions in the first half; no clip's in the second
    uneven = replace(batch, image_masks=few, clip_masks=none)
    whole, expected = gradients(plain, [uneven])
    result, got = gradients(plain, split(uneven, 2))
    for name, value in whole.values.items():
        torch.testing.assert_close(result.values[name], value, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        error = (got[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, (name, error)


def test_loss_weight(plain: Config, batch: Batch) -> None:
    """Lambda multiplies the clips' loss."""
    values = gradients(changed(plain, train={"loss_weight": 0.25}), [batch])[0].values
    torch.testing.assert_close(values["loss"], values["loss_images"] + 0.25 * values["loss_clips"])


def test_one_stream(plain: Config, batch: Batch) -> None:
    """Clips or images alone: every parameter of the model still has a gradient."""
    alone = {
        "clips": replace(batch, images=None, image_masks=None, image_jitter=None),
        "images": replace(batch, clips=None, clip_masks=None),
    }
    for stream, other in (("clips", "images"), ("images", "clips")):
        config = changed(plain, train={other: 0})
        result, found = gradients(config, [alone[stream]])
        assert set(result.values) == {"loss", f"loss_{stream}", f"accuracy_{stream}", "grad_norm"}
        assert bool(result.finite)
        assert set(found) == {name for name, _ in trainer(config)[0].named_parameters()}


def test_clipping(plain: Config, batch: Batch) -> None:
    """`grad_norm` is the norm before; Adam's first moment shows that it is `clip_grad` after."""
    model, step = trainer(changed(plain, optim={"clip_grad": 0.5}))
    result = step(1e-3, [batch])
    expected = gradients(plain, [batch])[1]
    norm = torch.cat([gradient.flatten() for gradient in expected.values()]).double().norm().float()
    assert norm > 0.5
    torch.testing.assert_close(result.values["grad_norm"], norm)
    moments = torch.cat([step.optimizer.state[p]["exp_avg"].flatten() for p in model.parameters()])
    torch.testing.assert_close(moments.norm() / (1 - 0.9), torch.tensor(0.5), rtol=1e-4, atol=0)


def test_drop_path_is_a_function_of_the_samples(config: Config, batch: Batch) -> None:
    """In micro-batches of any size, after whatever was drawn before; other samples' seeds draw other factors."""
    strong = changed(config, model={"drop_path": 0.9})
    seeded = replace(batch, clip_seeds=torch.arange(4), image_seeds=torch.arange(8))
    whole, expected = gradients(strong, [seeded])
    torch.rand(7)
    result, got = gradients(strong, split(seeded, 2))
    torch.testing.assert_close(result.values["loss"], whole.values["loss"], rtol=1e-5, atol=0)
    for name, gradient in expected.items():
        error = (got[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 1e-5, (name, error)
    others = [replace(seeded, clip_seeds=torch.arange(4) + 4), replace(seeded, image_seeds=torch.arange(8) + 8), batch]
    losses = {float(gradients(strong, [other])[0].values["loss"]) for other in [seeded, *others]}
    assert len(losses) == 4


def test_drop_factors(config: Config) -> None:
    """Whole branches of a sample at the rate of their block, from 0 to `drop_path`, and the mean stays 1."""
    model = changed(config, model={"drop_path": 0.4, "depths": (1, 1, 2, 1)}).model
    factors = drop_factors(model, np.arange(20000))
    assert factors.shape == (5, 2, 20000)
    for block, rate in zip(factors, (0, 0.1, 0.2, 0.3, 0.4)):
        assert set(np.unique(block).tolist()) <= {0.0, float(np.float32(1 / (1 - rate)))}
        # Four standard deviations of the mean of 20,000 draws.
        assert abs(block.mean(1) - 1).max() <= 4 * (rate / (1 - rate) / 20000) ** 0.5
    a, b = (factors[4] == 0).astype(float)
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.03  # attention and MLP are dropped each by itself


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_changes_nothing(plain: Config, batch: Batch, bad: float) -> None:
    """Two gradients go bad on the second step: it is skipped, and the one nearest to the loss is named."""
    model, step = trainer(plain)
    step(1e-3, [batch])
    names = [name for name, _ in model.named_parameters()]
    early, late = "encoder.layers.0.blocks.0.mlp.fc1.weight", "video_decoder.fuse.bias"
    assert names.index(early) < names.index(late)
    hooks = [model.get_parameter(name).register_hook(lambda gradient: gradient * bad) for name in (early, late)]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moments = {
        name: {key: value.clone() for key, value in step.optimizer.state[p].items()}
        for name, p in model.named_parameters()
    }
    result = step(1e-3, [batch])
    assert not result.finite
    assert names[int(result.worst)] == late
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    for name, p in model.named_parameters():
        assert all(torch.equal(value, moments[name][key]) for key, value in step.optimizer.state[p].items()), name
    for hook in hooks:
        hook.remove()
    assert step(1e-3, [batch]).finite
    assert not torch.equal(model.head.weight, weights["head.weight"])


class Waits(TorchDispatchMode):
    """Records operations for whose result a GPU would make Python wait."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Pass on, and look at what is called."""
        name = func.name()
        masked = name.startswith("aten::index") and any(
            isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8)
            for index in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
        if masked or name.removeprefix("aten::").split(".")[0].lstrip("_") in {word.lstrip("_") for word in waiting}:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(config: Config, batch: Batch) -> None:
    """No scalar is read, no shape depends on a value, in a step of two micro-batches; the probe itself works."""
    _, step = trainer(config)
    with Waits() as waits:
        result = step(1e-3, split(batch, 2))
    assert waits.found == []
    with waits:
        float(result.values["loss"])
        batch.clips[batch.clip_masks[:, 0, 0, 0]]  # type: ignore[index]
    assert waits.found == ["aten::_local_scalar_dense", "aten::index.Tensor"]


class Counting:
    """A tokenizer that remembers what it was asked for."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.frames: list[int] = []

    def encode(self, pixels: Tensor) -> Tensor:
        """Pass on."""
        self.frames.append(len(pixels))
        return self.tokenizer.encode(pixels)


def test_only_frames_with_a_masked_position_are_tokenised(plain: Config, batch: Batch) -> None:
    """In one call for both streams; they get the tokens they would get among all frames, the others none."""
    assert batch.clips is not None
    assert batch.clip_masks is not None
    assert batch.images is not None
    assert batch.image_masks is not None
    assert batch.image_jitter is not None
    clip_masks, image_masks = batch.clip_masks.clone(), batch.image_masks.clone()
    clip_masks[0, 1] = clip_masks[2] = False  # half of a clip, a whole one
    image_masks[5] = False
    tokenizer = Counting(tokenizers.build(plain.tokenizer, WORLD.device))
    inputs = masked_inputs(
        replace(batch, clip_masks=clip_masks, image_masks=image_masks),
        tokenizer,  # type: ignore[arg-type]
        plain,
        WORLD.device,
    )
    assert tokenizer.frames == [2 + 4 + 0 + 4 + 7]
    images = augment.color_jitter(batch.images, batch.image_jitter)
    for stream, frames, used in (
        ("clips", batch.clips.flatten(0, 1), clip_masks.flatten(2).any(2).repeat_interleave(2, 1)),
        ("images", images, image_masks.flatten(1).any(1)),
    ):
        everywhere = tokenizer.tokenizer.encode(augment.tokenizer_view(frames, 32)).view_as(inputs[stream].codes)
        assert torch.equal(inputs[stream].codes[used], everywhere[used]), stream
        assert bool((inputs[stream].codes[~used] == NO_TOKEN).all()), stream


def test_nothing_is_masked(plain: Config, batch: Batch) -> None:
    """No frame is tokenised, and nothing breaks."""
    assert batch.image_masks is not None
    alone = replace(batch, clips=None, clip_masks=None, image_masks=torch.zeros_like(batch.image_masks))
    inputs = masked_inputs(alone, tokenizers.build(plain.tokenizer, WORLD.device), plain, WORLD.device)
    assert bool((inputs["images"].codes == NO_TOKEN).all())
    result = trainer(changed(plain, train={"clips": 0}))[1](1e-3, [alone])
    assert bool(result.finite)
    assert result.values["loss"] == result.values["grad_norm"] == 0


@pytest.mark.parametrize("stream", ["clip_masks", "image_masks"])
def test_masks_on_a_device_are_refused(plain: Config, batch: Batch, stream: str) -> None:
    """Looking at them would wait for it."""
    moved = replace(batch, **{stream: getattr(batch, stream).to("meta")})
    with pytest.raises(ValueError, match=r"masks must be on the CPU .*, these are on meta"):
        masked_inputs(moved, tokenizers.build(plain.tokenizer, WORLD.device), plain, WORLD.device)


def test_slots_are_the_masked_positions_on_a_cpu_and_all_that_there_can_be_elsewhere(config: Config) -> None:
    mask = torch.zeros(3, 2, 4, 4, dtype=torch.bool)
    mask[0, 1, :2] = True
    assert slots_for(config.clip_mask, mask, torch.device("cpu")) == 8
    capacity = masking.capacity(config.clip_mask, (2, 4, 4))
    assert slots_for(config.clip_mask, mask, torch.device("cuda")) == 3 * capacity > 8
