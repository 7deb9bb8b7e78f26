"""Peak memory of real training steps on random data, in a process of its own: a script.

Reads a list of configurations (JSON) from standard input and prints the bytes that each took above what the process
held before its model was built. Freed blocks go back at once, so that the resident memory is what lives
(`benchmarks.memory.MALLOC`). With an argument, the process gets that many bytes of address space for its steps and
prints the RunError that it ends with.
"""

from __future__ import annotations

import gc
import json
import resource
import sys

import torch

from benchmarks.memory import high_water, resident
from benchmarks.problems.train import synthetic_batch
from bevt.config import Config, from_dict
from bevt.tokenizers.vq import VQConfig, VQModel, VQTokenizer
from bevt.train import memory
from bevt.train.distributed import World
from bevt.train.metrics import RunError
from bevt.train.optim import build_optimizer
from bevt.train.pretrain import build_model
from bevt.train.step import TrainStep

WORLD = World(0, 1, torch.device("cpu"))


def trainer(config: Config) -> TrainStep:
    """What steps a new model, with AdamW's moments there, and blocks recomputed as `config` has it."""
    tokenizer = VQTokenizer(VQModel(VQConfig())).to("cpu")
    model = build_model(config, tokenizer.vocab_size, WORLD.device)
    if config.train.memory_budget:
        memory.recompute(model, memory.choose(config, 1, "cpu"))
    step = TrainStep(
        model, tokenizer, build_optimizer(model, config.optim, fused=config.path == "fused"), config, WORLD
    )
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    step._update(0.0, {"loss": torch.zeros(())})
    return step


def peak(config: Config) -> int:
    """Bytes of one step above what was there before the model."""
    gc.collect()
    before = resident("VmRSS")
    step, data = trainer(config), synthetic_batch(config)
    return high_water(lambda: step(1e-3, [data])) - before


def limited(config: Config, room: int) -> str:
    """What a step that gets `room` bytes ends with."""
    step, data = trainer(config), synthetic_batch(config)
    resource.setrlimit(resource.RLIMIT_AS, (resident("VmSize") + room,) * 2)
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
