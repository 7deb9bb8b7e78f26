"""What a run writes down, and how it ends where it cannot go on."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import changed, command, figures, room, same_tensors, train_rows, wait_until
from torch.distributed.checkpoint import FileSystemWriter

from bevt import cli
from bevt.config import Config
from bevt.data import DataError
from bevt.data.manifest import index
from bevt.models.bevt import BEVT
from bevt.train import checkpoint
from bevt.train.metrics import Display, MetricsWriter, RunError, read_rows
from bevt.train.optim import build_optimizer
from bevt.train.phases import PHASES
from bevt.train.pretrain import build_model, pretrain

KEYS = [
    *("event", "step", "loss", "loss_clips", "accuracy_clips", "loss_images", "accuracy_images", "grad_norm", "lr"),
    *("step_seconds", "data_wait", "clips_per_second", "images_per_second", "replaced"),
    *(f"{phase}_seconds" for phase in PHASES),
    "memory_gib",
]


def scalars(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Every TensorBoard scalar of a run: (step, value), in order."""
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def assert_same_scalars(out: Path) -> None:
    """TensorBoard holds what `metrics.jsonl` does, in float32."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for row in read_rows(out / "metrics.jsonl"):
        for name, value in row.items():
            if name not in ("event", "step"):
                expected.setdefault(f"{row['event']}/{name}", []).append((row["step"], pytest.approx(value, rel=1e-6)))
    assert scalars(out) == expected


def test_rows(finished: Path, config: Config) -> None:
    """One a step, complete, finite, the same in TensorBoard."""
    rows = train_rows(finished)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(sorted(row) == sorted(KEYS) for row in rows)
    assert rows[0]["lr"] == pytest.approx(0.1 * config.optim.lr)
    shares = []
    for row in rows:
        assert row["loss"] == pytest.approx(row["loss_clips"] + row["loss_images"], rel=1e-5)
        assert 0 <= row["data_wait"] <= 1
        assert row["clips_per_second"] == pytest.approx(2 / row["step_seconds"])
        assert row["images_per_second"] == pytest.approx(4 / row["step_seconds"])
        phases = [row[f"{phase}_seconds"] for phase in PHASES]
        assert min(phases) > 0
        assert sum(phases) < 1.01 * row["step_seconds"]
        shares.append(sum(phases) / row["step_seconds"])
        assert 0.05 < row["memory_gib"] < 16
    assert max(shares) > 0.5  # what the phases leave is a checkpoint's, or the wait for a core
    assert_same_scalars(finished)
    assert json.loads((finished / "config.json").read_text())["train"]["clips"] == 2


def test_rows_of_several_steps(finished: Path, config: Config, tmp_path: Path) -> None:
    """Every fourth step and the last: means since the row before."""
    pretrain(changed(config, train={"log_every": 4, "checkpoint_every": 100}), tmp_path, quiet=True)
    single, means = train_rows(finished), train_rows(tmp_path)
    assert [row["step"] for row in means] == [4, 6]
    for row, steps in zip(means, (single[:4], single[4:])):
        for key in ("loss", "loss_clips", "accuracy_images", "grad_norm"):
            assert row[key] == pytest.approx(sum(step[key] for step in steps) / len(steps), rel=1e-6)


def test_one_stream_has_no_rows_of_the_other(config: Config, tmp_path: Path) -> None:
    """Images alone."""
    pretrain(changed(config, train={"clips": 0}, optim={"max_steps": 1}), tmp_path, quiet=True)
    (row,) = train_rows(tmp_path)
    assert sorted(row) == sorted(key for key in KEYS if "clips" not in key)


def test_a_continued_file_has_every_step_once(tmp_path: Path) -> None:
    """Rows past the checkpoint and a line cut by a kill go; TensorBoard forgets the same."""
    writer = MetricsWriter(tmp_path, 0)
    for step in (1, 2, 3, 4):
        writer.write({"event": "train", "step": step, "loss": 10.0 + step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "step": 5, "lo')
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]

    writer = MetricsWriter(tmp_path, 2)
    for step in (3, 4):
        writer.write({"event": "train", "step": step, "loss": 20.0 + step})
    writer.write({"event": "eval", "step": 4, "val_loss_clips": 1.0})
    writer.close()
    losses = [(1, 11.0), (2, 12.0), (3, 23.0), (4, 24.0)]
    assert [(row["step"], row["loss"]) for row in read_rows(tmp_path / "metrics.jsonl")[:4]] == losses
    assert scalars(tmp_path) == {"train/loss": losses, "eval/val_loss_clips": [(4, 1.0)]}

    MetricsWriter(tmp_path, 4).close()
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["event"] for row in rows] == ["train"] * 4, (
        "the evaluation comes after the last checkpoint: it is redone"
    )


def test_a_gradient_that_is_not_finite_ends_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At step 3 of 6: parameter and inputs are named, weights and optimizer stay, and no checkpoint is written."""
    parameter = "encoder.layers.2.blocks.1.mlp.fc1.weight"
    seen: dict[str, Any] = {"backwards": 0}

    def poisoned(*arguments: Any) -> BEVT:
        model = seen["model"] = build_model(*arguments)
        model.get_parameter(parameter).register_hook(poison)
        return model

    def optimizer(*arguments: Any, **keywords: Any) -> torch.optim.Optimizer:
        seen["optimizer"] = build_optimizer(*arguments, **keywords)
        return seen["optimizer"]

    def poison(gradient: torch.Tensor) -> torch.Tensor:
        seen["backwards"] += 1
        if seen["backwards"] < 9:  # two streams in each of two micro-batches a step
            return gradient
        seen.setdefault("weights", {name: value.clone() for name, value in seen["model"].state_dict().items()})
        return gradient.fill_(torch.nan)

    monkeypatch.setattr("bevt.train.pretrain.build_model", poisoned)
    monkeypatch.setattr("bevt.train.pretrain.build_optimizer", optimizer)
    with pytest.raises(RunError) as caught:
        pretrain(changed(config, train={"checkpoint_every": 1}), tmp_path, quiet=True)

    message = str(caught.value)
    assert message.startswith("step 3: the loss or a gradient is not finite (loss ")
    assert "grad_norm nan" in message
    assert f"the gradient of {parameter} is the first that is not" in message
    assert f"its 6 inputs are listed in {tmp_path / 'nonfinite.json'}" in message
    report = json.loads((tmp_path / "nonfinite.json").read_text(), parse_constant=pytest.fail)
    assert (report["step"], report["parameter"], report["values"]["grad_norm"]) == (3, parameter, "nan")
    assert report["values"]["loss"] == pytest.approx(report["values"]["loss_clips"] + report["values"]["loss_images"])
    assert len(report["inputs"]) == 6
    assert sum(".mp4@" in name or ".webm@" in name or ".jpg" in name for name in report["inputs"]) == 6

    saved = checkpoint.load(tmp_path / "checkpoints" / "last")
    assert saved["step"] == 2
    for state in (seen["model"].state_dict(), seen["weights"]):
        assert all(torch.equal(value, saved["model"][name]) for name, value in state.items())
    same_tensors(saved, seen["model"], seen["optimizer"])
    assert [row["step"] for row in train_rows(tmp_path)] == [1, 2]


