"""A registry case made runnable: inputs, contestants, the float64 truth, and the work that it takes at least.

Every problem looks the same to the code that verifies and times: `leaves` are the tensors that take gradients, by name;
a contestant maps such a dictionary to output tensors; `grads` are random gradients of the outputs.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from bevt_kernels import Spec, baselines, select, window_attention
from bevt_kernels.testing import WindowCase, eager_window_attention
from bevt_kernels.window_attention.boxes import segments
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.registry import DTYPES, OPS, StepCase
from bevt.config import SIZES
from bevt.models import video_swin

Leaves = dict[str, Tensor]
Forward = Callable[[Leaves], Tensor]
WindowFunction = Callable[[Tensor, Tensor, WindowCase], Tensor]


@dataclass(frozen=True)
class Contestant:
    """Who computes it."""

    forward: Forward
    """Leaves -> output."""
    reasons: list[str]
    """Why it cannot run here; empty where it can."""
    ours: bool
    package: str = "bevt"
    """The distribution whose version it depends on."""


@dataclass(frozen=True)
class Work:
    """What must be done at least; None where nobody counted it."""

    flop: int
    """By the op's formula: whole windows, no padding."""
    flop_unmasked: int | None = None
    """Without the pairs that a shift excludes."""
    bytes: int | None = None
    """Each input read once, each output written once."""


class Problem(ABC):
    """What the problems share."""

    leaves: Leaves
    frozen: str | None = None
    """The leaf whose gradient the last quantity leaves out."""
    grad: Tensor
    contestants: dict[str, Contestant]

    def __init__(self, case: Any, device: str) -> None:
        self.case, self.device, self.dtype = case, device, DTYPES[device]

    def step(self, name: str, frozen: bool = False, mark: Callable[[], None] = lambda: None) -> Leaves:
        """One contestant's output and gradients, by name. `mark` is called between forward and backward."""
        leaves = {k: leaf.detach() if frozen and k == self.frozen else leaf for k, leaf in self.leaves.items()}
        return _step(self.contestants[name].forward, leaves, self.grad, mark)

    @abstractmethod
    def truth(self) -> tuple[Leaves, Leaves]:
        """What `step` should return, in float64, and what plain PyTorch makes of it in this dtype."""

    def judged(self, results: Leaves) -> Leaves:
        """Results as the error rule is applied to them."""
        return results

    @abstractmethod
    def work(self) -> dict[str, Work]:
        """By quantity."""


def _impls(spec: Spec) -> dict[str, list[str]]:
    return {impl: select.reasons("window_attention", impl, spec) for impl in select.IMPLEMENTATIONS}


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


class WindowAttention(Problem):
    """The op: qkv and bias_table -> out."""

    case: WindowCase
    frozen = "bias_table"

    def __init__(self, case: WindowCase, device: str) -> None:
        super().__init__(case, device)
        qkv, table, self.grad = case.inputs(self.dtype, device=device)
        self.leaves = {"qkv": _leaf(qkv), "bias_table": _leaf(table)}
        spec = Spec(device, self.dtype, True, case.window, case.head_dim)
        self.contestants = {impl: Contestant(self._ours(impl), reasons, True) for impl, reasons in _impls(spec).items()}
        for name, baseline in baselines.WINDOW_ATTENTION.items():
            forward = self._rival(baseline.function)
            self.contestants[name] = Contestant(forward, baseline.reasons(spec), False, baseline.package)

    def _ours(self, impl: str) -> Forward:
        arguments: Any = self.case.keywords()
        return lambda x: window_attention(x["qkv"], x["bias_table"], impl=impl, **arguments)

    def _rival(self, function: WindowFunction) -> Forward:
        return lambda x: function(x["qkv"], x["bias_table"], self.case)

    def truth(self) -> tuple[Leaves, Leaves]:
        eager = self._rival(eager_window_attention)
        qkv, table = (leaf.detach().double() for leaf in self.leaves.values())
        # Clip by clip: one float64 score tensor of a clip is 0.3 GB in stage 1, and of 8 clips 2.5.
        clips = [
            _step(eager, {"qkv": _leaf(q), "bias_table": _leaf(table)}, g)
            for q, g in zip(qkv.split(1), self.grad.double().split(1))
        ]
        join = {"out": torch.cat, "grad qkv": torch.cat, "grad bias_table": sum}
        oracle: Leaves = {name: join[name]([clip[name] for clip in clips]) for name in join}  # type: ignore[operator]
        return oracle, _step(eager, self.leaves, self.grad)

    def work(self) -> dict[str, Work]:
        forward, backward = _counted(self._ours("reference"), self.leaves, self.grad)
        unmasked = math.prod(
            sum(length**2 for _, length in segments(size, w, s)) / (size * w)
            for size, w, s in zip(self.case.grid, self.case.window, self.case.shift)
        )
        qkv, table = (leaf.nbytes for leaf in self.leaves.values())
        out = self.grad.nbytes
        lse = 4 * out // (self.grad.element_size() * self.case.head_dim)  # float32, one a query and head
        moved = {"forward": qkv + table + out + lse, "backward": 2 * (qkv + table + out) + lse}
        flop = {"forward": forward, "backward": backward}
        works = {k: Work(flop[k], round(flop[k] * unmasked), moved[k]) for k in flop}
        both = Work(forward + backward, round((forward + backward) * unmasked), sum(moved.values()))
        return {**works, "forward+backward": both, "forward+backward, frozen table": both}


