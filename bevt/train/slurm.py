"""`bevt slurm`: a training run as a Slurm job, submitted through submitit.

One task a node starts `torchrun`, whose agents meet at the job's first node and start one process a GPU. A process that
dies is restarted there, with all others, from the last checkpoint. Before the time limit, and where the cluster is set
to signal a preemption, Slurm sends submitit's signal (SIGUSR2): the run stops after its step with a checkpoint, and the
first task has the job requeued. SIGTERM alone (scancel, other preemption) leaves a checkpoint too; whether such a job
is queued again is then Slurm's decision, and the run goes on where it stopped.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from bevt.config import AnyConfig, Config, ConfigError, UserError, check, command_of

MARGIN = 30
"""Seconds of `SlurmOptions.grace` that are left, once the processes have ended, to requeue the job."""


POLL = 0.2
"""Seconds between two looks at torchrun."""


LOG = "%j_log.out"
"""Everything that a job's nodes say: torchrun may give rank 0, which speaks for the run, to any of them."""


class SlurmError(UserError):
    """A job that cannot be submitted, or that failed; the message says what to do."""


@dataclass(frozen=True)
class SlurmOptions:
    """What Slurm is asked for."""

    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs of each, with one process each."""
    cpus_per_gpu: int = 8
    """CPU cores for each process; it has `data.workers` decoding processes."""
    memory: int | None = None
    """GB of each machine; 0: all of it; not given: the cluster's default."""
    time: int = 1440
    """Minutes until Slurm ends the job; an unfinished run is queued again."""
    partition: str | None = None
    """Where it is queued; not given: the cluster's default, as for the next two."""
    account: str | None = None
    """Whom Slurm charges."""
    qos: str | None = None
    """Quality of service."""
    name: str = "bevt"
    """The job's name."""
    sbatch: tuple[str, ...] = ()
    """Any other options of sbatch, without their dashes: constraint=h200 exclude=node[1-3] exclusive."""
    grace: int = 180
    """Seconds before the time limit at which the run is told to stop: a step, its checkpoint and half a minute."""
    restarts: int = 3
    """How often torchrun restarts the processes of one job after one has died."""
    requeues: int = 100
    """How often a job whose time was over is queued again; preemptions do not count."""
    dry_run: bool = False
    """Print the sbatch script and torchrun's command, and submit nothing; needs submitit, but no Slurm."""


def launch(config: AnyConfig, options: SlurmOptions, out: Path, words: Sequence[str], *, resume: bool) -> str:
    """Submit `bevt pretrain WORDS` (or `finetune`) as a job, or make its script with `options.dry_run`; what to tell.

    `config` and `out` are what the words say. Raises ConfigError or SlurmError for what would fail in the job and can
    be seen here, and for what Slurm refuses.
    """
    _check(config, options, out, resume)
    try:
        import submitit
        from submitit.core.utils import FailedJobError, FailedSubmissionError
    except ImportError as error:
        raise SlurmError(
            "bevt slurm needs submitit, which is not installed: pip install 'bevt[slurm]', or pip install submitit"
        ) from error
    command = command_of(config)
    folder, node = out.absolute() / "slurm", Node(options, (command, *words))
    if options.dry_run:

        class Script(submitit.SlurmExecutor):
            """Writes the script where there is no Slurm."""

            @classmethod
            def affinity(cls) -> int:
                return 1

        script = Script(folder)
        script.update_parameters(**_parameters(options, folder))
        text = script._make_submission_file_text(script._submitit_command_str, "")
        return f"{text}\n# on every node:\n# {shlex.join(node.command('JOB', 'FIRST_NODE', 'PORT', 'FIRST'))}"
    if not shutil.which("sbatch") or not shutil.which("srun"):
        raise SlurmError(
            "no sbatch and srun here: submit from a login node of the cluster. --dry-run shows what would be "
            f"submitted; without Slurm: torchrun --nproc-per-node {options.gpus_per_node} -m bevt {command} ..."
        )
    executor = submitit.SlurmExecutor(folder, max_num_timeout=options.requeues)
    executor.update_parameters(**_parameters(options, folder))
    try:
        job = executor.submit(node).job_id
    except (FailedJobError, FailedSubmissionError) as error:
        raise SlurmError(f"sbatch did not take the job: {error}") from error
    log = folder / LOG.replace("%j", job)
    return (
        f"submitted job {job}: {options.nodes} x {options.gpus_per_node} GPUs, {options.time} minutes at a time\n"
        f"log: {log}\n"
        f"to follow it: tail -F {shlex.quote(str(log))}; its state: squeue -j {job}; to stop it: scancel {job}"
    )


