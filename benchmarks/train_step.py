"""A whole training step, update included, on random pixels under the recipe's masks, on the fused and reference path.

    python -m benchmarks.train_step --size tiny --clips 1 --images 8 --threads 2

Paths take turns, so that a change of clocks or load meets both. Tokenizers: `dalle`, the recipe's, at its full size
with random weights; `vq`, this project's; `kept`: `dalle` with a token cache that has every view, as in later epochs,
which the reference path does not have. Before anything is timed, loss and gradient norm of both paths' first step are
compared. Peak memory is of a process of its own, above what it held before the model was built.
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.memory import MALLOC, high_water, resident
from bevt import budget, masking
from bevt.config import SIZES, Config, MaskConfig, Size, resized, tokenizer_settings
from bevt.data.batch import Batch
from bevt.models.region import compile_regions
from bevt.recipes import RECIPES
from bevt.tokenizers import Tokenizer
from bevt.tokenizers.cache import TokenCache
from bevt.tokenizers.dalle import DalleEncoder, DalleTokenizer
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train import memory
from bevt.train.distributed import World
from bevt.train.loop import build_model
from bevt.train.optim import build_optimizer
from bevt.train.phases import PHASES
from bevt.train.step import TrainStep

RESULTS = Path(__file__).parent / "results" / "train_step.jsonl"
SAME = 1e-5
"""Relative difference of the first step's figures: float32's rounding, unless a code at a tie differs."""

Kind = Literal["dalle", "vq", "kept"]
Way = Literal["fused", "reference"]


class Case(NamedTuple):
    """What is run."""

    size: Size
    clips: int
    images: int
    tokenizer: Kind
    precision: Literal["float32", "bfloat16"]
    compile: bool

    def config(self, path: Way) -> Config:
        """The joint recipe at this size, as one micro-batch."""
        base = RECIPES["joint_stage"]()
        train = replace(
            base.train,
            clips=self.clips,
            images=self.images,
            micro_clips=self.clips,
            micro_images=self.images,
            precision=self.precision,
        )
        model = resized(base.model, self.size)
        return replace(base, path=path, model=model, train=train)


def synthetic_batch(config: Config) -> Batch:
    """A micro-batch of random pixels under the recipe's masks."""
    t, d = config.train, config.data
    side, seeds = d.crop // 16, {"clips": np.arange(t.micro_clips), "images": np.arange(t.micro_images)}

    def masks(settings: MaskConfig, stream: str, depth: int) -> Tensor:
        return torch.from_numpy(masking.generate(settings, seeds[stream], (depth, side, side)))

    random = torch.Generator().manual_seed(0)
    return Batch(
        clips=torch.randint(256, (t.micro_clips, d.frames, d.crop, d.crop, 3), generator=random, dtype=torch.uint8),
        clip_masks=masks(config.clip_mask, "clips", d.frames // 2),
        images=torch.randint(256, (t.micro_images, d.crop, d.crop, 3), generator=random, dtype=torch.uint8),
        image_masks=masks(config.image_mask, "images", 1)[:, 0],
        image_jitter=torch.tensor([[1.1, 0.9, 1.2, 2.0, 0.0, 1.0]]).repeat(t.micro_images, 1),
        clip_seeds=torch.from_numpy(seeds["clips"]),
        image_seeds=torch.from_numpy(seeds["images"]),
        clip_slots=torch.arange(t.micro_clips),
        image_slots=torch.arange(t.micro_images),
    )


def tokenizer_of(kind: Kind, config: Config, device: torch.device) -> Tokenizer:
    """Of random weights, whose logits differ as much as pixels do."""
    torch.manual_seed(0)
    if kind == "vq":
        return VQTokenizer(VQModel(VQConfig()), tokenizer_settings(config)).to(device)
    encoder = DalleEncoder()
    for conv in encoder.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    return DalleTokenizer(encoder, tokenizer_settings(config)).to(device)


def train_step(case: Case, path: Way, device: torch.device, folder: Path) -> TrainStep:
    """What steps a seeded model; `folder` is for a token cache."""
    config = case.config(path)
    tokenizer = tokenizer_of(case.tokenizer, config, device)
    cache = None
    if case.tokenizer == "kept" and path == "fused":
        config = replace(config, tokenizer=replace(config.tokenizer, cache=str(folder)))
        views: dict[str, tuple[dict[str, Any], int]] = {
            "clips": ({"files": "random"}, case.clips),
            "images": ({"files": "random"}, case.images),
        }
        cache = TokenCache.open(config, tokenizer, "random weights", device, views)
    torch.manual_seed(1)
    model = build_model(config, tokenizer.vocab_size, device)
    if case.compile and path == "fused":
        compile_regions(model)
    optimizer = build_optimizer(model, config.optim, fused=path == "fused")
    return TrainStep(model, tokenizer, optimizer, config, World(0, 1, device), cache)


def peak(case: Case, path: Way, device: torch.device) -> int:
    """Bytes of the second step above what this process held before the model was built."""
    data = synthetic_batch(case.config(path))
    gc.collect()
    before = resident("VmRSS")
    with tempfile.TemporaryDirectory() as folder:
        step = train_step(case, path, device, Path(folder))
        step(1e-5, [data])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            step(1e-5, [data])
            return torch.cuda.max_memory_allocated()
        return high_water(lambda: step(1e-5, [data])) - before


def peak_in_a_process(words: list[str], path: Way) -> int:
    """`peak`, in a process of its own with the same arguments."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_step", *words, "--peak-of", path],
        env={**os.environ, **MALLOC, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.splitlines()[-1])


def measure(case: Case, device: torch.device, rounds: int, threads: int, words: list[str]) -> list[rows.Row]:
    """One row a path."""
    data = synthetic_batch(case.config("fused"))
    times: dict[str, list[float]] = {}
    phases: dict[str, list[dict[str, float]]] = {}
    paths: tuple[Way, ...] = ("fused", "reference")
    with tempfile.TemporaryDirectory() as folder:
        steps = {path: train_step(case, path, device, Path(folder)) for path in paths}
        first = {path: step(1e-5, [data]).values for path, step in steps.items()}
        for name in ("loss", "grad_norm"):
            ours, theirs = (float(first[path][name]) for path in paths)
            print(f"first step: {name} {ours:.6f}, reference path {theirs:.6f}, {abs(ours / theirs - 1):.1e} apart")
            if case.precision == "float32" and abs(ours / theirs - 1) > SAME:
                raise SystemExit(f"the paths do not agree on {name}: nothing is timed")
        for path, step in steps.items():
            step(1e-5, [data])
            times[path], phases[path] = [], []
        for i in range(rounds):
            for path in paths[i % 2 :] + paths[: i % 2]:
                steps[path].phases.start()
                start = time.perf_counter()
                steps[path](1e-5, [data])
                phases[path].append(steps[path].phases.read())  # waits for the device
                times[path].append(time.perf_counter() - start)
    found = []
    for path in paths:
        p20, p50, p80 = np.quantile(times[path], (0.2, 0.5, 0.8))
        ratio = np.array(times["reference"]) / np.array(times[path])
        config = case.config(path)
        tokenizing, training = budget.step_flop(case.config("fused"))
        flop = training + tokenizing * (case.tokenizer == "dalle")
        predicted = memory.predict(replace(config, tokenizer=replace(config.tokenizer, kind="dalle")), 1, device.type)
        found.append(
            {
                **rows.environment(device.type),
                "op": "train_step",
                "case": f"swin {case.size}, {case.clips} clips + {case.images} images, tokenizer {case.tokenizer}",
                "dtype": case.precision,
                "contestant": path + (", compiled" if case.compile and path == "fused" else ""),
                "quantity": "step",
                "threads": threads,
                "rounds": rounds,
                "p20_ms": 1e3 * p20,
                "p50_ms": 1e3 * p50,
                "p80_ms": 1e3 * p80,
                "clips_per_second": case.clips / p50,
                "x reference": float(np.median(ratio)),
                "tflops": flop / p50 / 1e12 if case.tokenizer != "vq" else None,
                "seconds": {phase: float(np.median([each[phase] for each in phases[path]])) for phase in PHASES},
                "peak_mib": peak_in_a_process(words, path) / 2**20,
                "predicted_peak_mib": predicted.peak().total / 2**20 if case.tokenizer == "dalle" else None,
            }
        )
    return found


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="tiny", choices=list(SIZES))
    parser.add_argument("--clips", type=int, default=1)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--tokenizer", default="dalle", choices=["dalle", "vq", "kept"])
    parser.add_argument("--precision", default="", choices=["float32", "bfloat16"], help="default: CPU's float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--compile", action="store_true", help="the encoder of the fused path")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", choices=["fused", "reference"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    precision = args.precision or ("bfloat16" if args.device == "cuda" else "float32")
    case = Case(args.size, args.clips, args.images, args.tokenizer, cast(Any, precision), args.compile)
    if args.peak_of:
        print(peak(case, args.peak_of, device))
        return
    found = measure(case, device, args.rounds, args.threads, sys.argv[1:])
    rows.save(RESULTS, found)
    print(found[0]["case"])
    for row in found:
        split = ", ".join(f"{phase} {seconds:.2f}" for phase, seconds in row["seconds"].items() if seconds > 0.005)
        print(
            f"{row['contestant']:>20}: {row['p50_ms'] / 1e3:.2f} s a step, {row['clips_per_second']:.3f} clips/s, "
            f"{row['x reference']:.2f} times the reference path, peak {row['peak_mib']:.0f} MiB ({split})"
        )


if __name__ == "__main__":
    main()
