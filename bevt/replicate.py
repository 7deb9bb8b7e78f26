"""`bevt replicate`: the paper's comparisons at a small scale, from nothing to a report.

Every training is a command of `bevt`, run on one thread, as many at a time as there are cores; what an earlier call has
finished is kept. Encoders that start in several ways are finetuned on two labellings of the same clips, "what" (the
background, which one frame tells) and "how" (the motion, which none does), and tested with their frames in order, one
frame repeated, shuffled, and reversed.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import shlex
import statistics
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

import bevt
from bevt.config import TrainConfig, to_dict
from bevt.data import shapes
from bevt.data.processes import cores, pool
from bevt.evaluate.classification import ORDERS
from bevt.pictures.replication import bars
from bevt.recipes import ALL_RECIPES, BEVT_RECIPES
from bevt.recipes.replicate import replicate_joint_stage
from bevt.tokenizers.vq import VQConfig
from bevt.train.loop import hold
from bevt.train.metrics import RunError
from bevt.train.tokenizer import fit_tokenizer

PAPER_TIME = {
    "K400": "80.6 | 65.3 | 77.8",
    "SSv2": "66.3 | 6.3 | 19.0",
    "Diving48": "84.0 | 13.8 | 50.4",
}
"""Table 2: in order, one frame, shuffled."""


@dataclass(frozen=True)
class Start:
    """A way in which an encoder starts."""

    title: str
    paper: tuple[float, ...] | None
    """Top-1 of the paper with such a start: SSv2, Diving48, K400; for a mask SSv2, K400."""
    recipe: str = ""
    """What pretrains it; empty: random weights."""
    init: str = ""
    """The start that it goes on from."""
    streams: tuple[Literal["clips", "images"], ...] = ("clips", "images")
    """What it is pretrained on."""
    mask: str = "tube"
    tuning: tuple[str, ...] = ("replicate_finetune",)
    """The recipe that finetunes it, and options."""


STARTS = {
    "random": Start("random", None),
    "bevt_i": Start("BEVT-I", (69.2, 81.2, 80.5), "replicate_image_stage", streams=("images",)),
    "bevt_v_scratch": Start("BEVT-V from scratch", (67.1, 83.7, 76.2), "replicate_joint_stage", streams=("clips",)),
    "bevt_v": Start("BEVT-V from BEVT-I", (70.0, 85.2, 79.6), "replicate_joint_stage", "bevt_i", streams=("clips",)),
    "bevt_scratch": Start("BEVT from scratch", (67.9, 85.1, 78.5), "replicate_joint_stage"),
    "bevt": Start("BEVT from BEVT-I", (70.6, 86.7, 80.6), "replicate_joint_stage", "bevt_i"),
}

MASKS = {
    "random_3d": Start("Random-3D", (59.1, 67.4), "replicate_joint_stage", "bevt_i", mask="random_3d"),
    "frame_diff": Start("Frame-Diff", (62.9, 70.6), "replicate_joint_stage", "bevt_i", mask="frame_diff"),
    "random_frame": Start("Random-Frame", (62.6, 70.9), "replicate_joint_stage", "bevt_i", mask="random_frame"),
}
"""BEVT from BEVT-I with other masks than the tube's (Table 9, Swin-T), whose top-1 are 63.3 and 71.6."""

SYSTEMS = {
    "timesformer_bevt_i": Start(
        "TimeSformer, BEVT-I",
        (61.8, 77.2, 76.5),
        "timesformer_demo_image",
        streams=("images",),
        tuning=("timesformer_demo_finetune",),
    ),
    "timesformer_bevt": Start(
        "TimeSformer, BEVT from BEVT-I",
        (65.7, 82.3, 77.1),
        "timesformer_demo_joint",
        "timesformer_bevt_i",
        tuning=("timesformer_demo_finetune",),
    ),
    "videomae": Start("VideoMAE", None, "videomae_demo", streams=("clips",), tuning=("videomae_demo_finetune",)),
    "vivit_1": Start("ViViT's model 1, from random weights", None, tuning=("vivit_demo",)),
    "vivit_2": Start(
        "its model 2", None, tuning=("vivit_demo", "--model.kind", "vivit_2", "--model.temporal-depth", "1")
    ),
    "vivit_3": Start("its model 3", None, tuning=("vivit_demo", "--model.kind", "vivit_3")),
    "vivit_4": Start("its model 4", None, tuning=("vivit_demo", "--model.kind", "vivit_4")),
}
"""The other systems, with BEVT's figures of a TimeSformer (Table 8)."""


