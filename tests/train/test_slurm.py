"""`bevt slurm` with commands in Slurm's place: the script that they are given runs, its tasks on one machine."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ENVIRONMENT, ROOT, changed, command, descendants, figures, train_rows, wait_for_end, wait_until

from bevt.cli import main
from bevt.config import Config, ConfigError
from bevt.train.slurm import SlurmError, SlurmOptions, launch

pytest.importorskip("submitit", reason="needs submitit: pip install submitit")

SBATCH = """#!/bin/bash
export SLURM_JOB_ID=4711 SLURM_JOB_NUM_NODES=2 SLURM_NTASKS=2 SLURM_JOB_NODELIST=localhost
echo "Submitted batch job 4711"
( while rm -f "$STATE/requeue"; bash "$1"; [ -e "$STATE/requeue" ]; do :; done; touch "$STATE/done" ) \
    < /dev/null > "$STATE/log" 2>&1 &
"""
"""Runs the script, again where it was requeued."""

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do
    case $1 in --output) shift ;; --output=*) log=${1#*=} ;; esac
    shift
done
for task in 0 1; do
    SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 "$@" >> "${log//%j/$SLURM_JOB_ID}" 2>&1 &
    tasks="$tasks $!"
done
echo $tasks > "$STATE/part" && mv "$STATE/part" "$STATE/tasks"
while wait -n; do [ -n "$(jobs -r)" ] || exit 0; done
kill -9 $tasks
exit 1
"""
"""A task for each of two nodes; as with --kill-on-bad-exit, one that fails ends the other."""

SCONTROL = """#!/bin/bash
[ "$*" = "requeue 4711" ] && touch "$STATE/requeue"
"""


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """The environment of a login node, its state in `STATE`."""
    (tmp_path / "bin").mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL)):
        path = tmp_path / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
    return {**ENVIRONMENT, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "STATE": str(tmp_path)}


def slurm(config: Config, out: Path, *options: str) -> list[str]:
    """`bevt slurm` of `config` on two nodes of one GPU."""
    words = command(config, out, *options, "--nodes", "2", "--gpus-per-node", "1")
    return [sys.executable, "-m", "bevt", "slurm", *words[4:]]


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")
def test_a_job_of_two_nodes_is_stopped_and_queued_again(
    pair: Config, undisturbed_pair: Path, cluster: dict[str, str], tmp_path: Path
) -> None:
    """Slurm's notice to both tasks, in the middle of an epoch: a checkpoint of the very step, a second turn in which
    the run ends, no third, the losses of a run that nothing disturbed, and no process left.
    """
    out, state = tmp_path / "run", Path(cluster["STATE"])
    submitted = subprocess.run(
        slurm(pair, out), cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=60, check=False
    )
    assert submitted.returncode == 0, submitted.stderr
    log = out / "slurm" / "4711_log.out"
    assert f"submitted job 4711: 2 x 1 GPUs, 1440 minutes at a time\nlog: {log}\n" in submitted.stdout
    metrics = out / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(train_rows(out)) >= 6, "the run does not get on")
    tasks = [int(pid) for pid in (state / "tasks").read_text().split()]
    started = set(tasks).union(*map(descendants, tasks))
    for pid in tasks:
        os.kill(pid, signal.SIGUSR2)
    wait_until((state / "done").exists, "the job does not end")
    text = log.read_text()
    assert text.count("stopped, to be continued with --resume, at step ") == 1, text
    assert text.count(f"finished at step {pair.optim.max_steps} of ") == 1, text
    assert text.count("Starting with JobEnvironment") == 4, "two turns of two tasks"
    assert figures(out) == figures(undisturbed_pair)
    assert not wait_for_end(started), "processes outlive their job"


