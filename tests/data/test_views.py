"""The two views of contrastive learning against the standard library's, Pillow's and torchvision's results."""

from __future__ import annotations

import colorsys
from dataclasses import fields, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.foreign import torchvision_schemas
from bevt.data import augment, views
from bevt.data.views import Distortions

SEEDS = np.arange(20_000)


@pytest.fixture(scope="module")
def transforms() -> ModuleType:
    torchvision_schemas()
    reason = "needs torchvision: pip install --no-deps torchvision==0.28.0 (make test does it)"
    return pytest.importorskip("torchvision.transforms.functional", reason=reason)


def _none(count: int) -> Distortions:
    """Nothing is done to the images."""
    return Distortions(
        factors=np.ones((count, 3)),
        hue=np.zeros(count),
        order=np.tile([3, 0, 1, 2], (count, 1)),
        grey=np.zeros(count, bool),
        sigma=np.zeros(count),
        solarize=np.zeros(count, bool),
    )


def _images(count: int, side: int = 32) -> torch.Tensor:
    """Noise, with a row of greys, whose hue is undefined."""
    images = torch.randint(0, 256, (count, side, side, 3), generator=torch.Generator().manual_seed(0))
    images[:, 0] = images[:, 0, :, :1]
    return images.to(torch.uint8)


def test_nothing_drawn_changes_nothing() -> None:
    images = _images(2)
    assert torch.equal(views.distort(images, _none(2)), images.float())


def test_hue_equals_the_standard_librarys() -> None:
    """Two images, each by its own angle; a level more or less where float32 rounds across it."""
    images, turns = _images(2, 16), np.array([0.07, -0.1])
    got = views.distort(images, replace(_none(2), hue=turns)).numpy()
    expected = np.empty(images.shape)
    for image, row, column in np.ndindex(*images.shape[:3]):
        hue, saturation, value = colorsys.rgb_to_hsv(*(images[image, row, column] / 255).tolist())
        expected[image, row, column] = colorsys.hsv_to_rgb((hue + turns[image]) % 1, saturation, value)
    difference = np.abs(got - np.floor(expected * 255.999))
    assert difference.max() <= 1
    assert difference.mean() < 1e-3


def test_jitter_equals_torchvisions_in_every_order(transforms: ModuleType) -> None:
    """A level that the hue's rounding decides is up to three after the other adjustments, whose factors are exact."""
    images, factors = _images(24), np.tile([1.25, 0.75, 1.125], (24, 1))
    how = replace(_none(24), factors=factors, hue=np.full(24, 0.08), order=views._ORDERS)
    got = views.distort(images, how)
    names = ("brightness", "contrast", "saturation", "hue")
    for image, order, mine in zip(images.movedim(-1, 1), views._ORDERS, got.movedim(-1, 1)):
        for kind in order:
            factor = [*how.factors[0], how.hue[0]][kind]
            image = getattr(transforms, f"adjust_{names[kind]}")(image, factor)
        difference = (mine - image).abs()
        assert difference.max() <= 3, order
        assert difference.mean() < 5e-3, order


def test_grey_is_pillows_cut_instead_of_rounded() -> None:
    images = _images(2)
    got = views.distort(images, replace(_none(2), grey=np.array([False, True])))
    expected = np.asarray(Image.fromarray(images[1].numpy()).convert("L"), np.float32)[..., None]
    assert torch.equal(got[0], images[0].float())
    difference = expected - got[1].numpy()
    assert set(np.unique(difference)) == {0.0, 1.0}


def test_solarize_equals_pillows() -> None:
    images = _images(2)
    got = views.distort(images, replace(_none(2), solarize=np.array([True, False])))
    expected = np.asarray(ImageOps.solarize(Image.fromarray(images[0].numpy())), np.float32)
    np.testing.assert_array_equal(got[0].numpy(), expected)
    assert torch.equal(got[1], images[1].float())


def test_blur_equals_torchvisions(transforms: ModuleType) -> None:
    """Each image by its own sigma, up to the rounding of halves."""
    images, sigmas = _images(3), np.array([0.4, 2.0, 1.1])
    got = views.distort(images, replace(_none(3), sigma=sigmas))
    for image, sigma, mine in zip(images, sigmas, got):
        difference = transforms.gaussian_blur(image.movedim(-1, 0), [13, 13], [sigma, sigma]).movedim(0, -1) - mine
        assert difference.abs().max() <= 1
        assert difference.abs().mean() < 1e-2


