"""Learning classes: what a run leaves, that its result does not depend on how it was cut up, and what it refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TORCHRUN, changed, command, figures, output, train_rows
from torch import Tensor

from bevt.config import (
    AugmentConfig,
    ConfigError,
    FinetuneConfig,
    UserError,
)
from bevt.data import DataError
from bevt.data.batch import Batch
from bevt.models.classifier import VideoSwinClassifier
from bevt.models.probes import Probes
from bevt.models.weights import WeightsError
from bevt.train import checkpoint
from bevt.train.classify import ClassStep, dropout
from bevt.train.distributed import World
from bevt.train.finetune import build_classifier, finetune, initialise
from bevt.train.metrics import read_rows
from bevt.train.optim import build_optimizer, finetuning_rule

CPU = torch.device("cpu")
CLASSES = ("disc", "square", "triangle")


def test_rows_of_a_run(finished_tuning: Path) -> None:
    """A row a step, an evaluation after every epoch of two steps and at the end."""
    rows = read_rows(finished_tuning / "metrics.jsonl")
    assert [(row["event"], row["step"]) for row in rows] == [
        *(("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4)),
        *(("eval", 4), ("train", 5), ("train", 6), ("eval", 6)),
    ]
    for row in train_rows(finished_tuning):
        assert row["loss"] == row["loss_clips"] > 0
        assert 0 <= row["accuracy_clips"] <= 1
        assert row["grad_norm"] > 0


def test_a_checkpoint_knows_its_classes_and_the_average(finished_tuning: Path) -> None:
    saved = checkpoint.load(finished_tuning / "checkpoints" / "last")
    assert saved["classes"] == ["0", "1", "2"]
    assert saved["average"].keys() == saved["model"].keys()
    assert not torch.equal(saved["average"]["head.weight"], saved["model"]["head.weight"])


def test_a_resumed_run_is_the_run(tuned: FinetuneConfig, finished_tuning: Path, tmp_path: Path) -> None:
    """Bit for bit, averaged weights too, and the evaluation that was due where it stopped is made."""
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished_tuning, out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    (out / "checkpoints" / "last").unlink()
    finetune(tuned, out, resume=True, quiet=True)
    assert figures(out) == figures(finished_tuning)
    evals = [
        [row for row in read_rows(run / "metrics.jsonl") if row["event"] == "eval"] for run in (out, finished_tuning)
    ]
    assert evals[0] == evals[1]
    one, other = (checkpoint.load(run / "checkpoints" / "last") for run in (out, finished_tuning))
    for group in ("model", "average"):
        for name, value in one[group].items():
            assert torch.equal(value, other[group][name]), (group, name)


@pytest.fixture(scope="module")
def exact(tuned: FinetuneConfig) -> FinetuneConfig:
    """In float64, in one micro-batch."""
    return changed(tuned, train={"precision": "float64", "micro_clips": 4})


@pytest.fixture(scope="module")
def alone(exact: FinetuneConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tuned") / "alone"
    finetune(exact, out, quiet=True)
    return out


@pytest.mark.parametrize(
    ("values", "python"),
    [({"micro_clips": 2}, None), ({"micro_clips": 2}, TORCHRUN), ({"micro_clips": 2, "parallel": "fsdp"}, TORCHRUN)],
    ids=["micro-batches", "ddp", "fsdp"],
)
def test_however_a_step_is_cut_up(
    exact: FinetuneConfig, alone: Path, tmp_path: Path, values: dict[str, object], python: tuple[str, ...] | None
) -> None:
    """Losses, norms, held-out figures and weights up to float64's rounding, with all that draws random numbers."""
    config, out = changed(exact, train=values), tmp_path / "run"
    if python:
        output(command(config, out, python=python))
    else:
        finetune(config, out, quiet=True)
    for got, wanted in zip(read_rows(out / "metrics.jsonl"), read_rows(alone / "metrics.jsonl"), strict=True):
        for key in (key for key in wanted if re.match("loss|accuracy|grad_norm|val_", key)):
            assert got[key] == pytest.approx(wanted[key], rel=1e-9), (key, got["step"])
    one, other = (checkpoint.load(run / "checkpoints" / "last") for run in (out, alone))
    for group in ("model", "average"):
        for name, value in other[group].items():
            torch.testing.assert_close(one[group][name], value, rtol=1e-8, atol=1e-9, msg=name)


