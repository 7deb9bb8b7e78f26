"""Weights of one vision transformer for another: what is kept, what starts as its authors have it, what is refused."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bevt.config import ViTConfig, ViTKind
from bevt.data.augment import to_encoder_clips
from bevt.models import names, vit_names, vit_weights, weights
from bevt.models.classifier import ViTClassifier
from bevt.models.names import Source, State, WeightsError
from bevt.models.vit import VideoTransformer
from bevt.models.vit_weights import fitted

DIM, GRID = 16, (4, 2, 3)
PARTS = ("weight", "bias")
SMALL = ViTConfig(embed_dim=DIM, depth=2, num_heads=2, patch=8, temporal_depth=1)


def config(kind: ViTKind, **more: object) -> ViTConfig:
    values = {**SMALL.__dict__, "kind": kind, "tubelet": 1 if kind == "timesformer" else 2, **more}
    return ViTConfig(**values)  # type: ignore[arg-type]


def classifier(kind: ViTKind, **more: object) -> ViTClassifier:
    torch.manual_seed(1)
    return ViTClassifier(config(kind, **more), 3, GRID)


def noise(shape: torch.Size, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def image() -> Source:
    """An image model's weights, all random: 5 x 5 places."""
    model = VideoTransformer(config("timesformer"), (1, 5, 5), still=True)
    state = {f"encoder.{name}": noise(p.shape, i) for i, (name, p) in enumerate(model.state_dict().items())}
    state |= {"norm.weight": noise(torch.Size([DIM]), 90), "norm.bias": noise(torch.Size([DIM]), 91)}
    state |= {"head.weight": noise(torch.Size([9, DIM]), 92), "head.bias": noise(torch.Size([9]), 93)}
    return Source("an image model", state)


