"""A whole training step, update included, on random pixels under the recipe's masks."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.problems.base import Contestant, Leaves, Work
from benchmarks.problems.models import Model, attention_flop
from benchmarks.registry import QUANTITIES, TrainCase
from benchmarks.tables import short
from bevt import masking
from bevt.config import Config, MaskConfig, resized, tokenizer_settings
from bevt.data import augment
from bevt.data.batch import Batch
from bevt.models.bevt import CELL
from bevt.models.region import compile_regions
from bevt.recipes.pretrain import joint_stage
from bevt.tokenizers import Tokenizer
from bevt.tokenizers.cache import TokenCache
from bevt.train.distributed import World
from bevt.train.optim import build_optimizer
from bevt.train.phases import PHASES
from bevt.train.step import TrainStep, masked_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from bevt.models.bevt import MaskedInput, Stream
    from bevt.tokenizers.dalle import DalleEncoder
    from bevt.tokenizers.vq import VQModel

NEEDS = {"safetensors": "safetensors", "rich": "rich", "PIL": "pillow"}
"""Modules that the ops' problems do without, and what pip calls them."""
DISAGREEMENT = 0.005
"""Of the codes, beside twice that of the reference path in the same dtype: ties, and what half precision may cost."""
KEPT = "fused, tokens kept"
RATE = 1e-5
"""Learning rate of the steps that are timed."""


