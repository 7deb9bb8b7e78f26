"""Steps of other systems: the same result by each contestant, work counted right, a machine without the package."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import memory, registry, run, verify
from benchmarks.problems import yardstick
from benchmarks.problems.yardstick import VideoMAECase, VideoMAEStep, ViTStep, tube_masks
from benchmarks.registry import OPS, Entry, Op, ViTCase

TINY = VideoMAECase(2, frames=4, side=64, size="tiny")
CLASSIFIERS = [ViTCase(2, kind, frames=4, side=64, size="tiny") for kind in ("vivit_1", "timesformer")]


def test_tubes_hide_nine_of_ten_patches() -> None:
    mask = tube_masks(3, (8, 14, 14))
    assert mask.shape == (3, 8 * 14 * 14)
    frames = mask.view(3, 8, 14 * 14)
    assert bool((frames == frames[:, :1]).all()), "a tube is the same patch in all frames"
    assert frames.sum(-1).unique().tolist() == [176]
    assert not torch.equal(frames[0], frames[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_each_attention_gives_the_same_step(
    flava: ModuleType, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setitem(registry.DTYPES, "cpu", dtype)
    problem = VideoMAEStep(TINY, "cpu")
    assert [problem.models[name].config._attn_implementation for name in ("sdpa", "eager")] == ["sdpa", "eager"]
    able = [name for name in problem.names if not problem.contestants[name].reasons]
    assert able == list(problem.names[dtype == torch.bfloat16 :]), "the native layers are for float32"
    good, wrong = verify.contestants(problem, able)
    assert (good, wrong) == (able, {})
    kinds = problem.judged(problem.step("reference"))
    assert {"loss", "grad query.weight", "grad head.weight", "grad encoder_to_decoder.weight"} <= set(kinds)
    assert all(bool(x.any()) for x in kinds.values()), "a gradient is zero: its parameter takes no part"


@pytest.mark.parametrize("case", CLASSIFIERS, ids=["vivit_1", "timesformer"])
def test_each_classifier_gives_the_same_step(flava: ModuleType, case: ViTCase) -> None:
    problem = ViTStep(case, "cpu")
    good, wrong = verify.contestants(problem, list(problem.names))
    assert (good, wrong) == (list(problem.names), {})
    assert ("hugging face sdpa" in problem.names) == (case.kind == "vivit_1"), "TimeSformer's is eager there"


@pytest.mark.parametrize("case", CLASSIFIERS, ids=["vivit_1", "timesformer"])
def test_work_of_classifiers_is_what_torch_counts(flava: ModuleType, case: ViTCase) -> None:
    problem = ViTStep(case, "cpu")
    marks: list[int] = []
    with FlopCounterMode(display=False) as counter:
        problem.step("hugging face eager", mark=lambda: marks.append(counter.get_total_flops()))
    assert problem.work()["forward"].flop == marks[0]


def test_work_is_what_torch_counts_but_for_hidden_patches(flava: ModuleType) -> None:
    problem = VideoMAEStep(TINY, "cpu")
    marks: list[int] = []
    with FlopCounterMode(display=False) as counter:
        problem.step("hugging face eager", mark=lambda: marks.append(counter.get_total_flops()))
    embedded = 2 * int(problem.mask.sum()) * (3 * 2 * 16 * 16) * 48
    work = problem.work()
    assert work["forward"].flop == marks[0] - embedded
    assert work["backward"].flop == counter.get_total_flops() - marks[0] - embedded


def test_a_run_has_rows_of_both(
    flava: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    registered(monkeypatch)
    rows = run.measure("videomae_step", "tiny", "cpu")
    assert {(row["contestant"], row["quantity"]) for row in rows} == {
        (name, quantity) for name in VideoMAEStep.names for quantity in VideoMAEStep.quantities
    }
    assert all(row["version"][0].isdigit() for row in rows), "the version of transformers"
    assert "within the error rule: native, reference, hugging face sdpa, hugging face eager" in capsys.readouterr().out


def test_without_transformers_nobody_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    registered(monkeypatch)
    monkeypatch.setattr(yardstick.importlib.util, "find_spec", lambda name: None)
    yardstick._transformers_reasons.cache_clear()
    try:
        rows = run.measure("videomae_step", "tiny", "cpu")
    finally:
        yardstick._transformers_reasons.cache_clear()
    why = "cannot run: transformers is not installed: pip install transformers"
    assert f"hugging face sdpa {why}" in capsys.readouterr().out
    assert [(row["contestant"], row["absent"], row["p50_ms"]) for row in rows] == [
        (name, why, None) for name in VideoMAEStep.names
    ]


def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op under a name, with one small case, no memory processes and little time."""
    monkeypatch.setitem(OPS, "videomae_step", Op({"tiny": Entry("tiny", TINY, {"cpu": 1})}, ()))
    monkeypatch.setattr(memory, "peaks", lambda *_: {})
    monkeypatch.setattr(run, "SECONDS", {"cpu": 0.0})
