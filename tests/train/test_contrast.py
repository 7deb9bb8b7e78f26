"""Contrastive learning as a run: what it leaves, a step against one by hand, what starts from it, what it refuses."""

from __future__ import annotations

import copy
import math
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import ENVIRONMENT, ROOT, TORCHRUN, changed, command, figures, train_rows
from torch import Tensor

from bevt.config import BatchConfig, Config, ConfigError, ContrastConfig, FinetuneConfig, MoBYConfig
from bevt.data.batch import Batch
from bevt.data.views import byol
from bevt.models.moby import Branch, MoBY
from bevt.train import checkpoint
from bevt.train.contrast import Contrasting, ContrastStep, contrast
from bevt.train.distributed import World
from bevt.train.finetune import build_classifier, initialise
from bevt.train.metrics import read_rows

CPU = torch.device("cpu")
STEPS = 4


@pytest.fixture(scope="module")
def contrasted(config: Config) -> ContrastConfig:
    """Four steps of 4 images in two micro-batches; a queue of two steps."""
    return ContrastConfig(
        recipe="image_contrastive",
        model=replace(config.model, window_size=(1, 3, 3), drop_path=0.2),
        moby=MoBYConfig(queue=8, temperature=0.3, momentum=0.9),
        data=replace(config.data, clips="", crop_area=(0.3, 1.0), short_side=(64, 64), jitter=0.0),
        optim=replace(config.optim, max_steps=STEPS),
        train=BatchConfig(
            clips=0, images=4, micro_images=2, precision="float32", log_every=1, checkpoint_every=2, threads=1
        ),
    )