@pytest.mark.parametrize("how", ["central", "average"])
def test_patches_of_images_become_tubes(image: Source, how: str) -> None:
    """Central: what the second of two frames is; average: a clip of one frame repeated gives the image's tokens."""
    model = classifier("vivit_1", inflation=how)
    vit_weights.start(model, image)
    embed = model.encoder.patch_embed
    weight, bias = (image.state[f"encoder.patch_embed.proj.{name}"] for name in ("weight", "bias"))
    clip = noise(torch.Size([1, 3, 8, 16, 24]), 5)
    tokens = embed(model.encoder.patches(clip)).view(1, 4, 2, 3, DIM).permute(0, 4, 1, 2, 3)
    for d in range(4):
        frame = clip[:, :, 2 * d + 1] if how == "central" else clip[:, :, 2 * d : 2 * d + 2].mean(2)
        torch.testing.assert_close(tokens[:, :, d], F.conv2d(frame, weight, bias, stride=8), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vivit_1", "vivit_2", "vivit_3", "vivit_4", "timesformer"])
def test_places_of_images(image: Source, kind: ViTKind) -> None:
    """Interpolated with corners on corners; repeated over time where each token has one of its own."""
    model = classifier(kind)
    report = vit_weights.start(model, image)
    classed = kind in ("vivit_1", "vivit_2", "timesformer")
    assert set(report.unused) == {"head.weight", "head.bias"} | (set() if classed else {"encoder.cls_token"})
    old = image.state["encoder.pos_embed"]
    got = model.encoder.pos_embed
    if classed:
        assert torch.equal(got[:, 0], old[:, 0])
        assert torch.equal(model.encoder.cls_token, image.state["encoder.cls_token"])
    grid = old[0, 1:].view(5, 5, DIM)
    places = got[0, int(classed) :].view(-1, 2, 3, DIM)
    assert len(places) == (1 if kind in ("vivit_2", "timesformer") else 4)
    for each in places:
        for y, x in ((0, 0), (0, 2), (1, 0), (1, 2)):
            torch.testing.assert_close(each[y, x], grid[4 * y, 2 * x])
        torch.testing.assert_close(each[0, 1], grid[0, 2], msg="the middle column is a place of the old ones")


def test_places_of_an_image_that_are_as_many_as_tokens(image: Source) -> None:
    """25 places are a frame's, though a grid of 5 x 5 x 1 has as many."""
    places = fitted(image.state, config("vivit_1"), (5, 5, 1))[0]["encoder.pos_embed"]
    frames = places[0, 1:].view(5, 5, DIM)
    assert torch.equal(frames[1:], frames[:1].expand(4, -1, -1)), "of each frame the same"


def test_places_in_time_of_the_second_model() -> None:
    """Linearly between their neighbours, ends on ends as scipy's zoom has it; the class token's is kept."""
    torch.manual_seed(0)
    old = ViTClassifier(config("vivit_2"), 3, (2, 2, 3))
    state = {name: noise(p.shape, i) for i, (name, p) in enumerate(old.state_dict().items())}
    model = classifier("vivit_2")
    vit_weights.start(model, Source("two frames", state))
    token, first, last = state["encoder.temporal.pos_embed"][0]
    expected = [token, first, first + (last - first) / 3, first + (last - first) * 2 / 3, last]
    torch.testing.assert_close(model.encoder.temporal.pos_embed[0], torch.stack(expected))


def test_equal_places_are_taken_as_they_are() -> None:
    """Of a model of the same grid, whose number of tokens happens to be a square, too."""
    torch.manual_seed(0)
    old = ViTClassifier(config("vivit_1"), 3, (4, 2, 2))  # 16 tokens
    new = ViTClassifier(config("vivit_1"), 3, (4, 2, 2))
    state = {name: noise(p.shape, i) for i, (name, p) in enumerate(old.state_dict().items())}
    vit_weights.start(new, Source("itself", state))
    assert all(torch.equal(value, state[name]) for name, value in new.state_dict().items() if name[:5] != "head.")
    weights.take(new, Source("itself", state))
    assert all(torch.equal(value, state[name]) for name, value in new.state_dict().items())


def test_what_attends_over_time_starts_as_its_authors_have_it(image: Source) -> None:
    timesformer = classifier("timesformer")
    report = vit_weights.start(timesformer, image)
    kept = {re.sub(r"\d+", "*", name) for name in report.missing}
    assert kept == {"encoder.time_embed", "head.weight", "head.bias"} | {
        f"encoder.blocks.*.temporal_fc.{p}" for p in ("weight", "bias")
    }
    own = timesformer.state_dict()
    assert all((own[f"encoder.blocks.{i}.temporal_fc.weight"] == 0).all() for i in range(2)), "the first block's too"
    for name, value in image.state.items():
        if ".attn." in name or ".norm1." in name:
            copied = name.replace(".attn.", ".temporal_attn.").replace(".norm1.", ".temporal_norm1.")
            assert torch.equal(own[copied], value), name
    assert (own["encoder.time_embed"] == 0).all()


@pytest.mark.parametrize("how", ["copy", "zero"])
def test_the_third_model_of_vivit(image: Source, how: str) -> None:
    model = classifier("vivit_3", temporal_init=how)
    vit_weights.start(model, image)
    block = model.encoder.blocks[0]
    assert (block.temporal_norm1.weight == 1).all(), "scenic leaves this norm as it is"
    if how == "copy":
        assert torch.equal(block.temporal_attn.qkv.weight, image.state["encoder.blocks.0.attn.qkv.weight"])
    else:
        assert (block.temporal_attn.proj.weight == 0).all()


def test_the_second_model_of_vivit(image: Source) -> None:
    """The image model is the spatial one, norm included."""
    model = classifier("vivit_2")
    report = vit_weights.start(model, image)
    assert torch.equal(model.encoder.spatial_norm.weight, image.state["norm.weight"])
    absent = {name for name in model.state_dict() if name.startswith(("encoder.temporal.", "norm.", "head."))}
    assert set(report.missing) == absent


def test_a_timesformer_starts_the_third_model_as_what_it_is() -> None:
    """Without class tokens both compute the same: its last layer over time is part of the projection before it."""
    torch.manual_seed(0)
    old = VideoTransformer(config("timesformer"), GRID)
    state: State = {f"encoder.{name}": noise(p.shape, i) / 4 for i, (name, p) in enumerate(old.state_dict().items())}
    weights.load(old, {name.removeprefix("encoder."): value for name, value in state.items()})
    wanted = config("vivit_3", tubelet=1)
    new = VideoTransformer(wanted, GRID)
    out, missing, unused = fitted(state, wanted, GRID)
    out["encoder.patch_embed.proj.weight"] = state["encoder.patch_embed.proj.weight"].unsqueeze(2)
    assert (missing, unused) == ([], ["encoder.cls_token"])
    weights.load(new, {name.removeprefix("encoder."): value for name, value in out.items()})
    clip = noise(torch.Size([2, 3, 4, 16, 24]), 7)
    torch.testing.assert_close(new.patch_embed(new.patches(clip)), old.patch_embed(old.patches(clip)))
    x = noise(torch.Size([2, 4, 6, DIM]), 8)
    for before, after in zip(old.blocks, new.blocks):
        branch = before.temporal_fc(before._over_time(x))
        torch.testing.assert_close(after._over_time(x), branch, rtol=1e-4, atol=1e-4)
    times = state["encoder.time_embed"][0, :, None] + state["encoder.pos_embed"][0, None, 1:]
    torch.testing.assert_close(new.pos_embed.view(4, 6, DIM), times)


@pytest.mark.parametrize("kind", ["vivit_1", "vivit_2", "vivit_4"])
def test_a_timesformer_starts_the_others_without_its_time(kind: ViTKind) -> None:
    torch.manual_seed(0)
    old = ViTClassifier(config("timesformer"), 3, (8, 2, 3))
    state = {name: noise(p.shape, i) for i, (name, p) in enumerate(old.state_dict().items())}
    model = classifier(kind)
    vit_weights.start(model, Source("a TimeSformer", state))
    places, times = state["encoder.pos_embed"][0, 1:], state["encoder.time_embed"][0, ::2]
    got = model.encoder.pos_embed[0, int(kind != "vivit_4") :]
    torch.testing.assert_close(got, places if kind == "vivit_2" else (times[:, None] + places).flatten(0, 1))


@pytest.mark.parametrize(
    ("of", "wanted"), [("vivit_1", "vivit_4"), ("timesformer", "vivit_1"), ("timesformer", "vivit_3")]
)
def test_what_is_tested_is_what_was_trained(of: ViTKind, wanted: ViTKind) -> None:
    """Another kind starts from it, and says what it leaves out; to be tested as one it is refused."""
    source = Source("weights", dict(classifier(of).state_dict()))
    report = vit_weights.start(classifier(wanted), source)
    left = {name for name in source.state if name not in report.loaded} - {"encoder.time_embed"}
    if wanted == "vivit_3":  # its last layer over time is part of the projection before it
        assert set(report.unused) == {"encoder.cls_token", "head.weight", "head.bias"}
    else:
        assert set(report.unused) == left
    with pytest.raises(
        WeightsError, match=r"to be tested, --size and model\.kind, patch and tubelet, data\.frames and"
    ):
        weights.take(classifier(wanted), source)


def test_other_times_are_not_tested() -> None:
    longer = ViTClassifier(config("timesformer"), 3, (8, 2, 3))
    with pytest.raises(WeightsError, match=r"encoder\.time_embed \(1, 8, 16\) for \(1, 4, 16\)"):
        weights.take(classifier("timesformer"), Source("weights", dict(longer.state_dict())))


def test_numbers_that_no_model_can_have() -> None:
    state = dict(classifier("vivit_1").state_dict())
    poisoned = {**state, "norm.bias": state["norm.bias"] / 0}
    with pytest.raises(WeightsError, match=r"not finite, of a run that has diverged, or damaged: norm\.bias"):
        weights.load(classifier("vivit_1"), poisoned)
    with pytest.raises(WeightsError, match=r"norm\.bias$"):  # of another recipe it is not
        weights.take(classifier("vivit_1"), Source("weights", poisoned))
    with pytest.raises(WeightsError, match=r"of another type: norm\.bias torch\.int32"):
        weights.load(classifier("vivit_1"), {**state, "norm.bias": state["norm.bias"].int()})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("vivit.encoder.layer.0.attention.attention.query.weight", (16, 15), r"are of shapes \(16, 15\), \(16, 16\)"),
        ("classifier.weight", (), r"head\.weight \(\), which no such model has"),
        ("vivit.embeddings.position_embeddings", (25, 16), r"encoder\.pos_embed \(25, 16\), which no such model has"),
        ("vivit.embeddings.position_embeddings", (1, 1, 16), r"encoder\.pos_embed \(1, 1, 16\), which"),
        ("vivit.embeddings.patch_embeddings.projection.bias", (7,), r"patch_embed\.proj\.bias \(7,\), which no"),
        ("vivit.embeddings.patch_embeddings.projection.bias", None, r"patch_embed\.proj\.bias absent, which no"),
        ("vivit.embeddings.patch_embeddings.projection.weight", (16, 1, 8, 8), r"proj\.weight \(16, 1, 8, 8\), which"),
    ],
)
def test_shapes_that_no_model_can_have(name: str, shape: tuple[int, ...] | None, message: str) -> None:
    published = vit_names.to_hugging_face(classifier("vivit_1").state_dict(), "vivit")
    assert name in published
    with pytest.raises(WeightsError, match=message):
        vit_names.recognise({**published, name: torch.zeros(shape)} if shape is not None else _without(published, name))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("shape", [(7,), None])