def synthetic_batch(config: Config) -> Batch:
    """A micro-batch of random pixels under the recipe's masks."""
    t, d = config.train, config.data
    side, seeds = d.crop // 16, {"clips": np.arange(t.micro_clips), "images": np.arange(t.micro_images)}

    def masks(settings: MaskConfig, stream: str, depth: int) -> Tensor:
        return torch.from_numpy(masking.generate(settings, seeds[stream], (depth, side, side)))

    random = torch.Generator().manual_seed(0)
    return Batch(
        clips=torch.randint(256, (t.micro_clips, d.frames, d.crop, d.crop, 3), generator=random, dtype=torch.uint8),
        clip_masks=masks(config.clip_mask, "clips", d.frames // 2),
        images=torch.randint(256, (t.micro_images, d.crop, d.crop, 3), generator=random, dtype=torch.uint8),
        image_masks=masks(config.image_mask, "images", 1)[:, 0],
        image_jitter=torch.tensor([[1.1, 0.9, 1.2, 2.0, 0.0, 1.0]]).repeat(t.micro_images, 1),
        clip_seeds=torch.from_numpy(seeds["clips"]),
        image_seeds=torch.from_numpy(seeds["images"]),
        clip_slots=torch.arange(t.micro_clips),
        image_slots=torch.arange(t.micro_images),
    )


class TrainingStep(Model):
    """The joint recipe's step on the fused and on the reference path, as `bevt pretrain` builds them.

    "tokens kept": with a token cache that has every view, as in later epochs (`--tokenizer.cache`), which the reference
    path does not have. Judged on one clip and two images, in three parts. Codes at the masked positions: by how many
    are not the reference path's in float32, beside how many of that path's in the same dtype are not. Loss and
    gradients: on float32's codes, so that a code which differs is not an error of the model. The update: on float64's
    gradients, since AdamW's first goes by the sign of those that are near 0; they are made large enough to be clipped.
    """

    case: TrainCase
    names = ("fused", KEPT, "reference")
    quantities = QUANTITIES[-1:]
    warm = 0  # a step takes seconds on a CPU, and one was run before

    def __init__(self, case: TrainCase, device: str) -> None:
        super().__init__(case, device)
        self.leaves, self.grads = {}, {}
        missing = [f"needs {name}: pip install {pip}" for name, pip in NEEDS.items() if not _has(name)]
        self.direct_count = device == "cpu" and case.tokenizer == "dalle"
        self.contestants = {n: Contestant(lambda leaves: {}, missing, n != "reference") for n in self.names}
        self.precision = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        self.seconds: dict[str, list[dict[str, float]]] = {name: [] for name in self.names}
        self.steps: dict[str, TrainStep] = {}
        self.batch = synthetic_batch(self._config("fused"))
        if device == "cuda":  # as the loader has them
            self.batch = replace(
                self.batch,
                clips=cast(Tensor, self.batch.clips).pin_memory(),
                images=cast(Tensor, self.batch.images).pin_memory(),
            )
        self.folder = tempfile.TemporaryDirectory()
        self.encoder: DalleEncoder | None = None
        self.tokenizing = 0

    def _config(self, path: str, precision: str = "", clips: int = 0, images: int = 0) -> Config:
        """The joint recipe at the case's size, as one micro-batch."""
        base, case = joint_stage(), self.case
        clips, images = clips or case.batch, images or case.batch * case.images
        train: Any = {
            **{"clips": clips, "images": images, "micro_clips": clips, "micro_images": images},
            "precision": precision or self.precision,
        }
        return replace(
            base,
            path=path,  # type: ignore[arg-type]
            model=resized(base.model, case.size),
            data=replace(base.data, frames=case.frames, crop=case.side),
            train=replace(base.train, **train),
        )

    def _tokenizer(self, config: Config) -> Tokenizer:
        """Of random weights."""
        from bevt.tokenizers.dalle import DalleTokenizer
        from bevt.tokenizers.vq import VQTokenizer

        device, settings = torch.device(self.device), tokenizer_settings(config)
        pixels = augment.tokenizer_view(cast(Tensor, self.batch.clips)[0, :2], self.case.side // 2)
        if self.case.tokenizer == "vq":
            return VQTokenizer(random_vq(pixels), settings).to(device)
        if self.encoder is None:
            self.encoder = random_encoder(pixels)
        return DalleTokenizer(copy.deepcopy(self.encoder), settings).to(device)

    def _trainer(self, config: Config, cache: str = "") -> TrainStep:
        """What steps a seeded model; `cache`: with a token cache of that name, which is empty at first."""
        from bevt.train.pretrain import build_model

        device, tokenizer, tokens = torch.device(self.device), self._tokenizer(config), None
        if cache:
            config = replace(config, tokenizer=replace(config.tokenizer, cache=f"{self.folder.name}/{cache}"))
            views: dict[str, tuple[dict[str, Any], int]] = {
                "clips": ({"files": "random"}, config.train.clips),
                "images": ({"files": "random"}, config.train.images),
            }
            tokens = TokenCache.open(config, tokenizer, "random weights", device, views)
        torch.manual_seed(1)
        model = build_model(config, tokenizer.vocab_size, device)
        if config.path == "fused" and self.device == "cuda":  # `train.compile`'s default
            compile_regions(model)
        optimizer = build_optimizer(model, config.optim, fused=config.path == "fused")
        return TrainStep(model, tokenizer, optimizer, config, World(0, 1, device), tokens)

    def step(self, name: str, frozen: bool = False, mark: Callable[[], None] = lambda: None) -> Leaves:
        """One update; its model stays for the next."""
        if name not in self.steps:
            self.steps[name] = self._trainer(self._config(_path(name)), "timed" if name == KEPT else "")
        mark()
        step = self.steps[name]
        step.phases.start()
        result = step(RATE, [self.batch])
        self.seconds[name].append(step.phases.read())  # waits for the device
        if not result.finite:
            raise FloatingPointError("the loss or a gradient is not finite")
        if step.cache and len(self.seconds[name]) == 1:
            step.cache.flush()
        return {}

    def kept(self, name: str) -> int:
        """Weights, moments and the tokenizer's weights."""
        step = self.steps[name]
        moments = (x for state in step.optimizer.state.values() for x in state.values() if isinstance(x, Tensor))
        modules = (x for x in vars(step.tokenizer).values() if isinstance(x, nn.Module))
        frozen = (x for module in modules for x in (*module.parameters(), *module.buffers()))
        return sum(x.nbytes for x in {id(x): x for x in (*step.model.parameters(), *moments, *frozen)}.values())

    def notes(self, name: str, rounds: int) -> dict[str, Any]:
        """Seconds of each phase, medians."""
        taken = self.seconds[name][-rounds:]
        return {"seconds": {phase: short(float(np.median([each[phase] for each in taken]))) for phase in PHASES}}

    def answer(self, name: str, frozen: bool = False) -> Leaves:
        """Losses and gradients on float32's codes, the contestant's own codes, and an update by float64's gradients."""
        inputs, step = self._judged(_path(name), self.precision, "judged" if name == KEPT else "")
        codes = self._codes(inputs)
        return {**self._gradients(inputs, step), "codes": codes, **self._update(step)}

    def truth(self) -> tuple[Leaves, Leaves]:
        """Of the reference path; sets `codes` and `steep`, which `answer` needs."""
        inputs, step = self._judged("reference", "float32")
        self.codes = self._codes(inputs)
        if len(self.codes.unique()) < min(100, len(self.codes) // 8):
            raise ValueError(f"the tokenizer has {len(self.codes.unique())} codes here: agreement would say nothing")
        eager = self.codes
        if self.precision != "float32":
            half, step = self._judged("reference", self.precision)
            eager = self._codes(half)
        wide = self._trainer(self._config("reference", "float64", 1, 2))
        oracle, plain = self._gradients(inputs, wide), self._gradients(inputs, step)
        gradients = {name: p.grad for name, p in wide.model.named_parameters() if p.grad is not None}
        norm = torch.stack([grad.norm() for grad in gradients.values()]).norm()
        self.steep = {name: 2 * wide.config.optim.clip_grad / norm * grad for name, grad in gradients.items()}
        return {**oracle, **self._update(wide)}, {**plain, **self._update(step), "codes": eager}

    def _judged(self, path: str, precision: str, cache: str = "") -> tuple[dict[Stream, MaskedInput], TrainStep]:
        """One clip and two images as the model takes them, and what steps a new model. From a cache the second time."""
        config = self._config(path, precision, 1, 2)
        if precision == "float32":  # whatever the tokenizer would choose for itself on this device
            config = replace(config, tokenizer=replace(config.tokenizer, precision="float32"))
        step = self._trainer(config, cache)
        batch, device = synthetic_batch(config), torch.device(self.device)
        inputs = masked_inputs(batch, step.tokenizer, config, device, step.cache)
        if step.cache:
            step.cache.flush()
            step.cache.share()
            inputs = masked_inputs(batch, step.tokenizer, config, device, step.cache)
            assert step.cache.share() == 1, "the token cache did not keep the codes"
        seeds = {"clips": batch.clip_seeds, "images": batch.image_seeds}
        return {stream: step._dropped(x, seeds[stream]) for stream, x in inputs.items()}, step

    @staticmethod
    def _codes(inputs: dict[Stream, MaskedInput]) -> Tensor:
        """(K,) at the masked positions."""
        return torch.cat([x.codes[_positions(x)] for x in inputs.values()])

    def _gradients(self, inputs: dict[Stream, MaskedInput], step: TrainStep) -> Leaves:
        """Losses and gradients of the model that `step` has, on `self.codes`."""
        results: Leaves = {}
        parts = self.codes.split([int(_positions(x).sum()) for x in inputs.values()])
        for (stream, x), part in zip(inputs.items(), parts):
            codes = x.codes.masked_scatter(_positions(x), part)
            share = {stream: torch.ones((), dtype=torch.float64, device=codes.device)}
            found = step.run({stream: replace(x, codes=codes)}, share, True)
            results[f"loss.{stream}"] = found[f"loss_{stream}"]
        grads = {f"grad {name}": p.grad for name, p in step.model.named_parameters()}
        return results | {name: grad for name, grad in grads.items() if grad is not None}

    def _update(self, step: TrainStep) -> Leaves:
        """What an update by `self.steep` changes, and the first moment that it leaves."""
        named = dict(step.model.named_parameters())
        before = {name: p.detach().clone() for name, p in named.items()}
        for name, p in named.items():
            p.grad = self.steep[name].to(p, copy=True)  # clipping writes into it
        step._update(RATE, {"loss": torch.zeros((), device=self.device)})
        moments = {f"moment {name}": step.optimizer.state[p]["exp_avg"] for name, p in named.items()}
        return {**{f"update {name}": p.detach() - before[name] for name, p in named.items()}, **moments}

    def check(self, results: Leaves, oracle: Leaves, eager: Leaves, note: str, times: float) -> None:
        """By the error rule, but for codes."""
        other, eagers = (float((x["codes"] != self.codes).double().mean()) for x in (results, eager))
        most = times * eagers + DISAGREEMENT
        assert other <= most, (
            f"codes{note}: {100 * other:.2f} % are not float32's, at most {100 * most:.2f} % may be others"
        )
        results = {what: x for what, x in results.items() if what != "codes"}
        super().check(results, oracle, eager, note, times)

    def work(self) -> dict[str, Work]:
        """Decoders, head and tokenizer at the masked positions and frames of the batch."""
        from bevt import budget
        from bevt.train import memory

        config, case = self._config("fused"), self.case
        if case.tokenizer == "vq":
            config = replace(config, tokenizer=replace(config.tokenizer, kind="vq"))
        clips, images = (cast(Tensor, x) for x in (self.batch.clip_masks, self.batch.image_masks))
        grids = (clips.shape[1:], (1, *images.shape[1:]))
        settings = (config.clip_mask, config.image_mask)
        usual = [budget.masked_positions(*each) for each in zip(settings, grids)]
        more = [float(mask.sum()) / len(mask) / n for mask, n in zip((clips, images), usual)]
        frames = 2 * float(clips.any(-1).any(-1).sum()) / len(clips) / budget.masked_frames(config)
        tokenizer, *others = (row for row in budget.counted(config) if not row.name.startswith(" "))
        gmac = len(clips) * tokenizer.clip_gmac * frames + len(images) * tokenizer.image_gmac
        self.tokenizing = round(2e9 * gmac)
        training = 0.0
        for row in others:
            shares = more if row.name in budget.BEHIND else (1.0, 1.0)
            passes = 2 if row.name == "patch embedding" else 3  # nobody needs the gradient of pixels
            gmac = len(clips) * row.clip_gmac * shares[0] + len(images) * row.image_gmac * shares[1]
            training += passes * 2e9 * gmac
        flop = round(training) + self.tokenizing
        maps = [(len(x), (depth, CELL * h, CELL * w)) for x, (depth, h, w) in zip((clips, images), grids)]
        excluded = sum(attention_flop(memory.swin_of(config), n, grid)[1] for n, grid in maps)
        return {QUANTITIES[-1]: Work(flop, flop - 3 * excluded)}

    def spared(self, name: str) -> int:
        """Tokenizing, where tokens are kept."""
        return self.tokenizing if name == KEPT else 0


def random_encoder(pixels: Tensor) -> DalleEncoder:
    """DALL-E's of published size. Its codes differ from place to place: its head's bias takes the mean logits away.

    `pixels` (M, 3, H, W) in [0, 1] are of the kind that it will see.
    """
    from bevt.tokenizers.dalle import DalleEncoder, DalleTokenizer

    torch.manual_seed(0)
    encoder = DalleEncoder().requires_grad_(False)
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    means = DalleTokenizer(encoder).rows(pixels).mean(0) @ encoder.head.weight.flatten(1).T
    encoder.head.get_parameter("bias").sub_(means)
    return encoder


def random_vq(pixels: Tensor) -> VQModel:
    """Our own tokenizer's model, with vectors of `pixels` (M, 3, H, W) in [0, 1] as its codes."""
    from bevt.tokenizers.vq import VQConfig, VQModel

    torch.manual_seed(0)
    model = VQModel(VQConfig()).requires_grad_(False)
    vectors = model.vectors(pixels).flatten(0, -2)
    model.codebook.copy_(vectors[torch.arange(len(model.codebook)) % len(vectors)])
    return model


def _path(name: str) -> str:
    return "reference" if name == "reference" else "fused"


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _positions(x: MaskedInput) -> Tensor:
    """The mask as the codes lie: clips (B, T, h, w), images (M, h, w)."""
    return x.mask.repeat_interleave(2, dim=1) if x.mask.dim() == 4 else x.mask