@pytest.fixture(scope="module")
def finished_contrast(contrasted: ContrastConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of that run."""
    out = tmp_path_factory.mktemp("contrasted") / "run"
    result = contrast(contrasted, out, quiet=True)
    assert (result.finished, result.step, result.evaluation) == (True, STEPS, {})
    return out


def test_rows_of_a_run(finished_contrast: Path) -> None:
    """A row a step and nothing else; what a step has learned changes the next one's figures."""
    rows = read_rows(finished_contrast / "metrics.jsonl")
    assert [(row["event"], row["step"]) for row in rows] == [("train", step) for step in range(1, STEPS + 1)]
    for row in rows:
        assert row["loss"] == row["loss_images"] > 0
        assert 0 <= row["accuracy_images"] <= 1
        assert row["grad_norm"] > 0
    assert len({row["loss"] for row in rows}) == STEPS


def test_a_resumed_run_is_the_run(contrasted: ContrastConfig, finished_contrast: Path, tmp_path: Path) -> None:
    """Bit for bit, with the key branch, the queues and the optimizer's moments."""
    out = tmp_path / "run"
    shutil.copytree(finished_contrast, out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step_00000004")
    (out / "checkpoints" / "last").unlink()
    contrast(contrasted, out, resume=True, quiet=True)
    assert figures(out) == figures(finished_contrast)
    assert len(train_rows(out)) == STEPS
    one, other = (checkpoint.load(run / "checkpoints" / "last") for run in (out, finished_contrast))
    assert one["model"].keys() == other["model"].keys() >= {"queues", "key.norm.weight", "predictor.fc1.weight"}
    for name, value in other["model"].items():
        assert torch.equal(one["model"][name], value), name
    for name, state in other["optimizer"].items():
        for key, value in state.items():
            assert torch.equal(one["optimizer"][name][key], value), (name, key)


def test_key_branch_and_queues_move(finished_contrast: Path) -> None:
    """Between two checkpoints: the key branch less far than the online one, and all keys of the queue are new."""
    before, after = (
        checkpoint.load(finished_contrast / "checkpoints" / f"step_0000000{step}")["model"] for step in (2, 4)
    )
    online, key = (
        float((after[prefix + "encoder.layers.0.blocks.0.mlp.fc1.weight"] - before[prefix + name]).norm())
        for prefix in ("", "key.")
        for name in ("encoder.layers.0.blocks.0.mlp.fc1.weight",)
    )
    assert 0 < key < online
    assert (after["queues"] != before["queues"]).any(-1).all()
    torch.testing.assert_close(after["queues"].norm(dim=-1), torch.ones(2, 8))


def test_images_are_classified_from_its_weights(
    contrasted: ContrastConfig, tuned: FinetuneConfig, finished_contrast: Path
) -> None:
    """The online encoder of the same window, bit for bit."""
    path = finished_contrast / "checkpoints" / "last"
    config = changed(replace(tuned, init=str(path)), model={"window_size": (1, 3, 3)}, train={"clips": 0, "images": 4})
    model = build_classifier(config, 3, CPU)
    said = initialise(model, config)  # type: ignore[arg-type]
    assert said.startswith("a MoBY of this project: ")
    assert "kept at their initial values: head.weight, head.bias; not used: " in said
    saved = checkpoint.load(path)["model"]
    names = [name for name, _ in model.named_parameters() if not name.startswith("head.")]
    assert {name.split(".")[0] for name in names} == {"patch_embed_2d", "encoder", "norm"}
    for name in names:
        assert torch.equal(model.get_parameter(name), saved[name]), name


def test_clips_are_classified_from_its_weights(tuned: FinetuneConfig, finished_contrast: Path) -> None:
    """The encoder's weights as they are; bias tables alike at every distance in time, the embedding spread over it."""
    path = finished_contrast / "checkpoints" / "last"
    config = replace(tuned, init=str(path))
    model = build_classifier(config, 3, CPU)
    initialise(model, config)  # type: ignore[arg-type]
    saved = checkpoint.load(path)["model"]
    for name, value in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            distances = value.unflatten(0, (7, 25))  # of a window 4 deep
            assert all(torch.equal(table, saved[name]) for table in distances), name
        elif name == "patch_embed.proj.weight":
            torch.testing.assert_close(value.sum(2), saved["patch_embed_2d.proj.weight"])
            assert torch.equal(value[:, :, 0], value[:, :, 1])
        elif not name.startswith("head."):
            assert torch.equal(value, saved[name.replace("patch_embed.", "patch_embed_2d.")]), name


def batch_of(seed: int) -> Batch:
    """Two cuts of two images, in turn."""
    generator = torch.Generator().manual_seed(seed)
    return Batch(
        clips=None,
        clip_masks=None,
        images=torch.randint(256, (4, 64, 64, 3), generator=generator, dtype=torch.uint8),
        image_masks=None,
        image_jitter=None,
        image_seeds=torch.arange(4) + 10 * seed,
    )


def project(branch: Branch, images: Tensor) -> Tensor:
    """A branch's parts, one after the other."""
    tokens = branch.norm(branch.encoder(branch.patch_embed_2d(images))[-1])
    return branch.projector(tokens.flatten(1, 3).mean(1))


def by_hand(config: ContrastConfig, model: MoBY, batches: list[list[Batch]], rates: list[float]) -> list[float]:
    """Steps of MoBY by its paper's algorithm and torch's optimizer; changes `model` and its queues. Losses a step."""
    online, key = model, model.key
    trained = {name: p for name, p in online.named_parameters() if not name.startswith("key.")}
    bare = [p for name, p in trained.items() if "norm" in name or name.endswith("relative_position_bias_table")]
    rest = [p for p in trained.values() if all(p is not other for other in bare)]
    decay = config.optim.weight_decay
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": decay}, {"params": bare, "weight_decay": 0.0}], lr=0.0, eps=config.optim.eps
    )
    queues = [list(queue) for queue in model.queues.clone()]
    losses = []
    for step, (micro, lr) in enumerate(zip(batches, rates)):
        share = 1 - (1 - config.moby.momentum) * (math.cos(math.pi * step / STEPS) + 1) / 2
        with torch.no_grad():
            for name, p in key.named_parameters():
                p.copy_(share * p + (1 - share) * trained[name])
        added: list[list[Tensor]] = [[], []]
        total = 0.0
        for batch in micro:
            assert batch.images is not None
            assert batch.image_seeds is not None
            seeds = batch.image_seeds.numpy()
            views = [byol(batch.images[i::2], seeds[i::2], second=bool(i)).double() for i in (0, 1)]
            with torch.no_grad():
                keys = [F.normalize(project(key, view), dim=1) for view in views]
            loss = torch.zeros((), dtype=torch.float64)
            for mine, other in ((0, 1), (1, 0)):
                query = F.normalize(model.predictor(project(online, views[mine])), dim=1)
                for i in range(2):
                    candidates = torch.stack([keys[other][i], *queues[other]])
                    logits = candidates @ query[i] / config.moby.temperature
                    loss = loss + F.cross_entropy(logits, torch.tensor(0)) / 2
            (loss / len(micro)).backward()
            total += loss.item() / len(micro)
            for view, found in enumerate(keys):
                added[view] += found
        torch.nn.utils.clip_grad_norm_(trained.values(), config.optim.clip_grad)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        for view, found in enumerate(added):
            for i, vector in enumerate(found):
                queues[view][(len(found) * step + i) % len(queues[view])] = vector
        losses.append(total)
    model.queues.copy_(torch.stack([torch.stack(queue) for queue in queues]))
    return losses


def test_steps_are_those_of_the_algorithm(contrasted: ContrastConfig) -> None:
    """Three steps of two micro-batches in float64: losses, weights of both branches, queues."""
    config = changed(contrasted, model={"drop_path": 0.0}, train={"precision": "float64"})
    config = changed(config, optim={"clip_grad": 0.5, "eps": 1e-6})  # a smaller one would divide by rounding errors
    torch.manual_seed(0)
    task = Contrasting(config)
    task.prepare(World(0, 1, CPU), None)
    task.steps = STEPS
    model, _ = task.build(fresh=True)
    other = copy.deepcopy(model)
    step = task.step(model, task.optimizer(model))
    assert isinstance(step, ContrastStep)
    batches = [[batch_of(2 * i), batch_of(2 * i + 1)] for i in range(3)]
    rates = [1e-2, 5e-3, 2e-3]
    losses = [float(step(lr, micro).values["loss"]) for micro, lr in zip(batches, rates)]
    assert losses == pytest.approx(by_hand(config, other, batches, rates), rel=1e-9)  # type: ignore[arg-type]
    state = other.state_dict()
    assert not torch.equal(state["queues"][0], state["queues"][1])
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=1e-7, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_inputs_of_a_step(contrasted: ContrastConfig) -> None:
    """The cuts lie in turn; each has its own view, and drop path by its own seed."""
    task = Contrasting(contrasted)
    task.prepare(World(0, 1, CPU), None)
    task.steps = STEPS
    model, _ = task.build(fresh=True)
    step = task.step(model, task.optimizer(model))
    batch = batch_of(3)
    assert batch.images is not None
    given, _ = step.inputs(batch)
    assert torch.equal(given["first"], byol(batch.images[[0, 2]], np.array([30, 32]), second=False))
    assert torch.equal(given["second"], byol(batch.images[[1, 3]], np.array([31, 33]), second=True))
    first, second = given["drop"]
    assert first.shape == second.shape == (5, 2, 2)
    swapped = step.inputs(replace(batch, image_seeds=torch.tensor([31, 30, 33, 32])))[0]["drop"]
    assert torch.equal(swapped[0], second)
    assert torch.equal(swapped[1], first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"clips": 4}}, "train.clips must be 0: images are what is contrasted"),
        ({"train": {"images": 0}}, "at least one stream needs a batch above 0"),
        ({"data": {"images": ""}}, "data.images is empty"),
        ({"model": {"window_size": (4, 3, 3)}}, r"model.window_size must be \(1, h, w\), of images"),
        ({"moby": {"queue": 10}}, "moby.queue = 10 is not a multiple of train.images = 4"),
        ({"moby": {"queue": 0}}, "moby.queue must be above 0"),
        ({"moby": {"temperature": 0.0}}, "moby.temperature must be above 0"),
        ({"moby": {"momentum": 1.5}}, "moby.momentum must be from 0 to 1"),
        ({"data": {"views": 4}}, "data.views has no meaning where images are contrasted"),
        ({"data": {"jitter": 0.4}}, "data.jitter has no meaning where images are contrasted"),
        ({"data": {"val_images": "x"}}, "data.val_images has no meaning where images are contrasted"),
        ({"train": {"parallel": "fsdp"}}, "train.parallel 'fsdp' cannot average the key encoder's shards"),
        ({"train": {"micro_images": 3}}, "train.images = 4 is not a multiple of train.micro_images"),
    ],
)
def test_what_is_refused(
    contrasted: ContrastConfig, tmp_path: Path, change: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        contrast(changed(contrasted, **change), tmp_path / "run", quiet=True)


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")
def test_two_processes_on_cpus_are_refused(contrasted: ContrastConfig, tmp_path: Path) -> None:
    done = subprocess.run(
        command(contrasted, tmp_path / "run", python=TORCHRUN),
        cwd=ROOT,
        env={**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "bevt: MoBY's heads normalise over the images of all processes" in done.stderr
    assert "this is 2 processes on cpu: train with one" in done.stderr
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