def _check(config: AnyConfig, options: SlurmOptions, out: Path, resume: bool) -> None:
    """Raise ConfigError or SlurmError for a mistake that would otherwise show when the job has started."""
    from bevt.data.build import accumulation

    least = {"nodes": 1, "gpus_per_node": 1, "cpus_per_gpu": 1, "memory": 0, "time": 1, "restarts": 0, "requeues": 0}
    for key, smallest in least.items():
        value = getattr(options, key)
        if value is not None and value < smallest:
            raise ConfigError(f"--{key.replace('_', '-')} must be {smallest} or above, got {value}")
    if not 2 * MARGIN <= options.grace < 60 * options.time:
        raise ConfigError(
            f"--grace must be from {2 * MARGIN} seconds to below --time, {60 * options.time} seconds, "
            f"got {options.grace}"
        )
    for word in options.sbatch:
        if word.startswith(("-", "=")):
            raise ConfigError(f"--sbatch takes options as KEY=VALUE or KEY, without dashes, got {word!r}")
    check(config)
    accumulation(config, options.nodes * options.gpus_per_node)
    if isinstance(config, Config) and not Path(config.tokenizer.path).is_file():
        raise ConfigError(f"tokenizer.path = {config.tokenizer.path!r} is no file that is seen here")
    init = getattr(config, "init", "")
    if init and not Path(init).exists():
        raise ConfigError(f"init = {init!r} is not seen here")
    if not resume and (out / "metrics.jsonl").exists():
        raise SlurmError(f"{out} already holds a run: continue it with --resume, or name another folder with --out")


def _parameters(options: SlurmOptions, folder: Path) -> dict[str, Any]:
    """The options in the names of submitit's SlurmExecutor; `folder`, absolute, gets the log."""
    cpus = options.cpus_per_gpu * options.gpus_per_node
    return {
        "job_name": options.name,
        "nodes": options.nodes,
        "ntasks_per_node": 1,
        "gpus_per_node": options.gpus_per_node,
        "cpus_per_task": cpus,
        "mem": None if options.memory is None else f"{options.memory}GB",
        "time": options.time,
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "signal_delay_s": options.grace,
        "stderr_to_stdout": True,
        "wckey": None,  # submitit's default is refused where a cluster keeps a list of them
        # Slurm 22.05 and later do not hand the number of cores from sbatch to srun; and a node whose task has failed
        # would leave the others to wait for it, at a rendezvous of 15 minutes.
        "srun_args": [
            f"--output={folder / LOG}",
            "--open-mode=append",
            f"--cpus-per-task={cpus}",
            "--kill-on-bad-exit=1",
        ],
        "additional_parameters": {
            "requeue": True,
            "output": str(folder / LOG),
            **{key: value if given else True for key, given, value in (word.partition("=") for word in options.sbatch)},
        },
    }


@dataclass(frozen=True)
class Node:
    """The task of one node, which submitit calls there: torchrun, from its start to its end."""

    options: SlurmOptions
    words: tuple[str, ...]
    """Arguments of `bevt`."""

    def command(self, job: str, host: str, port: str, first: str) -> list[str]:
        """The call of torchrun; `first`: "true" on the node `host`, which holds the rendezvous."""
        return [
            *(sys.executable, "-m", "torch.distributed.run"),
            *("--nnodes", str(self.options.nodes), "--nproc-per-node", str(self.options.gpus_per_node)),
            *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"{host}:{port}", "--rdzv-id", job),
            *("--rdzv-conf", f"is_host={first}", "--max-restarts", str(self.options.restarts)),
            *("-m", "bevt", *self.words, "--resume"),
        ]

    def __call__(self) -> None:
        """Run torchrun until it has ended by itself, or Slurm wants the node back. Raises SlurmError if it failed."""
        import submitit

        environment = submitit.JobEnvironment()
        notice = signal.Signals[f"SIG{environment.USR_SIG}"]
        came: set[int] = set()

        def note(signum: int, frame: FrameType | None) -> None:
            came.add(signum)

        # The processes inherit the block: some of Slurm's trackers signal them too, and the notice would end them.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {notice})
        agent = self._start(environment)
        signal.signal(signal.SIGTERM, note)
        requeue = signal.signal(notice, note)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        while agent.poll() is None and not came:
            time.sleep(POLL)
        if agent.poll() is not None:  # by itself
            if agent.returncode:
                raise SlurmError("the run failed, as the log above says; mended, it goes on with --resume")
            return
        deadline = time.monotonic() + self.options.grace - MARGIN / 2
        agent.terminate()  # once: a second SIGTERM would interrupt its waiting for the processes
        while agent.poll() is None and time.monotonic() < deadline:
            time.sleep(POLL)
        agent.kill()
        if agent.wait() == 0:
            return
        while notice not in came and time.monotonic() < deadline:  # preempted: it follows; cancelled: SIGKILL does
            time.sleep(POLL)
        if notice not in came:
            raise SlurmError("the run was stopped by SIGTERM, and goes on with --resume")
        assert callable(requeue)
        requeue(notice, None)  # on the first node it ends this process; the others' end with the job

    def _start(self, environment: Any) -> subprocess.Popen[bytes]:
        port = 10000 + int(environment.job_id) % 20000  # below Linux's ephemeral ports
        first = "true" if environment.global_rank == 0 else "false"
        words = self.command(environment.job_id, environment.hostnames[0], str(port), first)
        print(shlex.join(words), flush=True)
        settings = {
            # A store for each restart: the shared one keeps the addresses of the dead (PyTorch issue 135712).
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(self.options.grace - MARGIN),  # older ones wait for 30 s
            "PYTHONUNBUFFERED": "1",
        }
        return subprocess.Popen(words, env={**os.environ, **settings})

    def checkpoint(self) -> Any:
        """What submitit queues again: the same, as `--resume` finds the checkpoint."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)
