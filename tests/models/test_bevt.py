"""The two-stream model: shapes, masking, decoders, loss, and the independence of what must be independent."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from bevt_kernels import NoImplementation
from torch import nn

from bevt.config import ModelConfig
from bevt.models.bevt import BEVT, ImageDecoder, MaskedInput, PatchExpand, Stream, VideoDecoder, masked_slots

TINY = ModelConfig(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=(4, 3, 3), drop_path=0.0)


def _inputs(seed: int = 0) -> dict[str, MaskedInput]:
    g = torch.Generator().manual_seed(seed)
    clip_mask = torch.rand(2, 4, 4, 6, generator=g) < 0.4
    image_mask = torch.rand(3, 4, 6, generator=g) < 0.4
    return {
        "clips": MaskedInput(
            torch.randn(2, 3, 8, 64, 96, generator=g),
            clip_mask,
            torch.randint(50, (2, 8, 4, 6), generator=g),
            2 * 8 * 24,
        ),
        "images": MaskedInput(
            torch.randn(3, 3, 64, 96, generator=g), image_mask, torch.randint(50, (3, 4, 6), generator=g), 3 * 24
        ),
    }


@pytest.fixture
def model() -> BEVT:
    torch.manual_seed(0)
    return BEVT(TINY, 50)


def test_decoded_shapes(model: BEVT) -> None:
    x = _inputs()
    assert model.decode("clips", x["clips"].pixels, x["clips"].mask).shape == (2, 8, 4, 6, 128)
    assert model.decode("images", x["images"].pixels, x["images"].mask).shape == (3, 4, 6, 128)


def test_loss_is_the_mean_over_masked_positions_alone(model: BEVT) -> None:
    for stream, x in _inputs().items():
        loss, accuracy = model.stream_loss(stream, x)  # type: ignore[arg-type]
        logits = model.head(model.decode(stream, x.pixels, x.mask))  # type: ignore[arg-type]
        mask = x.mask.repeat_interleave(2, dim=1) if stream == "clips" else x.mask
        torch.testing.assert_close(loss, F.cross_entropy(logits[mask], x.codes[mask]), rtol=1e-5, atol=1e-6)
        assert accuracy.item() == pytest.approx((logits[mask].argmax(-1) == x.codes[mask]).float().mean().item())


@pytest.mark.parametrize("spare", [0, 7])
@pytest.mark.parametrize("stream", ["clips", "images"])
def test_masked_positions_alone_equal_the_dense_form(stream: Stream, spare: int) -> None:
    """Loss, accuracy and every gradient, in float64, whatever the capacity."""
    torch.manual_seed(0)
    model = BEVT(TINY, 50, [stream], dtype=torch.float64).double()
    x = _inputs()[stream]
    mask = x.mask.repeat_interleave(2, dim=1) if stream == "clips" else x.mask
    x = replace(x, pixels=x.pixels.double(), slots=int(mask.sum()) + spare, codes=x.codes.masked_fill(~mask, -1))
    logits = model.head(model.decode(stream, x.pixels, x.mask))[mask]
    dense = F.cross_entropy(logits, x.codes[mask])
    loss, accuracy = model.stream_loss(stream, x)
    torch.testing.assert_close(loss, dense)
    assert accuracy.item() == pytest.approx((logits.argmax(-1) == x.codes[mask]).double().mean().item())
    grads, expected = (torch.autograd.grad(y, list(model.parameters())) for y in (loss, dense))
    for (name, _), got, want in zip(model.named_parameters(), grads, expected):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_codes_of_visible_positions_do_not_matter(model: BEVT) -> None:
    for stream, x in _inputs().items():
        mask = x.mask.repeat_interleave(2, dim=1) if stream == "clips" else x.mask
        other = replace(x, codes=torch.where(mask, x.codes, (x.codes + 1) % 50))
        assert torch.equal(model.stream_loss(stream, x)[0], model.stream_loss(stream, other)[0])  # type: ignore[arg-type]


def test_hidden_pixels_do_not_reach_the_features(model: BEVT) -> None:
    for stream, x in _inputs().items():
        hidden = x.mask.repeat_interleave(16, -1).repeat_interleave(16, -2)
        if stream == "clips":
            hidden = hidden.repeat_interleave(2, 1)
        noise = torch.where(hidden.unsqueeze(1), torch.randn_like(x.pixels), 0.0)
        a = model.decode(stream, x.pixels, x.mask)  # type: ignore[arg-type]
        assert torch.equal(a, model.decode(stream, x.pixels + noise, x.mask))  # type: ignore[arg-type]
        assert not torch.equal(a, model.decode(stream, x.pixels + noise.roll(16, -1), x.mask))  # type: ignore[arg-type]


@pytest.mark.parametrize("slots", [0, 72])
def test_an_empty_mask_gives_zero_loss_and_zero_gradients(model: BEVT, slots: int) -> None:
    x = _inputs()["images"]
    loss, accuracy = model.stream_loss("images", replace(x, mask=torch.zeros_like(x.mask), slots=slots))
    loss.backward()
    assert loss.item() == accuracy.item() == 0.0
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in model.parameters())


def test_every_parameter_of_the_trained_streams_gets_a_gradient() -> None:
    for streams in (("clips",), ("images",), ("clips", "images")):
        model = BEVT(TINY, 50, streams)  # type: ignore[arg-type]
        out = model(**{s: x for s, x in _inputs().items() if s in streams})
        sum(out[f"loss_{s}"] for s in streams).backward()  # type: ignore[union-attr]
        idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
        assert idle == [], f"streams {streams}"


def test_streams_share_encoder_mask_token_norm_and_head_only(model: BEVT) -> None:
    inputs = _inputs()
    touched = {}
    for stream, x in inputs.items():
        model.zero_grad(set_to_none=True)
        model.stream_loss(stream, x)[0].backward()  # type: ignore[arg-type]
        touched[stream] = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None}
    shared = {"encoder", "mask_token", "norm", "head"}
    assert touched["clips"] == shared | {"patch_embed", "video_decoder"}
    assert touched["images"] == shared | {"patch_embed_2d", "image_decoder"}


def test_masked_slots() -> None:
    mask = torch.tensor([[True, False, True], [False, False, True]])
    assert masked_slots(mask, 5).tolist() == [0, 2, 5, -1, -1]
    assert masked_slots(mask, 3).tolist() == [0, 2, 5]
    assert masked_slots(torch.zeros(4, dtype=torch.bool), 2).tolist() == [-1, -1]


@pytest.mark.parametrize("factor", [(1, 2, 2), (2, 1, 1)])
def test_patch_expand_is_the_transposed_convolution(factor: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    ours = PatchExpand(8, factor)
    x = torch.randn(2, 3, 4, 5, 8)
    expected = nn.ConvTranspose3d.forward(ours, x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


def test_planar_patch_expand_is_the_2d_transposed_convolution() -> None:
    torch.manual_seed(0)
    ours, theirs = PatchExpand(8, (1, 2, 2), planar=True), nn.ConvTranspose2d(8, 8, 2, stride=2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 1, 4, 5, 8)
    expected = theirs(x[:, 0].permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unsqueeze(1)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-6)


def test_decoders_are_linear() -> None:
    """Spec: linear throughout. An affine map f obeys f(a) + f(b) = f(a + b) + f(0)."""
    torch.manual_seed(0)
    for decoder, depth in ((ImageDecoder(16), 1), (VideoDecoder(16), 4)):
        a, b = ((torch.randn(1, depth, 4, 4, 8), torch.randn(1, depth, 2, 2, 16)) for _ in range(2))
        zero = decoder(torch.zeros_like(a[0]), torch.zeros_like(a[1]))
        torch.testing.assert_close(decoder(*a) + decoder(*b), decoder(a[0] + b[0], a[1] + b[1]) + zero)


def test_a_mask_of_another_grid_is_refused(model: BEVT) -> None:
    x = _inputs()["clips"]
    with pytest.raises(ValueError, match=r"mask is \(2, 4, 4, 5\).*token grid \(2, 4, 4, 6\)"):
        model.decode("clips", x.pixels, x.mask[..., :5])


def test_an_implementation_that_cannot_serve_is_refused_when_the_model_is_built() -> None:
    with pytest.raises(NoImplementation, match="window_attention"):
        BEVT(replace(TINY, attention_impl="native"), 50, device="cuda")


def test_implementations_are_resolved_once_and_named(model: BEVT) -> None:
    assert set(model.implementations) == {"window_attention", "masked_linear_cross_entropy", "linear"}
    assert "auto" not in model.implementations.values()
