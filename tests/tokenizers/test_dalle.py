"""The DALL-E encoder: its arithmetic against Hugging Face's, and its weights from every file they come in."""

from __future__ import annotations

import os
import pickle
import sys
import types
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bevt.tokenizers import Tokenizer
from bevt.tokenizers.dalle import DalleEncoder, DalleTokenizer, foreign_name

pytestmark = pytest.mark.filterwarnings("ignore:Couldn't retrieve source code for container")
"""torch.save says so of the stand-in classes in the format before 1.6."""

SMALL = {"n_hid": 8, "vocab_size": 96}


def random_encoder(**size: int) -> DalleEncoder:
    """An encoder whose codes differ from cell to cell: its logits have mean 0 over `pixels`."""
    encoder = DalleEncoder(**size)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in encoder.named_parameters():
            fan_in = p[0].numel()
            p.normal_(0, 0.1 if name.endswith("bias") else (6 / fan_in) ** 0.5, generator=generator)
        encoder.head.bias -= encoder(0.8 * pixels(2, 32) + 0.1).mean((0, 2, 3))
    return encoder


def pixels(m: int, side: int, seed: int = 1) -> Tensor:
    """(m, 3, side, side): cells of 8x8 pixels of random colours, with noise."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.rand(m, 3, side // 8, side // 8, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return 0.8 * cells + 0.2 * torch.rand(m, 3, side, side, generator=generator)


def renamed(encoder: DalleEncoder, naming: str) -> dict[str, Tensor]:
    state = encoder.state_dict()
    return state if naming == "own" else {foreign_name(name, naming): t for name, t in state.items()}


@pytest.fixture
def tokenizer() -> DalleTokenizer:
    return DalleTokenizer(random_encoder(**SMALL))


# ---- arithmetic


@pytest.mark.parametrize(
    ("size", "frames", "side"),
    [({"n_hid": 8, "vocab_size": 96}, 3, 40), ({"n_hid": 12, "blocks": 1, "vocab_size": 200}, 2, 24), ({}, 1, 112)],
    ids=["small", "one block a group", "published size"],
)
def test_codes_are_those_of_flava_image_codebook(flava: Any, size: dict[str, int], frames: int, side: int) -> None:
    """Equal codes on equal weights, but for ties: where the two logits differ by less than 1e-5 of the largest one."""
    ours = random_encoder(**size)
    config = flava.FlavaImageCodebookConfig(
        hidden_size=size.get("n_hid", 256),
        num_blocks_per_group=size.get("blocks", 2),
        vocab_size=size.get("vocab_size", 8192),
    )
    with torch.device("meta"):
        theirs = flava.FlavaImageCodebook(config)
    theirs.load_state_dict(renamed(ours, "flava"), strict=True, assign=True)
    x = pixels(frames, side)
    with torch.no_grad():
        logits = theirs.eval().blocks(0.8 * x + 0.1)
    codes = DalleTokenizer(ours).encode(x)
    assert codes.unique().numel() > min(20, codes.numel() // 4), "weights too tame: hardly any codes to compare"
    gap = logits.amax(1) - logits.gather(1, codes[:, None])[:, 0]
    assert gap.max() <= 1e-5 * logits.abs().max()


def test_published_size_has_its_published_cost() -> None:
    with torch.device("meta"):
        encoder = DalleEncoder()
        with FlopCounterMode(display=False) as counter:
            logits = encoder(torch.empty(1, 3, 112, 112))
    assert logits.shape == (1, 8192, 14, 14)
    assert sum(p.numel() for p in encoder.parameters()) == 53_786_240
    assert round(counter.get_total_flops() / 2e9, 2) == 26.06


def test_encode_is_the_argmax_of_the_logits(tokenizer: DalleTokenizer) -> None:
    x = pixels(2, 32)
    with torch.no_grad():
        logits = tokenizer.encoder(0.8 * x + 0.1)
    codes = tokenizer.encode(x)
    assert codes.shape == (2, 4, 4)
    assert codes.dtype == torch.int64
    gap = logits.amax(1) - logits.gather(1, codes[:, None])[:, 0]
    assert gap.max() <= 1e-5 * logits.abs().max()


def test_autocast_of_the_caller_does_not_change_the_codes(tokenizer: DalleTokenizer) -> None:
    x = pixels(2, 64)
    expected = tokenizer.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tokenizer.encode(x), expected)


def test_it_is_a_frozen_tokenizer(tokenizer: DalleTokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.downsample) == ("dalle", 96, 8)
    assert not any(p.requires_grad for p in tokenizer.encoder.parameters())
    with pytest.raises(NotImplementedError, match="kind 'vq'"):
        tokenizer.decode(torch.zeros(1, 2, 2, dtype=torch.int64))


@pytest.mark.parametrize(
    ("x", "error", "says"),
    [
        (torch.zeros(3, 16, 16), ValueError, r"\(M, 3, H, W\), got \(3, 16, 16\)"),
        (torch.zeros(1, 16, 16, 3), ValueError, r"got \(1, 16, 16, 3\)"),
        (torch.zeros(1, 3, 16, 20), ValueError, "multiples of 8, got 16 x 20"),
        (torch.zeros(1, 3, 0, 8), ValueError, "got 0 x 8"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "uint8"),
    ],
)
def test_bad_pixels_are_refused(tokenizer: DalleTokenizer, x: Tensor, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        tokenizer.encode(x)


def test_no_frames_give_no_codes(tokenizer: DalleTokenizer) -> None:
    assert tokenizer.encode(torch.zeros(0, 3, 16, 24)).shape == (0, 2, 3)


# ---- files


@pytest.mark.parametrize("naming", ["own", "published", "flava"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_weights_load_under_every_name_from_every_file(tmp_path: Path, naming: str, suffix: str) -> None:
    encoder = random_encoder(**SMALL)
    path = tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(renamed(encoder, naming), path)
    loaded = DalleTokenizer.load(path, encoder=DalleEncoder(**SMALL))
    for name, expected in encoder.state_dict().items():
        assert torch.equal(loaded.encoder.state_dict()[name], expected), name


def test_save_and_load_at_the_published_size(tmp_path: Path) -> None:
    with torch.device("meta"):
        encoder = DalleEncoder()
    encoder.to_empty(device="cpu")
    with torch.no_grad():
        for i, p in enumerate(encoder.parameters()):
            p.fill_(i)
    DalleTokenizer(encoder).save(tmp_path / "encoder.safetensors")
    loaded = DalleTokenizer.load(tmp_path / "encoder.safetensors")
    for i, (name, p) in enumerate(loaded.encoder.named_parameters()):
        assert torch.equal(p, torch.full_like(p, i)), name


def test_half_precision_weights_become_float32(tmp_path: Path) -> None:
    torch.save({name: t.half() for name, t in random_encoder(**SMALL).state_dict().items()}, tmp_path / "half.pt")
    loaded = DalleTokenizer.load(tmp_path / "half.pt", encoder=DalleEncoder(**SMALL))
    assert {p.dtype for p in loaded.encoder.parameters()} == {torch.float32}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_the_pickled_module_loads_without_its_classes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, zipped: bool
) -> None:
    encoder = random_encoder(**SMALL)
    path = tmp_path / "encoder.pkl"
    save_pickled(encoder, path, zipped=zipped, monkeypatch=monkeypatch)
    with pytest.raises(ImportError):  # the classes are gone, so nothing could have been built from them
        __import__("dall_e.encoder")
    x = pixels(2, 32)
    loaded = DalleTokenizer.load(path, encoder=DalleEncoder(**SMALL))
    assert torch.equal(loaded.encode(x), DalleTokenizer(encoder).encode(x))


class Malice:
    """Runs a shell command where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"echo > '{self.marker}'",)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
