"""Multi-view tests: equal to a slow loop over single views, on one process and two, from a dump; what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import ENVIRONMENT, ROOT, TORCHRUN, changed, output
from torch import Tensor

from bevt import cli
from bevt.config import IMAGENET, ConfigError, FinetuneConfig
from bevt.data.build import make_backend
from bevt.data.classes import class_numbers
from bevt.data.manifest import index
from bevt.data.sampling import Sampler
from bevt.evaluate.classification import ORDERS, classify, reordered
from bevt.evaluate.predictions import Predictions
from bevt.evaluate.scores import scores
from bevt.models.names import WeightsError
from bevt.train import checkpoint
from bevt.train.distributed import World
from bevt.train.finetune import build_classifier, finetune, initialise, restore
from bevt.train.memory import views_at_once

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
CLASSES = ("0", "1", "2")


@pytest.fixture(scope="module")
def exact(tuned: FinetuneConfig) -> FinetuneConfig:
    """In float64, so that what is equal is equal."""
    return changed(tuned, train={"precision": "float64"})


@pytest.fixture(scope="module")
def model(exact: FinetuneConfig) -> torch.nn.Module:
    torch.manual_seed(3)
    model = build_classifier(exact, 3, CPU)
    for p in model.parameters():  # far from its start, so that views differ
        torch.nn.init.normal_(p, std=0.3)

    return model


def slow(config: FinetuneConfig, model: torch.nn.Module, frames: str = "normal") -> np.ndarray:
    """(files, clips, crops, classes): one view at a time, read and normalised by hand."""
    manifest = index(config.data.val_clips, "clips")
    sampler = Sampler(manifest, config.data, "clips", 0, train=False)
    backend = make_backend("pyav", config.data)
    out = []
    for number in range(len(manifest.entries)):
        for request in sampler.grid(number, config.test.clips, config.test.crops):
            view = torch.zeros(config.data.frames, config.data.crop, config.data.crop, 3, dtype=torch.uint8)
            backend.read([request], [view])
            view = {"normal": view, "reversed": view.flip(0), "single": view[[2, 2, 2, 2]]}[frames]
            mean, std = torch.tensor(IMAGENET.mean), torch.tensor(IMAGENET.std)
            pixels = ((view.float() - mean) / std).permute(3, 0, 1, 2).unsqueeze(0)
            with torch.no_grad():
                out.append(model.eval()(pixels)[0].softmax(0))
    return torch.stack(out).view(len(manifest.entries), config.test.clips, config.test.crops, -1).numpy()


def predicted(config: FinetuneConfig, model: torch.nn.Module, **options: object) -> dict[str, Predictions]:
    manifest = index(config.data.val_clips, "clips")
    labels = class_numbers(manifest, "list", CLASSES, numbered=True)
    given = {"views": config.views, "labels": labels, **options}
    found = classify(model, config, manifest, CLASSES, ALONE, **given)  # type: ignore[arg-type]
    return {order: predictions for (_, order), predictions in found.items()}


def test_views_equal_a_slow_loop(exact: FinetuneConfig, model: torch.nn.Module) -> None:
    """Six views of each file, and all of one file together."""
    found = predicted(exact, model)["normal"]
    wanted = slow(exact, model)
    np.testing.assert_allclose(found.probabilities, wanted, rtol=1e-6)
    assert wanted.reshape(3, 6, 3).std(1).max() > 1e-4, "the views do not differ: nothing was tested"
    np.testing.assert_allclose(found.video_level(), wanted.reshape(3, 6, 3).mean(1), rtol=1e-6)
    assert found.labels.tolist() == [0, 1, 2]
    right = (wanted.reshape(3, 6, 3).mean(1).argmax(1) == [0, 1, 2]).mean()
    assert scores(found).top1 == pytest.approx(right)


@pytest.mark.parametrize("order", ["reversed", "single"])
def test_other_orders_equal_a_slow_loop(exact: FinetuneConfig, model: torch.nn.Module, order: str) -> None:
    found = predicted(exact, model, orders=ORDERS)
    np.testing.assert_allclose(found[order].probabilities, slow(exact, model, order), rtol=1e-6)
    assert np.abs(found[order].probabilities - found["normal"].probabilities).max() > 1e-4


def test_shuffled_frames_are_all_there(tuned: FinetuneConfig) -> None:
    """A permutation for each seed, the same wherever it is in the batch; not the identity for all."""
    clips = torch.arange(8, dtype=torch.uint8).view(1, 8, 1, 1, 1).expand(5, 8, 2, 2, 3)
    found = reordered(clips, "shuffled", np.arange(5))[:, :, 0, 0, 0]
    assert all(sorted(row) == list(range(8)) for row in found.tolist())
    assert len({tuple(row) for row in found.tolist()}) == 5
    assert torch.equal(reordered(clips[:1], "shuffled", np.array([3]))[0, :, 0, 0, 0], found[3])


def test_the_memory_limit_changes_nothing(
    exact: FinetuneConfig, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many views go through together: one, four (a file's six in two parts), or all."""
    wanted = predicted(exact, model)["normal"].probabilities
    for most in (1, 4, 6, 100):
        monkeypatch.setattr("bevt.evaluate.classification.views_at_once", lambda *_, most=most: most)
        np.testing.assert_allclose(predicted(exact, model)["normal"].probabilities, wanted, rtol=1e-6)