def test_a_disk_that_fills_up(config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From step 4 on: another checkpoint is tried at once, its failure told, and the run goes on from step 2."""
    original = FileSystemWriter.write_data

    def write(self: FileSystemWriter, *arguments: Any) -> Any:
        if "step_00000002" not in str(self.path):
            raise OSError(28, "No space left on device")
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", write)
        says = r"cannot write .*step_0000000[56]: No space left on device; make room .* continue with --resume"
        with pytest.raises(checkpoint.CheckpointError, match=says):
            pretrain(config, tmp_path, quiet=True)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["last", "step_00000002"]
    assert train_rows(tmp_path)[-1]["step"] in (5, 6)
    assert pretrain(config, tmp_path, resume=True, quiet=True).finished
    assert figures(tmp_path) == figures(finished)


@pytest.mark.parametrize(
    "row",
    [{"text": 20_000 * "x"}, {f"v{i}": 1 for i in range(1000)}],  # longer than its numbers, or shorter
    ids=["metrics.jsonl", "tensorboard"],
)
def test_a_disk_that_takes_no_more_rows(
    config: Config,
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    row: dict[str, Any],
) -> None:
    """In the middle of row 3, of either file: one line says so, and the run goes on from step 2 as if undisturbed."""

    class Full(MetricsWriter):
        def write(self, given: dict[str, Any]) -> None:
            if given["step"] == 3:
                wait_until((tmp_path / "checkpoints" / "last").exists, "no checkpoint of step 2")
                disk.enter_context(room(15_000))
                given = {**given, **row}
            super().write(given)

    with ExitStack() as disk, monkeypatch.context() as patch:
        patch.setattr("bevt.train.loop.MetricsWriter", Full)
        with pytest.raises(SystemExit, match="2"):
            cli.main(command(config, tmp_path)[3:])
    assert capfd.readouterr().err == (
        f"bevt: cannot write the rows of {tmp_path}: File too large; make room or mend the folder, then continue with "
        "--resume\n"
    )
    assert pretrain(config, tmp_path, resume=True, quiet=True).finished
    assert figures(tmp_path) == figures(finished)
    assert_same_scalars(tmp_path)


def test_files_that_turn_unreadable(config: Config, tmp_path: Path) -> None:
    """Two clips are cut short after they were indexed: the run goes on, and lists what it read in their place."""
    folder, manifest = tmp_path / "clips", tmp_path / "clips.jsonl"
    shutil.copytree(config.data.clips, folder, ignore=shutil.ignore_patterns(".*"))
    index(str(folder), "clips", cache=manifest)
    broken = sorted(path for path in folder.rglob("*") if path.is_file())[:2]
    for path in broken:
        path.write_bytes(path.read_bytes()[:200])
    out = tmp_path / "run"
    assert pretrain(changed(config, data={"clips": str(manifest)}), out, quiet=True).finished
    listed = read_rows(out / "bad_files.jsonl")
    assert {row["path"] for row in listed} == {str(path) for path in broken}
    for row in listed:
        assert set(row) == {"stream", "position", "path", "error", "replaced_by"}
        assert row["stream"] == "clips"
        assert row["error"]
        assert row["replaced_by"] not in {str(path) for path in broken}


@pytest.mark.parametrize("failing", ["build_model", "build_optimizer", "MetricsWriter", "TrainStep"])
def test_the_terminal_is_left_as_it_was(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """Wherever a run fails, the progress bar, which hides the cursor, is taken down."""
    displays: list[Display] = []

    class Terminal(Display):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
            super().__init__(*arguments, **options)
            displays.append(self)

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr("bevt.train.loop.Display", Terminal)
    module = "loop" if failing == "MetricsWriter" else "pretrain"
    monkeypatch.setattr(f"bevt.train.{module}.{failing}", fail)
    with pytest.raises(RuntimeError, match="no"):
        pretrain(config, tmp_path, quiet=False)
    (display,) = displays
    assert display._bar is not None
    assert not display._bar.live.is_started


def test_lines_without_a_terminal(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line a log step with the losses, the speed, and the time to go."""
    pretrain(changed(config, optim={"max_steps": 2}), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("joint_stage: clips + images, 0.6 M parameters, float32, 1 x cpu")
    assert "2 steps of 2 clips + 4 images, 3.5 steps an epoch, 2 micro-batches a step and process" in lines
    last = next(line for line in lines if line.startswith("step 2/2"))
    for part in ("loss ", "clips ", "images ", "acc ", "clips/s", "images/s", "data wait", "ETA 0:00"):
        assert part in last
    assert figures(tmp_path)[1]["loss"] == pytest.approx(float(last.split("loss ")[1].split()[0]), abs=1e-3)


def test_unreadable_held_out_data_is_refused_before_the_run(config: Config, tmp_path: Path) -> None:
    """Not after it: a run takes days."""
    held_out = tmp_path / "held_out"
    held_out.mkdir()
    (held_out / "notes.mp4").write_text("not a video")
    with pytest.raises(DataError, match=r"(?s)held-out data is never replaced.*notes\.mp4: not a video"):
        pretrain(changed(config, data={"val_clips": str(held_out)}), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_files_that_the_index_knows_to_be_unreadable_are_listed_once(config: Config, tmp_path: Path) -> None:
    """In `bad_files.jsonl`, at the start; the epoch keeps its length, and a resumed run does not list them again."""
    shutil.copytree(config.data.clips, tmp_path / "clips", ignore=shutil.ignore_patterns(".*"))
    (tmp_path / "clips" / "notes.mp4").write_text("not a video")
    broken = changed(config, data={"clips": str(tmp_path / "clips")})
    out = tmp_path / "run"
    pretrain(broken, out, quiet=True)
    pretrain(broken, out, quiet=True, resume=True)
    (row,) = [
        json.loads(line) for line in (out / "bad_files.jsonl").read_text().splitlines() if '"position": -1' in line
    ]
    assert row["path"] == str(tmp_path / "clips" / "notes.mp4")
    assert row["replaced_by"] == "the next readable file of the epoch"
