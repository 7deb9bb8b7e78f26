"""A run that was cut short, however it ended, goes on as if it had not been: bit for bit, in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ENVIRONMENT, ROOT, changed, command, figures, train_rows

from bevt.config import Config
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train import checkpoint
from bevt.train.loop import RunError, pretrain
from bevt.train.metrics import MetricsWriter

STEPS, EVERY = 20, 6
"""Steps of the run, and between its checkpoints; an epoch has 3.5 steps."""


@pytest.fixture(scope="module")
def long(config: Config) -> Config:
    """Both streams, drop path, a decoding process: everything that could depend on where a run was cut."""
    return changed(config, data={"workers": 1}, optim={"max_steps": STEPS}, train={"checkpoint_every": EVERY})


@pytest.fixture(scope="module")
def uninterrupted(long: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run that nothing disturbs."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    bevt_pretrain(long, out)
    return out


def bevt_pretrain(config: Config, out: Path, *options: str) -> str:
    """The command to its end; what it printed."""
    done = subprocess.run(
        command(config, out, *options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def interrupt(config: Config, out: Path, rows: int, signum: signal.Signals) -> tuple[int, str, set[int]]:
    """Send a signal once that many rows are written: exit status, output, the processes that the run had started."""
    metrics = out / "metrics.jsonl"
    process = subprocess.Popen(
        command(config, out), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= rows):
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.002)
        started = descendants(process.pid)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, started


def descendants(pid: int) -> set[int]:
    """Ids of the processes below one."""
    parents = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:  # gone meanwhile
            continue
        parents[int(status.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found: set[int] = set()
    while new := {child for child, parent in parents.items() if parent in found | {pid}} - found:
        found |= new
    return found


def wait_for_end(processes: set[int]) -> set[int]:
    """Those that are still there after a while."""
    deadline = time.monotonic() + 20
    while (alive := {pid for pid in processes if Path(f"/proc/{pid}").exists()}) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def same_weights(first: Path, second: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same model and optimizer state, bit for bit."""
    a, b = (checkpoint.load(run / "checkpoints" / "last.pt") for run in (first, second))
    moments = [
        all(torch.equal(a["optimizer"]["state"][i][name], b["optimizer"]["state"][i][name]) for name in state)
        for i, state in a["optimizer"]["state"].items()
    ]
    return all(moments) and all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())