def test_a_last_layer_over_time_that_does_not_fit(name: str, shape: tuple[int, ...] | None) -> None:
    state, key = dict(classifier("timesformer").state_dict()), f"encoder.blocks.0.temporal_fc.{name}"
    state = {**state, key: torch.zeros(shape)} if shape else _without(state, key)
    with pytest.raises(WeightsError, match=rf"temporal_fc\.{name} (\(7,\)|absent)"):
        vit_weights.start(classifier("vivit_3", tubelet=1), Source("weights", state))


def _without(state: State, name: str) -> State:
    return {key: value for key, value in state.items() if key != name}


def test_what_does_not_fit(image: Source) -> None:
    before = {name: value.clone() for name, value in classifier("vivit_1").state_dict().items()}
    model = classifier("vivit_1")
    for change, message in (
        ({"encoder.pos_embed": torch.zeros(1, 1 + 7, DIM)}, "has 7 places, which is neither 4 x 2 x 3 nor the square"),
        ({"encoder.blocks.7.norm1.weight": torch.zeros(DIM)}, "left over: encoder.blocks.7.norm1.weight"),
        ({"encoder.blocks.0.mlp.fc1.bias": torch.zeros(5)}, r"of another shape: encoder.blocks.0.mlp.fc1.bias \(5,\)"),
    ):
        with pytest.raises(WeightsError, match=f"an image model: .*{message}"):
            vit_weights.start(model, Source("an image model", {**image.state, **change}))
    without = {name: value for name, value in image.state.items() if name != "encoder.cls_token"}
    with pytest.raises(WeightsError, match="has no place for a class token, which a 'vivit_1' has"):
        vit_weights.start(model, Source("an image model", without))
    for kind in ("vivit_2", "vivit_3", "timesformer"):
        with pytest.raises(WeightsError, match=r"missing: .*tempor"):  # nothing over time was trained
            weights.take(classifier(kind), image)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="has no classes to be tested on"):
        weights.take(model, Source("x", {}))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "nothing was written"