@pytest.mark.parametrize("sigma", [1.0, 1.5, 2.0])
def test_blur_is_near_pillows(sigma: float) -> None:
    """Three box filters inside the picture: at most 4 levels apart on noise, whose blur spans 60 and more."""
    images = _images(1, 96)
    got = views.distort(images, replace(_none(1), sigma=np.array([sigma])))[0].numpy()
    blurred = Image.fromarray(images[0].numpy()).filter(ImageFilter.GaussianBlur(sigma))
    inside = np.s_[8:-8, 8:-8]
    assert np.abs(got - np.asarray(blurred, np.float32))[inside].max() <= 4
    assert np.ptp(got[inside]) > 60


def test_the_order_of_operations() -> None:
    """Jitter, grey, blur, solarize: one after the other is all at once."""
    images = _images(2)
    how = Distortions(
        factors=np.array([[0.7, 1.2, 1.1], [1.4, 0.8, 0.9]]),
        hue=np.array([0.05, -0.03]),
        order=np.array([[0, 3, 1, 2], [2, 1, 3, 0]]),
        grey=np.array([True, False]),
        sigma=np.array([0.8, 1.7]),
        solarize=np.array([True, True]),
    )
    x = images
    for names in (("factors", "hue", "order"), ("grey",), ("sigma",), ("solarize",)):
        x = views.distort(x, replace(_none(2), **{name: getattr(how, name) for name in names})).to(torch.uint8)
    assert torch.equal(views.distort(images, how), x.float())


@pytest.mark.parametrize("second", [False, True])
def test_what_is_drawn(second: bool) -> None:
    """Probabilities within 4 standard errors of MoBY's (of 20,000 at most 0.014), ranges filled to a hundredth."""
    how = views.draw(SEEDS, second)
    jittered = how.hue != 0
    for name, share, expected in (
        ("jitter", jittered, 0.8),
        ("grey", how.grey, 0.2),
        ("blur", how.sigma > 0, 0.1 if second else 1.0),
        ("solarize", how.solarize, 0.2 if second else 0.0),
    ):
        assert share.mean() == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / len(SEEDS))), name
    assert (how.factors[~jittered] == 1).all()
    for name, values, low, high in (
        ("brightness", how.factors[:, 0], 0.6, 1.4),
        ("contrast", how.factors[:, 1], 0.6, 1.4),
        ("saturation", how.factors[:, 2], 0.8, 1.2),
        ("hue", how.hue, -0.1, 0.1),
        ("sigma", how.sigma[how.sigma > 0], 0.1, 2.0),
    ):
        assert low <= values.min() < low + 0.01, name
        assert high - 0.01 < values.max() <= high, name
    assert np.unique(how.order, axis=0, return_counts=True)[1] == pytest.approx(len(SEEDS) / 24, rel=0.15)


def test_numbers_have_nothing_to_do_with_each_other() -> None:
    """Of both views: correlations below 5 standard errors."""
    columns = []
    for second in (False, True):
        how = views.draw(SEEDS, second)
        columns += [*how.factors.T, how.hue, how.order[:, 0], how.grey, how.sigma]
    correlations = np.corrcoef(np.array(columns, float)) - np.eye(len(columns))
    assert np.abs(correlations).max() < 5 / np.sqrt(len(SEEDS))


def test_a_sample_does_not_depend_on_its_batch() -> None:
    seeds = np.array([7, 2**62, 11])
    whole = views.byol(_images(3), seeds, True)
    for i in range(3):
        assert torch.equal(whole[i], views.byol(_images(3)[i : i + 1], seeds[i : i + 1], True)[0])


@pytest.mark.parametrize("second", [False, True])
def test_a_view_is_what_is_drawn_normalised(second: bool) -> None:
    images, seeds = _images(4), np.arange(4)
    expected = augment.normalize(views.distort(images, views.draw(seeds, second)))
    got = views.byol(images, seeds, second)
    assert got.shape == (4, 3, 32, 32)
    assert torch.equal(got, expected)


def test_no_value_is_read_back() -> None:
    """It runs where there are no values to read."""
    with FakeTensorMode():
        assert views.byol(torch.empty(2, 32, 32, 3, dtype=torch.uint8), np.arange(2), True).shape == (2, 3, 32, 32)


def test_every_part_is_drawn_per_image() -> None:
    how = views.draw(np.arange(5), False)
    assert {len(getattr(how, f.name)) for f in fields(how)} == {5}