def test_kill_in_the_middle_of_an_epoch(long: Config, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints, in the middle of writing a third and a row: resumed, the run is the run."""
    out = tmp_path / "run"
    status, _, started = interrupt(long, out, EVERY + 2, signal.SIGKILL)
    assert status == -signal.SIGKILL
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    assert int(saved.stem.removeprefix("step_")) < len(train_rows(out)) < STEPS, "killed at a bad moment: run it again"
    assert not wait_for_end(started), "processes outlive their parent"
    part = out / "checkpoints" / "step_00000012.part"
    part.write_bytes(saved.read_bytes()[:5000])
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')

    assert f"resumed {out} at step {EVERY}" in bevt_pretrain(long, out, "--resume")
    assert [row["step"] for row in figures(out)] == list(range(1, STEPS + 1))
    assert figures(out) == figures(uninterrupted)
    assert same_weights(out, uninterrupted)
    assert not part.exists()


def test_sigterm(long: Config, uninterrupted: Path, tmp_path: Path) -> None:
    """A checkpoint of the very step, exit status 0; resumed, the run is the run."""
    out = tmp_path / "run"
    status, output, started = interrupt(long, out, EVERY + 2, signal.SIGTERM)
    assert status == 0, output
    stopped = re.search(r"stopped at step (\d+) of 20; continue with --resume", output)
    assert stopped, output
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    assert saved.name == f"step_{int(stopped[1]):08d}.pt"
    assert len(train_rows(out)) == int(stopped[1])
    assert not wait_for_end(started), "processes outlive their parent"

    result = pretrain(long, out, resume=True, quiet=True)
    assert result.finished
    assert figures(out) == figures(uninterrupted)
    assert same_weights(out, uninterrupted)


def test_sigterm_before_the_first_step(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model is built, say: the run stops with its initial weights, and goes on."""
    with monkeypatch.context() as patch:
        patch.setattr("bevt.train.loop.build_optimizer", signalling(patch))
        result = pretrain(config, tmp_path / "run", quiet=True)
    assert (result.step, result.finished) == (0, False)
    assert pretrain(config, tmp_path / "run", resume=True, quiet=True).finished
    pretrain(config, tmp_path / "whole", quiet=True)
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def signalling(patch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`build_optimizer` during which SIGTERM arrives."""
    from bevt.train.loop import build_optimizer

    def build(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return build_optimizer(*arguments)

    return build


def test_signal_handlers_are_put_back(finished: Path) -> None:
    """After a run, Ctrl-C is Python's again."""
    assert finished.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


# --- what a resumed run may change, and what not -------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, in this process."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    pretrain(config, out, quiet=True)
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, cut back to step 4."""
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    (out / "checkpoints" / "step_00000006.pt").unlink()
    return out


def test_an_existing_run_is_not_overwritten(config: Config, run: Path) -> None:
    """Without `resume`, with or without a checkpoint."""
    with pytest.raises(RunError, match=r"already holds a run: continue it with --resume, or name another folder"):
        pretrain(config, run, quiet=True)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(RunError, match="already holds a run"):
        pretrain(config, run, quiet=True)


def test_changed_keys_are_named(config: Config, run: Path) -> None:
    """Both values of every key."""
    other = changed(config, optim={"lr": 2e-3}, model={"window_size": (2, 3, 3)})
    with pytest.raises(RunError) as caught:
        pretrain(other, run, resume=True, quiet=True)
    assert "model.window_size = [4, 3, 3], now [2, 3, 3]; optim.lr = 0.001, now 0.002." in str(caught.value)


def test_keys_that_may_change(config: Config, run: Path, finished: Path, tokenizer_path: Path, tmp_path: Path) -> None:
    """Workers, intervals, and where data and tokenizer lie: the figures stay, bit for bit."""
    moved = tmp_path / "moved"
    shutil.copytree(config.data.clips, moved / "clips")
    shutil.copy(tokenizer_path, moved / "vq.safetensors")
    other = changed(
        config,
        data={"workers": 1, "prefetch": 1, "clips": str(moved / "clips")},
        tokenizer={"path": str(moved / "vq.safetensors")},
        train={"checkpoint_every": 5, "keep": 1, "eval_clips": 1},
    )
    assert pretrain(other, run, resume=True, quiet=True).finished
    assert figures(run) == figures(finished)
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000006.pt"]


def test_other_data_is_refused(config: Config, run: Path, tmp_path: Path) -> None:
    """One clip less."""
    shutil.copytree(config.data.clips, tmp_path / "clips", ignore=shutil.ignore_patterns(".*"))
    next((tmp_path / "clips").rglob("*.mp4")).unlink()
    with pytest.raises(RunError, match=r"cannot be resumed: .*clips in the source was 7, is 6"):
        pretrain(changed(config, data={"clips": str(tmp_path / "clips")}), run, resume=True, quiet=True)


def test_a_tokenizer_of_other_size_is_refused(config: Config, run: Path, tmp_path: Path) -> None:
    """The message has both vocabularies."""
    path = tmp_path / "other.safetensors"
    VQTokenizer(VQModel(VQConfig(image_size=32, vocab_size=16, code_dim=4, width=4, blocks=0))).save(path)
    with pytest.raises(RunError, match=r"predicts 32 codes, but the tokenizer .*other.safetensors has 16"):
        pretrain(changed(config, tokenizer={"path": str(path)}), run, resume=True, quiet=True)


def test_resume_without_a_run_starts_one(config: Config, finished: Path, tmp_path: Path) -> None:
    """Also where a run was killed before its first checkpoint: its rows go."""
    out = tmp_path / "run"
    out.mkdir()
    shutil.copy(finished / "metrics.jsonl", out)
    pretrain(config, out, resume=True, quiet=True)
    assert figures(out) == figures(finished)


def test_a_finished_run_stays_as_it_is(config: Config, finished: Path, tmp_path: Path) -> None:
    """Resumed again, it does no step."""
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    result = pretrain(config, out, resume=True, quiet=True)
    assert (result.step, result.finished, result.checkpoint.name) == (6, True, "step_00000006.pt")
    assert train_rows(out) == train_rows(finished)


def test_damaged_checkpoint(config: Config, run: Path) -> None:
    """The newest one is cut short (by a disk): the file is named."""
    newest = run / "checkpoints" / "step_00000004.pt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.raises(checkpoint.CheckpointError, match=r"step_00000004.pt is no checkpoint, or was cut short"):
        pretrain(config, run, resume=True, quiet=True)


def test_folder_that_cannot_be_written(config: Config, tmp_path: Path) -> None:
    """A file in its place or above it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file is a file; name a folder"):
        pretrain(config, tmp_path / "file", quiet=True)
    with pytest.raises(RunError, match=r"cannot write to --out .*/file/run: Not a directory"):
        pretrain(config, tmp_path / "file" / "run", quiet=True)


def test_crash_then_resume_in_the_same_process(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error at step 5, after the checkpoint of step 4: no process or open file is left, and the run can go on."""

    def fail(self: MetricsWriter, row: dict[str, Any]) -> None:
        write(self, row)
        if row["step"] == 5:
            raise RuntimeError("no more")

    write = MetricsWriter.write
    helped = changed(config, data={"workers": 1})
    children, files = descendants(os.getpid()), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", fail)
        with pytest.raises(RuntimeError, match="no more"):
            pretrain(helped, tmp_path, quiet=True)
    servers = 2  # the fork server and the resource tracker of this process stay
    assert len(wait_for_end(descendants(os.getpid()) - children)) <= servers
    assert len(os.listdir("/proc/self/fd")) <= files + 2 * servers
    pretrain(helped, tmp_path, resume=True, quiet=True)
    assert figures(tmp_path) == figures(finished)


# --- weights of another run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def image_stage(config: Config) -> Config:
    """The image stream alone, with 2D windows."""
    return changed(config, model={"window_size": (1, 3, 3)}, train={"clips": 0}, optim={"max_steps": 2})


@pytest.fixture(scope="module")
def image_weights(image_stage: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its last checkpoint."""
    return pretrain(image_stage, tmp_path_factory.mktemp("image_stage"), quiet=True).checkpoint


def first_checkpoint(config: Config, init: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """The weights with which a run from `init` starts."""
    with monkeypatch.context() as patch:
        patch.setattr("bevt.train.loop.build_optimizer", signalling(patch))
        result = pretrain(replace(config, init=str(init)), out, quiet=True)
    assert result.step == 0
    return checkpoint.load(result.checkpoint)["model"]


def test_joint_stage_from_the_image_stage(
    config: Config, image_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shared weights as they were; patch embedding and bias tables inflated to clips; the run goes on from there."""
    old = checkpoint.load(image_weights)["model"]
    new = first_checkpoint(config, image_weights, tmp_path, monkeypatch)
    table = "encoder.layers.2.blocks.1.attn.relative_position_bias_table"
    assert torch.equal(new["patch_embed.proj.weight"].sum(2), old["patch_embed_2d.proj.weight"])
    assert torch.equal(new[table], old[table].repeat(2 * 4 - 1, 1))
    same = [key for key in old if key in new and old[key].shape == new[key].shape]
    assert {"head.weight", "mask_token", "image_decoder.fuse.weight", "norm.weight"} <= set(same)
    assert all(torch.equal(old[key], new[key]) for key in same)
    assert all(key.startswith(("patch_embed.", "video_decoder.")) for key in new.keys() - old.keys())
    assert pretrain(replace(config, init=str(image_weights)), tmp_path, resume=True, quiet=True).finished


def test_image_stage_from_itself(
    image_stage: Config, image_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights, and no optimizer state."""
    old, new = (
        checkpoint.load(image_weights)["model"],
        first_checkpoint(image_stage, image_weights, tmp_path, monkeypatch),
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)


def test_video_only_from_the_joint_stage(
    config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What images alone use is left out."""
    old = checkpoint.load(finished / "checkpoints" / "last.pt")["model"]
    new = first_checkpoint(
        changed(config, train={"images": 0}), finished / "checkpoints" / "last.pt", tmp_path, monkeypatch
    )
    assert all(torch.equal(old[key], value) for key, value in new.items())
    assert all(key.startswith(("patch_embed_2d.", "image_decoder.")) for key in old.keys() - new.keys())


def test_weights_of_another_size(config: Config, image_weights: Path, tmp_path: Path) -> None:
    """The file, a tensor and both shapes."""
    wide = replace(changed(config, model={"embed_dim": 32}), init=str(image_weights))
    with pytest.raises(
        ValueError, match=r"step_00000002\.pt: .* of another shape: mask_token \(1, 1, 16\) for \(1, 1, 32\)"
    ):
        pretrain(wide, tmp_path, quiet=True)


def test_weights_for_another_vocabulary(config: Config, image_weights: Path, tmp_path: Path) -> None:
    """Both numbers of codes."""
    path = tmp_path / "other.safetensors"
    VQTokenizer(VQModel(VQConfig(image_size=32, vocab_size=16, code_dim=4, width=4, blocks=0))).save(path)
    other = replace(changed(config, tokenizer={"path": str(path)}), init=str(image_weights))
    with pytest.raises(ValueError, match=r"step_00000002\.pt: its head predicts 32 codes, the tokenizer has 16"):
        pretrain(other, tmp_path / "run", quiet=True)


def test_clips_from_images_with_3d_windows(config: Config, tmp_path: Path) -> None:
    """Such tables cannot be inflated: the message says which recipe's can."""
    images = changed(config, train={"clips": 0}, optim={"max_steps": 1})
    path = pretrain(images, tmp_path / "images", quiet=True).checkpoint
    with pytest.raises(ValueError, match=r"3D windows \(4, 3, 3\) has no weights for clips; start from .*image_stage"):
        pretrain(replace(config, init=str(path)), tmp_path / "run", quiet=True)
