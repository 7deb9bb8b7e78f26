"""OpenAI's dVAE encoder (github.com/openai/DALL-E at 5be4b23), whose 8192 codes are BEVT's and BEiT's targets.

The architecture also ships as Hugging Face's `FlavaImageCodebook`; weights of either load here.
Letters: M frames, H x W pixels, h = H/8, w = W/8 codes, n = `n_hid`, V = `vocab_size`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from bevt_kernels import Spec, conv3x3, resolve
from bevt_kernels.conv3x3.api import outputs_adjacent
from torch import Tensor, nn
from torch.nn import functional as F

from bevt.config import TokenizerConfig
from bevt.tokenizers import common
from bevt.tokenizers.frozen import AUTO, PIECE, FrozenTokenizer


class Block(nn.Module):
    """x + gain * (three 3x3 convolutions and a 1x1, each after a ReLU, n_out/4 wide inside)."""

    impl = "reference"
    """Of `bevt_kernels.conv3x3`."""

    def __init__(self, n_in: int, n_out: int, gain: float) -> None:
        super().__init__()
        hid = n_out // 4
        self.gain = gain
        self.skip = nn.Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(n_in, hid, 3, padding=1),
                nn.Conv2d(hid, hid, 3, padding=1),
                nn.Conv2d(hid, hid, 3, padding=1),
                nn.Conv2d(hid, n_out, 1),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """(M, n_in, H, W) -> (M, n_out, H, W)."""
        y = x
        for conv in self.convs[:3]:
            y = conv3x3(y, conv.get_parameter("weight"), conv.get_parameter("bias"), relu=True, impl=self.impl)
        return self.convs[3](F.relu_(y)).mul_(self.gain).add_(self.skip(x))


class DalleEncoder(nn.Module):
    """Four groups of blocks, n, 2n, 4n and 8n wide, 2x2 max pooling between them, and a 1x1 convolution to V logits.

    Published size (the defaults): 53.8 M parameters, 26.06 GMAC for a frame of 112x112.
    """

    def __init__(self, n_hid: int = 256, blocks: int = 2, vocab_size: int = 8192) -> None:
        super().__init__()
        widths = [n_hid, n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid]
        gain = 1 / (4 * blocks) ** 2
        self.stem = nn.Conv2d(3, n_hid, 7, padding=3)
        self.groups = nn.ModuleList(
            nn.Sequential(*(Block(widths[g] if b == 0 else widths[g + 1], widths[g + 1], gain) for b in range(blocks)))
            for g in range(4)
        )
        self.head = nn.Conv2d(8 * n_hid, vocab_size, 1)

    def features(self, x: Tensor, most: int = 0) -> Tensor:
        """(M, 3, H, W) mapped pixels (0.8 x + 0.1) -> (M, 8n, h, w), what the last convolution sees.

        With `most` a group's output has at most so many numbers (or those of one frame) at a time.
        """
        for g, group in enumerate(self.groups):
            if most:
                _, _, height, width = x.shape
                numbers = (self.stem.out_channels << g) * height * width
                x = torch.cat([self._stage(g, group, piece) for piece in x.split(max(1, most // numbers))])
            else:
                x = self._stage(g, group, x)
        return F.relu(x)

    def _stage(self, g: int, group: nn.Module, x: Tensor) -> Tensor:
        """Group g with the convolution before it, if it is the first, or else the pooling behind it."""
        x = group(x if g else self.stem(x))
        return x if g == len(self.groups) - 1 else F.max_pool2d(x, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(M, 3, H, W) mapped pixels -> (M, V, h, w) logits."""
        return self.head(self.features(x))


def foreign_name(own: str, naming: Literal["published", "flava"]) -> str:
    """What OpenAI's module (`published`) or `FlavaImageCodebook` (`flava`) calls `DalleEncoder`'s parameter `own`."""
    flava = naming == "flava"
    *place, leaf = own.split(".")
    leaf = leaf if flava else leaf[0]  # OpenAI's convolution has its own class, with `w` and `b`
    if place == ["stem"]:
        return f"blocks.input.{leaf}"
    if place == ["head"]:
        return f"blocks.output.conv.{leaf}"
    _, group, block, *conv = place
    path = f"blocks.group_{int(group) + 1}.{'group.' if flava else ''}block_{int(block) + 1}"
    if conv == ["skip"]:
        return f"{path}.id_path.{leaf}"
    return f"{path}.res_path.{'path.' if flava else ''}conv_{int(conv[1]) + 1}.{leaf}"


