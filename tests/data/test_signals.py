"""Ctrl-C and SIGTERM, to the whole process group as a terminal and a scheduler send them, while files are looked at."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bevt.data import shapes
from bevt.data.processes import undisturbed

STATUS = {signal.SIGINT: (130, "bevt: interrupted"), signal.SIGTERM: (143, "bevt: terminated")}


@pytest.fixture
def folder(dataset: shapes.ShapesPaths, tmp_path: Path) -> Path:
    """400 videos."""
    for number in range(400):
        shutil.copy(Path(dataset.train_clips) / "0001.webm", tmp_path / f"{number:03}.webm")
    return tmp_path


def signalled(
    command: str, folder: Path, signum: signal.Signals, ready: Callable[[int], bool], again: float = 0.0
) -> tuple[int, str]:
    """`bevt data COMMAND folder`, signalled once it is ready (its process id given), and again after so many seconds:
    exit status, standard error.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "bevt", "data", *command.split(), str(folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        deadline = time.monotonic() + 60
        while not ready(process.pid):
            assert process.poll() is None, "it ended before it was signalled"
            assert time.monotonic() < deadline, "it does not get on"
            time.sleep(0.002)
        os.killpg(process.pid, signum)
        if again:
            time.sleep(again)
            os.killpg(process.pid, signum)
        begin = time.monotonic()
        _, err = process.communicate(timeout=60)
        assert time.monotonic() - begin < 30
    finally:
        process.kill()
    # An interrupt that passes through `exec`, in an import say, makes CPython end by SIGINT itself: a shell's 130 too.
    return 130 if process.returncode == -signal.SIGINT else process.returncode, err


def command_line(pid: str) -> str:
    """Of a process that may have ended."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def test_signals_wait_beside_threads() -> None:
    """One that another thread takes, as numpy's and rich's do, too; then it is what it would have been."""
    done = threading.Event()
    idle = threading.Thread(target=done.wait)
    idle.start()
    reached = []

    def interrupted() -> None:
        with undisturbed():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)
            reached.append("the end of the block")

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        done.set()
        idle.join()
    assert reached
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("signum", STATUS, ids=lambda signum: signum.name)
def test_indexing(folder: Path, signum: signal.Signals) -> None:
    """It ends soon, says what it has kept, and goes on from there."""
    partial = folder / ".bevt_manifest_clips.jsonl.partial3"
    status, err = signalled("index", folder, signum, lambda _: partial.exists() and partial.stat().st_size > 0)
    assert (status, err.splitlines()[-1]) == STATUS[signum], err
    done = partial.read_bytes().count(b"\n")
    assert 0 < done < 400
    assert f"{done} of 400 files are done and kept: indexing goes on from there" in err
    assert "Traceback" not in err
    assert "leaked" not in err


@pytest.mark.parametrize(("signum", "seconds"), [(signal.SIGINT, 0.2), (signal.SIGTERM, 0.02)])
def test_an_impatient_second_one(folder: Path, signum: signal.Signals, seconds: float) -> None:
    """It does not interrupt the end of the first one."""
    partial = folder / ".bevt_manifest_clips.jsonl.partial3"
    ready = lambda _: partial.exists() and partial.stat().st_size > 0  # noqa: E731
    status, err = signalled("index", folder, signum, ready, again=seconds)
    assert status == STATUS[signum][0], err
    assert STATUS[signum][1] in err.splitlines()
    assert "Traceback" not in err


def test_one_while_the_interpreter_ends() -> None:
    """It does not replace the exit status: modules are taken down once Python has put the default handlers back."""
    code = """
import os, signal, sys
from bevt.__main__ import main

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid(), signum=signal.SIGTERM):
        kill(pid, signum)
        print("still here", flush=True)

last = Last()
sys.argv = ["bevt", "--help"]
main()
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith("still here\n")


def test_while_processes_start(folder: Path) -> None:
    """The fork server imports torch and the decoders: a second in which nothing of it may be seen."""

    def starting(parent: int) -> bool:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        return any("forkserver" in command_line(child) for child in children)

    status, err = signalled("index", folder, signal.SIGINT, starting)
    assert (status, err.splitlines()[-1]) == STATUS[signal.SIGINT], err
    assert "Traceback" not in err
    assert "leaked" not in err
