"""VideoMAE, ViViT and TimeSformer through the same loop: resumed, compiled, on several processes, by every decoder."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bevt_kernels import Spec
from bevt_kernels.baselines.common import compile_reasons
from safetensors import SafetensorError
from tiny import TORCHRUN, changed, command, figures, output, train_rows

from benchmarks.foreign import torchvision_schemas
from bevt import cli, tokenizers
from bevt.budget import step_flop
from bevt.config import (
    AnyConfig,
    AugmentConfig,
    Config,
    ConfigError,
    DecoderConfig,
    FinetuneConfig,
    MaskConfig,
    VideoMAEConfig,
    VideoMAETrainConfig,
    ViTConfig,
)
from bevt.data import augment
from bevt.data.build import build_loader
from bevt.models import names, vit_names, weights
from bevt.models.classifier import build
from bevt.train import checkpoint
from bevt.train.classify import ClassStep
from bevt.train.distributed import World
from bevt.train.export import export
from bevt.train.finetune import Finetuning, finetune, restore
from bevt.train.loop import RunResult
from bevt.train.metrics import Meter, RunError, read_rows
from bevt.train.optim import build_optimizer
from bevt.train.pretrain import build_model as build_masked
from bevt.train.pretrain import initialise as initialise_masked
from bevt.train.pretrain import pretrain
from bevt.train.videomae import PixelPretraining

SMALL = ViTConfig(embed_dim=24, depth=2, num_heads=2)
SYSTEMS = ("videomae", "timesformer_bevt", "vivit_1", "vivit_2", "vivit_3", "vivit_4", "timesformer")


@pytest.fixture(scope="session")
def systems(config: Config, tuned: FinetuneConfig) -> dict[str, AnyConfig]:
    """A small run of each, of six steps in two micro-batches, with all that draws random numbers."""
    held_out = replace(config.data, val_clips=config.data.clips, val_images=config.data.images)
    videomae = VideoMAEConfig(
        recipe="videomae_pretrain_k400",
        model=SMALL,
        decoder=DecoderConfig(embed_dim=12, depth=1, num_heads=2),
        clip_mask=MaskConfig(kind="random_tube", ratio=0.75),
        data=replace(held_out, images="", val_images="", crop_scales=(1.0, 0.875, 0.75), jitter=0.0),
        optim=config.optim,
        train=VideoMAETrainConfig(
            clips=4,
            images=0,
            micro_clips=2,
            precision="float32",
            log_every=1,
            checkpoint_every=2,
            eval_clips=3,
            threads=1,
        ),
    )
    timesformer = replace(SMALL, kind="timesformer", tubelet=1, drop_path=0.2)
    bevt = replace(config, recipe="timesformer_joint_stage", model=timesformer, data=held_out)
    bevt = changed(bevt, train={"clips": 4, "images": 8, "micro_clips": 2, "micro_images": 4, "threads": 1})
    classes = replace(tuned, augment=AugmentConfig(repeats=2, color=0.5, grey=0.5, mixup=0.8))
    found: dict[str, AnyConfig] = {"videomae": videomae, "timesformer_bevt": bevt}
    for kind in ("vivit_1", "vivit_2", "vivit_3", "vivit_4"):
        model = replace(SMALL, kind=kind, drop_path=0.2, **({"temporal_depth": 1} if kind == "vivit_2" else {}))
        found[kind] = replace(classes, recipe="vivit_k400", model=model)
        found[kind] = changed(found[kind], optim={"kind": "sgd", "lr": 0.1, "ema": 0.0})  # type: ignore[type-var]
    found["timesformer"] = replace(classes, recipe="timesformer_k400", model=timesformer)
    return found


def run(config: AnyConfig, out: Path, **options: Any) -> RunResult:
    """The run, in this process."""
    train: Any = finetune if isinstance(config, FinetuneConfig) else pretrain
    return train(config, out, quiet=True, **options)


@pytest.fixture(scope="session")
def finished_systems(systems: dict[str, AnyConfig], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folders of those runs, each made when it is first asked for."""
    folder = tmp_path_factory.mktemp("systems")

    class Folders(dict[str, Path]):
        def __missing__(self, name: str) -> Path:
            self[name] = folder / name
            assert run(systems[name], self[name]).finished
            return self[name]

    return Folders()


