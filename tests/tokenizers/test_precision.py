"""Precision, memory format and compilation change no codes but near-ties: on real frames, with random weights.

The published weights are not here. Random ones keep activations in range: convolutions after a ReLU have variance
2 / fan-in, the others 1 / fan-in; a block's last one is divided by the block's gain (1/64) and halved, so that the
residual branch, and with it every convolution, shows in the result. The head's bias takes the mean of the logits over
the frames away, without which one code would win everywhere.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import av
import bevt_kernels.native
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from bevt.config import ConfigError, TokenizerConfig
from bevt.data import augment, shapes
from bevt.evaluate.agreement import LEAST, Agreement, agreement
from bevt.tokenizers import frozen
from bevt.tokenizers.dalle import Block, DalleEncoder, DalleTokenizer
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer

CPU = torch.device("cpu")
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}


@pytest.fixture(scope="module")
def real_views(real_clips: Path) -> Tensor:
    """(4, 3, 112, 112): the tokenizer's view of a frame of each real clip."""
    frames = []
    for path in sorted(p for p in real_clips.iterdir() if p.suffix in (".mp4", ".avi")):
        with av.open(str(path)) as container:
            frame = next(islice(container.decode(video=0), 20, None)).to_ndarray(format="rgb24")
        frames.append(frame[8:232, 40:264])
    return augment.tokenizer_view(torch.from_numpy(np.stack(frames)), 112)


@pytest.fixture(scope="module")
def shape_views(dataset: shapes.ShapesPaths) -> Tensor:
    """(4, 3, 112, 112): of stills of the embedded dataset."""
    files = sorted(p for p in Path(dataset.train_images).rglob("*") if p.suffix in (".png", ".jpg"))[:4]
    images = [np.asarray(Image.open(file).convert("RGB").resize((224, 224))) for file in files]
    return augment.tokenizer_view(torch.from_numpy(np.stack(images)), 112)


def random_encoder(views: Tensor, **size: int) -> DalleEncoder:
    """Random weights as the module's docstring says."""
    encoder = DalleEncoder(**size).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    gains = {f"{name}.convs.3.weight": m.gain for name, m in encoder.named_modules() if isinstance(m, Block)}
    for name, p in encoder.named_parameters():
        fan_in = p[0].numel()
        variance = 0.0 if p.ndim == 1 else (1 if "skip" in name or "stem" in name else 2) / fan_in
        p.normal_(0, variance**0.5 * 0.5 / gains[name] if name in gains else variance**0.5, generator=generator)
    rows = DalleTokenizer(encoder).to(CPU).rows(views)
    encoder.head.bias -= rows.mean(0) @ encoder.head.weight.flatten(1).T
    return encoder


def tokenizer(encoder: DalleEncoder, **keys: Any) -> DalleTokenizer:
    """Of a copy, since `to` rounds the weights."""
    return DalleTokenizer(copy.deepcopy(encoder), TokenizerConfig(**keys)).to(CPU)


def assert_only_near_ties_differ(found: Agreement, roundoff: float, least: float) -> None:
    """Where codes differ, their float32 logits are within 64 units of roundoff of each other, in spreads of the logits.

    Some 50 roundings add up to about 4 units of the rows' magnitude, three times their spread over positions: logits
    are off by 12 units, the worst of thousands by five times that. Measured: gaps of 18 (float16) and 26 (bfloat16).
    """
    assert found.equal >= least, str(found)
    if len(found.gaps):
        assert found.gaps.max() <= 64 * roundoff, str(found)


@pytest.fixture(scope="module")
def published_size(real_views: Tensor) -> DalleEncoder:
    return random_encoder(real_views[:2])


class Rounded(DalleTokenizer):
    """Arithmetic of tensor cores: factors and results in a precision, sums in float32. (A CPU takes 8 s a frame.)"""

    def __init__(self, encoder: DalleEncoder, precision: torch.dtype) -> None:
        super().__init__(copy.deepcopy(encoder))

        def rounded(x: Tensor) -> Tensor:
            return x.to(precision).float()

        for p in self.rounded:
            p.data = rounded(p)
        for module in self.encoder.modules():
            if isinstance(module, (nn.Conv2d, Block)):
                module.register_forward_hook(lambda module, args, out: rounded(out))
        self.encoder.stem.register_forward_pre_hook(lambda module, args: tuple(map(rounded, args)))


@pytest.mark.parametrize(("precision", "least"), [("float16", 0.985), ("bfloat16", 0.93)])
def test_published_size_on_real_frames(
    published_size: DalleEncoder, real_views: Tensor, precision: str, least: float
) -> None:
    """Measured on 8 frames: float16 99.5 to 99.7 %, bfloat16 95 to 97 %. Here are 392 codes, 0.26 % each."""
    tested = Rounded(published_size, getattr(torch, precision))
    found = agreement(tested, tokenizer(published_size), [real_views[:2]])
    assert_only_near_ties_differ(found, ROUNDOFF[precision], least)


