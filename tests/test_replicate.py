"""The replication's machinery, at one step a training: its plan, that it goes on where it was cut, and its report."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path

import pytest

from bevt import replicate
from bevt.data import shapes
from bevt.replicate import MASKS, STARTS, SYSTEMS, Job, plan, run_jobs, verdict
from bevt.train.loop import hold
from bevt.train.metrics import RunError

FEW = {"train_clips": 12, "val_clips": 6, "train_images": 6, "val_images": 6}


def test_plan_has_every_start_labelling_and_seed(dataset: shapes.ShapesPaths, tmp_path: Path) -> None:
    """What is waited for comes before who waits; a job for each, tested after it is tuned."""
    jobs = plan(tmp_path, dataset, tmp_path / "vq.safetensors", seeds=3)
    names = [job.name for job in jobs]
    pretrained = [name for name, start in replicate.every_start().items() if start.recipe]
    tuned = 2 * len(STARTS) + len(MASKS) + len(SYSTEMS)
    assert len(set(names)) == len(names) == len(pretrained) + 2 * 3 * tuned
    for i, job in enumerate(jobs):
        assert all(names.index(before) < i for before in job.after)
        init = job.words[job.words.index("--init") + 1] if "--init" in job.words else ""
        started = [Path(init).parts[-3]] if init else []
        assert started == [name for name in job.after if job.words[0] != "test"]


def test_orderings_name_starts() -> None:
    assert {name for _, _, *pair in replicate.ORDERINGS for name in pair} <= replicate.every_start().keys()


@pytest.mark.parametrize(
    ("better", "other", "expected"),
    [
        ((0.6, 0.7, 0.8), (0.5, 0.6, 0.7), ("comes out", 10)),
        ((0.6, 0.5, 0.8), (0.5, 0.6, 0.7), ("unclear", 10 / 3)),
        ((0.5, 0.5, 0.5), (0.5, 0.6, 0.7), ("does not come out", -10)),
        ((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), ("tie", 0)),
    ],
)
def test_verdicts(better: tuple[float, ...], other: tuple[float, ...], expected: tuple[str, float]) -> None:
    figures = {name: {"how": [{"normal": value} for value in values]} for name, values in (("a", better), ("b", other))}
    word, difference = verdict(figures, "how", "a", "b")
    assert (word, pytest.approx(difference)) == expected


class Silent:
    """A console."""

    def print(self, text: str) -> None:
        """Nothing."""


def test_a_job_that_fails_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"wrong ended with status 2; what it said is in .*wrong.log"):
        run_jobs([Job("wrong", ("finetune", "nothing"))], tmp_path, Silent())  # type: ignore[arg-type]
    assert "no recipe 'nothing'" in (tmp_path / "logs" / "wrong.log").read_text()
    assert not list((tmp_path / "done").iterdir())


def test_a_small_replication(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four starts, a mask and three systems, one seed: a row of each in the report; a second call runs nothing."""
    kept = ("random", "bevt_i", "bevt_v", "bevt")
    monkeypatch.setattr(replicate, "STARTS", {name: STARTS[name] for name in kept})
    monkeypatch.setattr(replicate, "MASKS", {"random_3d": MASKS["random_3d"]})
    systems = ("timesformer_bevt_i", "videomae", "vivit_2")
    monkeypatch.setattr(replicate, "SYSTEMS", {name: SYSTEMS[name] for name in systems})
    names = {*kept, "random_3d", *systems}
    monkeypatch.setattr(replicate, "ORDERINGS", tuple(o for o in replicate.ORDERINGS if set(o[2:]) <= names))
    folder = replicate.replicate(tmp_path, 1, counts=FEW, steps=1, fit_steps=2)
    text = (folder / "README.md").read_text()
    assert all(f"| {STARTS[name].title} |" in text for name in kept)
    assert "| Random-3D |" in text
    assert all(f"| {SYSTEMS[name].title} |" in text for name in systems)
    assert "| BEVT from BEVT-I above BEVT-I (SSv2 70.6, 69.2) | how |" in text
    assert (folder / "starts.png").stat().st_size > 1000
    figures = json.loads((folder / "results.json").read_text())
    assert figures["bevt"]["how"][0].keys() == {"normal", "single", "shuffled", "reversed"}
    assert figures["random_3d"].keys() == figures["videomae"].keys() == {"how"}
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "done").iterdir()}
    assert len(before) == 4 + 2 + 2 * (4 * 2 + 1 + 3)
    replicate.replicate(tmp_path, 1, counts=FEW, steps=1, fit_steps=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "done").iterdir()} == before
    with pytest.raises(RunError, match=r"holds a replication with other settings.*: name another --out"):
        replicate.replicate(tmp_path, 1, counts=FEW, steps=2, fit_steps=2)


def test_a_folder_of_an_earlier_version_is_refused(tmp_path: Path) -> None:
    """Whose settings nobody wrote down."""
    (tmp_path / "done").mkdir()
    with pytest.raises(RunError, match="holds a replication with other settings"):
        replicate.replicate(tmp_path, 1, counts=FEW, steps=1, fit_steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_one_at_a_time(tmp_path: Path) -> None:
    with ExitStack() as stack:
        hold(tmp_path, stack)
        with pytest.raises(RunError, match="another process is at work in"):
            replicate.replicate(tmp_path, 1, counts=FEW, steps=1, fit_steps=2)