@pytest.mark.parametrize("name", SYSTEMS)
def test_rows_and_what_is_left(name: str, finished_systems: dict[str, Path]) -> None:
    """A row a step, figures of held-out data at the end; of pretraining pictures."""
    out = finished_systems[name]
    rows = train_rows(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    cuts = 8 if name.startswith("vivit") or name == "timesformer" else 4
    assert rows[-1]["clips_per_second"] == pytest.approx(cuts / rows[-1]["step_seconds"])
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in rows)
    last = read_rows(out / "metrics.jsonl")[-1]
    assert last["event"] == "eval"
    if name == "videomae":
        assert 0 < last["val_loss_clips"] < 2
        assert last["mean_clips"] == pytest.approx(1, abs=0.02), "normalised: their mean square is near 1"
        assert (out / "pictures" / "clip_0.png").exists()
    elif name == "timesformer_bevt":
        assert {"val_loss_clips", "val_loss_images"} <= last.keys()
        assert (out / "pictures" / "clip_0.png").exists()
    else:
        assert 0 <= last["val_top1"] <= 1


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_resumed_run_is_the_run(
    name: str, systems: dict[str, AnyConfig], finished_systems: dict[str, Path], tmp_path: Path
) -> None:
    """Bit for bit, from a checkpoint in the middle."""
    whole, out = finished_systems[name], tmp_path / "run"
    shutil.copytree(whole, out, symlinks=True)
    shutil.rmtree(out / "checkpoints" / "step_00000006")
    (out / "checkpoints" / "last").unlink()
    run(systems[name], out, resume=True)
    assert figures(out) == figures(whole)
    one, other = (checkpoint.load(folder / "checkpoints" / "last") for folder in (out, whole))
    for key, value in one["model"].items():
        assert torch.equal(value, other["model"][key]), key


def test_operations_of_a_step_are_counted(systems: dict[str, AnyConfig]) -> None:
    """For TFLOP/s and MFU; a file that is cut twice is two clips."""
    pixels = PixelPretraining(systems["videomae"])  # type: ignore[arg-type]
    assert pixels.flop() == step_flop(pixels.config)
    twice: Any = systems["vivit_1"]
    flop = []
    for config in (twice, changed(twice, augment={"repeats": 1})):
        task = Finetuning(config)
        task.classes = ("left", "right", "up")
        flop.append(task.flop())
    assert flop[0] == (0.0, pytest.approx(2 * flop[1][1]))
    assert flop[1][1] > 0


REASONS = compile_reasons(Spec("cpu", torch.float32))


