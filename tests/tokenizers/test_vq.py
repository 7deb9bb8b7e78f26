"""The VQ tokenizer: what a short fit reaches, its codebook's rules, its file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from bevt.config import ConfigError
from bevt.tokenizers import Tokenizer
from bevt.tokenizers.vq import FitReport, MovingCodebook, VQConfig, VQModel, VQTokenizer, cosines, fit, nearest

QUICK = VQConfig(
    image_size=32,
    vocab_size=96,
    code_dim=8,
    width=16,
    blocks=0,
    steps=250,
    batch=16,
    lr=2e-3,
    decay=0.95,
    eval_batches=4,
)
TINY = dataclasses.replace(QUICK, vocab_size=12, code_dim=4, width=4, steps=12, batch=2, eval_batches=1)


def scenes(config: VQConfig, seed: int = 0) -> Iterator[Tensor]:
    """Endless batches (M, 3, S, S): a striped disc or square on a smooth background."""
    m, s = config.batch, config.image_size
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(s), torch.arange(s), indexing="ij")
    while True:
        r = torch.rand(6, m, 1, 1, generator=generator)
        colours = torch.rand(2, m, 3, 1, 1, generator=generator)
        background = F.interpolate(torch.rand(m, 3, 2, 2, generator=generator), (s, s), mode="bilinear")
        dx, dy, radius = (x - s * r[0]).abs(), (y - s * r[1]).abs(), s * (0.15 + 0.2 * r[2])
        inside = torch.where(r[3] < 0.5, dx.hypot(dy), torch.maximum(dx, dy)) < radius
        stripes = torch.sin((x * (r[4] * math.pi).cos() + y * (r[4] * math.pi).sin()) * (0.3 + 0.3 * r[5])) > 0
        shape = torch.where(stripes[:, None], colours[0], colours[1])
        yield torch.where(inside[:, None], shape, background)


@pytest.fixture(scope="module")
def fitted() -> tuple[VQTokenizer, FitReport, list[tuple[int, dict[str, float]]]]:
    rows: list[tuple[int, dict[str, float]]] = []
    tokenizer, report = fit(scenes(QUICK), QUICK, on_step=lambda step, metrics: rows.append((step, dict(metrics))))
    return tokenizer, report, rows


# ---- what a fit reaches


def test_a_short_fit_uses_the_codebook_evenly(fitted: tuple[VQTokenizer, FitReport, list]) -> None:
    report = fitted[1]
    assert report.codes_used >= 64
    assert report.perplexity >= 64
    assert report.top_share <= 0.15
    assert report.perplexity == pytest.approx(math.exp(report.entropy))
    assert (report.steps, report.tokens) == (250, 4 * 16 * 4 * 4)


def test_a_short_fit_rebuilds_fresh_images(fitted: tuple[VQTokenizer, FitReport, list]) -> None:
    """Measured 20.6 of 255 after these 250 steps; each image's own mean colour gives 43."""
    tokenizer, report, _ = fitted
    x = next(scenes(QUICK, seed=9))
    rebuilt = tokenizer.decode(tokenizer.encode(x))
    assert rebuilt.shape == x.shape
    assert rebuilt.min() >= 0
    assert rebuilt.max() <= 1
    error = 255 * F.l1_loss(rebuilt, x).item()
    assert error <= 25
    assert error == pytest.approx(report.error, rel=0.2)
    assert error <= 0.6 * 255 * F.l1_loss(x.mean((2, 3), keepdim=True).expand_as(x), x).item()


def test_training_improves_on_the_k_means_start(fitted: tuple[VQTokenizer, FitReport, list]) -> None:
    """Measured: 26.3 of 255 after one step, 21.2 at the end."""
    start = fit(scenes(QUICK), dataclasses.replace(QUICK, steps=1))[1]
    assert fitted[1].error < 0.9 * start.error


def test_metrics_come_at_their_steps(fitted: tuple[VQTokenizer, FitReport, list]) -> None:
    rows = fitted[2]
    assert [step for step, _ in rows] == [*range(20, 241, 20), 250]
    assert all(math.isfinite(value) for _, metrics in rows for value in metrics.values())
    assert rows[-1][1]["codes"] >= 64


def test_codes_withstand_noise_that_the_eye_does_not_see(fitted: tuple[VQTokenizer, FitReport, list]) -> None:
    tokenizer = fitted[0]
    x = torch.cat([next(scenes(QUICK, seed=s)) for s in (9, 10)])
    noisy = (x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) / 255).clamp(0, 1)
    assert (tokenizer.encode(noisy) == tokenizer.encode(x)).float().mean() >= 0.95