@pytest.mark.skipif(not bevt_kernels.native.loaded(), reason="needs the native library")
def test_winograds_convolutions(published_size: DalleEncoder, narrow: DalleEncoder, real_views: Tensor) -> None:
    """Beside direct ones, at the published size and in a narrow encoder, whose channels are padded."""
    for encoder, views in ((published_size, real_views[:2]), (narrow, real_views)):
        made, plain = tokenizer(encoder), tokenizer(encoder, impl="reference")
        assert made.implementations["conv3x3"] == "native"
        assert plain.implementations["conv3x3"] == "reference"
        assert_only_near_ties_differ(agreement(made, plain, [views]), 2.0**-24, LEAST)


@pytest.mark.skipif(not bevt_kernels.native.loaded(), reason="needs the native library")
def test_frames_at_a_time() -> None:
    """At the published size: whole pieces of each group in 20 frames, without a remainder."""
    with torch.device("meta"):
        made = DalleTokenizer(DalleEncoder())
    assert made.piece("cpu", 112, 112) == 2
    for block in made.encoder.modules():
        if isinstance(block, Block):
            block.impl = "native"
    assert made.piece("cpu", 112, 112) == 20
    seen: list[tuple[int, int]] = []

    def stage(g: int, group: nn.Module, x: Tensor) -> Tensor:
        seen.append((g, len(x)))
        side = 112 >> min(g + 1, 3)
        return x.new_empty(len(x), 256 << g, side, side)

    made.encoder._stage = stage  # type: ignore[method-assign]
    made.features(torch.empty(20, 3, 112, 112, device="meta"))
    assert seen == [(0, 2)] * 10 + [(1, 5)] * 4 + [(2, 10)] * 2 + [(3, 20)]


def test_published_size_in_channels_last(published_size: DalleEncoder, real_views: Tensor) -> None:
    """`to` changes the layout; the encoder as made is contiguous."""
    plain = DalleTokenizer(copy.deepcopy(published_size))
    found = agreement(tokenizer(published_size), plain, [real_views[:2]])
    assert_only_near_ties_differ(found, 2.0**-24, LEAST)


@pytest.fixture(scope="module")
def narrow(real_views: Tensor, shape_views: Tensor) -> DalleEncoder:
    return random_encoder(torch.cat([real_views, shape_views]), n_hid=32, vocab_size=2048)


@pytest.mark.parametrize(("precision", "least"), [("float16", 0.99), ("bfloat16", 0.93)])
def test_precisions_of_the_tokenizer_itself(
    narrow: DalleEncoder, real_views: Tensor, shape_views: Tensor, precision: str, least: float
) -> None:
    tested = tokenizer(narrow, precision=precision)
    weight, bias = tested.tail
    assert (weight.dtype, bias.dtype) == (getattr(torch, precision), torch.float32)
    found = agreement(tested, tokenizer(narrow), [real_views, shape_views])
    assert found.tokens == 8 * 196
    assert_only_near_ties_differ(found, ROUNDOFF[precision], least)


@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_vq(real_views: Tensor, precision: str) -> None:
    """An untrained one whose convolutions speak; the codebook and the vectors stay float32 in every precision."""
    model = VQModel(VQConfig(vocab_size=256, code_dim=16, width=16))
    generator = torch.Generator().manual_seed(0)
    for p in model.encoder.parameters():
        nn.init.normal_(p, 0, (2 / p[0].numel()) ** 0.5 if p.ndim > 1 else 0.1, generator=generator)
    vectors = VQTokenizer(copy.deepcopy(model)).rows(real_views)
    model.codebook.copy_(vectors[torch.randperm(len(vectors), generator=generator)[:256]])
    exact = VQTokenizer(copy.deepcopy(model)).to(CPU)
    tested = VQTokenizer(model, TokenizerConfig(precision=precision)).to(CPU)  # type: ignore[arg-type]
    assert model.codebook.dtype == torch.float32
    assert tested.decode(tested.encode(real_views)).dtype == torch.float32
    found = agreement(tested, exact, [real_views])
    assert found.equal >= {"float32": 1, "float16": 0.99, "bfloat16": 0.95}[precision], str(found)
    assert not len(found.gaps) or found.gaps.max() <= 64 * ROUNDOFF[precision], str(found)


def test_agreement_counts_and_measures(narrow: DalleEncoder, real_views: Tensor) -> None:
    """Against a head whose logits are moved by hand: the winner of one position loses by a known gap."""
    exact = tokenizer(narrow)
    first = real_views[:1]
    code = int(exact.encode(first)[0, 3, 5])
    weight, bias = exact.tail
    logits = torch.addmm(bias, exact.rows(first), weight.T)
    changed = copy.deepcopy(narrow)
    changed.head.bias[code] -= 1e6
    found = agreement(tokenizer(changed), exact, [first])
    positions = logits.argmax(1) == code
    best, second = logits[positions].topk(2).values.T
    assert found.tokens == 196
    assert found.equal == pytest.approx(1 - float(positions.sum()) / 196)
    torch.testing.assert_close(found.gaps, (best - second) / logits[positions].std(1), rtol=1e-3, atol=1e-5)
    assert not found.passed


