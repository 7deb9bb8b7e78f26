"""The command line as a person uses it: what works, and what a mistake is answered with."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from bevt_kernels import native

from bevt import cli
from bevt.cli import main
from bevt.data import shapes
from bevt.tokenizers.dalle import DalleEncoder, DalleTokenizer
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train import pretrain

Run = Callable[..., tuple[int, str, str]]

TINY = [
    "--model.embed-dim", "16", "--model.depths", "1", "1", "1", "1", "--model.num-heads", "1", "2", "4", "8",
    "--data.crop", "64", "--data.short-side", "64", "80", "--data.workers", "0",
    "--clip-mask.min-block", "4", "--image-mask.min-block", "4",
    "--train.precision", "float32", "--train.threads", "1", "--train.log-every", "1",
    "--train.clips", "2", "--train.micro-clips", "2", "--train.images", "2", "--train.micro-images", "2",
]  # fmt: skip


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("pretrain", ...)` -> (exit status, standard output, standard error)."""

    def call(*argv: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return int(stop.value.code or 0), out, err

    return call


@pytest.fixture(scope="module")
def vq(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer file; its codes mean nothing."""
    torch.manual_seed(0)
    model = VQModel(VQConfig(image_size=32, vocab_size=32, code_dim=4, width=8, blocks=0))
    torch.nn.init.normal_(model.codebook)
    path = tmp_path_factory.mktemp("vq") / "vq.safetensors"
    VQTokenizer(model).save(path)
    return path


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, dataset: shapes.ShapesPaths) -> tuple[Path, Path]:
    """The embedded dataset's clips (H.264 and VP9) beside an MPEG-4 `old.avi` and a `short.mp4`; its JPEGs."""
    root = tmp_path_factory.mktemp("folders")
    clips, images = root / "clips", root / "images"
    shutil.copytree(dataset.train_clips, clips, ignore=shutil.ignore_patterns(".*"))
    shutil.copytree(dataset.train_images, images, ignore=shutil.ignore_patterns(".*"))
    _encode(clips / "old.avi", "mpeg4", 30)
    _encode(clips / "short.mp4", "libx264", 12)
    return clips, images


def _encode(path: Path, codec: str, frames: int) -> None:
    """A video of 96x80: a bar that moves."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 80, "yuv420p"
        for i in range(frames):
            pixels = np.full((80, 96, 3), 60, np.uint8)
            pixels[:, 3 * i : 3 * i + 9] = 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def real_folders(tmp_path_factory: pytest.TempPathFactory, real_clips: Path) -> tuple[Path, Path]:
    """The four real clips (H.264 and MPEG-4), and twelve JPEGs of their frames."""
    root = tmp_path_factory.mktemp("real")
    clips, images = root / "clips", root / "images"
    shutil.copytree(real_clips, clips, ignore=shutil.ignore_patterns(".*"))
    images.mkdir()
    for source in sorted(clips.iterdir()):
        with av.open(str(source)) as video:
            for i, frame in zip(range(3), video.decode(video=0)):
                frame.to_image().save(images / f"{source.stem}_{i}.jpg")
    return clips, images


def _pretrain(folders: tuple[Path, Path], vq: Path, out: Path, *more: object) -> list[object]:
    clips, images = folders
    command = ["pretrain", "joint_stage", "--out", out, "--data.clips", clips, "--data.images", images]
    return [*command, "--tokenizer.kind", "vq", "--tokenizer.path", vq, "--optim.max-steps", 2, *TINY, *more]


def test_both_streams_run_on_real_clips_and_jpegs(
    run: Run, real_folders: tuple[Path, Path], vq: Path, tmp_path: Path
) -> None:
    status, out, err = run(*_pretrain(real_folders, vq, tmp_path / "run"))
    assert status == 0, err
    assert "finished at step 2 of 2" in out
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(np.isfinite(row[f"loss_{stream}"]) for row in rows for stream in ("clips", "images"))


@pytest.mark.slow
def test_the_joint_stage_at_full_size_on_real_clips(run: Run, real_folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Swin-B at 16x224x224 and the DALL-E encoder, both with random weights: the recipe itself, one clip, one image."""
    torch.manual_seed(0)
    DalleTokenizer(DalleEncoder()).save(tmp_path / "encoder.safetensors")
    clips, images = real_folders
    status, out, err = run(
        *("pretrain", "joint_stage", "--out", tmp_path / "run", "--data.clips", clips, "--data.images", images),
        *("--tokenizer.path", tmp_path / "encoder.safetensors", "--optim.max-steps", 1, "--train.log-every", 1),
        *("--train.clips", 1, "--train.micro-clips", 1, "--train.images", 1, "--train.micro-images", 1),
        *("--train.precision", "float32", "--data.workers", 1),
    )
    assert status == 0, err
    assert "clips + images, 109.7 M parameters" in out
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert row["loss_clips"] == pytest.approx(np.log(8192), abs=1.0)  # an untrained head spreads over all codes
    assert row["loss_images"] == pytest.approx(np.log(8192), abs=1.0)


def test_exit_status_of_a_stopped_run(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """3; under torchrun, which would start it again, 0."""
    monkeypatch.setattr(pretrain, "pretrain", lambda *_, **__: pretrain.RunResult(3, 10, tmp_path / "a", {}))
    status, out, _ = run("pretrain", "joint_stage", "--out", tmp_path)
    assert (status, out) == (3, f"stopped, to be continued with --resume, at step 3 of 10: {tmp_path / 'a'}\n")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert run("pretrain", "joint_stage", "--out", tmp_path)[0] == 0


def test_an_interrupt_that_a_library_turns_into_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch does that was writing a checkpoint."""

    def interrupted(_: list[str]) -> int:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("unexpected pos") from None
        return 0

    before = [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(cli, "_dispatch", interrupted)
    try:
        status, _, err = run("doctor")
    finally:
        for each, handler in before:
            signal.signal(each, handler)
    assert (status, err) == (130, "bevt: interrupted\n")


def test_a_clip_shorter_than_its_frames_loops(run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    shutil.copy(folders[0] / "short.mp4", clips)  # 12 frames; the recipe spans 121
    status, _, err = run(*_pretrain((clips, folders[1]), vq, tmp_path / "run"))
    assert status == 0, err


def test_an_empty_folder(run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    status, _, err = run(*_pretrain((tmp_path / "empty", folders[1]), vq, tmp_path / "run"))
    assert status == 2
    assert f"no clips in the folder {tmp_path / 'empty'}: looked for .mp4" in err


def test_a_folder_that_does_not_exist(run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path) -> None:
    status, _, err = run(*_pretrain((folders[0], tmp_path / "absent"), vq, tmp_path / "run"))
    assert status == 2
    assert f"{tmp_path / 'absent'} does not exist" in err


def test_a_text_file_called_mp4(run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "notes.mp4").write_text("not a video")
    status, _, err = run(*_pretrain((clips, folders[1]), vq, tmp_path / "run"))
    assert status == 2
    assert f"none of the 1 clips in {clips} can be read" in err
    assert "notes.mp4" in err


def test_a_truncated_video(
    run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    data = (folders[0] / "0000.mp4").read_bytes()
    (clips / "cut.mp4").write_bytes(data[: len(data) // 2])
    status, _, err = run(*_pretrain((clips, folders[1]), vq, tmp_path / "run"))
    assert status == 2
    assert "cut.mp4" in err
    # Beside a whole one, that one is read in its place, and the log names it.
    shutil.copy(folders[0] / "old.avi", clips)
    status, _, err = run(*_pretrain((clips, folders[1]), vq, tmp_path / "run"))
    assert status == 0, err
    assert f"{clips / 'cut.mp4'}: cut off: " in caplog.text
    assert f"{clips}: 1 of 2 files cannot be read" in caplog.text


def test_a_mask_that_does_not_fit(run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path) -> None:
    more = ("--data.workers", 1, "--image-mask.min-block", 100)
    status, _, err = run(*_pretrain(folders, vq, tmp_path / "run", *more))
    assert status == 2
    assert "image_mask.min_block = 100 must lie in 1..8" in err
    assert not multiprocessing.active_children()


def test_a_key_that_does_not_exist(run: Run) -> None:
    status, _, err = run("pretrain", "joint_stage", "--optim.lrr", 1)
    assert status == 2
    assert "no option --optim.lrr; the nearest is --optim.lr" in err


def test_a_recipe_that_does_not_exist(run: Run) -> None:
    status, _, err = run("pretrain", "joint_stag")
    assert status == 2
    assert "no recipe 'joint_stag'; the nearest is 'joint_stage'" in err


def test_help_of_a_recipe_says_what_it_is(run: Run) -> None:
    for command in ("pretrain", "budget"):
        status, out, _ = run(command, "mask_ablation", "--help")
        assert status == 0
        assert "Random-3D           --clip-mask.kind random_3d" in out


def test_a_command_that_does_not_exist(run: Run) -> None:
    status, _, err = run("tokeniser", "fit")
    assert status == 2
    assert "no command 'tokeniser fit'; the nearest is 'tokenizer fit'" in err


def test_a_value_of_the_wrong_type(run: Run) -> None:
    status, out, err = run("pretrain", "joint_stage", "--out", "x", "--optim.lr", "fast")
    assert status == 2
    assert "--optim.lr" in out + err


def test_a_checkpoint_of_another_size(run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path) -> None:
    assert run(*_pretrain(folders, vq, tmp_path / "small"))[0] == 0
    init = tmp_path / "small" / "checkpoints" / "last"
    status, _, err = run(*_pretrain(folders, vq, tmp_path / "large", "--init", init, "--model.embed-dim", 32))
    assert status == 2
    assert str(init) in err
    assert "of another shape: mask_token (1, 1, 16) for (1, 1, 32)" in err


def test_a_file_that_is_no_checkpoint(run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path) -> None:
    status, _, err = run(*_pretrain(folders, vq, tmp_path / "run", "--init", vq))
    assert status == 2
    assert f"{vq} is no checkpoint" in err
    assert len(err.splitlines()) == 1


def test_an_output_folder_that_cannot_be_written(
    run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/run"), tmp_path / "file", tmp_path / "file" / "run"):
        status, _, err = run(*_pretrain(folders, vq, out))
        assert status == 2
        assert f"--out {out}" in err


def test_an_existing_run_is_not_overwritten(run: Run, folders: tuple[Path, Path], vq: Path, tmp_path: Path) -> None:
    assert run(*_pretrain(folders, vq, tmp_path / "run"))[0] == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    status, _, err = run(*_pretrain(folders, vq, tmp_path / "run"))
    assert status == 2
    assert "already holds a run: continue it with --resume" in err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_tokenizer_that_is_not_there(run: Run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    status, _, err = run(*_pretrain(folders, tmp_path / "absent.safetensors", tmp_path / "run"))
    assert status == 2
    assert f"no file {tmp_path / 'absent.safetensors'}" in err


def test_tokenizer_fit_then_pretrain(run: Run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    clips, images = folders
    tokenizer = tmp_path / "tokenizer.safetensors"
    status, out, err = run(
        *("tokenizer", "fit", "--out", tokenizer, "--data.clips", clips, "--data.images", images),
        *("--data.crop", 64, "--data.short-side", 64, 80, "--data.workers", 0, "--data.stride", 1),
        *("--vocab-size", 32, "--code-dim", 4, "--width", 8, "--steps", 3, "--batch", 8),
    )
    assert status == 0, err
    assert "of 32 codes in use" in out
    status, _, err = run(*_pretrain(folders, tokenizer, tmp_path / "run"))
    assert status == 0, err


def test_tokenizer_fit_without_data(run: Run, tmp_path: Path) -> None:
    status, _, err = run("tokenizer", "fit", "--out", tmp_path / "t.safetensors")
    assert status == 2
    assert "--data.clips" in err


def test_data_index_and_check(run: Run, folders: tuple[Path, Path], tmp_path: Path) -> None:
    status, out, _ = run("data", "index", folders[0], "--out", tmp_path / "clips.jsonl")
    assert status == 0
    assert "9 readable clips, 0 unreadable" in out
    status, out, _ = run("data", "check", tmp_path / "clips.jsonl")
    assert status == 0
    assert "9 clips: 0 cannot be used" in out
    assert "short.mp4: 12 frames, a clip spans 121" in out

    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "notes.mp4").write_text("not a video")
    status, out, _ = run("data", "check", clips)
    assert status == 1
    assert "notes.mp4" in out
    status, _, err = run("data", "check", tmp_path / "absent")
    assert status == 2
    assert "does not exist" in err


def test_budget_of_a_recipe(run: Run) -> None:
    status, out, _ = run("budget", "joint_stage", "--gpus", 4, "--size", "tiny")
    assert status == 0
    assert "tokenizer (dalle)" in out
    assert "on 4 devices" in out
    assert "27.84" in out  # Swin-T's stages, in millions of parameters


def test_doctor(run: Run) -> None:
    status, out, _ = run("doctor")
    assert status == 0
    for word in ("torch", "native library", "PyAV", "apex", "masked_linear_cross_entropy: "):
        assert word in out
    if native.loaded() and not torch.cuda.is_available():
        for op in ("linear", "linear_argmax", "conv3x3"):
            assert f"{op}: native" in out


@pytest.mark.parametrize(
    "command",
    [
        "demo",
        "pretrain joint_stage",
        "tokenizer fit",
        "data index",
        "data check",
        "data bench",
        "budget joint_stage",
        "doctor",
    ],
)
def test_help_of_every_command(run: Run, command: str) -> None:
    status, out, _ = run(*command.split(), "--help")
    assert status == 0
    assert f"usage: bevt {command}" in out


def test_help_names_every_command(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in ("demo", "pretrain", "tokenizer fit", "data index", "data check", "data bench", "budget", "doctor"):
        assert command in out