def test_the_same_seed_gives_the_same_tokenizer_and_another_does_not() -> None:
    def weights(config: VQConfig) -> dict[str, Tensor]:
        torch.rand(3)  # the fit depends on no global state
        return fit(scenes(TINY), config)[0].model.state_dict()

    first, again, other = weights(TINY), weights(TINY), weights(dataclasses.replace(TINY, seed=1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["codebook"], other["codebook"])


def test_a_fit_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    fit(scenes(TINY), TINY)
    assert torch.equal(torch.rand(1), expected)


def test_fewer_vectors_than_codes_still_fit() -> None:
    config = dataclasses.replace(TINY, image_size=8, batch=1, vocab_size=40)
    assert fit(scenes(config), config)[1].codes_used >= 1


# ---- the vectors


def test_cosines_are_orthonormal_and_start_with_the_colours() -> None:
    basis = cosines(192).flatten(1)
    torch.testing.assert_close(basis @ basis.T, torch.eye(192), atol=1e-6, rtol=0)
    colours = torch.tensor([0.2, 0.5, 0.9])
    vector = VQModel(TINY).vectors(colours.view(1, 3, 1, 1).expand(1, 3, 8, 8))[0, 0, 0]
    torch.testing.assert_close(vector, F.pad(4 * colours - 2, (0, 1)), atol=1e-6, rtol=0)


def test_an_unfitted_model_with_every_cosine_gives_the_pixels_back() -> None:
    model = VQModel(dataclasses.replace(TINY, code_dim=192))
    x = next(scenes(TINY))
    torch.testing.assert_close(model.pixels(model.vectors(x)), x, atol=1e-5, rtol=0)


# ---- the codebook


def test_lookup_is_the_nearest_neighbour() -> None:
    """Against float64 distances; two codes may swap only where their distances agree to 1e-6."""
    generator = torch.Generator().manual_seed(0)
    x, codebook = torch.randn(500, 8, generator=generator), torch.randn(96, 8, generator=generator)
    distance = (x.double()[:, None] - codebook.double()).square().sum(2)
    chosen = distance.gather(1, nearest(x, codebook)[:, None])[:, 0]
    assert (chosen - distance.amin(1)).max() <= 1e-6


def test_lookup_takes_the_lower_of_two_equal_codes() -> None:
    codebook = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert nearest(torch.tensor([[1.0, 0.0]]), codebook).tolist() == [1]


def book(vectors: Tensor) -> MovingCodebook:
    return MovingCodebook(vectors, TINY, torch.Generator().manual_seed(0))


def test_dead_codes_are_revived_on_the_data() -> None:
    vectors = torch.randn(240, 4, generator=torch.Generator().manual_seed(0))
    codebook = book(vectors)
    codebook.codes = torch.full_like(codebook.codes, 100.0)  # all but code 0 lie far from every vector
    codebook.codes[0] = 0
    codebook.use = torch.where(torch.arange(12) == 0, 240.0, 0.0)
    codebook.total = codebook.codes * codebook.use[:, None]
    indices = nearest(vectors, codebook.codes)
    assert indices.unique().tolist() == [0]
    codebook.update(vectors, indices, revive=True)
    distance = (codebook.codes[1:, None] - vectors).abs().sum(2).amin(1)
    assert distance.max() < 1e-5, "a dead code did not move onto a vector"
    assert len(nearest(vectors, codebook.codes).unique()) == 12


def test_without_revival_dead_codes_stay_where_they_are() -> None:
    vectors = torch.randn(240, 4, generator=torch.Generator().manual_seed(0))
    codebook = book(vectors)
    before = codebook.codes.clone()
    codebook.update(vectors, torch.zeros(240, dtype=torch.int64), revive=False)
    torch.testing.assert_close(codebook.codes[1:], before[1:])


def test_codes_follow_the_mean_of_their_vectors() -> None:
    codebook = book(torch.randn(240, 4, generator=torch.Generator().manual_seed(0)))
    target = torch.randn(12, 4, generator=torch.Generator().manual_seed(1))
    vectors, indices = target.repeat(20, 1), torch.arange(12).repeat(20)
    for _ in range(300):
        codebook.update(vectors, indices, revive=True)
    torch.testing.assert_close(codebook.codes, target)
    torch.testing.assert_close(codebook.use, torch.full((12,), 20.0))


# ---- the tokenizer and its file


def test_save_and_load_give_equal_codes_and_pictures(
    fitted: tuple[VQTokenizer, FitReport, list], tmp_path: Path
) -> None:
    tokenizer, x = fitted[0], next(scenes(QUICK, seed=9))
    tokenizer.save(tmp_path / "vq.safetensors")
    loaded = VQTokenizer.load(tmp_path / "vq.safetensors")
    assert loaded.model.config == QUICK
    assert torch.equal(loaded.encode(x), tokenizer.encode(x))
    assert torch.equal(loaded.decode(loaded.encode(x)), tokenizer.decode(tokenizer.encode(x)))
    assert [p.name for p in tmp_path.iterdir()] == ["vq.safetensors"]


def test_it_is_a_frozen_tokenizer_of_any_image_size() -> None:
    tokenizer = VQTokenizer(VQModel(VQConfig(width=4)))
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.downsample) == ("vq", 512, 8)
    assert not any(p.requires_grad for p in tokenizer.model.parameters())
    codes = tokenizer.encode(torch.rand(2, 3, 24, 40))
    assert (codes.shape, codes.dtype) == ((2, 3, 5), torch.int64)
    assert tokenizer.decode(codes).shape == (2, 3, 24, 40)


