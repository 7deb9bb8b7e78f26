"""Learning classes of real videos through the command line: a list of absolute paths, finetune, test, predict."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny import changed, command, output, train_rows

from bevt.config import IMAGENET, FinetuneConfig
from bevt.data.augment import to_encoder_clips
from bevt.data.build import make_backend
from bevt.data.manifest import index
from bevt.data.sampling import Sampler
from bevt.evaluate.predictions import Predictions
from bevt.models import vit_names
from bevt.models.classifier import build
from bevt.recipes import FINETUNE_RECIPES

pytest.importorskip("av", reason="PyAV is not installed: pip install av")

BEVT = (sys.executable, "-m", "bevt")


@pytest.fixture(scope="module")
def videos(real_clips: Path) -> list[Path]:
    """The four, in the order of their classes."""
    return sorted(path for path in real_clips.iterdir() if path.suffix in (".mp4", ".avi"))


@pytest.fixture(scope="module")
def run(tuned: FinetuneConfig, videos: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of one frame of each of eight parts, 64 pixels."""
    folder = tmp_path_factory.mktemp("real")
    listed = folder / "list.txt"
    listed.write_text("".join(f"{path.absolute()} {number}\n" for number, path in enumerate(videos)))
    config = changed(
        tuned,
        data={"clips": str(listed), "val_clips": str(listed), "sampling": "segments", "frames": 8},
        optim={"max_steps": 2, "epochs": 2},
        test={"clips": 4, "crops": 3},
    )
    printed = output(command(config, folder / "run"))
    assert "4 classes: 0, 1, 2, 3" in printed
    assert "finished at step 2 of 2" in printed
    assert len(train_rows(folder / "run")) == 2
    assert not (folder / "run" / "bad_files.jsonl").exists()
    return folder / "run"


@pytest.fixture(scope="module")
def tested(run: Path) -> Path:
    """What the test wrote, where it writes by default."""
    dump = str(run / "views.parquet")
    printed = output([*BEVT, "test", "ssv2", str(run / "checkpoints" / "last"), "--dump", dump])
    assert "4 files, 4 x 3 views each" in printed
    return run / "test"


@pytest.fixture(scope="module")
def dumped(tested: Path) -> Predictions:
    return Predictions.load(tested.parent / "views.parquet")


def test_the_dump_has_every_view(dumped: Predictions, videos: list[Path]) -> None:
    """Twelve of each file, with its label; the crops of a file differ, and so do its clips."""
    assert [Path(name).name for name in dumped.files] == [path.name for path in videos]
    assert dumped.classes == ("0", "1", "2", "3")
    assert dumped.labels.tolist() == [0, 1, 2, 3]
    assert dumped.probabilities.shape == (4, 4, 3, 4)
    np.testing.assert_allclose(dumped.probabilities.sum(-1), 1, rtol=1e-5)
    assert (np.ptp(dumped.probabilities, axis=1).max(-1) > 0).any()
    assert (np.ptp(dumped.probabilities, axis=2).max(-1) > 0).all()


def test_scores_are_those_of_the_dump(tested: Path, dumped: Predictions) -> None:
    """Accuracies by hand, from the mean over the twelve views."""
    said = json.loads((tested / "scores.json").read_text())
    assert (said["recipe"], said["clips"], said["crops"]) == ("ssv2", 4, 3)
    right = dumped.probabilities.reshape(4, 12, 4).mean(1).argmax(1) == np.arange(4)
    assert said["normal"]["top1"] == pytest.approx(right.mean())
    assert said["normal"]["mean_class"] == pytest.approx(right.mean()), "of one file each"
    rows = list(csv.DictReader((tested / "classes.csv").read_text().splitlines()))
    assert len(rows) == 4
    with Image.open(tested / "confusion.png") as picture:
        picture.load()
        assert min(picture.size) > 100


def test_a_prediction_is_the_tests(run: Path, dumped: Predictions, videos: list[Path], tmp_path: Path) -> None:
    """The mean over the same twelve views, to a tenth of a per cent, and a picture."""
    last = str(run / "checkpoints" / "last")
    picture = tmp_path / "prediction.png"
    printed = output([*BEVT, "predict", str(videos[3]), "--checkpoint", last, "--out", str(picture)])
    said = {words[2]: float(words[0]) for line in printed.splitlines() if len(words := line.split()) == 3}
    assert said.keys() == set(dumped.classes)
    for name, share in zip(dumped.classes, dumped.probabilities[3].reshape(12, 4).mean(0)):
        assert said[name] == pytest.approx(100 * share, abs=0.051), name
    with Image.open(picture) as image:
        image.load()
        assert min(image.size) > 100


def test_published_weights_of_videomae(videos: list[Path], tmp_path: Path) -> None:
    """A file by Hugging Face's names (of one block, else VideoMAE-B's size), tested as it is: 5 x 3 views of each."""
    recipe = FINETUNE_RECIPES["videomae_k400"]()
    config = changed(recipe, model={"depth": 1})
    torch.manual_seed(0)
    model = build(config, 4)
    torch.nn.init.normal_(model.head.weight)
    file, listed = tmp_path / "model.safetensors", tmp_path / "list.txt"
    save_file(vit_names.to_hugging_face(model.state_dict(), "videomae"), file)
    listed.write_text("".join(f"{path.absolute()} {number}\n" for number, path in enumerate(videos)))
    words = [*BEVT, "test", "videomae_k400", str(file), "--model.depth", "1", "--data.val-clips", str(listed)]
    words += ["--train.precision", "float32", "--out", str(tmp_path / "test"), "--dump", str(tmp_path / "out.parquet")]
    printed = output([*words, "--test.memory", "1", "--data.workers", "0"], timeout=300)
    assert "4 files, 5 x 3 views each" in printed
    dump = Predictions.load(tmp_path / "out.parquet")
    assert dump.probabilities.shape == (4, 5, 3, 4)
    # By hand: one view of one file, decoded and cut by the same requests.
    manifest = index(str(listed), "clips")
    view = Sampler(manifest, config.data, "clips", 0, train=False).grid(2, 5, 3)[7]
    frames = torch.empty(1, 16, 224, 224, 3, dtype=torch.uint8)
    make_backend("pyav", config.data).read([view], [frames[0]])
    with torch.no_grad():
        expected = model.eval()(to_encoder_clips(frames, IMAGENET)).softmax(-1)[0]
    np.testing.assert_allclose(dump.probabilities[2, 2, 1], expected, rtol=1e-4, atol=1e-6)