@pytest.mark.parametrize("hidden", [True, False], ids=["inside an encoder", "alone"])
def test_code_in_a_pickle_is_refused_and_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, zipped: bool, hidden: bool
) -> None:
    malice, path = Malice(tmp_path / "marker"), tmp_path / "encoder.pkl"
    if hidden:
        save_pickled(random_encoder(**SMALL), path, zipped=zipped, monkeypatch=monkeypatch, also=malice)
    else:
        torch.save(malice, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=rf"asks for {os.system.__module__}\.system"):
        DalleTokenizer.load(path, encoder=DalleEncoder(**SMALL))
    assert not malice.marker.exists()
    pickle.loads(pickle.dumps(malice))
    assert malice.marker.exists(), "the object is harmless, so the test shows nothing"


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("kind", ["zip", "before 1.6", "safetensors"])
def test_a_truncated_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, keep: float) -> None:
    encoder = random_encoder(**SMALL)
    path = tmp_path / ("encoder.safetensors" if kind == "safetensors" else "encoder.pkl")
    if kind == "safetensors":
        DalleTokenizer(encoder).save(path)
    else:
        save_pickled(encoder, path, zipped=kind == "zip", monkeypatch=monkeypatch)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(ValueError, match=rf"{path.name} is (damaged|not a whole)"):
        DalleTokenizer.load(path, encoder=DalleEncoder(**SMALL))