# ---- what is settled, and pieces


def test_what_to_settles() -> None:
    made = DalleTokenizer(DalleEncoder(n_hid=8, vocab_size=96), TokenizerConfig(impl="reference")).to(CPU)
    assert made.implementations == {
        "linear_argmax": "reference",
        "tokenizer precision": "float32",
        "tokenizer": "eager",
        "conv3x3": "reference",
    }
    half = tokenizer(DalleEncoder(n_hid=8, vocab_size=96), precision="float16")
    assert half.implementations["tokenizer precision"] == "float16"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_what_to_settles_on_cuda() -> None:
    made = DalleTokenizer(DalleEncoder(n_hid=8, vocab_size=96)).to("cuda")
    assert made.implementations["tokenizer precision"] == "float16"
    assert made.implementations["tokenizer"] == "compiled"


def test_rounded_weights_are_not_saved(tmp_path: Path) -> None:
    half = tokenizer(DalleEncoder(n_hid=8, vocab_size=96), precision="float16")
    with pytest.raises(ValueError, match=r"rounded the weights to torch\.float16"):
        half.save(tmp_path / "half.safetensors")


@pytest.mark.parametrize("impl", ["reference", "auto"])
def test_pieces_give_the_codes_of_the_whole(
    impl: str, monkeypatch: pytest.MonkeyPatch, narrow: DalleEncoder, real_views: Tensor
) -> None:
    """No more frames at once than `PIECE` allows; native by group, so that the last ones see many.

    Equal but for ties, since a library may add in another order.
    """
    made, seen = tokenizer(narrow, impl=impl), []
    whole = made.encode(real_views)
    stage = made.encoder._stage

    def record(g: int, group: nn.Module, x: Tensor) -> Tensor:
        seen.append((g, len(x)))
        return stage(g, group, x)

    monkeypatch.setattr(made.encoder, "_stage", record)
    monkeypatch.setitem(frozen.PIECE, "cpu", 3 * 32 * 112 * 112 * 4 + 5)
    pieces = made.encode(real_views)
    if made.native:
        assert seen == [(0, 3), (0, 1), (1, 4), (2, 4), (3, 4)]
    else:
        assert seen == [(g, frames) for frames in (3, 1) for g in range(4)]
    weight, bias = made.tail
    logits = torch.addmm(bias, made.rows(real_views), weight.T)
    gap = logits.amax(1) - logits.gather(1, pieces.view(-1, 1))[:, 0]
    assert (pieces == whole).float().mean() >= LEAST
    assert gap.max() <= 1e-5 * logits.abs().max()


# ---- compilation


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Compilations are counted, and limited, by function, not by tokenizer."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_one_compilation_for_any_number_of_frames(
    fresh_compiler: None, monkeypatch: pytest.MonkeyPatch, real_views: Tensor
) -> None:
    """One graph for 2 to 15 frames, a second for a single one, a third for more; none for none."""
    graphs = []

    def counted(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return aot_eager(graph, inputs)

    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **keys: compiler(f, backend=counted, **keys))
    compiled = tokenizer(DalleEncoder(n_hid=4, blocks=1, vocab_size=16), compile="yes")
    assert compiled.implementations["tokenizer"] == "compiled"

    def compilations(*counts: int) -> int:
        for frames in counts:
            compiled.encode(real_views[:1, :, :32, :32].expand(frames, -1, -1, -1))
        return len(graphs)

    assert compilations(4, 2, 3, 15, 0) == 1
    assert compilations(1) == 2
    assert compilations(16, 40, 1, 2) == 3


def test_compiled_codes(fresh_compiler: None, real_views: Tensor) -> None:
    encoder = random_encoder(real_views, n_hid=16, blocks=1, vocab_size=2048)
    found = agreement(tokenizer(encoder, compile="yes"), tokenizer(encoder), [real_views])
    assert_only_near_ties_differ(found, 2.0**-24, LEAST)


def test_without_a_compiler_the_key_is_named(fresh_compiler: None) -> None:
    made = tokenizer(DalleEncoder(n_hid=4, blocks=1, vocab_size=16), compile="yes")
    with (
        torch._inductor.config.patch({"cpp.cxx": (None, "no-such-compiler"), "fx_graph_cache": False}),
        pytest.raises(ConfigError, match=r"tokenizer\.compile: .* install a C\+\+ compiler .* set it to 'no'"),
    ):
        made.encode(torch.rand(2, 3, 16, 24))
