"""The ops themselves."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bevt_kernels import Spec, conv3x3, linear, linear_argmax, masked_linear_cross_entropy, window_attention
from bevt_kernels.baselines import CONV3X3, LINEAR, LINEAR_ARGMAX, MASKED_LINEAR_CROSS_ENTROPY, WINDOW_ATTENTION
from bevt_kernels.conv3x3.api import outputs_adjacent
from bevt_kernels.select import IMPLEMENTATIONS
from bevt_kernels.testing import (
    ArgmaxCase,
    ConvCase,
    LinearCase,
    LossCase,
    WindowCase,
    assert_accuracy,
    assert_argmax,
    eager_masked_linear_cross_entropy,
    eager_window_attention,
    eager_winograd,
)
from bevt_kernels.window_attention.boxes import segments
from torch import Tensor

from benchmarks.problems.base import Forward, Leaves, Problem, Work, contestants, counted, leaf, run
from benchmarks.registry import QUANTITIES

FORWARD, _, BOTH, FROZEN, _ = QUANTITIES
Size3 = tuple[int, int, int]


def allowed(grid: Size3, window: Size3, shift: Size3) -> float:
    """The share of a map's pairs of tokens in one window that its shift does not exclude; `grid` in whole windows."""
    return math.prod(
        sum(length**2 for _, length in segments(size, w, s)) / (size * w) for size, w, s in zip(grid, window, shift)
    )


class WindowAttention(Problem):
    """qkv and bias_table -> out."""

    case: WindowCase
    names = (*IMPLEMENTATIONS, *WINDOW_ATTENTION)
    quantities = (*Problem.quantities, FROZEN)
    frozen = "bias_table"

    def __init__(self, case: WindowCase, device: str) -> None:
        super().__init__(case, device)
        qkv, table, grad = case.inputs(self.dtype, device=device)
        self.leaves = {"qkv": leaf(qkv), "bias_table": leaf(table)}
        self.grads = {"out": grad}
        spec = Spec(device, self.dtype, True, case.window, case.head_dim)
        self.contestants = contestants("window_attention", spec, self._ours, WINDOW_ATTENTION, self._rival)

    def _ours(self, impl: str) -> Forward:
        arguments: Any = self.case.keywords()
        return lambda x: {"out": window_attention(x["qkv"], x["bias_table"], impl=impl, **arguments)}

    def _rival(self, function: Callable[..., Tensor]) -> Forward:
        return lambda x: {"out": function(x["qkv"], x["bias_table"], self.case)}

    def truth(self) -> tuple[Leaves, Leaves]:
        """Clip by clip: one float64 score tensor of a clip is 0.3 GB in stage 1, and of 8 clips 2.5."""
        eager = self._rival(eager_window_attention)
        qkv, table = (x.detach().double() for x in self.leaves.values())
        clips = [
            run(eager, {"qkv": leaf(q), "bias_table": leaf(table)}, {"out": g})
            for q, g in zip(qkv.split(1), self.grads["out"].double().split(1))
        ]
        join = {"out": torch.cat, "grad qkv": torch.cat, "grad bias_table": sum}
        oracle: Leaves = {name: join[name]([clip[name] for clip in clips]) for name in join}  # type: ignore[operator]
        return oracle, run(eager, self.leaves, self.grads)

    def work(self) -> dict[str, Work]:
        forward, _ = counted(self._ours("reference"), self.leaves, {})
        unmasked = allowed(self.case.grid, self.case.window, self.case.shift)
        qkv, table = (x.nbytes for x in self.leaves.values())
        grad = self.grads["out"]
        out = grad.nbytes
        lse = 4 * out // (grad.element_size() * self.case.head_dim)  # float32, one a query and head
        moved = {"forward": qkv + table + out + lse, "backward": 2 * (qkv + table + out) + lse}
        flop = {"forward": forward, "backward": 2 * forward}
        works = {k: Work(flop[k], round(flop[k] * unmasked), moved[k]) for k in flop}
        both = Work(3 * forward, round(3 * forward * unmasked), sum(moved.values()))
        return {**works, "forward+backward": both, FROZEN: both}


