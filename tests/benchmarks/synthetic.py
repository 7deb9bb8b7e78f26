"""Rows as benchmarks write them, with numbers made up."""

from typing import Any

from benchmarks.rows import Row

CPU = {"cpu": "Some CPU", "cores": 2, "isa": "AVX2"}
GPU = {**CPU, "gpu": "NVIDIA H200"}
WINDOW = {"batch": 1, "grid": [16, 28, 28], "window": [8, 7, 7], "shift": [0, 0, 0], "heads": 4, "head_dim": 32}
CLIP = {"batch": 1, "size": "tiny", "frames": 16, "side": 224}


def row(contestant: str = "native", ms: float = 10.0, **fields: Any) -> Row:
    """Of window attention, forward and backward, unless `fields` say otherwise."""
    return {
        "commit": "0123456789abcdef", "dirty": False, "tree": "t", "date": "2026-01-01", "machine": CPU, "versions": {},
        "op": "window_attention", "case": "cpu target", "problem": WINDOW, "device": "cpu", "dtype": "float32",
        "threads": 2, "quantity": "forward+backward", "contestant": contestant,
        "ours": contestant in ("native", "triton", "reference"), "lacks": None, "speedup": {},
        "p20_ms": 0.9 * ms, "p50_ms": ms, "p80_ms": 1.2 * ms, **fields,
    }  # fmt: skip


def pair(**fields: Any) -> list[Row]:
    """Ours and eager, which takes three times as long and five times the memory."""
    ours = row(**{"peak_mib": 10.0, "speedup": {"eager": 3.0}, **fields})
    return [ours, row("eager", 30.0, **{"peak_mib": 50.0, **fields})]


def steps() -> list[Row]:
    """A training step in turns with the reference path's."""
    seconds = {"data": 0.0, "tokenizer": 1.0, "encoder": 2.0, "head": 0.5, "optimizer": 0.1}
    step: dict[str, Any] = {"op": "train_step", "case": "swin-t, dalle", "quantity": "step", "problem": None}
    slow = {name: 2 * value for name, value in seconds.items()}
    return [
        row("fused", 3600.0, **step, seconds=seconds, speedup={"reference": 2.0}) | {"ours": True},
        row("reference", 7200.0, **step, seconds=slow) | {"ours": False},
    ]


def everything() -> list[Row]:
    """Rows for every kind of plot, on one machine."""
    rows = steps()
    for batch in (1, 2, 4):
        rows += pair(case=f"batch {batch}", problem=WINDOW | {"batch": batch})
    for depth in (2, 4, 8, 16):
        table = {"window": [depth, 7, 7], "table_window": [depth, 7, 7]}
        rows += pair(case=f"window {depth} x 7 x 7", problem=WINDOW | {"batch": 3} | table)
    limits = {"limits": {"flops": 1e11, "bandwidth": 1e10}, "percent_of_limit": 12.0, "limit": "arithmetic"}
    rows += pair(op="linear", case="qkv", problem=None, flop=10**8, flop_unmasked=None, bytes=10**7, **limits)
    for frames, side in ((8, 224), (16, 112), (16, 224), (32, 224)):
        clip = CLIP | {"frames": frames, "side": side}
        rows += pair(op="video_swin_step", case=f"{frames} frames, {side}", problem=clip)
    return rows
