"""A checkpoint's weights for other people's code: a file by the names of the original, torchvision or Hugging Face."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bevt.config import (
    AnyConfig,
    Config,
    ConfigError,
    ContrastConfig,
    FinetuneConfig,
    ModelConfig,
    VideoMAEConfig,
    ViTConfig,
    from_dict,
)
from bevt.models import names, vit_names
from bevt.models.names import State
from bevt.train import checkpoint
from bevt.train.metrics import RunError

Names = Literal["original", "hugging_face", "torchvision"]

HUGGING_FACE: dict[str, tuple[Literal["videomae", "vivit", "timesformer"], str]] = {
    "videomae": ("videomae", "VideoMAEForVideoClassification"),
    "vivit_1": ("vivit", "VivitForVideoClassification"),
    "timesformer": ("timesformer", "TimesformerForVideoClassification"),
}
"""Prefix and class of those kinds that exist there."""


def export(path: Path, whose: Names, out: Path) -> str:
    """Write the weights of the checkpoint `path` (averaged ones where there are such); what was written, in words.

    - `original`: a file that the authors' code reads, a dict of a state dict: of BEVT's official code (`state_dict`;
      finetuned: Video Swin's), VideoMAE (`model`), TimeSformer (`model_state`).
    - `torchvision`: a state dict of `swin3d_*`, of a Video Swin of clips that was finetuned.
    - `hugging_face`: a folder that `from_pretrained` reads, of VideoMAE, ViViT's first model or TimeSformer.

    Raises ConfigError where there are no such names for the model, RunError where `out` exists or cannot be written.
    """
    saved = checkpoint.load(path, optimizer=False)
    state = {**saved["model"], **saved.get("average", {})}
    config = _config(saved)
    classes = tuple(saved.get("classes", ()))
    if any(key.startswith("backbone.") for key in state):
        raise ConfigError(f"{path} is of probes on a frozen encoder, which other people's code has no names for")
    if out.exists():
        raise RunError(f"--out {out} exists: name another one")
    if whose == "hugging_face":
        tensors, about = _hugging_face(state, config, classes)
        what = f"model.safetensors and config.json of {about['architectures'][0]}, "

        def write(part: Path) -> None:
            part.mkdir()
            save_file({key: value.contiguous() for key, value in tensors.items()}, part / "model.safetensors")
            (part / "config.json").write_text(json.dumps(about, indent=2) + "\n")
    else:
        held, tensors = (_torchvision if whose == "torchvision" else _original)(state, config)
        what = ""

        def write(part: Path) -> None:
            with part.open("wb") as file:
                torch.save(held, file)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:  # whole or not at all
            write(Path(folder) / "part")
            (Path(folder) / "part").rename(out)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch's and safetensors' of a full disk
        why = error.strerror if isinstance(error, OSError) else str(error).partition("\n")[0]
        raise RunError(f"--out {out} cannot be written: {why}") from error
    return f"{out}: {what}{len(tensors)} tensors"


def _config(saved: dict[str, Any]) -> AnyConfig:
    """The configuration of a checkpoint of any kind."""
    values, command = saved["config"], saved.get("command", "pretrain")
    if command == "pretrain":
        return from_dict(values, VideoMAEConfig if "decoder" in values else Config)
    return from_dict(values, FinetuneConfig if command == "finetune" else ContrastConfig)


def _original(state: State, config: AnyConfig) -> tuple[dict[str, Any], State]:
    model = config.model
    if isinstance(model, ViTConfig):
        if model.kind == "videomae":
            tensors = vit_names.to_videomae(state)
            return {"model": tensors}, tensors
        if model.kind == "timesformer" and isinstance(config, FinetuneConfig):
            tensors = vit_names.to_timesformer(state)
            return {"model_state": tensors}, tensors
    elif isinstance(config, Config):
        tensors = names.to_official(state)
        return {"state_dict": tensors}, tensors
    elif isinstance(config, FinetuneConfig) and config.stream == "clips":
        tensors = names.to_video_swin(state, model.window_size)
        return {"state_dict": tensors}, tensors
    raise ConfigError(f"nobody's original code has names for what recipe {config.recipe!r} trains")


def _torchvision(state: State, config: AnyConfig) -> tuple[State, State]:
    if not (isinstance(config.model, ModelConfig) and isinstance(config, FinetuneConfig) and config.stream == "clips"):
        raise ConfigError(
            f"torchvision has names for a finetuned Video Swin of clips, not for what recipe {config.recipe!r} trains"
        )
    tensors = names.to_torchvision(state, config.model.window_size)
    return tensors, tensors


def _hugging_face(state: State, config: AnyConfig, classes: tuple[str, ...]) -> tuple[State, dict[str, Any]]:
    model, data = config.model, config.data
    known = isinstance(model, ViTConfig) and model.kind in HUGGING_FACE
    if not known or isinstance(config, (Config, ContrastConfig)):
        raise ConfigError(
            f"Hugging Face has VideoMAE, ViViT's first model and TimeSformer's classifier, and not what recipe "
            f"{config.recipe!r} trains"
        )
    model = cast(ViTConfig, model)
    root, architecture = HUGGING_FACE[model.kind]
    about: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": root,
        "image_size": data.crop,
        "patch_size": model.patch,
        "num_channels": 3,
        "num_frames": data.frames,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": model.depth,
        "num_attention_heads": model.num_heads,
        "intermediate_size": int(model.embed_dim * model.mlp_ratio),
        "layer_norm_eps": 1e-6,
        "qkv_bias": True,
    }
    if root == "vivit":
        about["tubelet_size"] = [model.tubelet, model.patch, model.patch]
    elif root == "videomae":
        about |= {"tubelet_size": model.tubelet, "use_mean_pooling": isinstance(config, FinetuneConfig)}
    else:
        about |= {"attention_type": "divided_space_time", "drop_path_rate": 0}
    if isinstance(config, VideoMAEConfig):
        about |= {
            "architectures": ["VideoMAEForPreTraining"],
            "decoder_hidden_size": config.decoder.embed_dim,
            "decoder_num_hidden_layers": config.decoder.depth,
            "decoder_num_attention_heads": config.decoder.num_heads,
            "decoder_intermediate_size": int(config.decoder.embed_dim * model.mlp_ratio),
            "norm_pix_loss": True,
        }
    else:
        about |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    return vit_names.to_hugging_face(state, root), about