def every_start() -> dict[str, Start]:
    """Of all three."""
    return {**STARTS, **MASKS, **SYSTEMS}


def labellings(start: str) -> tuple[str, ...]:
    """On which it is finetuned; where masks or systems are compared, motion alone."""
    return tuple(shapes.LABELLINGS) if start in STARTS else ("how",)


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
    for name, start in every_start().items():
        if not start.recipe:
            continue
        words = ["pretrain", start.recipe]
        if start.recipe in BEVT_RECIPES:
            words += ["--tokenizer.path", str(tokenizer)]
        for stream in start.streams:
            words += [f"--data.{stream}", getattr(data, f"train_{stream}")]
            words += [f"--data.val-{stream}", getattr(data, f"val_{stream}")]
        if start.recipe == "replicate_joint_stage" and "images" not in start.streams:
            words += ["--train.images", "0"]
        if start.mask != "tube":
            words += ["--clip-mask.kind", start.mask]
        if start.init:
            words += ["--init", str(out / start.init / "checkpoints" / "last")]
        words += ["--out", str(out / name), "--resume"]
        pretraining.append(Job(name, tuple(words), (start.init,) if start.init else ()))
    for seed in range(seeds):
        for name, start in every_start().items():
            for labels in labellings(name):
                run = f"{name}-{labels}-{seed}"
                words = ["finetune", *start.tuning, "--train.seed", str(seed)]
                words += ["--out", str(out / run), "--resume"]
                words += ["--data.clips", str(folder / f"{labels}_train_clips.txt")]
                words += ["--data.val-clips", str(folder / f"{labels}_val_clips.txt")]
                if start.recipe:
                    words += ["--init", str(out / name / "checkpoints" / "last")]
                tuning.append(Job(run, tuple(words), (name,) if start.recipe else ()))
                checkpoint = str(out / run / "checkpoints" / "last")
                tested = ("test", start.tuning[0], checkpoint, *start.tuning[1:], "--temporal")
                tuning.append(Job(f"{run}-test", tested, (run,)))
    waited = {job.after[0] for job in pretraining if job.after}
    pretraining.sort(key=lambda job: job.name not in waited)
    return pretraining + tuning


def run_jobs(jobs: Sequence[Job], out: Path, console: Console) -> None:
    """Run those that are not done, as many at a time as there are cores. Raises RunError where one fails."""
    (out / "done").mkdir(parents=True, exist_ok=True)
    (out / "logs").mkdir(exist_ok=True)
    done = {path.name for path in (out / "done").iterdir() if not path.suffix}
    left = [job for job in jobs if job.name not in done]
    total, begun = len(left), time.monotonic()
    running: dict[Future[tuple[int, float]], Job] = {}
    with pool(cores()) as processes:
        try:
            while left or running:
                for job in [job for job in left if set(job.after) <= done][: cores() - len(running)]:
                    left.remove(job)
                    running[processes.submit(_run, job.words, out / "logs" / f"{job.name}.log")] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    try:
                        status, seconds = future.result()
                    except BrokenProcessPool as error:
                        what = f"{job.name} was under way when a process was killed, for want of memory perhaps"
                        raise RunError(f"{what}; the same command goes on from there") from error
                    if status:
                        log = out / "logs" / f"{job.name}.log"
                        raise RunError(f"{job.name} ended with status {status}; what it said is in {log}")
                    _write(out / "done" / job.name, f"{seconds:.1f}\n")
                    done.add(job.name)
                    minutes = (time.monotonic() - begun) / 60
                    finished = total - len(left) - len(running)
                    console.print(f"{finished}/{total}  {job.name}  {seconds:.0f} s  ({minutes:.1f} min)")
        except BaseException:
            for process in list(multiprocessing.active_children()):  # or leaving the pool would wait for them
                process.kill()
            raise


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    temporary = path.with_suffix(".new")
    temporary.write_text(text)
    os.replace(temporary, path)


