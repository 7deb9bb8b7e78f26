"""The tests' own tools: input factories reach the corners, rules let through what is right and nothing else."""

from dataclasses import replace

import pytest
import torch
from bevt_kernels.testing import (
    ArgmaxCase,
    LossCase,
    assert_accuracy,
    assert_argmax,
    eager_masked_linear_cross_entropy,
    random_argmax_case,
    random_loss_case,
)

HALF = [torch.bfloat16, torch.float16]


def test_random_loss_cases_reach_the_corners() -> None:
    cases = [random_loss_case(seed) for seed in range(200)]
    assert len(set(cases)) > 180
    for corner in (
        [c for c in cases if c.rows == 0],
        [c for c in cases if c.rows == 1],
        [c for c in cases if c.rows % 2],
        [c for c in cases if c.slots == 0],
        [c for c in cases if c.slots and not c.used],
        [c for c in cases if c.slots and c.slots == c.used],
        [c for c in cases if c.duplicates and c.used > c.rows],
        [c for c in cases if c.classes == 1],
        [c for c in cases if c.classes > 1024 and c.classes % 16],
    ):
        assert len(corner) >= 3, corner
    assert all(c.slots * c.channels * c.classes <= 2**24 or c.slots == 1 for c in cases)
    assert {random_argmax_case(seed).rows for seed in range(200)} >= {0, 1, 63, 65}


@pytest.mark.parametrize("seed", range(20))
def test_inputs_are_as_the_case_says(seed: int) -> None:
    case = random_loss_case(seed)
    hidden, weight, bias, targets, index, grad = case.inputs(torch.bfloat16, seed)
    assert (hidden.shape, weight.shape) == ((case.rows, case.channels), (case.classes, case.channels))
    assert (bias.shape, targets.shape, index.shape) == ((case.classes,), (case.slots,), (case.slots,))
    assert grad.dtype == torch.float32
    used = index >= 0
    assert used.sum() == case.used
    assert ((index >= -1) & (index < case.rows))[used].all()
    assert ((targets >= 0) & (targets < case.classes))[used].all()
    assert case.duplicates or index[used].unique().numel() == case.used
    again = case.inputs(torch.bfloat16, seed)
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, bias, targets, index, grad), again))


def test_inputs_are_the_same_numbers_in_every_dtype() -> None:
    case = LossCase(9, 8, 7, 6, 5)
    assert torch.equal(case.inputs(torch.float64)[0].bfloat16(), case.inputs(torch.bfloat16)[0])


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_accuracy_of_eager_passes_and_its_neighbours_do_not(dtype: torch.dtype) -> None:
    case = LossCase(600, 64, 1000, 500, 400)
    *inputs, _ = case.inputs(dtype)
    accuracy = eager_masked_linear_cross_entropy(*inputs)[1]
    assert 0.2 < accuracy < 0.5
    assert_accuracy(accuracy, *inputs)
    with pytest.raises(AssertionError, match="no multiple of 1/400"):
        assert_accuracy(accuracy + 0.3 / 400, *inputs)
    for step in (-5, 5):
        with pytest.raises(AssertionError, match=r"accuracy: \d+ of 400 slots, expected"):
            assert_accuracy(accuracy + step / 400, *inputs)


def test_accuracy_without_used_slots_is_zero() -> None:
    *inputs, _ = replace(LossCase(9, 8, 7, 6, 5), used=0).inputs(torch.float32)
    assert_accuracy(torch.tensor(0.0), *inputs)
    with pytest.raises(AssertionError, match="expected 0 to 0"):
        assert_accuracy(torch.tensor(1.0), *inputs)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF], ids=str)
def test_argmax_in_any_order_passes_and_a_second_best_does_not(dtype: torch.dtype) -> None:
    x, weight, bias = inputs = ArgmaxCase(300, 64, 1000).inputs(dtype)
    order = torch.randperm(64)
    codes = (x.float()[:, order] @ weight.float()[:, order].t() + bias.float()).argmax(1)
    assert_argmax(codes, *inputs)
    logits = x.double() @ weight.double().t() + bias.double()
    second = codes.clone()
    second[7] = logits[7].topk(2).indices[1]
    with pytest.raises(AssertionError, match=r"1 of rows 0\.\.299 are not the largest logit; row 7 is"):
        assert_argmax(second, *inputs)
    with pytest.raises(AssertionError, match="are no class"):
        assert_argmax(codes + 1000, *inputs)