def batch_of(labels: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    n = len(labels)
    return Batch(
        clips=torch.randint(256, (n, 4, 64, 64, 3), generator=generator, dtype=torch.uint8),
        clip_masks=None,
        images=None,
        image_masks=None,
        image_jitter=None,
        clip_seeds=torch.arange(n) + 7,
        clip_labels=torch.tensor(labels),
    )


def plain_config(tuned: FinetuneConfig) -> FinetuneConfig:
    """Without anything random, in float64."""
    return changed(
        replace(tuned, augment=AugmentConfig()),
        model={"drop_path": 0.0},
        head={"dropout": 0.0},
        optim={"ema": 0.9, "clip_grad": 0.0, "layer_decay": 1.0},
        train={"precision": "float64"},
    )


def test_a_step_is_cross_entropy_and_adamw(tuned: FinetuneConfig) -> None:
    """Against torch's own loss of the whole batch, its AdamW, and the average as it is defined."""
    config = plain_config(tuned)
    torch.manual_seed(0)
    model = build_classifier(config, 3, CPU)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    average = {f"average.{name}": value.clone() for name, value in start.items()}
    optimizer = build_optimizer(model, config.optim, rule=finetuning_rule(config.optim, config.model))
    step = ClassStep(model, optimizer, config, World(0, 1, CPU), 3, average=average)
    result = step(1e-3, [batch_of([0, 2]), batch_of([1, 1])])

    torch.manual_seed(0)
    other = build_classifier(config, 3, CPU)
    from bevt.data.augment import to_encoder_clips

    clips = torch.cat([batch_of([0, 2]).clips, batch_of([1, 1]).clips])  # type: ignore[list-item]
    logits = other(to_encoder_clips(clips))
    loss = F.cross_entropy(logits, torch.tensor([0, 2, 1, 1]))
    loss.backward()
    assert float(result.values["loss"]) == pytest.approx(loss.item(), rel=1e-12)
    right = (logits.argmax(1) == torch.tensor([0, 2, 1, 1])).double().mean()
    assert float(result.values["accuracy_clips"]) == float(right)
    bare = [p for name, p in other.named_parameters() if "norm" in name or name.endswith("bias_table")]
    rest = [p for name, p in other.named_parameters() if not ("norm" in name or name.endswith("bias_table"))]
    groups = [{"params": rest, "weight_decay": config.optim.weight_decay}, {"params": bare, "weight_decay": 0.0}]
    torch.optim.AdamW(groups, lr=1e-3).step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12, msg=name)
        expected = 0.9 * start[name] + 0.1 * q.detach()
        torch.testing.assert_close(average[f"average.{name}"], expected, rtol=1e-9, atol=1e-12, msg=name)


def test_dropout_is_the_samples_own() -> None:
    """Half of the channels at a rate of a half, twice as large; the same for a sample whatever is beside it."""
    factors = dropout(np.arange(50), 400, 0.5)
    assert set(np.unique(factors)) == {0.0, 2.0}
    assert factors.mean() == pytest.approx(1, abs=0.03)
    assert np.array_equal(dropout(np.array([3, 9]), 400, 0.5)[1], factors[9])
    assert not np.array_equal(factors[0], factors[1])


def test_probes_train_and_leave_the_encoder(tuned: FinetuneConfig, finished: Path, tmp_path: Path) -> None:
    """Four heads in one pass, each with a figure of its own; the frozen weights are the checkpoint's, bit for bit."""
    config = changed(
        replace(tuned, init=str(finished / "checkpoints" / "last"), augment=AugmentConfig()),
        model={"drop_path": 0.0},
        head={"probes": ("linear", "attentive"), "probe_lrs": (1.0, 0.1), "dropout": 0.0},
        optim={"ema": 0.0, "lr": 1e-2, "clip_grad": 0.0, "layer_decay": 1.0},
    )
    result = finetune(config, tmp_path / "probes", quiet=True)
    names = ("linear 1", "linear 0.1", "attentive 1", "attentive 0.1")
    assert {f"val_top1 {name}" for name in names} <= set(result.evaluation)
    rows = train_rows(tmp_path / "probes")
    assert all(f"accuracy {name}" in rows[0] for name in names)
    saved = checkpoint.load(tmp_path / "probes" / "checkpoints" / "last")
    before = checkpoint.load(finished / "checkpoints" / "last")["model"]
    frozen = {name: value for name, value in before.items() if name.startswith(("encoder.", "patch_embed."))}
    assert frozen
    for name, value in frozen.items():
        assert torch.equal(saved["model"][f"backbone.{name}"], value), name