def _run(words: tuple[str, ...], log: Path) -> tuple[int, float]:
    """In a process of the pool: the command's exit status, and its seconds."""
    from bevt.cli import main

    torch.set_num_threads(1)
    begun = time.monotonic()
    with open(log, "a") as file, redirect_stdout(file), redirect_stderr(file):
        try:
            main(words)
        except SystemExit as ended:
            return int(ended.code or 0), time.monotonic() - begun
        except Exception:
            traceback.print_exc()
            return 1, time.monotonic() - begun
    raise AssertionError("a command ends by SystemExit")


ORDERINGS = (
    ("pretraining helps on motion: BEVT-I above random", "how", "bevt_i", "random"),
    ("pretraining helps on motion: BEVT above random", "how", "bevt", "random"),
    ("BEVT from BEVT-I above BEVT-I (SSv2 70.6, 69.2)", "how", "bevt", "bevt_i"),
    ("BEVT above BEVT-V, both from BEVT-I (SSv2 70.6, 70.0)", "how", "bevt", "bevt_v"),
    ("BEVT above BEVT-V, both from scratch (SSv2 67.9, 67.1)", "how", "bevt_scratch", "bevt_v_scratch"),
    ("BEVT-V from BEVT-I above from scratch (SSv2 70.0, 67.1)", "how", "bevt_v", "bevt_v_scratch"),
    ("BEVT from BEVT-I above from scratch (SSv2 70.6, 67.9)", "how", "bevt", "bevt_scratch"),
    ("BEVT-I above BEVT-V from scratch on appearance (K400 80.5, 76.2)", "what", "bevt_i", "bevt_v_scratch"),
    ("tube above Random-3D (SSv2 63.3, 59.1)", "how", "bevt", "random_3d"),
    ("tube above Frame-Diff (SSv2 63.3, 62.9)", "how", "bevt", "frame_diff"),
    ("tube above Random-Frame (SSv2 63.3, 62.6)", "how", "bevt", "random_frame"),
    ("TimeSformer: BEVT above BEVT-I (SSv2 65.7, 61.8)", "how", "timesformer_bevt", "timesformer_bevt_i"),
)
"""What the paper found: in words, on which labelling it is looked for here, the better start and the other."""

Figures = dict[str, dict[str, list[dict[str, float]]]]
"""By start and labelling: for each seed the top-1 accuracy by order of frames."""


def collect(out: Path, seeds: int) -> Figures:
    """The scores of all finetuned models."""
    return {
        name: {
            labels: [_scores(out / f"{name}-{labels}-{seed}" / "test" / "scores.json") for seed in range(seeds)]
            for labels in labellings(name)
        }
        for name in every_start()
    }


def _scores(path: Path) -> dict[str, float]:
    found = json.loads(path.read_text())
    return {order: found[order]["top1"] for order in ORDERS}


def verdict(figures: Figures, labels: str, better: str, other: str) -> tuple[str, float]:
    """Whether `better` is above `other` with every seed, with none, or neither; and the mean difference in points.

    A tie with every seed says nothing.
    """
    pairs = zip(figures[better][labels], figures[other][labels], strict=True)
    differences = [100 * (a["normal"] - b["normal"]) for a, b in pairs]
    if all(d > 0 for d in differences):
        word = "comes out"
    elif not any(differences):
        word = "tie"
    else:
        word = "does not come out" if all(d <= 0 for d in differences) else "unclear"
    return word, statistics.fmean(differences)