def test_the_script(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What sbatch would be given, and torchrun, without Slurm: nothing is written."""
    out = tmp_path / "run"
    options = ["--partition", "gpu", "--time", "600", "--sbatch", "constraint=h200", "exclusive", "--dry-run"]
    with pytest.raises(SystemExit) as stop:
        main(slurm(config, out, *options)[3:])
    assert not stop.value.code
    script, _, node = capsys.readouterr().out.partition("# on every node:")
    lines = script.splitlines()
    for wanted in (
        "nodes=2", "ntasks-per-node=1", "gpus-per-node=1", "cpus-per-task=8", "time=600", "partition=gpu", "requeue",
        "signal=USR2@180", "open-mode=append", "constraint=h200", "exclusive",
    ):  # fmt: skip
        assert f"#SBATCH --{wanted}" in lines, wanted
    assert not [line for line in lines if "account" in line or "--mem" in line], "not asked for"
    assert " --cpus-per-task=8 " in lines[-2], "srun has to be told too"
    assert " --nnodes 2 --nproc-per-node 1 " in node
    assert " -m bevt pretrain joint_stage --out " in node
    assert "constraint" not in node
    assert node.rstrip().endswith("--resume")
    assert not out.exists()


@pytest.mark.parametrize(
    ("recipe", "words", "command"),
    [
        ("k400", ["--data.clips", "K400/train.csv", "--init", "INIT"], "finetune"),
        ("ssv2", ["--data.clips", "train.json", "--augment.magnitude", "9"], "finetune"),
        ("image_supervised", ["--data.images", "IMAGENET/train"], "finetune"),
        ("image_contrastive", ["--data.images", "IMAGENET/train", "--moby.queue", "8192"], "contrast"),
    ],
)
def test_the_script_of_other_commands(
    recipe: str, words: list[str], command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each recipe by its own command, with the flags that were given, and no option of Slurm's."""
    (tmp_path / "start.pth").touch()
    words = [word.replace("INIT", str(tmp_path / "start.pth")) for word in words]
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as stop:
        main(["slurm", recipe, *words, "--out", str(out), "--time", "600", "--dry-run"])
    assert not stop.value.code
    script, _, node = capsys.readouterr().out.partition("# on every node:")
    assert "#SBATCH --time=600" in script.splitlines()
    wanted = [recipe, *words, "--out", str(out), "--resume"]
    assert shlex.split(node)[-len(wanted) - 3 :] == ["-m", "bevt", command, *wanted]
    assert not out.exists()


def test_a_start_that_is_not_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the job waits in the queue."""
    words = ["--data.clips", "x", "--init", str(tmp_path / "gone"), "--out", str(tmp_path / "run"), "--dry-run"]
    with pytest.raises(SystemExit):
        main(["slurm", "k400", *words])
    assert f"init = '{tmp_path / 'gone'}' is not seen here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (SlurmOptions(nodes=0), "--nodes must be 1 or above, got 0"),
        (SlurmOptions(time=0), "--time must be 1 or above, got 0"),
        (SlurmOptions(memory=-1), "--memory must be 0 or above, got -1"),
        (SlurmOptions(time=3), "--grace must be from 60 seconds to below --time, 180 seconds, got 180"),
        (SlurmOptions(sbatch=("--exclusive",)), "--sbatch takes options as KEY=VALUE or KEY, without dashes"),
        (SlurmOptions(nodes=3), r"train.clips = 2 is not a multiple of train.micro_clips \* devices = 1 \* 24"),
    ],
)
def test_what_is_refused_before_it_waits_in_the_queue(
    config: Config, options: SlurmOptions, says: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=says):
        launch(config, options, tmp_path / "run", [], resume=False)


def test_files_that_are_missing_or_there_already(config: Config, finished: Path, tmp_path: Path) -> None:
    options = SlurmOptions(gpus_per_node=1)
    with pytest.raises(ConfigError, match=r"tokenizer\.path = '' is no file"):
        launch(changed(config, tokenizer={"path": ""}), options, tmp_path, [], resume=False)
    with pytest.raises(SlurmError, match="already holds a run: continue it with --resume"):
        launch(config, options, finished, [], resume=False)


def test_no_slurm(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SlurmError, match=r"no sbatch and srun here: .*--dry-run shows .*torchrun --nproc-per-node 1 "):
        launch(config, SlurmOptions(gpus_per_node=1), tmp_path / "run", [], resume=False)


def test_no_submitit(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(SlurmError, match=r"pip install 'bevt\[slurm\]'"):
        launch(config, SlurmOptions(gpus_per_node=1), tmp_path / "run", [], resume=False)


def test_a_job_that_slurm_refuses(
    config: Config, cluster: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error has sbatch's reason."""
    (tmp_path / "bin" / "sbatch").write_text("#!/bin/bash\necho 'error: invalid partition: gpuu' >&2\nexit 1\n")
    monkeypatch.setenv("PATH", cluster["PATH"])
    with pytest.raises(SlurmError, match="sbatch did not take the job: error: invalid partition: gpuu"):
        launch(config, SlurmOptions(gpus_per_node=1), tmp_path / "run", [], resume=False)


def test_a_mistyped_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["slurm", "joint_stage", "--partitoin", "gpu"])
    assert "no option --partitoin; the nearest is --partition" in capsys.readouterr().err