def test_views_that_fit(tuned: FinetuneConfig) -> None:
    """More memory, more views, in proportion; never none."""
    few, many = (views_at_once(changed(tuned, test={"memory": m}), 3, "cpu") for m in (0.1, 1.0))
    assert 5 < few < many
    assert many / few == pytest.approx(10, rel=0.2)
    assert views_at_once(changed(tuned, test={"memory": 1e-6}), 3, "cpu") == 1


class Recorder(torch.nn.Module):
    """Counts the views that go through it at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, pixels: Tensor) -> Tensor:
        self.seen.append(len(pixels))
        return torch.zeros(len(pixels), 3)


def test_views_go_through_together(exact: FinetuneConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many whole files as fit; of one that does not fit, as many of its views."""
    for most, seen in ((12, [12, 6]), (4, [4, 2] * 3), (100, [18])):
        monkeypatch.setattr("bevt.evaluate.classification.views_at_once", lambda *_, most=most: most)
        recorder = Recorder()
        predicted(exact, recorder)
        assert recorder.seen == seen


def test_a_model_is_left_as_it_was(exact: FinetuneConfig, model: torch.nn.Module) -> None:
    model.train()
    predicted(exact, model)
    assert model.training


@pytest.fixture(scope="module")
def run(exact: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in float64."""
    out = tmp_path_factory.mktemp("tested") / "run"
    finetune(exact, out, quiet=True)
    return out


def bevt(*words: str, python: tuple[str, ...] = (sys.executable,)) -> subprocess.CompletedProcess[str]:
    """What became of a command."""
    command = [*python, "-m", "bevt", *words]
    return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200, check=False)


@pytest.fixture(scope="module")
def tested(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes: scores, classes, confusion, dump."""
    out = tmp_path_factory.mktemp("tested") / "alone"
    output([sys.executable, "-m", "bevt", *words(run, out)])
    return out


def words(run: Path, out: Path, *more: str) -> list[str]:
    return [
        "test",
        "ssv2",
        str(run / "checkpoints" / "last"),
        "--out",
        str(out),
        "--dump",
        str(out / "views.parquet"),
        *more,
    ]


def test_two_processes_test_what_one_does(run: Path, tested: Path, tmp_path: Path) -> None:
    """Three files on two processes: none twice, none left out, all figures equal."""
    output([*TORCHRUN, "-m", "bevt", *words(run, tmp_path / "two")])
    one, two = (Predictions.load(out / "views.parquet") for out in (tested, tmp_path / "two"))
    assert one.files == two.files
    assert len(set(one.files)) == 3
    assert one.probabilities.shape == (3, 2, 3, 3)
    np.testing.assert_allclose(two.probabilities, one.probabilities, rtol=1e-6)
    scored = [json.loads((out / "scores.json").read_text())["normal"] for out in (tested, tmp_path / "two")]
    assert scored[0] == scored[1]
    assert (tested / "classes.csv").read_text() == (tmp_path / "two" / "classes.csv").read_text()


def test_scores_from_the_dump(tested: Path, tmp_path: Path) -> None:
    """The same figures without the model and the files."""
    output([sys.executable, "-m", "bevt", "test", "--from-dump", str(tested / "views.parquet"), "--out", str(tmp_path)])
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads((tested / "scores.json").read_text())
    assert (tmp_path / "classes.csv").read_text() == (tested / "classes.csv").read_text()
    assert (tmp_path / "confusion.png").stat().st_size > 1000


def test_the_checkpoints_model_is_tested(exact: FinetuneConfig, run: Path, tested: Path) -> None:
    """The averaged weights', by the slow loop."""
    model, classes = restore(run / "checkpoints" / "last", exact, CPU)
    average = checkpoint.load(run / "checkpoints" / "last")["average"]
    assert all(torch.equal(p, average[name]) for name, p in model.named_parameters())
    assert classes == CLASSES
    np.testing.assert_allclose(Predictions.load(tested / "views.parquet").probabilities, slow(exact, model), rtol=1e-6)


def test_temporal_dependency(run: Path, tmp_path: Path) -> None:
    printed = output([sys.executable, "-m", "bevt", *words(run, tmp_path, "--temporal")])
    assert all(f"{order}: top-1" in printed for order in ORDERS)
    assert json.loads((tmp_path / "scores.json").read_text()).keys() >= set(ORDERS)


def test_flags_change_the_protocol(run: Path, tmp_path: Path) -> None:
    printed = output([sys.executable, "-m", "bevt", *words(run, tmp_path, "--test.clips", "1", "--test.crops", "1")])
    assert "3 files, 1 x 1 views each" in printed


def test_unreadable_files_are_refused(run: Path, lists: Path, tmp_path: Path) -> None:
    """With the list, before and while they are decoded."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(b"no video")
    good = sorted((lists / "val_clips").glob("*.mp4"))[0]
    shutil.copy(good, tmp_path / "c.mp4")
    (tmp_path / "list.txt").write_text("a.mp4 0\nb.mp4 1\nc.mp4 2\n")
    done = bevt(*words(run, tmp_path / "out", "--data.val-clips", str(tmp_path / "list.txt")))
    assert done.returncode == 2
    assert "2 of 3 files cannot be read; held-out data is never replaced" in done.stderr
    assert "a.mp4" in done.stderr
    assert "b.mp4" in done.stderr
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("python", [(sys.executable,), TORCHRUN], ids=["one", "two"])
def test_files_that_turn_out_unreadable(run: Path, lists: Path, tmp_path: Path, python: tuple[str, ...]) -> None:
    """Damaged in the middle, where indexing does not look: every one is named, by one process or two."""
    sources = sorted((lists / "val_clips").glob("*.mp4")) + sorted((lists / "train_clips").glob("*.mp4"))
    names = []
    for i, source in enumerate(sources[:4]):
        bytes_ = bytearray(source.read_bytes())
        if i:
            middle = len(bytes_) * 2 // 5
            bytes_[middle : middle + 900] = bytes(900)
        (tmp_path / f"{i}.mp4").write_bytes(bytes_)
        names.append(f"{i}.mp4")
    (tmp_path / "list.txt").write_text("".join(f"{name} {i % 3}\n" for i, name in enumerate(names)))
    done = bevt(*words(run, tmp_path / "out", "--data.val-clips", str(tmp_path / "list.txt")), python=python)
    assert done.returncode != 0
    named = [name for name in names if name in done.stderr]
    assert len(named) >= 2, done.stderr
    assert "0.mp4:" not in done.stderr


def test_a_checkpoint_of_pretraining(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["test", "k400", str(finished / "checkpoints" / "last")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "is a checkpoint of pretraining ('joint_stage'), which knows no classes: finetune it first" in said


def test_a_checkpoint_of_another_recipe(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["test", "k400", str(run / "checkpoints" / "last")])
    assert "was made by recipe 'ssv2': say `bevt test ssv2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["test", "ssv2"], "name the model: bevt test ssv2 CHECKPOINT"),
        (
            ["test", "ssv2", "nowhere.pth", "--data.val-clips", "x"],
            "no checkpoint, and no file of weights, at nowhere.pth",
        ),
        (["test", "ssv2", __file__, "--data.val-clips", "x"], "--out is needed"),
        (["test", "ssv2", __file__], "data.val_clips is empty"),
        (["test", "ssv2", __file__, "--data.val-clips", "x", "--out", "y", "--dump", "/dev/full"], "ends in .parquet"),
        (["test", "--from-dump", "none.parquet"], "no predictions none.parquet"),
        (["predict", "v.mp4", "--checkpoint", "nowhere"], "no checkpoint at nowhere"),
    ],
)
def test_what_is_refused(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(argv)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stream", "window", "message"),
    [
        (
            "clips",
            (4, 3, 3),
            r"of another shape: encoder\.layers\.0.*relative_position_bias_table.*; to be tested",
        ),
        ("images", (2, 3, 3), r"missing: patch_embed\.proj\.weight.*; to be tested"),
    ],
)
def test_a_file_of_weights_is_tested_as_it_is(
    stream: str, window: tuple[int, int, int], message: str, exact: FinetuneConfig, tmp_path: Path
) -> None:
    """Tables are not resized, images are not inflated: with --init they are."""
    made = changed(exact, model={"window_size": window})
    trained = made if stream == "clips" else changed(made, train={"clips": 0, "images": 4})
    torch.save(build_classifier(trained, 3, CPU).state_dict(), tmp_path / "w.pth")
    tested = changed(exact, model={"window_size": (2, 3, 3)})
    with pytest.raises(WeightsError, match=message):
        restore(tmp_path / "w.pth", tested, CPU)
    start = replace(tested, init=str(tmp_path / "w.pth"))
    assert "tensors loaded" in initialise(build_classifier(start, 3, CPU), start)


def test_labels_that_the_model_does_not_know(run: Path, lists: Path, tmp_path: Path) -> None:
    good = sorted((lists / "val_clips").glob("*.mp4"))[0]
    shutil.copy(good, tmp_path / "c.mp4")
    (tmp_path / "list.txt").write_text("c.mp4 7\n")
    done = bevt(*words(run, tmp_path / "out", "--data.val-clips", str(tmp_path / "list.txt")))
    assert done.returncode == 2
    assert "none of the 3 classes (0 to 2): c.mp4 has 7" in done.stderr


def test_predict(run: Path, lists: Path, tmp_path: Path) -> None:
    """The classes in order of probability, as the test has them, and a picture."""
    video = sorted((lists / "val_clips").iterdir())[1]
    last, picture = str(run / "checkpoints" / "last"), str(tmp_path / "p.png")
    options = ["--checkpoint", last, "--out", picture, "--top", "2"]
    printed = output([sys.executable, "-m", "bevt", "predict", str(video), *options])
    lines = printed.splitlines()
    assert len(lines) == 3
    shares = [float(line.split("%")[0]) for line in lines[:2]]
    assert shares == sorted(shares, reverse=True)
    assert (tmp_path / "p.png").stat().st_size > 1000


@pytest.mark.parametrize("what", ["absent", "folder", "text"])
def test_predict_what_is_no_video(run: Path, tmp_path: Path, what: str) -> None:
    path = tmp_path / f"{what}.mp4"
    if what == "folder":
        path.mkdir()
    elif what == "text":
        path.write_text("no video")
    done = bevt(
        "predict", str(path), "--checkpoint", str(run / "checkpoints" / "last"), "--out", str(tmp_path / "p.png")
    )
    assert done.returncode == 2
    assert str(path) in done.stderr
    assert "Traceback" not in done.stderr


def test_pretrain_is_not_finetune() -> None:
    """Recipes of one command are unknown to the other, which names the nearest."""
    with pytest.raises(ConfigError, match="no recipe 'joint_stage'"):
        cli._finetune(["joint_stage"])