def test_autocast_of_the_caller_does_not_change_the_codes(fitted: tuple[VQTokenizer, FitReport, list]) -> None:
    x = next(scenes(QUICK, seed=9))
    expected = fitted[0].encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fitted[0].encode(x), expected)


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(3, 16, 16), ValueError, r"\(M, 3, H, W\), got \(3, 16, 16\)"),
        (torch.zeros(1, 3, 16, 20), ValueError, "multiples of 8, got 16 x 20"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "uint8"),
    ],
)
def test_bad_pixels_are_refused(x: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        VQTokenizer(VQModel(TINY)).encode(x)


@pytest.mark.parametrize(
    ("codes", "says"),
    [
        (torch.zeros(2, 2, dtype=torch.int64), r"must be \(M, h, w\) int64, got \(2, 2\)"),
        (torch.zeros(1, 2, 2), "got .* torch.float32"),
        (torch.full((1, 2, 2), 12), r"must lie in 0\.\.11, got 12\.\.12"),
        (torch.full((1, 2, 2), -1), r"must lie in 0\.\.11, got -1\.\.-1"),
    ],
)
def test_bad_codes_are_refused(codes: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VQTokenizer(VQModel(TINY)).decode(codes)


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vq.safetensors"
    with pytest.raises(FileNotFoundError, match=r"no file .*vq\.safetensors"):
        VQTokenizer.load(path)
    path.write_bytes(b"not a tensor in sight")
    with pytest.raises(ValueError, match=r"vq\.safetensors is not a whole safetensors file"):
        VQTokenizer.load(path)
    save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match=r"vq\.safetensors is no VQ tokenizer of this project"):
        VQTokenizer.load(path)


def test_a_file_whose_weights_disagree_with_its_configuration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "vq.safetensors"
    VQTokenizer(VQModel(TINY)).save(path)
    with safe_open(str(path), framework="pt") as f:
        metadata, tensors = f.metadata(), {key: f.get_tensor(key) for key in f.keys()}  # noqa: SIM118 (no mapping)
    save_file({**tensors, "codebook": torch.zeros(13, 4)}, path, metadata)
    with pytest.raises(ValueError, match=r"codebook is \(13, 4\), expected \(12, 4\)"):
        VQTokenizer.load(path)
    save_file(tensors, path, {**metadata, "config": '{"vocab_sizes": 12}'})
    with pytest.raises(ValueError, match="nearest is 'vocab_size'"):
        VQTokenizer.load(path)


# ---- bad fits


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", 0),
        ("code_dim", 193),
        ("image_size", 20),
        ("blocks", -1),
        ("lr", 0.0),
        ("decay", 1.0),
        ("commitment", -1.0),
    ],
)
def test_a_configuration_that_cannot_be_fitted_names_its_key(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"^{key} must"):
        dataclasses.replace(TINY, **{key: value})


def test_a_non_finite_loss_names_its_step() -> None:
    def poisoned() -> Iterator[Tensor]:
        for i, batch in enumerate(scenes(TINY), start=1):
            yield batch * math.nan if i == 7 else batch

    with pytest.raises(FloatingPointError, match="not finite at step 7"):
        fit(poisoned(), TINY)


def test_images_that_end_early_are_refused() -> None:
    with pytest.raises(ValueError, match="ended at step 2 of 12; give an endless iterator"):
        fit(iter([next(scenes(TINY))]), TINY)


@pytest.mark.parametrize(
    "batch",
    [torch.zeros(2, 3, 16, 16), torch.zeros(3, 3, 32, 32), torch.zeros(2, 3, 32, 32, dtype=torch.uint8)],
    ids=["size", "count", "type"],
)
def test_batches_of_another_shape_are_refused(batch: Tensor) -> None:
    with pytest.raises(ValueError, match=r"a batch must be \(2, 3, 32, 32\) float, got .* at step 1 of 12"):
        fit(iter([batch]), TINY)
