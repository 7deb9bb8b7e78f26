"""What problems look like to the code that verifies and times them.

`leaves` are the tensors that a contestant gets, by name; it maps them to output tensors, by name; `grads` are random
gradients of those outputs that have one. A problem without any is a forward pass alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from bevt_kernels import Spec, select
from bevt_kernels.baselines import Baseline
from bevt_kernels.testing import assert_within_budget
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.registry import DTYPES, QUANTITIES

Leaves = dict[str, Tensor]
Forward = Callable[[Leaves], Leaves]


@dataclass(frozen=True)
class Contestant:
    """Who computes it."""

    forward: Forward
    """Leaves -> outputs."""
    reasons: list[str]
    """Why it cannot run here; empty where it can."""
    ours: bool
    package: str = "bevt"
    """The distribution whose version it depends on."""
    lacks: str = ""
    """What of the task it does not do."""
    compiles: bool = False
    """Whether it is compiled for each case."""


@dataclass(frozen=True)
class Work:
    """What must be done at least; None where nobody counted it."""

    flop: int
    """Whole windows, used slots, no padding, nothing twice: of attention two products forward and four backward."""
    flop_unmasked: int | None = None
    """Without the pairs that a shift excludes; the others where there is no shift."""
    bytes: int | None = None
    """Each input read once, each output written once."""

    def less(self, flop: int) -> Work:
        """Without so many."""
        unmasked = None if self.flop_unmasked is None else self.flop_unmasked - flop
        return replace(self, flop=self.flop - flop, flop_unmasked=unmasked)


class Problem(ABC):
    """What the problems share."""

    names: tuple[str, ...]
    """Of the contestants."""
    quantities: tuple[str, ...] = QUANTITIES[:3]
    """What its rows say; of `registry.QUANTITIES`."""
    leaves: Leaves
    frozen: str | None = None
    """The leaf whose gradient "frozen table" leaves out."""
    direct_count = False
    """Whether convolutions are counted as direct ones, of which Winograd's multiply a quarter: no share of a limit."""
    grads: Leaves
    least, warm = 5, 2
    """Rounds that are timed, and before them some that are not."""
    contestants: dict[str, Contestant]

    def __init__(self, case: Any, device: str) -> None:
        self.case, self.device, self.dtype = case, device, DTYPES[device]

    def step(self, name: str, frozen: bool = False, mark: Callable[[], None] = lambda: None) -> Leaves:
        """One contestant's outputs and gradients, by name. `mark` is called between forward and backward."""
        leaves = {k: leaf.detach() if frozen and k == self.frozen else leaf for k, leaf in self.leaves.items()}
        return run(self.contestants[name].forward, leaves, self.grads, mark)

    def answer(self, name: str, frozen: bool = False) -> Leaves:
        """What is judged of a contestant: by default the step that is timed."""
        return self.step(name, frozen)

    @abstractmethod
    def truth(self) -> tuple[Leaves, Leaves]:
        """What `answer` should return, in float64, and what plain PyTorch makes of it in this dtype."""

    def judged(self, results: Leaves) -> Leaves:
        """Results as the error rule is applied to them."""
        return results

    def check(self, results: Leaves, oracle: Leaves, eager: Leaves, note: str, times: float) -> None:
        """Raise AssertionError unless `results` are right; all come from `judged`, `times` is the error rule's."""
        for what, result in results.items():
            assert_within_budget(result, eager[what], oracle[what], what + note, times)

    def kept(self, name: str) -> int:
        """Bytes that a contestant keeps between steps and that count as its memory."""
        return 0

    def spared(self, name: str) -> int:
        """FLOP of `work` that a contestant need not do."""
        return 0

    def notes(self, name: str, rounds: int) -> dict[str, Any]:
        """What else its rows say, of the last `rounds` steps."""
        return {}

    @abstractmethod
    def work(self) -> dict[str, Work]:
        """By quantity."""


def contestants(
    op: str,
    spec: Spec,
    ours: Callable[[str], Forward],
    rivals: Mapping[str, Baseline],
    theirs: Callable[[Callable[..., Any]], Forward],
) -> dict[str, Contestant]:
    """The op's implementations, then its rivals."""
    found = {impl: Contestant(ours(impl), select.reasons(op, impl, spec), True) for impl in select.IMPLEMENTATIONS}
    for name, rival in rivals.items():
        forward = theirs(rival.function)
        found[name] = Contestant(forward, rival.reasons(spec), False, rival.package, rival.lacks, rival.compiles)
    return found


def leaf(x: Tensor) -> Tensor:
    """`x` as a tensor that takes a gradient."""
    return x.detach().requires_grad_()


def run(forward: Forward, leaves: Leaves, grads: Leaves, mark: Callable[[], None] = lambda: None) -> Leaves:
    """Forward and backward: the outputs, and gradients of the leaves that take one, by name."""
    outputs = forward(leaves)
    mark()
    results = {name: out.detach() for name, out in outputs.items()}
    if grads:
        wanted = {name: x for name, x in leaves.items() if x.requires_grad}
        given = [grad.to(outputs[name].dtype) for name, grad in grads.items()]
        found = torch.autograd.grad([outputs[name] for name in grads], list(wanted.values()), given)
        results |= {f"grad {name}": grad for name, grad in zip(wanted, found)}
    return results


def counted(forward: Forward, leaves: Leaves, grads: Leaves) -> tuple[int, int]:
    """FLOP of forward and of backward, counted on tensors without data."""
    leaves, grads = ({name: x.to("meta") for name, x in tensors.items()} for tensors in (leaves, grads))
    marks: list[int] = []
    with FlopCounterMode(display=False) as counter:
        run(
            forward,
            {name: leaf(x) for name, x in leaves.items()},
            grads,
            lambda: marks.append(counter.get_total_flops()),
        )
    return marks[0], counter.get_total_flops() - marks[0]