def report(out: Path, figures: Figures, jobs: Sequence[Job], seeds: int, settings: Mapping[str, Any]) -> str:
    """`README.md` of the report: tables beside the paper's, and which of its orderings come out."""

    def cell(name: str, labels: str, order: str = "normal") -> str:
        values = [100 * each[order] for each in figures[name][labels]]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):.1f}{spread}"

    def published(start: Start) -> str:
        return " | ".join(f"{value:.1f}" for value in start.paper or ()) or "- | - | -"

    made, counts = settings["made"], settings["counts"]
    minutes = sum(float((out / "done" / job.name).read_text()) for job in jobs) / made["cores"] / 60
    chances = " and ".join(f"{100 / len(classes):.1f}" for _, classes in shapes.LABELLINGS.values())
    steps = settings["recipes"]["replicate_image_stage"]["optim"]["max_steps"]
    over = "mean and standard deviation over" if seeds > 1 else "of"
    lines = [
        "# The paper's comparisons at a small scale",
        "",
        f"Written by `bevt replicate --out {out} --seeds {seeds}` (`make replicate`): {minutes:.0f} minutes of "
        f"training and testing on {made['machine']}, bevt {made['bevt']}, torch {made['torch']}. Top-1 accuracies in "
        f"percent, {over} {seeds} seed{'s' * (seeds > 1)} of finetuning; every encoder was pretrained once, seed 0.",
        "",
        f"{counts['train_clips']} clips and {counts['train_images']} stills of the embedded dataset to learn from, "
        f'{counts["val_clips"]} clips to test on. "What": the background, of {len(shapes.BACKGROUNDS)} kinds; '
        f'"how": the motion of the shape, of {len(shapes.MOTIONS)}: {", ".join(shapes.MOTIONS)}. Settings: '
        "`bevt/recipes/replicate.py`, of the other systems `bevt/recipes/demo.py`.",
        "",
        "What these figures are worth: "
        f"chance is {chances} %, and the standard error of an accuracy on {counts['val_clips']} clips up to "
        f"{50 / counts['val_clips'] ** 0.5:.1f} points. Rate, batch and steps of finetuning were chosen on BEVT from "
        f"BEVT-I with seed 0, by the same clips; of the other systems on ViViT, by these and as many more (LOG.md, "
        f"2026-11-28). What goes on from BEVT-I has its {steps} steps of pretraining too. The paper's figures are of "
        "other data and sizes: only orderings can be compared.",
        "",
        "## Ways to start",
        "",
        "![accuracies by the start, beside the paper's](starts.png)",
        "",
        "| start | what | how | paper: SSv2 | Diving48 | K400 |",
        "|---|---|---|---|---|---|",
    ]
    for name, start in STARTS.items():
        lines.append(f"| {start.title} | {cell(name, 'what')} | {cell(name, 'how')} | {published(start)} |")
    lines += [
        "",
        "## How much the models depend on time",
        "",
        "The same clips in order, with the middle frame in the place of all, shuffled, and from the last to the first; "
        "of the paper: Swin-B started image-supervised, in order, one frame, shuffled. Where reversed clips are told "
        'as well as those in order, a model of "how" knows the axis and kind of a motion and not its direction.',
        "",
        "| start, labelling | in order | one frame | shuffled | reversed |",
        "|---|---|---|---|---|",
    ]
    for labels in shapes.LABELLINGS:
        for name, start in STARTS.items():
            cells = " | ".join(cell(name, labels, order) for order in ORDERS)
            lines.append(f"| {start.title}, {labels} | {cells} |")
    lines += [f"| paper, {data} | {text} | - |" for data, text in PAPER_TIME.items()]
    lines += [
        "",
        "## Masks",
        "",
        "| mask | how | paper, Swin-T: SSv2 | K400 |",
        "|---|---|---|---|",
    ]
    for name, start in MASKS.items():
        paper = " | ".join(f"{value:.1f}" for value in start.paper or ())
        lines.append(f"| {start.title} | {cell(name, 'how')} | {paper} |")
    lines.append(f"| tube (BEVT from BEVT-I above) | {cell('bevt', 'how')} | 63.3 | 71.6 |")
    lines += [
        "",
        "## The other systems",
        "",
        "Of sizes, tokens and finetuning of their own; the paper's figures are of BEVT with a TimeSformer (Table 8).",
        "",
        "| system | how | one frame | shuffled | reversed | paper: SSv2 | Diving48 | K400 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, start in SYSTEMS.items():
        cells = " | ".join(cell(name, "how", order) for order in ORDERS)
        lines.append(f"| {start.title} | {cells} | {published(start)} |")
    lines += [
        "",
        "## The paper's orderings",
        "",
        '"Comes out": above with every seed; "does not": with none; "unclear": with some; "tie": equal with all. '
        f"Of two starts that are equally good, one is above the other with all {seeds} one time in {2**seeds}.",
        "",
        "| ordering | labelling | here | difference |",
        "|---|---|---|---|",
    ]
    for words, labels, better, other in ORDERINGS:
        word, difference = verdict(figures, labels, better, other)
        lines.append(f"| {words} | {labels} | {word} | {difference:+.1f} |")
    lines += ["", "## Commands", ""]
    lines += ["`bevt replicate` makes data and tokenizer and runs, in this order, with `bevt` before each:", "", "```"]
    lines += [shlex.join(job.words) for job in jobs if job.words[0] != "test"]
    lines += [
        "```",
        "",
        "and `bevt test RECIPE RUN/checkpoints/last --temporal`, with its options, of every finetuned one.",
    ]
    return "\n".join(lines) + "\n"


def settle(out: Path, counts: Mapping[str, int], steps: int, fit_steps: int) -> dict[str, Any]:
    """What `out` is made with, as its `settings.json` keeps it. Raises RunError where that is something else already.

    "made" is of the first call, and not compared.
    """
    starts = every_start()
    recipes = {start.recipe for start in starts.values() if start.recipe} | {s.tuning[0] for s in starts.values()}
    settings: dict[str, Any] = {
        **{"shapes": shapes.VERSION, "counts": dict(counts), "labellings": shapes.LABELLINGS, "steps": steps},
        "tokenizer": asdict(vq(fit_steps)),
        "starts": {name: asdict(start) for name, start in starts.items()},
        "recipes": {name: to_dict(ALL_RECIPES[name]()) for name in sorted(recipes)},
        "made": {
            **{"bevt": bevt.__version__, "torch": torch.__version__, "cores": cores()},
            "machine": f"{cores()} cores ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})",
        },
    }
    settings = json.loads(json.dumps(settings))
    path = out / "settings.json"
    if path.exists():
        old = json.loads(path.read_text())
        if {**old, "made": ""} == {**settings, "made": ""}:
            return old
    elif not (out / "done").exists():
        out.mkdir(parents=True, exist_ok=True)
        _write(path, json.dumps(settings, indent=1) + "\n")
        return settings
    raise RunError(f"{out} holds a replication with other settings, of another version perhaps: name another --out")


def replicate(
    out: Path, seeds: int = 3, *, counts: Mapping[str, int] = shapes.COUNTS, steps: int = 0, fit_steps: int = 400
) -> Path:
    """Everything, from rendering to the report in `out/report`, which is returned.

    What an earlier call in `out` has finished is kept. `steps` above 0 shortens every training, for tests. Raises
    RunError where a job fails, where `out` is in use, and where it was made with other settings.
    """
    settings = settle(out, counts, steps, fit_steps)
    with ExitStack() as stack:
        hold(out, stack)
        return _replicate(out, seeds, settings, steps, fit_steps)


def _replicate(out: Path, seeds: int, settings: Mapping[str, Any], steps: int, fit_steps: int) -> Path:
    console = Console(highlight=False, soft_wrap=True)
    data = shapes.ensure(out / "data", seed=0, **settings["counts"])
    shapes.write_labels(data)
    tokenizer = out / "tokenizer.safetensors"
    if not tokenizer.exists():
        source = replicate_joint_stage()
        given = replace(source.data, clips=data.train_clips, images=data.train_images)
        fit_tokenizer(
            replace(source, data=given, train=TrainConfig(clips=1, images=1)), vq(fit_steps), tokenizer, quiet=True
        )
    jobs = plan(out, data, tokenizer, seeds)
    if steps:
        jobs = [replace(job, words=(*job.words, *_shorter(job, steps))) for job in jobs]
    run_jobs(jobs, out, console)
    figures, folder = collect(out, seeds), out / "report"
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    bars(
        folder / "starts.png",
        {s.title: {k: [v["normal"] for v in each] for k, each in figures[n].items()} for n, s in STARTS.items()},
        {start.title: start.paper[0] if start.paper else None for start in STARTS.values()},
        "Here: the embedded dataset, points for seeds",
        "Paper: Something-Something V2, Swin-B",
    )
    (folder / "README.md").write_text(report(out, figures, jobs, seeds, settings))
    console.print(f"report: {folder / 'README.md'}")
    return folder


def _shorter(job: Job, steps: int) -> tuple[str, ...]:
    return () if job.words[0] == "test" else ("--optim.max-steps", str(steps))


def vq(steps: int) -> VQConfig:
    """The tokenizer: 128 codes of 32x32 views."""
    return VQConfig(
        image_size=32,
        vocab_size=128,
        code_dim=8,
        width=16,
        blocks=0,
        steps=steps,
        batch=32,
        lr=3e-3,
        decay=0.95,
        seed=0,
    )