class MaskedLinearCrossEntropy(Problem):
    """hidden, weight and bias -> loss and accuracy.

    Only forward and backward together have rows: some make the gradients in their forward pass, some later.
    """

    case: LossCase
    names = (*IMPLEMENTATIONS, *MASKED_LINEAR_CROSS_ENTROPY)
    quantities = (BOTH,)

    def __init__(self, case: LossCase, device: str) -> None:
        super().__init__(case, device)
        *floats, self.targets, self.index, grad = case.inputs(self.dtype, device=device)
        self.leaves = {name: leaf(x) for name, x in zip(("hidden", "weight", "bias"), floats)}
        self.grads = {"loss": grad}
        spec = Spec(device, self.dtype, True, classes=case.classes)
        op = "masked_linear_cross_entropy"
        self.contestants = contestants(op, spec, self._ours, MASKED_LINEAR_CROSS_ENTROPY, self._rival)

    def _outputs(self, function: Callable[..., tuple[Tensor, Tensor | None]], *more: Any, **keywords: Any) -> Forward:
        def forward(x: Leaves) -> Leaves:
            loss, accuracy = function(*x.values(), self.targets, self.index, *more, **keywords)
            return {"loss": loss} if accuracy is None else {"loss": loss, "accuracy": accuracy}

        return forward

    def _ours(self, impl: str) -> Forward:
        return self._outputs(masked_linear_cross_entropy, impl=impl)

    def _rival(self, function: Callable[..., Any]) -> Forward:
        return self._outputs(function, self.case)

    def truth(self) -> tuple[Leaves, Leaves]:
        eager = self._outputs(eager_masked_linear_cross_entropy)
        double = {name: leaf(x.double()) for name, x in self.leaves.items()}
        grads = {"loss": self.grads["loss"].double()}
        return run(eager, double, grads), run(eager, self.leaves, self.grads)

    def check(self, results: Leaves, oracle: Leaves, eager: Leaves, note: str, times: float) -> None:
        """Accuracy is a count, and judged as one; a rival's loss in a half dtype by what that can hold."""
        results = dict(results)
        if "accuracy" in results:
            hidden, weight, bias = self.leaves.values()
            assert_accuracy(results.pop("accuracy"), hidden, weight, bias, self.targets, self.index)
        super().check(results, oracle, {**eager, "loss": eager["loss"].to(results["loss"].dtype)}, note, times)

    def work(self) -> dict[str, Work]:
        """Three products over the used slots. Of hidden the used rows are read, and all gradients written."""
        case, size = self.case, self.dtype.itemsize
        flop = 3 * 2 * case.used * case.channels * case.classes
        read = (case.used + case.classes) * case.channels * size + case.classes * size + 16 * case.slots
        written = (case.rows + case.classes) * case.channels * size + case.classes * size
        return {BOTH: Work(flop, flop, read + written)}


class LinearArgmax(Problem):
    """x, weight and bias -> codes."""

    case: ArgmaxCase
    names = (*IMPLEMENTATIONS, *LINEAR_ARGMAX)
    quantities = (FORWARD,)

    def __init__(self, case: ArgmaxCase, device: str) -> None:
        super().__init__(case, device)
        self.leaves = dict(zip(("x", "weight", "bias"), case.inputs(self.dtype, device=device)))
        self.grads = {}
        spec = Spec(device, self.dtype)
        self.contestants = contestants("linear_argmax", spec, self._ours, LINEAR_ARGMAX, self._rival)

    def _ours(self, impl: str) -> Forward:
        return lambda x: {"codes": linear_argmax(*x.values(), impl=impl)}

    def _rival(self, function: Callable[..., Tensor]) -> Forward:
        return lambda x: {"codes": function(*x.values(), self.case)}

    def truth(self) -> tuple[Leaves, Leaves]:
        """Nothing: a code is judged by the logits of its row, as several may be right."""
        return {}, {}

    def check(self, results: Leaves, oracle: Leaves, eager: Leaves, note: str, times: float) -> None:
        assert_argmax(results["codes"], *self.leaves.values())

    def work(self) -> dict[str, Work]:
        case = self.case
        flop = 2 * case.rows * case.channels * case.classes
        return {FORWARD: Work(flop, flop, sum(x.nbytes for x in self.leaves.values()) + 8 * case.rows)}