@pytest.mark.parametrize("suffix", [".pkl", ".safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"absent{suffix}"):
        DalleTokenizer.load(tmp_path / f"absent{suffix}")


@pytest.mark.parametrize("content", [b"hello\n", b"<html>", b"\x80\x02}q\x00."], ids=["text", "page", "other pickle"])
def test_another_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "encoder.pkl").write_bytes(content)
    with pytest.raises(ValueError, match=r"encoder\.pkl is damaged, or not a file of torch\.save"):
        DalleTokenizer.load(tmp_path / "encoder.pkl")


def test_a_training_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({"model": random_encoder(**SMALL).state_dict(), "epoch": 3}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match="neither a module nor a state dict"):
        DalleTokenizer.load(tmp_path / "last.pt", encoder=DalleEncoder(**SMALL))


def test_an_encoder_of_another_size_is_refused(tmp_path: Path) -> None:
    torch.save(renamed(random_encoder(**SMALL), "published"), tmp_path / "small.pt")
    with pytest.raises(ValueError, match=r"blocks\.output\.conv\.w is \(96, 64, 1, 1\), expected \(8192, 2048, 1, 1\)"):
        DalleTokenizer.load(tmp_path / "small.pt")


def test_missing_and_unexpected_weights_are_all_listed(tmp_path: Path) -> None:
    state = renamed(random_encoder(**SMALL), "flava")
    state["blocks.group_9.weight"] = state.pop("blocks.group_2.group.block_1.id_path.weight")
    del state["blocks.input.bias"]
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(ValueError, match="does not hold") as error:
        DalleTokenizer.load(tmp_path / "odd.safetensors", encoder=DalleEncoder(**SMALL))
    assert str(error.value).splitlines()[1:] == [
        "  missing blocks.input.bias (8,)",
        "  missing blocks.group_2.group.block_1.id_path.weight (16, 8, 1, 1)",
        "  unexpected blocks.group_9.weight (16, 8, 1, 1)",
    ]


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match=r"no DALL-E encoder: its 2 tensors are called weight, bias"):
        DalleTokenizer.load(tmp_path / "linear.pt")


def test_saving_into_a_missing_folder_says_so(tokenizer: DalleTokenizer, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder .*absent to write encoder\.safetensors in"):
        tokenizer.save(tmp_path / "absent" / "encoder.safetensors")


# ---- a stand-in for OpenAI's package, only as long as a file is being written


def save_pickled(
    encoder: DalleEncoder, path: Path, *, zipped: bool, monkeypatch: pytest.MonkeyPatch, also: Any = None
) -> None:
    """Write `encoder` as a whole module of classes dall_e.encoder.* and dall_e.utils.*, shaped as the published one."""

    def conv(weight: Tensor, bias: Tensor) -> nn.Module:
        module = classes["Conv2d"]()
        module.w, module.b = nn.Parameter(weight.data), nn.Parameter(bias.data)
        return module

    classes = {}
    with monkeypatch.context() as patch:
        for where, name in (("encoder", "Encoder"), ("encoder", "EncoderBlock"), ("utils", "Conv2d")):
            classes[name] = type(name, (nn.Module,), {"__module__": f"dall_e.{where}"})
            patch.setitem(sys.modules, "dall_e", types.ModuleType("dall_e"))
            if f"dall_e.{where}" not in sys.modules:
                patch.setitem(sys.modules, f"dall_e.{where}", types.ModuleType(f"dall_e.{where}"))
            setattr(sys.modules[f"dall_e.{where}"], name, classes[name])

        groups = OrderedDict()
        for g, group in enumerate(encoder.groups):
            blocks = OrderedDict()
            for b, block in enumerate(group):
                made = classes["EncoderBlock"]()
                made.n_layers, made.device = 8, torch.device("cpu")
                made.id_path = conv(block.skip.weight, block.skip.bias) if hasattr(block.skip, "weight") else block.skip
                path_modules = OrderedDict()
                for i, c in enumerate(block.convs):
                    path_modules[f"relu_{i + 1}"], path_modules[f"conv_{i + 1}"] = nn.ReLU(), conv(c.weight, c.bias)
                made.res_path = nn.Sequential(path_modules)
                blocks[f"block_{b + 1}"] = made
            if g < len(encoder.groups) - 1:
                blocks["pool"] = nn.MaxPool2d(2)
            groups[f"group_{g + 1}"] = nn.Sequential(blocks)
        head = OrderedDict(relu=nn.ReLU(), conv=conv(encoder.head.weight, encoder.head.bias))
        module = classes["Encoder"]()
        module.blocks = nn.Sequential(
            OrderedDict(input=conv(encoder.stem.weight, encoder.stem.bias), **groups, output=nn.Sequential(head))
        )
        module.also = also
        torch.save(module, path, _use_new_zipfile_serialization=zipped)
