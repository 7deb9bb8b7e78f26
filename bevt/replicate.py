"""`bevt replicate`: the paper's comparisons at a small scale, from nothing to a report.

Every training is a command of `bevt` in a process of its own, with one thread, as many at a time as there are cores;
what an earlier call has finished is kept. Encoders that start in several ways are finetuned on two labellings of the
same clips, "what" (the shape: one frame tells) and "how" (the motion: direction and order tell), and tested with their
frames in order, one frame repeated, shuffled, and reversed.
"""

from __future__ import annotations

import csv
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bevt.data import shapes
from bevt.data.processes import cores
from bevt.train.metrics import RunError

LABELLINGS = {"what": "shape", "how": "motion"}
"""Column of the dataset's labels."""

COUNTS = {"train_clips": 540, "val_clips": 270, "train_images": 1080, "val_images": 270}
"""Multiples of 54: every motion with every shape, equally often."""


@dataclass(frozen=True)
class Start:
    """A way in which an encoder starts."""

    title: str
    paper: tuple[float, float, float] | None
    """Top-1 of the paper with such a start: SSv2, Diving48, K400."""
    recipe: str = ""
    """What trains it; empty: random weights."""
    flags: str = ""
    init: str = ""
    """The start that it goes on from."""


STARTS = {
    "random": Start("random", None),
    "image_supervised": Start("image supervised", (66.3, 84.0, 80.6), "replicate_image_supervised"),
    "bevt_i": Start("BEVT-I", (69.2, 81.2, 80.5), "replicate_image_stage"),
    "bevt_v_scratch": Start("BEVT-V from scratch", (67.1, 83.7, 76.2), "replicate_joint_stage", "--train.images 0"),
    "bevt_v": Start("BEVT-V from BEVT-I", (70.0, 85.2, 79.6), "replicate_joint_stage", "--train.images 0", "bevt_i"),
    "bevt_scratch": Start("BEVT from scratch", (67.9, 85.1, 78.5), "replicate_joint_stage"),
    "bevt": Start("BEVT from BEVT-I", (70.6, 86.7, 80.6), "replicate_joint_stage", "", "bevt_i"),
    "random_3d": Start("mask Random-3D", None, "replicate_joint_stage", "--clip-mask.kind random_3d", "bevt_i"),
    "frame_diff": Start("mask Frame-Diff", None, "replicate_joint_stage", "--clip-mask.kind frame_diff", "bevt_i"),
    "random_frame": Start(
        "mask Random-Frame", None, "replicate_joint_stage", "--clip-mask.kind random_frame", "bevt_i"
    ),
}


@dataclass(frozen=True)
class Job:
    """A command of `bevt`."""

    name: str
    words: tuple[str, ...]
    after: tuple[str, ...] = ()
    """Jobs that have to be done before."""


def plan(out: Path, data: shapes.ShapesPaths, tokenizer: Path, seeds: int) -> list[Job]:
    """All jobs, those that others wait for first."""
    folder = Path(data.labels).parent
    pretraining: list[Job] = []
    tuning: list[Job] = []
    for name, start in STARTS.items():
        if not start.recipe:
            continue
        words = ["finetune" if start.recipe.endswith("supervised") else "pretrain", start.recipe]
        if words[0] == "finetune":
            words += ["--data.images", str(folder / "what_train_images.txt")]
            words += ["--data.val-images", str(folder / "what_val_images.txt")]
        else:
            words += ["--tokenizer.path", str(tokenizer), "--data.val-images", data.val_images]
            if "--train.images 0" not in start.flags:
                words += ["--data.images", data.train_images]
            if start.recipe == "replicate_joint_stage":
                words += ["--data.clips", data.train_clips, "--data.val-clips", data.val_clips]
        words += shlex.split(start.flags)
        if start.init:
            words += ["--init", str(out / start.init / "checkpoints" / "last")]
        words += ["--out", str(out / name), "--resume"]
        pretraining.append(Job(name, tuple(words), (start.init,) if start.init else ()))
    for seed in range(seeds):
        for name, start in STARTS.items():
            for labels in LABELLINGS:
                run = f"{name}-{labels}-{seed}"
                words = [
                    "finetune",
                    "replicate_finetune",
                    "--train.seed",
                    str(seed),
                    "--out",
                    str(out / run),
                    "--resume",
                ]
                words += ["--data.clips", str(folder / f"{labels}_train_clips.txt")]
                words += ["--data.val-clips", str(folder / f"{labels}_val_clips.txt")]
                if start.recipe:
                    words += ["--init", str(out / name / "checkpoints" / "last")]
                tuning.append(Job(run, tuple(words), (name,) if start.recipe else ()))
                checkpoint = str(out / run / "checkpoints" / "last")
                tested = ("test", "replicate_finetune", checkpoint, "--temporal")
                tuning.append(Job(f"{run}-test", tested, (run,)))
    waited = {job.after[0] for job in pretraining if job.after}
    pretraining.sort(key=lambda job: job.name not in waited)
    return pretraining + tuning


def run_jobs(jobs: Sequence[Job], out: Path, console: Console) -> None:
    """Run those that are not done, as many at a time as there are cores. Raises RunError where one fails.

    Interrupted, it ends them, with checkpoints, before it raises KeyboardInterrupt.
    """
    (out / "done").mkdir(parents=True, exist_ok=True)
    (out / "logs").mkdir(exist_ok=True)
    done = {path.name for path in (out / "done").iterdir()}
    left = [job for job in jobs if job.name not in done]
    total = len(left)
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    try:
        while left or running:
            for name, (process, start) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[name]
                if process.returncode:
                    log = out / "logs" / f"{name}.log"
                    raise RunError(f"{name} ended with status {process.returncode}; what it said is in {log}")
                (out / "done" / name).write_text(f"{time.monotonic() - start:.1f}\n")
                done.add(name)
                finished = total - len(left) - len(running)
                minutes = (time.monotonic() - begun) / 60
                console.print(
                    f"{finished}/{total}  {name}  {time.monotonic() - start:.0f} s  ({minutes:.1f} min in all)"
                )
            while len(running) < cores():
                job = next((job for job in left if set(job.after) <= done), None)
                if job is None:
                    break
                left.remove(job)
                with open(out / "logs" / f"{job.name}.log", "ab") as log_file:
                    process = subprocess.Popen(
                        [sys.executable, "-m", "bevt", *job.words], stdout=log_file, stderr=log_file, env=environment
                    )
                running[job.name] = process, time.monotonic()
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def write_labels(data: shapes.ShapesPaths) -> None:
    """Lists of `path label` lines beside the dataset's folders: `what_train_clips.txt` and so on."""
    folder = Path(data.labels).parent
    with open(data.labels, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    names = {"what": shapes.SHAPES, "how": shapes.MOTIONS}
    for labels, column in LABELLINGS.items():
        for split in COUNTS:
            lines = [
                f"{row['path']} {names[labels].index(row[column])}"
                for row in rows
                if row["path"].startswith(f"{split}/") and row[column] in names[labels]
            ]
            if lines:
                (folder / f"{labels}_{split}.txt").write_text("\n".join(lines) + "\n")
