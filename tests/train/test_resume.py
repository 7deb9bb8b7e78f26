"""A run that was cut short, however it ended, goes on as if it had not been: bit for bit, in processes of their own."""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import ENVIRONMENT, ROOT, changed, command, descendants, figures, signalling, train_rows, wait_for_end

from bevt.config import Config
from bevt.train import checkpoint
from bevt.train.metrics import Display, MetricsWriter
from bevt.train.pretrain import pretrain

STEPS, EVERY = 20, 6
"""Steps of the run, and between its checkpoints; an epoch has 3.5 steps."""


@pytest.fixture(scope="module")
def long(config: Config) -> Config:
    """Both streams, drop path, a decoding process: everything that could depend on where a run was cut.

    One thread, here and in processes of their own: another number of threads adds in another order.
    """
    train = {"checkpoint_every": EVERY, "threads": 1}
    return changed(config, data={"workers": 1}, optim={"max_steps": STEPS}, train=train)


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
    """Send a signal once that many rows and a checkpoint are written.

    Exit status, output, the processes that the run had started.
    """
    metrics = out / "metrics.jsonl"

    def far() -> bool:
        written = metrics.exists() and metrics.read_bytes().count(b"\n") >= rows
        return written and checkpoint.latest(out / "checkpoints") is not None

    process = subprocess.Popen(
        command(config, out), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not far():
            assert time.monotonic() < deadline, "the run does not get on"
            time.sleep(0.002)
        started = descendants(process.pid)
        process.send_signal(signum)
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output, started


def same_weights(first: Path, second: Path) -> bool:
    """Whether the newest checkpoints of two runs hold the same model and optimizer state, bit for bit."""
    a, b = (checkpoint.load(run / "checkpoints" / "last") for run in (first, second))
    moments = [
        torch.equal(value, b["optimizer"][name][key])
        for name, state in a["optimizer"].items()
        for key, value in state.items()
    ]
    return all(moments) and all(torch.equal(value, b["model"][key]) for key, value in a["model"].items())


def test_kill_in_the_middle_of_an_epoch(long: Config, uninterrupted: Path, tmp_path: Path) -> None:
    """SIGKILL between two checkpoints, in the middle of writing a third and a row: resumed, the run is the run."""
    out = tmp_path / "run"
    status, _, started = interrupt(long, out, EVERY + 2, signal.SIGKILL)
    assert status == -signal.SIGKILL
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    assert int(saved.name.removeprefix("step_")) < len(train_rows(out)) < STEPS, "killed at a bad moment: run it again"
    assert not wait_for_end(started), "processes outlive their parent"
    part = out / "checkpoints" / "step_00000012.part"
    part.mkdir(exist_ok=True)
    (part / "__0_0.distcp").write_bytes(b"PK")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"event": "train", "st')

    assert f"resumed {out} at step {EVERY}" in bevt_pretrain(long, out, "--resume")
    assert [row["step"] for row in figures(out)] == list(range(1, STEPS + 1))
    assert figures(out) == figures(uninterrupted)
    assert same_weights(out, uninterrupted)
    assert not part.exists()


def test_sigterm(long: Config, uninterrupted: Path, tmp_path: Path) -> None:
    """A checkpoint of the very step, exit status 3, said once; resumed, the run is the run."""
    out = tmp_path / "run"
    status, output, started = interrupt(long, out, EVERY + 2, signal.SIGTERM)
    assert status == 3, output
    stopped = re.search(r"stopped, to be continued with --resume, at step (\d+) of 20: ", output)
    assert stopped, output
    assert output.count("stopped") == 1
    saved = checkpoint.latest(out / "checkpoints")
    assert saved is not None
    assert saved.name == f"step_{int(stopped[1]):08d}"
    assert len(train_rows(out)) == int(stopped[1])
    assert not wait_for_end(started), "processes outlive their parent"

    result = pretrain(long, out, resume=True, quiet=True)
    assert result.finished
    assert figures(out) == figures(uninterrupted)
    assert same_weights(out, uninterrupted)


def test_sigterm_before_the_first_step(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model is built, say: the run stops with its initial weights, and goes on."""
    with monkeypatch.context() as patch:
        patch.setattr("bevt.train.pretrain.build_optimizer", signalling())
        result = pretrain(config, tmp_path / "run", quiet=True)
    assert (result.step, result.finished) == (0, False)
    assert pretrain(config, tmp_path / "run", resume=True, quiet=True).finished
    pretrain(config, tmp_path / "whole", quiet=True)
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_stop_between_two_rows(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows average steps; the row that the stop cut in two is that of the uninterrupted run."""
    sparse = changed(config, train={"log_every": 4, "checkpoint_every": 100})
    done = 0

    def step(self: Display, steps: int) -> None:
        nonlocal done
        done += 1
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Display, "step", step)
        assert pretrain(sparse, tmp_path / "run", quiet=True).step == 2
    assert not train_rows(tmp_path / "run")
    assert pretrain(sparse, tmp_path / "run", resume=True, quiet=True).finished
    pretrain(sparse, tmp_path / "whole", quiet=True)
    assert [row["step"] for row in figures(tmp_path / "run")] == [4, 6]
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")


def test_a_stop_in_the_last_step(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is complete, what would follow does not begin: the signal goes on to whoever had it before."""

    def step(self: Display, steps: int) -> None:
        if steps == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    def told(*_: object) -> None:
        raise InterruptedError

    scored = changed(config, data={"val_images": config.data.images})
    before = signal.signal(signal.SIGTERM, told)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Display, "step", step)
            with pytest.raises(InterruptedError):
                pretrain(scored, tmp_path / "run", quiet=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    saved = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.name == "step_00000006"
    assert not (tmp_path / "run" / "pictures").exists()
    assert pretrain(scored, tmp_path / "run", resume=True, quiet=True).evaluation
    assert (tmp_path / "run" / "pictures").exists()


def test_signal_handlers_are_put_back(finished: Path) -> None:
    """After a run, Ctrl-C is Python's again."""
    assert finished.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def fail_at(step: int) -> Callable[[MetricsWriter, dict[str, Any]], None]:
    """`MetricsWriter.write` that fails once the row of that step is written."""
    original = MetricsWriter.write

    def write(self: MetricsWriter, row: dict[str, Any]) -> None:
        original(self, row)
        if row["step"] == step:
            raise RuntimeError("no more")

    return write


def test_error_in_the_loop(config: Config, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At step 5, after the checkpoint of step 4: no process and no open file is left, and the run can go on."""
    helped = changed(config, data={"workers": 1})
    children, files = descendants(os.getpid()), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", fail_at(5))
        with pytest.raises(RuntimeError, match="no more"):
            pretrain(helped, tmp_path, quiet=True)
    servers = 2  # the fork server and the resource tracker of this process stay
    assert not multiprocessing.active_children()
    assert len(wait_for_end(descendants(os.getpid()) - children, servers)) <= servers
    assert len(os.listdir("/proc/self/fd")) <= files + 2 * servers
    pretrain(helped, tmp_path, resume=True, quiet=True)
    assert figures(tmp_path) == figures(finished)


def test_rows_of_several_steps(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their means do not depend on the cut either, whatever the intervals."""
    config = changed(config, train={"log_every": 2, "checkpoint_every": 3})
    pretrain(config, tmp_path / "whole", quiet=True)
    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", fail_at(4))
        with pytest.raises(RuntimeError, match="no more"):
            pretrain(config, tmp_path / "run", quiet=True)
    pretrain(config, tmp_path / "run", resume=True, quiet=True)
    assert [row["step"] for row in figures(tmp_path / "run")] == [2, 3, 4, 6]
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")