def load_weights(encoder: DalleEncoder, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Put `tensors`, under own, published or Flava names, into `encoder` as float32; `path` is for the message.

    Raises TokenizerError: names of none of the three, or a list of all missing, unexpected and mis-shaped ones.
    """
    expected = {name: p.shape for name, p in encoder.named_parameters()}
    namings: list[dict[str, str]] = [
        {name: name for name in expected},
        {foreign_name(name, "published"): name for name in expected},
        {foreign_name(name, "flava"): name for name in expected},
    ]
    names = max(namings, key=lambda names: len(names.keys() & tensors.keys()))
    if not names.keys() & tensors.keys():
        some = ", ".join(list(tensors)[:3])
        raise common.TokenizerError(
            f"{path} holds no DALL-E encoder: its {len(tensors)} tensors are called {some}, ..."
        )
    common.check_weights(tensors, {name: expected[own] for name, own in names.items()}, path, "this DALL-E encoder")
    encoder.load_state_dict({own: tensors[name].float().contiguous() for name, own in names.items()}, assign=True)


class DalleTokenizer(FrozenTokenizer):
    """The `Tokenizer` of the published dVAE encoder: 112x112 pixels -> 14x14 codes. Frozen; it has no decoder.

    In float16 as published for CUDA (dall_e/utils.py: every convolution but the last rounds weights and input), but
    that the last one's weight is rounded too; its bias and its sums are float32. Measured on random weights (emulated
    rounding, 8 real frames): 99.5 to 99.7 % of the codes are float32's with either head, bfloat16 gives 95 to 97 %.
    """

    name = "dalle"
    compiled_on = ("cuda",)

    def __init__(self, encoder: DalleEncoder, config: TokenizerConfig = AUTO) -> None:
        super().__init__(encoder, config)
        self.encoder = encoder
        self.vocab_size = encoder.head.out_channels

    @classmethod
    def load(
        cls, path: str | Path, config: TokenizerConfig = AUTO, *, encoder: DalleEncoder | None = None
    ) -> DalleTokenizer:
        """From the published `encoder.pkl` (a pickled module; its code is not run), a state dict, or safetensors.

        `config` as for `FrozenTokenizer`; `encoder` says another size than the published one. Raises FileNotFoundError,
        and TokenizerError where the file is damaged, asks for code, or holds other weights.
        """
        if encoder is None:
            with torch.device("meta"):  # 53.8 M random numbers less to draw; every parameter is replaced below
                encoder = DalleEncoder()
        tensors = common.read_safetensors(path)[0] if Path(path).suffix == ".safetensors" else common.read_pickle(path)
        load_weights(encoder, tensors, path)
        return cls(encoder, config)

    def settle(self, device: str) -> dict[str, str]:
        """As `FrozenTokenizer.settle`, and the implementation of the 3x3 convolutions.

        Native on CPUs in float32, unless `config.impl` is "reference", or they are compiled, with what surrounds them.
        """
        chosen = super().settle(device)
        plain = self.config.impl == "reference" or self.compiles(device)
        impl = resolve("conv3x3", "reference" if plain else "auto", Spec(device, self.precision))
        for block in self.encoder.modules():
            if isinstance(block, Block):
                block.impl = impl
                for conv in block.convs[:3] if impl == "native" else ():
                    weight = conv.get_parameter("weight")
                    weight.data = outputs_adjacent(weight)
        return {**chosen, "conv3x3": impl}

    def metadata(self) -> dict[str, str]:
        return {"format": "bevt-dalle-1"}

    @property
    def native(self) -> bool:
        """Whether `bevt_kernels.conv3x3` is; it wants many frames in the deep groups (its README)."""
        return any(isinstance(block, Block) and block.impl == "native" for block in self.encoder.modules())

    @property
    def width(self) -> float:
        """The first group's; or the last group's, as groups before it then get smaller pieces."""
        return self.encoder.stem.out_channels / (8 if self.native else 1)

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        return self.encoder.head.weight.flatten(1), self.encoder.head.get_parameter("bias")

    @property
    def rounded(self) -> list[nn.Parameter]:
        return [p for name, p in self.encoder.named_parameters() if name != "head.bias"]

    def features(self, pixels: Tensor) -> Tensor:
        x = (0.8 * pixels + 0.1).to(self.precision, memory_format=torch.channels_last)  # dall_e/utils.py: map_pixels
        most = PIECE["cpu"] // self.precision.itemsize if self.native else 0
        return self.encoder.features(x, most).permute(0, 2, 3, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Raises NotImplementedError: `encoder.pkl` has no decoder."""
        raise NotImplementedError("the DALL-E tokenizer here is the encoder alone; pictures from codes need kind 'vq'")
