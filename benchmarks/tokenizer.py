"""`python -m benchmarks.tokenizer`: what tokenizing only frames with a masked position saves, and what layout,
compilation and precision do; rows in benchmarks/results/tokenizer.jsonl.

The DALL-E encoder of published size with random weights. Tube lengths of the joint recipe are uniform over 4..8 of 8
steps, so the mean over one mask of each length, timed in turns, is the expected time; at length 8 all frames are
tokenized. One CPU thread takes about 4 minutes.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import rows, timing, verify
from benchmarks.arguments import obstacle, seconds, threads
from benchmarks.problems.train import DISAGREEMENT, random_encoder
from benchmarks.registry import TEST_SECONDS, TOKENIZER_TESTS
from benchmarks.run import statistics
from bevt import masking
from bevt.config import Config, TokenizerConfig
from bevt.data.batch import Batch
from bevt.recipes.pretrain import joint_stage
from bevt.tokenizers import Tokenizer
from bevt.tokenizers.dalle import DalleEncoder, DalleTokenizer
from bevt.train.step import NO_TOKEN, masked_inputs

DRAWS = 20000
"""Masks of which the expected share of tokenized frames is taken."""
CLIPS = {"cpu": 1, "cuda": 8}
FRAMES = {"cpu": 2, "cuda": 128}
"""At a time, where layout, compilation and precision are compared."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code, 1 where the tokens are not those of tokenizing everything."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tokenizer")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=threads, default=1, help="CPU threads of torch")
    parser.add_argument("--seconds", type=seconds, default=90, help="for the timed rounds of each of the two cases")
    parser.add_argument("--compiled", action="store_true", help="on the CPU, the compiled encoder too (CUDA: always)")
    parser.add_argument("--out", type=Path, default=verify.ROOT / "benchmarks" / "results" / "tokenizer.jsonl")
    args = parser.parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a CUDA GPU: torch sees none", file=sys.stderr)
        return 2
    if why := obstacle(args.out):
        print(f"nothing is measured: {why}", file=sys.stderr)
        return 2
    torch.set_num_threads(args.threads)
    try:
        print(verify.green(TOKENIZER_TESTS, args.device, TEST_SECONDS[args.device]), flush=True)
    except verify.GateClosed as closed:
        print(closed, file=sys.stderr)
        return 1
    common = {**rows.environment(args.device), "op": "tokenizer", "device": args.device, "threads": args.threads}
    encoder = random_encoder(torch.rand(2, 3, 112, 112))
    done = [
        {**common, **row}
        for row in (
            *masked_frames(joint_stage(), DalleTokenizer(copy.deepcopy(encoder)).to(args.device), args),
            *variants(encoder, args),
        )
    ]
    rows.save(args.out, done)
    for row in done:
        gain = "".join(f", {value:.3f} times as fast as {rival}" for rival, value in row["speedup"].items())
        print(f"{row['quantity']}, {row['contestant']}: {row['p50_ms']:.5g} ms{gain}")
    return 0