class VideoSwinStep(Problem):
    """Patch embedding and Video Swin: parameters -> the last stage's output. Under autocast where the dtype is half."""

    case: StepCase

    def __init__(self, case: StepCase, device: str) -> None:
        super().__init__(case, device)
        self.config = SIZES[case.size]
        torch.manual_seed(0)
        model = self._model("reference").apply(video_swin.init_weights).to(device)
        self.leaves = {name: _leaf(p) for name, p in model.named_parameters()}
        self.clip = torch.randn(case.batch, 3, case.frames, case.side, case.side).to(device)
        grid = (case.frames // 2, case.side // 32, case.side // 32)
        self.grad = torch.randn(case.batch, *grid, 8 * self.config.embed_dim).to(device)
        head_dim = self.config.embed_dim // self.config.num_heads[0]
        spec = Spec(device, self.dtype, True, self.config.window_size, head_dim)
        self.contestants = {
            impl: Contestant(self._forward(impl), reasons, True) for impl, reasons in _impls(spec).items()
        }
        self.contestants["eager"] = Contestant(self._forward("reference", baselines.eager), [], False, "torch")

    def _model(self, impl: str) -> nn.Module:
        config = replace(self.config, drop_path=0.0, attention_impl=impl)  # type: ignore[arg-type]
        embed = video_swin.PatchEmbed(video_swin.PATCH, config.embed_dim)
        return nn.Sequential(embed, video_swin.VideoSwin(config))

    def _forward(self, impl: str, function: WindowFunction | None = None) -> Forward:
        """The model with `impl`, or with a plain function in the op's place."""
        model = self._model(impl)

        def forward(leaves: Leaves) -> Tensor:
            clip = self.clip.to(next(iter(leaves.values())))
            autocast = torch.autocast(self.device, self.dtype, enabled=self.dtype.itemsize < clip.dtype.itemsize == 4)
            with autocast, _in_place_of_the_op(function) if function else contextlib.nullcontext():
                return torch.func.functional_call(model, leaves, (clip,))[-1].to(clip.dtype)

        return forward

    def judged(self, results: Leaves) -> Leaves:
        """Gradients of one kind together: the largest error of a LayerNorm's 96 numbers alone is a matter of luck."""
        kinds: dict[str, list[Tensor]] = {}
        for name, value in results.items():
            kinds.setdefault(".".join(name.split(".")[-2:]), []).append(value.flatten())
        return {kind: torch.cat(values) for kind, values in kinds.items()}

    def truth(self) -> tuple[Leaves, Leaves]:
        plain = self._forward("reference", eager_window_attention)
        double = {name: _leaf(leaf.double()) for name, leaf in self.leaves.items()}
        return _step(plain, double, self.grad.double()), _step(plain, self.leaves, self.grad)

    def work(self) -> dict[str, Work]:
        forward, backward = _counted(self.contestants["reference"].forward, self.leaves, self.grad)
        return {"forward": Work(forward), "backward": Work(backward), "forward+backward": Work(forward + backward)}


def _in_place_of_the_op(function: WindowFunction) -> contextlib.AbstractContextManager[object]:
    def attend(qkv: Tensor, table: Tensor, **k: Any) -> Tensor:
        b, depth, height, width, channels = qkv.shape
        heads, grid = k["num_heads"], (depth, height, width)
        case = WindowCase(
            b, grid, k["window_size"], k["shift"], k["table_window"], heads, head_dim=channels // (3 * heads)
        )
        return function(qkv, table, case)

    return mock.patch.object(video_swin, "window_attention", attend)


def _step(forward: Forward, leaves: Leaves, grad: Tensor, mark: Callable[[], None] = lambda: None) -> Leaves:
    """Forward and backward: the output, and gradients of the leaves that take one, by name."""
    out = forward(leaves)
    mark()
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(out, list(wanted.values()), grad)
    return {"out": out.detach(), **{f"grad {name}": g for name, g in zip(wanted, grads)}}


def _counted(forward: Forward, leaves: Leaves, grad: Tensor) -> tuple[int, int]:
    """FLOP of forward and of backward, counted on tensors without data."""
    leaves = {name: _leaf(leaf.to("meta")) for name, leaf in leaves.items()}
    with FlopCounterMode(display=False) as counter:
        out = forward(leaves)
        first = counter.get_total_flops()
        torch.autograd.grad(out, list(leaves.values()), grad.to("meta"))
    return first, counter.get_total_flops() - first


KINDS: dict[str, type[Problem]] = {"window_attention": WindowAttention, "video_swin_step": VideoSwinStep}


def build(op: str, case: str, device: str) -> Problem:
    """The problem of a registry case. Raises KeyError where it has no batch for the device."""
    entry = OPS[op].cases[case]
    return KINDS[op](replace(entry.case, batch=entry.batch[device]), device)
