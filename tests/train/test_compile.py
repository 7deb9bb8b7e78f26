"""A compiled step: nothing is compiled again once it runs, and its results are those of the plain one."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bevt_kernels import Spec
from bevt_kernels.baselines.common import compile_reasons
from stepping import gradients, split, trainer
from tiny import TORCHRUN, changed, command, figures, output, train_rows

from bevt import tokenizers
from bevt.config import Config, ConfigError
from bevt.data.batch import Batch
from bevt.models.bevt import BEVT
from bevt.models.region import Region, compile_regions
from bevt.train.distributed import World
from bevt.train.optim import build_optimizer
from bevt.train.pretrain import build_model, pretrain
from bevt.train.step import TrainStep

REASONS = compile_reasons(Spec("cpu", torch.float32))
needs_compiler = pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))


def other_masks(batch: Batch, share: float) -> Batch:
    """The batch with masks of another size, unequal between samples."""
    masks = {name: torch.rand(getattr(batch, name).shape) < share for name in ("clip_masks", "image_masks")}
    return replace(batch, **masks)


@needs_compiler
def test_nothing_is_compiled_again(config: Config, batch: Batch) -> None:
    """Both streams, two micro-batches, any masks, drop path on or off in a sample; the probe itself works."""
    seeded = replace(batch, clip_seeds=torch.arange(4), image_seeds=torch.arange(8))
    model, step = trainer(changed(config, model={"drop_path": 0.5}))
    compile_regions(model)
    torch._dynamo.reset()
    step(1e-3, split(seeded, 2))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for share in (0.1, 0.9):
            later = replace(seeded, clip_seeds=torch.arange(4) + 100, image_seeds=torch.arange(8) + 200)
            assert step(1e-3, split(other_masks(later, share), 2)).finite
        with pytest.raises(torch._dynamo.exc.RecompileError):
            step(1e-3, [seeded])  # micro-batches of another size
        with torch.no_grad():  # evaluation compiles nothing, whatever the size
            assert batch.images is not None
            model.encode("images", torch.rand(3, 3, 64, 64), torch.zeros(3, 4, 4, dtype=torch.bool))


@pytest.fixture(scope="module")
def joint(config: Config) -> Config:
    """Four steps in four micro-batches of one process, or in two of each of two.

    A micro-batch has the shapes of `test_nothing_is_compiled_again`: what that compiled is found on disk.
    """
    return changed(
        config,
        model={"drop_path": 0.5},
        optim={"max_steps": 4},
        train={"clips": 8, "images": 16, "micro_clips": 2, "micro_images": 4, "threads": 1},
    )


@pytest.fixture(scope="module")
def alone(joint: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run by one process, not compiled."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    pretrain(joint, out, quiet=True)
    return out


COUNTING = """
import sys

from torch._dynamo.utils import counters

from bevt.cli import main
from bevt.train.metrics import Meter

add = Meter.add


def counting(self, step, *rest):
    sys.stdout.write(f"process {self.world.rank}, step {step}: {counters['stats']['unique_graphs']} graphs\\n")
    add(self, step, *rest)


if __name__ == "__main__":  # not in processes that decode
    Meter.add = counting
    main(sys.argv[3:])  # behind "-m bevt"
"""
"""`bevt`, each process of which tells after every step how many graphs it has compiled since it began."""


@needs_compiler
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_equal_one(joint: Config, alone: Path, tmp_path: Path, parallel: str) -> None:
    """Compiled in their first step and never again; the figures of the plain run, up to float32's rounding."""
    script, out = tmp_path / "counting.py", tmp_path / "two"
    script.write_text(COUNTING)
    config = changed(joint, train={"compile": "yes", "parallel": parallel})
    printed = output(command(config, out, python=(*TORCHRUN, str(script))), timeout=300)
    for process in "01":
        graphs = re.findall(rf"process {process}, step \d: (\d+) graphs", printed)
        assert len(graphs) == 4, printed
        assert graphs[0] != "0", f"process {process} has compiled nothing"
        assert graphs == [graphs[0]] * 4, f"process {process} has compiled after its first step"
    assert "encoder compiled" in printed
    for got, wanted in zip(train_rows(out), train_rows(alone), strict=True):
        for key in ("loss", "loss_clips", "loss_images", "grad_norm"):
            assert got[key] == pytest.approx(wanted[key], rel=1e-6), (key, got["step"])  # measured: at most 1.1e-7


@needs_compiler
@pytest.mark.parametrize("compiled", [False, True])
def test_recomputing(plain: Config, batch: Batch, compiled: bool) -> None:
    """A region that is run again in the backward pass gives the same gradients, bit for bit."""

    def prepare(model: BEVT, recompute: bool) -> None:
        regions = [module for module in model.modules() if isinstance(module, Region)]
        assert len(regions) == 5 + 3 + 2  # blocks, mergings, patch embeddings
        for region in regions:
            region.recompute = recompute
        if compiled:
            compile_regions(model)

    kept, again = (gradients(plain, [batch], lambda m, r=recompute: prepare(m, r))[1] for recompute in (False, True))
    for name, gradient in kept.items():
        assert torch.equal(again[name], gradient), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_nothing_waits_for_a_gpu(config: Config, batch: Batch) -> None:
    """PyTorch's own guard, in a compiled step after the first two."""
    device = torch.device("cuda")
    tokenizer = tokenizers.build(config.tokenizer, device)
    model = build_model(config, tokenizer.vocab_size, device)
    compile_regions(model)
    step = TrainStep(model, tokenizer, build_optimizer(model, config.optim), config, World(0, 1, device))
    seeded = replace(batch, clip_seeds=torch.arange(4), image_seeds=torch.arange(8))
    for _ in range(2):
        step(1e-3, split(seeded, 2))
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step(1e-3, split(seeded, 2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert result.finite


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_cuda_graphs(config: Config, tmp_path: Path) -> None:
    """Two micro-batches a step, whose gradients add up outside of the graphs: the compiled run's figures."""
    compiled = changed(config, train={"compile": "yes"})
    pretrain(compiled, tmp_path / "compiled", quiet=True)
    pretrain(changed(compiled, train={"cuda_graphs": True}), tmp_path / "graphs", quiet=True)
    assert figures(tmp_path / "graphs") == figures(tmp_path / "compiled")


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA GPU it can be")
def test_what_cannot_be_compiled(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA graphs without a GPU, no compiler: an error that says so, and nothing runs plain in silence."""
    with pytest.raises(ConfigError, match=r"train.cuda_graphs needs a CUDA GPU, this runs on the cpu"):
        pretrain(changed(config, train={"cuda_graphs": True}), tmp_path / "graphs", quiet=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"train.compile: .*there is no no-such-compiler.*or set it to 'no'"):
        pretrain(changed(config, train={"compile": "yes"}), tmp_path / "compiler", quiet=True)