def masked_frames(config: Config, tokenizer: DalleTokenizer, args: argparse.Namespace) -> list[rows.Row]:
    """Clips alone: of the joint micro-batch's images, eight a clip, every one has masked positions."""
    device, side = torch.device(args.device), config.data.crop // 16
    grid = (config.data.frames // 2, side, side)
    share = float(masking.generate(config.clip_mask, np.arange(DRAWS), grid).any((2, 3)).mean())
    clips = CLIPS[args.device]
    pixels = torch.randint(256, (clips, config.data.frames, config.data.crop, config.data.crop, 3), dtype=torch.uint8)

    def batch(length: int) -> Batch:
        tube = replace(config.clip_mask, tube=(length / grid[0], length / grid[0]))
        mask = torch.from_numpy(masking.generate(tube, np.arange(clips), grid))
        return Batch(clips=pixels, clip_masks=mask, images=None, image_masks=None, image_jitter=None)

    def codes(length: int) -> Tensor:
        return masked_inputs(batch(length), tokenizer, config, device)["clips"].codes

    lengths = range(int(config.clip_mask.tube[0] * grid[0]), grid[0] + 1)
    everywhere = codes(grid[0])
    for length in lengths:
        found = codes(length)
        used = found != NO_TOKEN
        equal = bool((found == everywhere)[used].all())
        print(f"{length} of {grid[0]} steps masked: codes {'as' if equal else 'not as'} of all frames", flush=True)
        if not equal or used.sum() != 2 * length * clips * side * side:
            raise SystemExit("the tokens are not those of tokenizing everything: nothing is timed")
    times = _times({str(length): lambda n=length: codes(n) for length in lengths}, args)
    whole = times[str(grid[0])]
    ratio = sum(times.values()) / len(lengths) / whole
    saving = 1 - float(np.median(ratio))
    print(f"{100 * share:.2f} % of the frames hold a masked position ({DRAWS} draws); time saved: {100 * saving:.1f} %")
    extra: rows.Row = {
        "case": "joint recipe's clips",
        "dtype": tokenizer.implementations["tokenizer precision"],
        "quantity": f"{clips} clips",
        "tokenizer": tokenizer.implementations,
    }
    return [
        {**extra, "contestant": "all frames", **statistics(whole), "speedup": {}},
        {
            **extra,
            "contestant": "masked frames",
            **statistics(ratio * whole),
            "share_of_frames": share,
            "saving": saving,
            "speedup": {"all frames": float(np.median(1 / ratio))},
        },
    ]


def variants(encoder: DalleEncoder, args: argparse.Namespace) -> list[rows.Row]:
    """Encoding alone: as published in float32 (contiguous, eager), in channels-last, compiled, in half precision."""
    cuda = args.device == "cuda"
    settings: dict[str, dict[str, Any]] = {"channels last": {"precision": "float32", "compile": "no"}}
    if cuda or args.compiled:
        settings["compiled"] = {"precision": "float32", "compile": "yes"}
    for precision in ("float16", "bfloat16") if cuda else ():
        settings[precision] = {"precision": precision, "compile": "no"}
        settings[f"{precision}, compiled"] = {"precision": precision, "compile": "yes"}
    contestants: dict[str, Tokenizer] = {"contiguous": DalleTokenizer(copy.deepcopy(encoder))}
    contestants["contiguous"].encoder.to(args.device)  # type: ignore[attr-defined]
    for name, keys in settings.items():
        contestants[name] = DalleTokenizer(copy.deepcopy(encoder), TokenizerConfig(**keys)).to(args.device)
    frames = FRAMES[args.device]
    pixels = torch.rand(frames, 3, 112, 112, device=args.device)
    published = contestants["contiguous"].encode(pixels)

    def others(tokenizer: Tokenizer) -> float:
        """The share of codes that are not the published encoder's."""
        return float((tokenizer.encode(pixels) != published).double().mean())

    for name, keys in settings.items():
        eager = DalleTokenizer(
            copy.deepcopy(encoder), TokenizerConfig(**{**keys, "impl": "reference", "compile": "no"})
        )
        share, most = others(contestants[name]), 2 * others(eager.to(args.device)) + DISAGREEMENT
        print(f"{name}: {100 * share:.2f} % of the codes are not the published encoder's", flush=True)
        if share > most:
            raise SystemExit(f"at most {100 * most:.2f} % may be others: nothing is timed")
    times = _times({name: lambda t=t: t.encode(pixels) for name, t in contestants.items()}, args)
    return [
        {
            "case": "encode",
            "dtype": settings.get(name, {}).get("precision", "float32"),
            "quantity": f"{frames} frames",
            "contestant": name,
            **statistics(ms),
            "speedup": {"contiguous": float(np.median(times["contiguous"] / ms))} if name != "contiguous" else {},
        }
        for name, ms in times.items()
    ]


def _times(steps: dict[str, Any], args: argparse.Namespace) -> dict[str, np.ndarray]:
    """Milliseconds of every round."""

    def step(work: Any) -> timing.Step:
        def run(mark: timing.Mark) -> None:
            mark()
            work()

        return run

    taken = timing.interleaved(
        {name: step(work) for name, work in steps.items()}, args.device, args.seconds, least=3, warm=1
    )
    return {name: np.array(pairs)[:, 1] for name, pairs in taken.items()}


if __name__ == "__main__":
    sys.exit(main())
