"""Device-side augmentation against OpenCV's and torchvision's results."""

from __future__ import annotations

import numpy as np
import torch

from bevt.data import augment

# cv2.resize(image, (6, 6), interpolation=cv2.INTER_LANCZOS4) of `_pattern`, channels first; OpenCV 4.14.0.
LANCZOS4 = [
    [
        [41, 69, 156, 185, 91, 196],
        [167, 139, 107, 100, 81, 57],
        [100, 95, 107, 107, 117, 136],
        [145, 177, 210, 151, 149, 229],
        [124, 208, 68, 138, 247, 123],
        [59, 114, 68, 70, 178, 135],
    ],
    [
        [104, 84, 194, 114, 164, 82],
        [220, 196, 179, 149, 177, 114],
        [62, 72, 44, 30, 74, 171],
        [176, 179, 141, 193, 57, 133],
        [161, 36, 145, 215, 68, 56],
        [38, 219, 99, 125, 112, 120],
    ],
    [
        [213, 118, 61, 166, 137, 128],
        [72, 44, 240, 199, 151, 108],
        [198, 115, 94, 145, 146, 146],
        [155, 137, 186, 57, 129, 104],
        [32, 151, 171, 17, 107, 109],
        [144, 202, 67, 209, 137, 197],
    ],
]

# Factors of brightness, contrast and saturation, their order, and what adjust_brightness, adjust_contrast and
# adjust_saturation of torchvision 0.28.0 (transforms.functional, uint8 tensors) make of `_pattern()[0, :3, :4]`.
JITTERED: list[tuple[tuple[float, ...], tuple[int, ...], str]] = [
    (
        (1.25, 0.75, 1.375),
        (2, 0, 1),
        "36 89 157 105 173 227 202 227 36 36 104 173 55 123 191 150 218 227 "
        "227 48 116 101 170 227 89 158 226 206 227 36 61 130 198 179 227 36",
    ),
    (
        (0.75, 1.3125, 0.625),
        (1, 2, 0),
        "7 21 54 75 108 140 151 177 59 12 36 69 22 54 87 121 154 174 "
        "144 30 63 72 104 136 59 91 123 156 178 63 29 61 93 130 163 52",
    ),
]


def _pattern() -> torch.Tensor:
    """(1, 10, 13, 3) uint8 without any smoothness."""
    i, j, c = np.mgrid[0:10, 0:13, 0:3]
    return torch.from_numpy(((i * 37 + j * 91 + c * 53 + i * j * 11) % 256).astype(np.uint8))[None]


def test_tokenizer_view_equals_opencv() -> None:
    """Lanczos-4 without antialiasing, level for level."""
    view = augment.tokenizer_view(_pattern(), 6)
    torch.testing.assert_close(view[0] * 255, torch.tensor(LANCZOS4, dtype=torch.float32), rtol=0, atol=1e-4)


def test_tokenizer_view_ignores_autocast() -> None:
    """A half-precision resize would give other tokens."""
    expected = augment.tokenizer_view(_pattern(), 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(augment.tokenizer_view(_pattern(), 6), expected)


def test_tokenizer_view_of_equal_size_is_the_frame() -> None:
    """No resize where none is needed."""
    frame = _pattern()[:, :, :10]
    assert torch.equal(augment.tokenizer_view(frame, 10), frame.permute(0, 3, 1, 2) / 255)


def test_encoder_layout_and_normalisation() -> None:
    """One pixel, by hand: its place in (B, 3, T, H, W) and its value."""
    clips = torch.zeros(2, 3, 4, 5, 3, dtype=torch.uint8)
    clips[1, 2, 3, 4] = torch.tensor([200, 100, 50])
    out = augment.to_encoder_clips(clips)
    assert out.shape == (2, 3, 3, 4, 5)
    expected = torch.tensor([(200 - 123.675) / 58.395, (100 - 116.28) / 57.12, (50 - 103.53) / 57.375])
    torch.testing.assert_close(out[1, :, 2, 3, 4], expected)
    torch.testing.assert_close(augment.to_encoder_images(clips[1])[2, :, 3, 4], expected)


def test_color_jitter_equals_torchvision() -> None:
    """Two images, each with its own factors and order, level for level."""
    images = _pattern()[:, :3, :4].expand(2, -1, -1, -1)
    params = torch.tensor([[*factors, *order] for factors, order, _ in JITTERED])
    expected = torch.tensor(
        [[int(level) for level in levels.split()] for *_, levels in JITTERED], dtype=torch.uint8
    ).view(2, 3, 4, 3)
    assert torch.equal(augment.color_jitter(images, params), expected)


def test_color_jitter_identity() -> None:
    """Factors of one change nothing, in either type."""
    images = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    params = torch.tensor([[1.0, 1.0, 1.0, 2.0, 0.0, 1.0]] * 2)
    assert torch.equal(augment.color_jitter(images, params), images)
    torch.testing.assert_close(augment.color_jitter(images / 255, params), images / 255)