class Linear(Problem):
    """x, weight and bias -> out."""

    case: LinearCase
    names = (*IMPLEMENTATIONS, *LINEAR)

    def __init__(self, case: LinearCase, device: str) -> None:
        super().__init__(case, device)
        *leaves, grad = case.inputs(self.dtype, device=device)
        self.leaves = {name: leaf(x) for name, x in zip(("x", "weight", "bias"), leaves)}
        self.grads = {"out": grad}
        self.contestants = contestants("linear", Spec(device, self.dtype, True), self._ours, LINEAR, self._rival)

    def _ours(self, impl: str) -> Forward:
        return lambda x: {"out": linear(*x.values(), impl=impl)}

    def _rival(self, function: Callable[..., Tensor]) -> Forward:
        return lambda x: {"out": function(*x.values(), self.case)}

    def truth(self) -> tuple[Leaves, Leaves]:
        eager: Forward = lambda x: {"out": F.linear(*x.values())}  # noqa: E731
        double = {name: leaf(x.double()) for name, x in self.leaves.items()}
        return run(eager, double, {"out": self.grads["out"].double()}), run(eager, self.leaves, self.grads)

    def work(self) -> dict[str, Work]:
        """One product forward and two backward."""
        case = self.case
        flop = 2 * case.rows * case.channels * case.outputs
        inputs, out = sum(x.nbytes for x in self.leaves.values()), self.grads["out"].nbytes
        forward, backward = Work(flop, flop, inputs + out), Work(2 * flop, 2 * flop, 2 * inputs + out)
        return {
            "forward": forward,
            "backward": backward,
            BOTH: Work(3 * flop, 3 * flop, 3 * inputs + 2 * out),
        }


class Conv3x3(Problem):
    """x, weight and bias -> out; forward alone. Judged beside Winograd's algorithm in plain PyTorch."""

    case: ConvCase
    names = (*IMPLEMENTATIONS, *CONV3X3)
    quantities = (FORWARD,)
    direct_count = True

    def __init__(self, case: ConvCase, device: str) -> None:
        super().__init__(case, device)
        x, weight, bias = case.inputs(self.dtype, device=device)
        self.leaves = {"x": x, "weight": outputs_adjacent(weight), "bias": bias}  # as the tokenizer keeps it
        self.direct = weight.contiguous(memory_format=torch.channels_last)  # as the library has it best
        self.grads = {}
        self.contestants = contestants("conv3x3", Spec(device, self.dtype), self._ours, CONV3X3, self._rival)

    def _ours(self, impl: str) -> Forward:
        return lambda x: {"out": conv3x3(*x.values(), relu=self.case.relu, impl=impl)}

    def _rival(self, function: Callable[..., Tensor]) -> Forward:
        return lambda x: {"out": function(x["x"], self.direct, x["bias"], self.case)}

    def truth(self) -> tuple[Leaves, Leaves]:
        direct = CONV3X3["eager"].function
        x, weight, bias = self.leaves.values()
        double = direct(x.double(), weight.double(), bias.double(), self.case)
        return {"out": double}, {"out": eager_winograd(x, weight, bias, self.case.relu)}

    def work(self) -> dict[str, Work]:
        """The direct convolution's FLOP."""
        case = self.case
        pixels = case.images * case.height * case.width
        flop = 2 * 9 * pixels * case.channels * case.outputs
        moved = sum(x.nbytes for x in self.leaves.values()) + pixels * case.outputs * self.dtype.itemsize
        return {FORWARD: Work(flop, flop, moved)}