@pytest.mark.skipif(bool(REASONS), reason="; ".join(REASONS))
@pytest.mark.slow
@pytest.mark.parametrize("name", ["videomae", "timesformer_bevt", "vivit_2", "vivit_3", "vivit_4"])
def test_compiled(name: str, systems: dict[str, AnyConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plain run's figures up to float32's rounding, and nothing is compiled again after the first step."""
    torch._dynamo.reset()
    config: Any = changed(systems[name], train={"compile": "yes"})  # type: ignore[type-var]
    config = changed(config, optim={"max_steps": 3, "warmup_epochs": 0})
    run(changed(config, train={"compile": "no"}), tmp_path / "plain")
    graphs: list[int] = []
    add = Meter.add

    def counting(meter: Meter, *arguments: Any) -> None:
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        add(meter, *arguments)

    monkeypatch.setattr(Meter, "add", counting)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    run(config, tmp_path / "run")
    assert graphs[0] > before, "nothing was compiled"
    assert graphs == [graphs[0]] * 3, "something was compiled after the first step"
    for got, wanted in zip(train_rows(tmp_path / "run"), train_rows(tmp_path / "plain"), strict=True):
        for key in ("loss", "grad_norm"):
            assert got[key] == pytest.approx(wanted[key], rel=1e-5), (key, got["step"])


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch was built without gloo")
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", ["videomae", "timesformer_bevt", "vivit_2"])
def test_two_processes_equal_one(name: str, parallel: str, systems: dict[str, AnyConfig], tmp_path: Path) -> None:
    """Up to float64's rounding: losses, gradients, held-out figures and weights."""
    config: Any = changed(systems[name], train={"precision": "float64"})  # type: ignore[type-var]
    run(config, tmp_path / "one")
    output(command(changed(config, train={"parallel": parallel}), tmp_path / "two", python=TORCHRUN), timeout=240)
    one, two = (read_rows(tmp_path / folder / "metrics.jsonl") for folder in ("one", "two"))
    for got, wanted in zip(two, one, strict=True):
        for key in wanted:
            if re.match("(val_)?(loss|accuracy|mean|top)|grad_norm", key):
                assert got[key] == pytest.approx(wanted[key], rel=1e-9), (key, got["step"])
    saved = [checkpoint.load(tmp_path / folder / "checkpoints" / "last")["model"] for folder in ("one", "two")]
    for key, value in saved[0].items():
        torch.testing.assert_close(saved[1][key], value, rtol=1e-8, atol=1e-10, msg=key)


@pytest.mark.parametrize("name", ["videomae", "timesformer_bevt", "vivit_1", "timesformer"])
def test_dali(name: str, systems: dict[str, AnyConfig], tmp_path: Path) -> None:
    """Of files that DALI decodes on CPUs: losses near PyAV's, whose resize differs by a rounding."""
    pytest.importorskip("nvidia.dali", reason="needs DALI: pip install 'bevt[dali]'")
    config: Any = systems[name]
    listed = tmp_path / "webm.txt"
    folder = Path(config.data.clips if name == "videomae" else Path(config.data.clips).parent / "train_clips")
    listed.write_text("".join(f"{path} {i % 2}\n" for i, path in enumerate(sorted(folder.glob("*.webm")))))
    config = changed(config, data={"clips": str(listed), "val_clips": ""}, optim={"max_steps": 2})
    config = changed(config, optim={"warmup_epochs": 0})
    for backend in ("pyav", "dali"):
        run(changed(config, data={"backend": backend, "workers": 1}), tmp_path / backend)
    pyav, dali = (train_rows(tmp_path / backend) for backend in ("pyav", "dali"))
    assert [row["loss"] for row in dali] == pytest.approx([row["loss"] for row in pyav], rel=0.02)


def test_an_image_stage_starts_a_joint_one(systems: dict[str, AnyConfig], tmp_path: Path) -> None:
    """BEVT with a TimeSformer: attention over time starts as a copy that does nothing, as from an image model."""
    config: Any = systems["timesformer_bevt"]
    images = changed(config, train={"clips": 0})
    run(images, tmp_path / "images")
    state = checkpoint.load(tmp_path / "images" / "checkpoints" / "last")["model"]
    assert not [key for key in state if "temporal" in key or "time_embed" in key]
    joint = replace(config, init=str(tmp_path / "images" / "checkpoints" / "last"))
    model = build_masked(joint, 32, torch.device("cpu"))
    report = initialise_masked(model, joint, tokenizers.digest(joint.tokenizer))
    assert {re.sub(r"\d+", "*", name) for name in report.missing} == {
        "encoder.time_embed", "encoder.blocks.*.temporal_fc.weight", "encoder.blocks.*.temporal_fc.bias",
    }  # fmt: skip
    assert report.unused == ()
    own = model.state_dict()
    for i in range(2):
        block = f"encoder.blocks.{i}"
        assert torch.equal(own[f"{block}.temporal_attn.qkv.weight"], state[f"{block}.attn.qkv.weight"])
        assert (own[f"{block}.temporal_fc.weight"] == 0).all()


def test_a_joint_stage_starts_one_of_images(systems: dict[str, AnyConfig], finished_systems: dict[str, Path]) -> None:
    """What attends over time is left out, and said to be."""
    path = finished_systems["timesformer_bevt"] / "checkpoints" / "last"
    images: Any = replace(changed(systems["timesformer_bevt"], train={"clips": 0}), init=str(path))  # type: ignore[type-var]
    model = build_masked(images, 32, torch.device("cpu"))
    report = initialise_masked(model, images, tokenizers.digest(images.tokenizer))
    assert report.missing == ()
    assert all("temporal" in name or "time_embed" in name for name in report.unused)
    saved = checkpoint.load(path)["model"]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["vivit_1", "vivit_2", "vivit_3", "vivit_4", "timesformer"])
def test_a_masked_image_model_starts_a_classifier(name: str, systems: dict[str, AnyConfig], tmp_path: Path) -> None:
    """BEVT-I with a TimeSformer's encoder is the image model that these are started from."""
    config: Any = systems["timesformer_bevt"]
    run(changed(config, train={"clips": 0}, optim={"max_steps": 2}), tmp_path / "images")
    classes: Any = systems[name]
    classes = changed(classes, optim={"max_steps": 1, "warmup_epochs": 0})
    result = run(replace(classes, init=str(tmp_path / "images" / "checkpoints" / "last")), tmp_path / "run")
    assert result.finished


def test_pretraining_starts_finetuning(systems: dict[str, AnyConfig], finished_systems: dict[str, Path]) -> None:
    """VideoMAE's encoder is the classifier's; decoder and norm stay behind, and are said to."""
    from bevt.train.finetune import initialise

    path = finished_systems["videomae"] / "checkpoints" / "last"
    config: Any = replace(systems["vivit_1"], model=SMALL, init=str(path))
    model = build(config, 3)
    said = initialise(model, config)
    assert "a VideoMAE of this project" in said
    assert "kept at their initial values: norm.weight, norm.bias, head.weight, head.bias" in said
    saved = checkpoint.load(path)["model"]
    for key, value in model.state_dict().items():
        if key.startswith("encoder."):
            assert torch.equal(value, saved[key]), key


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("videomae", {"model": {"kind": "vivit_1"}}, "model.kind must be 'videomae' where pixels are predicted"),
        ("videomae", {"clip_mask": {"kind": "tube"}}, "clip_mask.kind must be 'random_tube'"),
        ("videomae", {"clip_mask": {"ratio": 0.01}}, r"clip_mask.ratio = 0.01 hides 0 of 16 patches of a frame"),
        ("videomae", {"clip_mask": {"ratio": 1.0}}, r"clip_mask.ratio = 1.0 hides 16 of 16 patches"),
        ("videomae", {"train": {"images": 4}}, "train.images must be 0"),
        ("videomae", {"decoder": {"num_heads": 5}}, "decoder.num_heads = 5 must divide decoder.embed_dim = 12"),
        ("videomae", {"model": {"drop_path": 0.1}}, "model.drop_path = 0.1 has no meaning"),
        ("videomae", {"data": {"crop": 40}}, r"data.crop must be a multiple of 16 \(model.patch 16\), got 40"),
        ("videomae", {"data": {"frames": 5}}, "data.frames must be even"),
        ("videomae", {"data": {"crop_scales": (1.2,)}}, r"data.crop_scales\[0\] must be above 0 and up to 1, got 1.2"),
        ("videomae", {"data": {"crop_area": (0.5, 1.0)}}, "data.crop_scales and data.crop_area are two ways"),
        ("timesformer_bevt", {"model": {"tubelet": 2}}, "model.tubelet must be 1 of a 'timesformer', got 2"),
        ("timesformer_bevt", {"model": {"kind": "vivit_3"}}, "model.kind must be 'timesformer' or a Video Swin's"),
        ("timesformer_bevt", {"model": {"patch": 8}}, "model.patch must be 16 where tokens are predicted"),
        ("timesformer_bevt", {"train": {"memory_budget": 1.0}}, "train.memory_budget is of BEVT with a Video Swin"),
        ("timesformer_bevt", {"clip_mask": {"kind": "random_tube"}}, "clip_mask.kind 'random_tube' is VideoMAE's"),
        ("vivit_4", {"model": {"num_heads": 3}}, "model.num_heads = 3 must be even"),
        ("vivit_1", {"model": {"num_heads": 5}}, "model.num_heads = 5 does not divide model.embed_dim = 24"),
        ("vivit_1", {"model": {"depth": 0}}, "model.depth must be above 0, got 0"),
        ("vivit_1", {"model": {"attention_impl": "xformers"}}, "model.attention_impl 'xformers': xformers"),
        ("vivit_1", {"augment": {"repeats": 0}}, "augment.repeats must be above 0, got 0"),
        ("vivit_1", {"model": {"temporal_depth": 2}}, "model.temporal_depth has no meaning with model.kind 'vivit_1'"),
        ("vivit_1", {"optim": {"impl": "apex"}}, "optim.impl 'apex' is of AdamW, not of optim.kind 'sgd'"),
        ("vivit_1", {"optim": {"eps": 1e-6}}, "optim.eps and the second of optim.betas have no meaning"),
        ("vivit_1", {"test": {"short_side": 32}}, "test.short_side = 32 is below data.crop = 64"),
        ("videomae", {"clip_mask": {"min_block": 4}}, "clip_mask.min_block has no meaning"),
    ],
)
def test_what_is_refused(
    name: str, change: dict[str, Any], message: str, systems: dict[str, AnyConfig], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(changed(systems[name], **change), tmp_path / "run")  # type: ignore[type-var]


def test_a_folder_of_another_kind(
    systems: dict[str, AnyConfig], finished_systems: dict[str, Path], config: Config
) -> None:
    """Both are pretraining, but no configuration of one is the other's."""
    with pytest.raises(RunError, match=r"holds a run of another kind, of recipe 'videomae_pretrain_k400'"):
        run(config, finished_systems["videomae"], resume=True)
    with pytest.raises(checkpoint.CheckpointError, match="which predicts no tokens"):
        run(
            replace(config, init=str(finished_systems["videomae"] / "checkpoints" / "last")),
            finished_systems["videomae"].parent / "new",
        )


@pytest.mark.parametrize("name", ["videomae", "vivit_1", "timesformer"])
def test_an_export_is_read_by_hugging_face(
    name: str, systems: dict[str, AnyConfig], finished_systems: dict[str, Path], tmp_path: Path
) -> None:
    """`from_pretrained` has nothing left over or missing; what it computes is what the checkpoint's model does."""
    torchvision_schemas()
    transformers = pytest.importorskip("transformers", reason="needs transformers: pip install transformers")
    path = finished_systems[name] / "checkpoints" / "last"
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(path), "--names", "hugging_face", "--out", str(tmp_path / "hf")])
    assert ended.value.code == 0
    about = json.loads((tmp_path / "hf" / "config.json").read_text())
    kind = getattr(transformers, about["architectures"][0])
    theirs, found = kind.from_pretrained(tmp_path / "hf", output_loading_info=True, attn_implementation="eager")
    assert not any(found.values()), found
    config: Any = systems[name]
    pixels = torch.randn(1, 3, config.data.frames, config.data.crop, config.data.crop)
    if name == "videomae":
        from bevt.train.videomae import build_model

        model = build_model(config, torch.device("cpu"))
        weights.load(model, checkpoint.load(path)["model"])
        mask = torch.zeros(1, 2, 16, dtype=torch.bool)
        mask[..., :12] = True
        hidden, visible = (m.flatten().nonzero().T for m in (mask, ~mask))
        with torch.no_grad():
            expected = model.predict(model.encoder.patches(pixels), visible, hidden)
            got = theirs.eval()(pixel_values=pixels.transpose(1, 2), bool_masked_pos=mask.flatten(1)).logits
    else:
        model = restore(path, config, torch.device("cpu"))[0].eval()
        with torch.no_grad():
            expected, got = model(pixels), theirs.eval()(pixel_values=pixels.transpose(1, 2)).logits
        assert theirs.config.id2label == {0: "0", 1: "1", 2: "2"}
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)  # their last norm of VideoMAE has 1e-5