def test_probes_are_independent(tuned: FinetuneConfig) -> None:
    """A head's gradient is that of its own loss alone."""
    config = changed(plain_config(tuned), head={"probes": ("linear",), "probe_lrs": (1.0, 1.0)})
    model = build_classifier(config, 3, CPU)
    assert isinstance(model, Probes)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    for group in optimizer.param_groups:
        group["factor"] = 1.0
    step = ClassStep(model, optimizer, config, World(0, 1, CPU), 3, ("a", "b"))
    kept: list[Tensor] = []
    step._update = lambda lr, sums: kept.extend(p.grad for p in step.parameters)  # type: ignore
    step(1.0, [batch_of([0, 2])])
    inputs, targets = step.inputs(batch_of([0, 2]))
    for i in (0, 1):
        (grad,) = torch.autograd.grad(
            F.cross_entropy(model(inputs["pixels"])[i], targets.double()), model.heads[i].weight
        )
        torch.testing.assert_close(kept[2 * i], grad)


def test_images_are_classified_by_the_image_stream(tuned: FinetuneConfig, lists: Path, tmp_path: Path) -> None:
    """Supervised pictures, and a video run that starts from them."""
    config = changed(
        tuned,
        model={"window_size": (1, 3, 3)},
        data={
            "clips": "",
            "val_clips": "",
            "images": str(lists / "images.txt"),
            "val_images": str(lists / "val_images.txt"),
        },
        train={"clips": 0, "images": 4, "micro_images": 4},
        optim={"max_steps": 2, "epochs": 1},
    )
    finetune(config, tmp_path / "images", quiet=True)
    video = replace(tuned, init=str(tmp_path / "images" / "checkpoints" / "last"))
    model = build_classifier(video, 3, CPU)
    said = initialise(model, video)  # type: ignore[arg-type]
    assert "kept at their initial values: head.weight, head.bias" in said
    image = checkpoint.load(tmp_path / "images" / "checkpoints" / "last")["average"]
    embed = image["patch_embed_2d.proj.weight"]
    torch.testing.assert_close(model.patch_embed.proj.weight.sum(2), embed)  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("quirks", "norm"),
    [("clean", "norm.weight, norm.bias, head.weight, head.bias"), ("official", "head.weight, head.bias")],
)
def test_a_start_from_pretraining(tuned: FinetuneConfig, finished: Path, quirks: str, norm: str) -> None:
    """Quirk C: the decoders' norm becomes the classifier's, or does not; decoders and head stay out and are named."""
    config = changed(replace(tuned, init=str(finished / "checkpoints" / "last")), model={"quirks": quirks})
    model = build_classifier(config, 3, CPU)
    said = initialise(model, config)  # type: ignore[arg-type]
    assert f"kept at their initial values: {norm}" in said
    saved = checkpoint.load(finished / "checkpoints" / "last")["model"]
    assert torch.equal(
        model.encoder.layers[0].blocks[0].mlp.fc1.weight, saved["encoder.layers.0.blocks.0.mlp.fc1.weight"]
    )  # type: ignore
    assert torch.equal(model.norm.weight, saved["norm.weight"]) == (quirks == "official")  # type: ignore[union-attr, arg-type]


