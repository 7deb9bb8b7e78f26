"""What a resumed run may change, and what is refused with its reason."""

from __future__ import annotations

import fcntl
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import changed, figures, train_rows

from bevt.config import Config, ConfigError
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train import checkpoint
from bevt.train.metrics import RunError
from bevt.train.pretrain import pretrain


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, cut back to step 4."""
    out = tmp_path / "run"
    shutil.copytree(finished, out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step_00000006")
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


def test_a_checkpoint_older_than_a_key_has_its_default(config: Config, run: Path, finished: Path) -> None:
    path = run / "checkpoints" / "step_00000004" / "state.json"
    saved = json.loads(path.read_text())
    del saved["config"]["tokenizer"]["precision"], saved["config"]["tokenizer"]["compile"]
    path.write_text(json.dumps(saved))
    other = changed(config, tokenizer={"precision": "bfloat16"})
    with pytest.raises(RunError, match=r"tokenizer.precision = 'auto', now 'bfloat16'\."):
        pretrain(other, run, resume=True, quiet=True)
    assert pretrain(config, run, resume=True, quiet=True).finished
    assert figures(run) == figures(finished)


def test_the_reference_path_is_plain_pytorch(config: Config, tmp_path: Path) -> None:
    """Its tokenizer too; and a key that asks for something else there is refused."""
    plain = replace(config, path="reference")
    pretrain(replace(plain, optim=replace(plain.optim, max_steps=1)), tmp_path / "run", quiet=True)
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    found = state["implementations"]
    assert found.pop("decoding") == config.data.backend
    assert found == {
        **dict.fromkeys(("window_attention", "masked_linear_cross_entropy", "linear"), "materialised"),
        **{"linear_argmax": "reference", "tokenizer precision": "float32", "tokenizer": "eager", "encoder": "eager"},
    }
    asked = {"tokenizer": {"impl": "native"}, "model": {"linear_impl": "native"}}
    for part, keys in asked.items():
        key = next(iter(keys))
        with pytest.raises(ConfigError, match=rf"{part}.{key} has no meaning with path 'reference'"):
            pretrain(changed(plain, **{part: keys}), tmp_path / "other", quiet=True)
    with pytest.raises(ConfigError, match=r"tokenizer.compile has no meaning"):
        pretrain(changed(plain, tokenizer={"compile": "yes"}), tmp_path / "other", quiet=True)


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
    assert [path.name for path in (run / "checkpoints").glob("step_*")] == ["step_00000006"]


def test_other_data_is_refused(config: Config, run: Path, tmp_path: Path) -> None:
    """One clip less."""
    shutil.copytree(config.data.clips, tmp_path / "clips", ignore=shutil.ignore_patterns(".*"))
    next((tmp_path / "clips").rglob("*.mp4")).unlink()
    with pytest.raises(RunError, match=r"cannot be resumed: .*clips in the source was 7, is 6"):
        pretrain(changed(config, data={"clips": str(tmp_path / "clips")}), run, resume=True, quiet=True)


def test_another_tokenizer_is_refused(config: Config, run: Path, tmp_path: Path) -> None:
    """Even one of the same size: its codes mean something else."""
    path = tmp_path / "other.safetensors"
    VQTokenizer(VQModel(VQConfig(image_size=32, vocab_size=32, code_dim=4, width=4, blocks=0))).save(path)
    with pytest.raises(RunError, match=r"other.safetensors is not the tokenizer it predicts the codes of"):
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
    assert (result.step, result.finished, result.checkpoint.name) == (6, True, "step_00000006")
    assert train_rows(out) == train_rows(finished)


def test_damaged_checkpoint(config: Config, run: Path) -> None:
    """The newest one is cut short or overwritten (by a disk): it is named, and the way on works."""
    newest = run / "checkpoints" / "step_00000004"
    shard = newest / "__0_0.distcp"
    data = shard.read_bytes()
    for damaged, why in (
        (data[:-1000], r"is damaged: __0_0\.distcp was cut short"),
        (bytes(len(data)), r"is damaged: __0_0\.distcp is not as it was written"),
    ):
        shard.write_bytes(damaged)
        says = rf"step_00000004 {why}.*; .*delete that folder and resume again"
        with pytest.raises(checkpoint.CheckpointError, match=says):
            pretrain(config, run, resume=True, quiet=True)
    shutil.rmtree(newest)
    assert pretrain(config, run, resume=True, quiet=True).finished


def test_folder_that_cannot_be_written(config: Config, tmp_path: Path) -> None:
    """A file in its place or above it."""
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file is a file; name a folder"):
        pretrain(config, tmp_path / "file", quiet=True)
    with pytest.raises(RunError, match=r"cannot write to --out .*/file/run: Not a directory"):
        pretrain(config, tmp_path / "file" / "run", quiet=True)


def test_two_processes_in_one_folder(config: Config, tmp_path: Path) -> None:
    """The second is refused while the first lives, and writes nothing."""
    out = tmp_path / "run"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for resume in (False, True):
            with pytest.raises(RunError, match=r"another process is at work in .*run: wait for it"):
                pretrain(config, out, resume=resume, quiet=True)
    assert [path.name for path in out.iterdir()] == [".lock"]
    assert pretrain(config, out, quiet=True).finished


def test_an_implementation_that_cannot_serve_is_a_mistake_of_the_configuration(config: Config, tmp_path: Path) -> None:
    """Named with its reasons; the command prints such a mistake without a traceback."""
    triton = changed(config, model={"attention_impl": "triton"}, train={"precision": "bfloat16"})
    with pytest.raises(ConfigError, match="model: window_attention has no implementation for impl='triton'"):
        pretrain(triton, tmp_path, quiet=True)