def test_levels_that_are_normalised_otherwise() -> None:
    """A TimeSformer's levels are normalised by 0.45 and 0.225, a ViViT's by 0.5: both make the same tokens of them."""
    torch.manual_seed(0)
    old = ViTClassifier(config("timesformer"), 3, GRID)
    source = vit_names.recognise(old.state_dict())
    assert source.what == "a TimeSformer of this project"
    model = classifier("vivit_4", inflation="average")
    vit_weights.start(model, source)
    frame = torch.randint(256, (1, 1, 16, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    clip = frame.expand(-1, 8, -1, -1, -1)
    theirs, ours = (m.encoder for m in (old, model))
    expected = theirs.patch_embed(theirs.patches(to_encoder_clips(clip[:, :4], config("timesformer").pixels)))
    got = ours.patch_embed(ours.patches(to_encoder_clips(clip, config("vivit_4").pixels)))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_an_image_model_of_anybody_is_taken_as_it_is(image: Source) -> None:
    """How its levels were normalised is not known: its bias stays."""
    model = classifier("vivit_1")
    vit_weights.start(model, image)
    assert torch.equal(model.encoder.patch_embed.proj.bias, image.state["encoder.patch_embed.proj.bias"])


def test_places_in_space_and_time_are_no_images() -> None:
    """16 tokens of 4 x 2 x 2 are a square's number, too: of a clip of another length they are refused."""
    old = ViTClassifier(config("vivit_1"), 3, (4, 2, 2))
    source = vit_names.recognise(old.state_dict())
    for grid in ((2, 2, 2), (4, 3, 3)):
        with pytest.raises(WeightsError, match=r"has 16 places, which is neither .*data\.frames, data\.crop"):
            vit_weights.start(ViTClassifier(config("vivit_1"), 3, grid), source)


def test_weights_of_the_other_family_are_named() -> None:
    vit = ViTClassifier(config("videomae"), 3, GRID).state_dict()
    swin = {"layers.0.blocks.0.attn.relative_position_bias_table": torch.zeros(1)}
    with pytest.raises(WeightsError, match="weights of a vision transformer, from which no Video Swin can start"):
        names.recognise(vit)
    with pytest.raises(WeightsError, match="weights of a vision transformer"):
        names.recognise(vit_names.to_hugging_face(vit, "videomae"))
    with pytest.raises(WeightsError, match="weights of a Swin, from which no vision transformer can start"):
        vit_names.recognise(swin)


def test_an_image_model_by_timms_names(image: Source) -> None:
    """The names of `vit_base_patch16_224`, but for its sizes."""
    block = [f"{part}.{p}" for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2") for p in PARTS]
    timm = {"cls_token", "pos_embed", *(f"patch_embed.proj.{p}" for p in PARTS)}
    timm |= {f"blocks.{i}.{key}" for i in range(2) for key in block}
    timm |= {f"{part}.{p}" for part in ("norm", "head") for p in PARTS}
    state = {name.removeprefix("encoder."): value for name, value in image.state.items()}
    assert state.keys() == timm
    source = vit_names.recognise(state)
    assert source.what == "a ViT by timm's names"
    assert source.pixels is None
    assert source.state.keys() == image.state.keys()
    assert all(torch.equal(source.state[name], value) for name, value in image.state.items())