def test_a_start_with_a_longer_window(tuned: FinetuneConfig, finished: Path) -> None:
    """Bias tables of depth 4 for depth 8."""
    config = changed(replace(tuned, init=str(finished / "checkpoints" / "last")), model={"window_size": (8, 3, 3)})
    model = build_classifier(config, 3, CPU)
    initialise(model, config)  # type: ignore[arg-type]
    assert model.encoder.layers[0].blocks[0].attn.relative_position_bias_table.shape == (15 * 25, 1)  # type: ignore


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"train": {"micro_clips": 1}}, ConfigError, "train.micro_clips = 1 must be even"),
        ({"train": {"images": 4}, "data": {"images": "x"}}, ConfigError, "classes are learned of one stream"),
        ({"data": {"views": 4}}, ConfigError, "data.views has no meaning where classes are learned"),
        ({"data": {"crop_area": (0.5, 0.2)}}, ConfigError, "data.crop_area must be a range"),
        ({"augment": {"magnitude": 31}}, ConfigError, "augment.magnitude at most 30"),
        ({"head": {"probes": ("linear",)}}, ConfigError, "optim.ema = 0.9 has no meaning with head.probes"),
        (
            {"head": {"probes": ("linear",), "probe_lrs": (1.0, 1.0), "dropout": 0.0}},
            ConfigError,
            "each kind and rate only once",
        ),
        ({"optim": {"layer_decay": 1.5}}, ConfigError, "optim.layer_decay must be from 0 to 1"),
        ({"model": {"loss_impl": "native"}}, ConfigError, "model.loss_impl is the masked-token loss's"),
    ],
)
def test_what_is_refused_before_a_file_is_read(
    tuned: FinetuneConfig, tmp_path: Path, change: dict[str, dict[str, object]], error: type[UserError], message: str
) -> None:
    with pytest.raises(error, match=message):
        finetune(changed(tuned, **change), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def labelled(lists: Path) -> Iterator[Path]:
    """A list of training clips that a test may write."""
    path = lists / "odd.txt"
    yield path
    path.unlink(missing_ok=True)
    (lists / ".odd.txt.bevt_manifest_clips.jsonl").unlink(missing_ok=True)


def clips(lists: Path, *labels: object) -> str:
    names = [line.split()[0] for line in (lists / "train.txt").read_text().splitlines()]
    return "".join(f"{name} {label}\n" for name, label in zip(names, labels))


def test_labels_out_of_range(tuned: FinetuneConfig, lists: Path, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("disc\nsquare\ntriangle\n")
    labelled.write_text(clips(lists, 0, 1, 2, 3, 0))
    config = changed(tuned, data={"clips": str(labelled)}, head={"classes": str(tmp_path / "classes.txt")})
    with pytest.raises(
        DataError, match=r"1 files have a label that is none of the 3 classes \(0 to 2\): .*0003.webm has 3"
    ):
        finetune(config, tmp_path / "run", quiet=True)


def test_held_out_labels_that_nothing_was_learned_of(
    tuned: FinetuneConfig, lists: Path, labelled: Path, tmp_path: Path
) -> None:
    labelled.write_text(clips(lists, 0, 1, 2, 3, 0))
    with pytest.raises(DataError, match=r"1 files have a label that is none of the 3 classes"):
        finetune(changed(tuned, data={"val_clips": str(labelled)}), tmp_path / "run", quiet=True)


def test_a_class_without_files(tuned: FinetuneConfig, lists: Path, labelled: Path, tmp_path: Path) -> None:
    """An error where nobody said that the class exists; a note where somebody did."""
    labelled.write_text(clips(lists, 0, 2, 0, 2, 0))
    config = changed(tuned, data={"clips": str(labelled)}, optim={"max_steps": 1})
    with pytest.raises(DataError, match="labels go up to 2, but no file has class 1"):
        finetune(config, tmp_path / "run", quiet=True)
    (tmp_path / "classes.txt").write_text("disc\nsquare\ntriangle\n")
    named = changed(config, head={"classes": str(tmp_path / "classes.txt")})
    printed = output(command(named, tmp_path / "named"))
    assert "1 of 3 classes: 'square' have no training file: nothing is learned of them" in printed


def test_a_list_that_names_absent_videos(tuned: FinetuneConfig, lists: Path, labelled: Path, tmp_path: Path) -> None:
    """In training each is named and replaced; held out they are an error that lists them."""
    labelled.write_text((lists / "train.txt").read_text() + "train_clips/gone.mp4 1\n")
    with pytest.raises(DataError, match=r"1 of 8 files cannot be read; held-out data.*\n.*gone.mp4: not there"):
        finetune(changed(tuned, data={"val_clips": str(labelled)}), tmp_path / "run", quiet=True)
    finetune(changed(tuned, data={"clips": str(labelled)}, optim={"max_steps": 1}), tmp_path / "other", quiet=True)
    assert [Path(row["path"]).name for row in read_rows(tmp_path / "other" / "bad_files.jsonl")] == ["gone.mp4"]


def test_a_start_of_another_size(tuned: FinetuneConfig, finished: Path) -> None:
    config = changed(replace(tuned, init=str(finished / "checkpoints" / "last")), model={"embed_dim": 32})
    with pytest.raises(WeightsError, match=r"checkpoints/last: .*of another shape"):
        initialise(build_classifier(config, 3, CPU), config)  # type: ignore[arg-type]


def test_a_start_that_is_not_there(tuned: FinetuneConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.pth"):
        finetune(replace(tuned, init=str(tmp_path / "none.pth")), tmp_path / "run", quiet=True)


def test_other_classes_than_the_run_began_with(
    tuned: FinetuneConfig, finished_tuning: Path, lists: Path, labelled: Path, tmp_path: Path
) -> None:
    import shutil

    out = tmp_path / "run"
    shutil.copytree(finished_tuning, out, symlinks=True)
    labelled.write_text(clips(lists, 0, 1, 0, 1, 0, 1, 0))
    with pytest.raises(UserError, match="it learned 3 classes, and these are 2"):
        finetune(changed(tuned, data={"clips": str(labelled), "val_clips": ""}), out, resume=True, quiet=True)


def test_the_public_form_of_the_classifier() -> None:
    """`VideoSwinClassifier` keeps its public form: pixels in, logits out."""
    from bevt.config import ModelConfig

    small = ModelConfig(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), window_size=(2, 2, 2))
    assert VideoSwinClassifier(small, 5)(torch.zeros(2, 3, 4, 32, 32)).shape == (2, 5)
    assert VideoSwinClassifier(small, 5, "images")(torch.zeros(2, 3, 32, 32)).shape == (2, 5)