@pytest.mark.parametrize("name", ["videomae", "timesformer"])
def test_an_export_by_original_names_starts_a_run(
    name: str, systems: dict[str, AnyConfig], finished_systems: dict[str, Path], tmp_path: Path
) -> None:
    """There and back: through a file that torch.save has written."""
    path = finished_systems[name] / "checkpoints" / "last"
    export(path, "original", tmp_path / "weights.pth")
    config: Any = systems[name]
    if name == "videomae":
        from bevt.train.videomae import build_model, initialise

        model: Any = build_model(config, torch.device("cpu"))
        assert "VideoMAE's pretraining by its original names" in initialise(model, tmp_path / "weights.pth")
    else:
        model, classes = restore(tmp_path / "weights.pth", config, torch.device("cpu"))
        assert classes == ("0", "1", "2")
    saved = checkpoint.load(path)
    for key, value in {**saved["model"], **saved.get("average", {})}.items():
        assert torch.equal(model.state_dict()[key], value), key


@pytest.mark.parametrize(
    ("name", "whose", "message"),
    [
        ("vivit_2", "hugging_face", "Hugging Face has VideoMAE, ViViT's first model and TimeSformer's classifier"),
        ("timesformer_bevt", "hugging_face", "and not what recipe 'timesformer_joint_stage' trains"),
        ("vivit_1", "original", "nobody's original code has names for what recipe 'vivit_k400' trains"),
        ("videomae", "torchvision", "torchvision has names for a finetuned Video Swin of clips"),
    ],
)
def test_exports_that_are_refused(
    name: str, whose: Any, message: str, finished_systems: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        export(finished_systems[name] / "checkpoints" / "last", whose, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(RunError, match="exists: name another one"):
        export(finished_systems["videomae"] / "checkpoints" / "last", "original", tmp_path / "out")


def test_two_cuts_of_a_file(systems: dict[str, AnyConfig]) -> None:
    """They differ, mixing pairs no file with itself, and neither depends on the size of a micro-batch."""
    config: Any = changed(
        systems["vivit_1"], train={"micro_clips": 4}, augment={"mixup": 0.0, "color": 0.0, "grey": 0.0}
    )  # type: ignore[type-var]
    labels = np.arange(7) % 3
    whole, halves = (build_loader(changed(config, train={"micro_clips": micro}), labels=labels) for micro in (4, 2))
    (one,), two = ([batch for batch, _ in zip(loader, range(count))] for loader, count in ((whole, 1), (halves, 2)))
    assert [name.split("@")[0] for name in one.clip_ids[::2]] == [name.split("@")[0] for name in one.clip_ids[1::2]]
    assert len(one.clip_ids) == 8
    assert all(not torch.equal(*cuts) for cuts in one.clips.view(4, 2, *one.clips.shape[1:]))
    assert one.clip_ids == tuple(name for batch in two for name in batch.clip_ids)
    assert torch.equal(one.clips, torch.cat([batch.clips for batch in two]))
    model = build(config, 3)
    seen: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "mix", lambda x, t, seeds, *rest: (seen.append(seeds), (x, t))[1])
        ClassStep(
            model, build_optimizer(model, config.optim), changed(config, augment={"mixup": 0.8}),
            World(0, 1, torch.device("cpu")), 3,
        ).inputs(one)  # fmt: skip
    files = dict(zip(one.clip_seeds.tolist(), (name.split("@")[0] for name in one.clip_ids)))
    pairs = np.array([files[seed] for seed in seen[0].tolist()]).reshape(-1, 2)
    assert (pairs[:, 0] != pairs[:, 1]).all()


@pytest.mark.parametrize("whose", ["original", "hugging_face"])
def test_an_export_is_whole_or_not_there(
    whose: Any, finished_systems: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a full disk: half of it is written, then torch and safetensors raise errors of their own."""

    def failing(what: Any, where: Any) -> None:
        if isinstance(where, Path):
            where.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device")
        where.write(b"half")
        raise RuntimeError("unexpected pos 64 vs 0")

    monkeypatch.setattr("bevt.train.export.torch.save", failing)
    monkeypatch.setattr("bevt.train.export.save_file", failing)
    with pytest.raises(RunError, match=r"out cannot be written: (I/O error: No space left|unexpected pos)"):
        export(finished_systems["videomae"] / "checkpoints" / "last", whose, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_test_takes_a_checkpoint_as_it_is(
    finished_systems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No size of somebody else's, no dump over an older one; pretraining names the recipe that goes on."""
    own = str(finished_systems["vivit_1"] / "checkpoints" / "last")
    (tmp_path / "out.parquet").touch()
    (tmp_path / "views.reversed.parquet").touch()
    pretrained = str(finished_systems["videomae"] / "checkpoints" / "last")
    for words, message in (
        ([own, "--size", "base"], "--size is for a file of somebody's weights"),
        ([own, "--dump", str(tmp_path / "out.parquet")], "out.parquet exists: name another file, or remove it"),
        (
            [own, "--temporal", "--dump", str(tmp_path / "views.parquet")],
            "views.reversed.parquet exists: name another file",
        ),
        ([pretrained], f"bevt finetune videomae_k400 --init {pretrained}"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(["test", "vivit_k400", *words])
        assert ended.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fixture", "whose", "read"),
    [
        ("finished", "original", "from_official"),
        ("finished_tuning", "original", "recognise"),
        ("finished_tuning", "torchvision", "from_torchvision"),
    ],
)
def test_exports_of_video_swins(
    fixture: str, whose: Any, read: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """BEVT's official names, Video Swin's, torchvision's: read back, they are the checkpoint's weights."""
    path = request.getfixturevalue(fixture) / "checkpoints" / "last"
    export(path, whose, tmp_path / "weights.pth")
    back: Any = getattr(names, read)(weights.read_file(tmp_path / "weights.pth"))
    state = back.state if read == "recognise" else back
    saved = checkpoint.load(path)
    expected = {**saved["model"], **saved.get("average", {})}
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_a_checkpoint_of_videomaes_own_training(systems: dict[str, AnyConfig], tmp_path: Path) -> None:
    """Its arguments lie beside the weights, as argparse has them."""
    from bevt.train.videomae import build_model, initialise

    config: Any = systems["videomae"]
    model, other = (build_model(config, torch.device("cpu")) for _ in range(2))
    held = {"model": vit_names.to_videomae(other.state_dict()), "args": Namespace(lr=1e-3, device="cuda"), "epoch": 3}
    torch.save({**held, "optimizer": {"state": {}}, "scaler": {"scale": 65536.0}}, tmp_path / "checkpoint-3.pth")
    initialise(model, tmp_path / "checkpoint-3.pth")
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
