"""Peak memory of real training steps on random data, in a process of its own: a script.

Reads a list of configurations (JSON) from standard input and prints the bytes that each took above what the process
held before its model was built. Freed blocks of 64 KiB and more go back at once, so that the resident memory is what
lives (`ENVIRONMENT`). With an argument, the process gets that many bytes of address space for its steps and prints the
RunError that it ends with.
"""

from __future__ import annotations

import gc
import json
import re
import resource
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bevt import masking
from bevt.config import Config, MaskConfig, from_dict
from bevt.data.batch import Batch
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train import memory
from bevt.train.distributed import World
from bevt.train.loop import build_model
from bevt.train.metrics import RunError
from bevt.train.optim import build_optimizer
from bevt.train.step import TrainStep

ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
WORLD = World(0, 1, torch.device("cpu"))


def status(key: str) -> int:
    """Bytes."""
    match = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return 1024 * int(match[1])


def batch(config: Config) -> Batch:
    """Random pixels under the recipe's masks."""
    t, d = config.train, config.data
    side, seeds = d.crop // 16, {"clips": np.arange(t.micro_clips), "images": np.arange(t.micro_images)}

    def masks(settings: MaskConfig, stream: str, depth: int) -> Tensor:
        return torch.from_numpy(masking.generate(settings, seeds[stream], (depth, side, side)))

    return Batch(
        clips=torch.randint(256, (t.micro_clips, d.frames, d.crop, d.crop, 3), dtype=torch.uint8),
        clip_masks=masks(config.clip_mask, "clips", d.frames // 2),
        images=torch.randint(256, (t.micro_images, d.crop, d.crop, 3), dtype=torch.uint8),
        image_masks=masks(config.image_mask, "images", 1)[:, 0],
        image_jitter=torch.tensor([[1.1, 0.9, 1.2, 2.0, 0.0, 1.0]]).repeat(t.micro_images, 1),
        clip_seeds=torch.from_numpy(seeds["clips"]),
        image_seeds=torch.from_numpy(seeds["images"]),
    )


def trainer(config: Config) -> TrainStep:
    """What steps a new model, with AdamW's moments there, and blocks recomputed as `config` has it."""
    tokenizer = VQTokenizer(VQModel(VQConfig())).to("cpu")
    model = build_model(config, tokenizer.vocab_size, WORLD.device)
    if config.train.memory_budget:
        memory.recompute(model, config, WORLD)
    step = TrainStep(model, tokenizer, build_optimizer(model, config.optim), config, WORLD)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    step._update(0.0, {"loss": torch.zeros(())})
    return step


def peak(config: Config) -> int:
    """Bytes of one step above what was there before the model."""
    gc.collect()
    before = status("VmRSS")
    step, data = trainer(config), batch(config)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark of resident memory (proc(5))
    step(1e-3, [data])
    return status("VmHWM") - before


def limited(config: Config, room: int) -> str:
    """What a step that gets `room` bytes ends with."""
    step, data = trainer(config), batch(config)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + room,) * 2)
    try:
        with memory.explained(config, WORLD):
            step(1e-3, [data])
    except RunError as error:
        return str(error)
    return "there was memory enough"


if __name__ == "__main__":
    configs = [from_dict(config) for config in json.load(sys.stdin)]
    if len(sys.argv) > 1:
        print(limited(configs[0], int(sys.argv[1])))
    else:
        linear = torch.nn.Linear(256, 256)  # libraries, before anything is counted
        optimizer = build_optimizer(linear, configs[0].optim)
        linear(torch.randn(256, 256)).sum().backward()
        optimizer.step()
        print(json.dumps([peak(config) for config in configs]))
