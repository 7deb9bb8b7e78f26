"""What `bevt test` and `bevt predict` do with a finetuned model."""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console

from bevt.config import ConfigError, FinetuneConfig, check
from bevt.data.build import source_kind, view_backend, view_batches
from bevt.data.classes import are_numbers, class_numbers
from bevt.data.entry import Entry
from bevt.data.manifest import Manifest, open_source, probe_source
from bevt.data.probe import probe
from bevt.evaluate.classification import ORDERS, classify
from bevt.evaluate.predictions import Predictions, require_parquet
from bevt.evaluate.scores import ClassScore, confusion, per_class, scores, table
from bevt.pictures.answers import answer
from bevt.pictures.confusion import confusion as draw
from bevt.train import checkpoint
from bevt.train.distributed import World
from bevt.train.finetune import as_if_trained, own_config, restore
from bevt.train.loop import joined
from bevt.train.metrics import RunError


def tested_config(path: Path, recipe: FinetuneConfig) -> FinetuneConfig:
    """The configuration that a checkpoint is tested with before flags change it: its own, or `recipe` of a file.

    Raises ConfigError where the checkpoint is of another recipe, CheckpointError where it is none of a finetuned model.
    """
    if not path.exists():
        raise checkpoint.CheckpointError(f"no checkpoint, and no file of weights, at {path}")
    if not path.is_dir():
        return recipe
    own = own_config(path)
    if own.recipe not in (recipe.recipe, "custom"):
        raise ConfigError(f"{path} was made by recipe {own.recipe!r}: say `bevt test {own.recipe} {path}`")
    return replace(own, head=replace(own.head, classes=""))  # the checkpoint has the names


def score(path: Path, config: FinetuneConfig, *, out: Path | None, dump: Path | None, temporal: bool) -> str:
    """Classify the held-out files of `config` by the model in `path`; the report, in the first of several processes.

    `out` and `dump` as in `bevt test`; that they can be written is looked at before anything is classified. Raises what
    `restore` and `classify` do, and RunError for places that cannot be written.
    """
    stream = config.stream
    source = getattr(config.data, f"val_{stream}")
    if not source:
        raise ConfigError(f"data.val_{stream} is empty: name the held-out files with --data.val-{stream}")
    if out is None:
        if not path.is_dir() or path.absolute().parent.name != "checkpoints":
            raise ConfigError(f"--out is needed: {path} lies in no run's folder that the scores could go to")
        out = path.absolute().parent.parent / "test"
    if temporal and (stream == "images" or config.head.probes):
        raise ConfigError("--temporal is for models of clips with one head")
    check(as_if_trained(config))
    if dump:
        require_parquet()
        if dump.suffix != ".parquet":
            raise ConfigError(f"--dump {dump}: name a file that ends in .parquet")
        others = (ORDERS if temporal else config.head.names)[1:]
        for each in (dump, *(_beside(dump, name) for name in others)):
            if each.exists():
                raise ConfigError(f"--dump {dump}: {each} exists: name another file, or remove it")
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    with joined() as world:
        model, classes = restore(path, config, world.device)
        if world.main:  # one process looks at where to write, and at the files, before the others need them
            _writable(out)
            _writable(dump.parent if dump else out)
            open_source(source, source_kind(config.data, stream))
        world.barrier()
        manifest = probe_source(source, source_kind(config.data, stream), kept=True)
        numbered = bool(config.head.classes) or are_numbers(classes)
        labels = class_numbers(manifest, source, classes, numbered=numbered)
        choice = view_backend(config, stream, manifest) if world.main else None
        name = world.broadcast(choice.name if choice else "")
        settled = replace(config, data=replace(config.data, backend=cast(Any, name)))
        found = classify(
            model,
            settled,
            manifest,
            classes,
            world,
            views=config.views,
            labels=labels,
            orders=ORDERS if temporal else ("normal",),
            about={"recipe": config.recipe, "checkpoint": str(path), "files": source, "decoder": name},
        )
    if not found:
        return ""
    named = {
        head or order: replace(predictions, about={**predictions.about, "of": head or order})
        for (head, order), predictions in found.items()
    }
    text = report(named, out)
    for i, (name, predictions) in enumerate(named.items()):
        if dump:
            predictions.save(_beside(dump, name) if i else dump)
    return text


def _beside(dump: Path, name: str) -> Path:
    """Where the predictions of a further head or order of frames go."""
    return dump.with_name(f"{dump.stem}.{name}{dump.suffix}")


def _writable(folder: Path) -> None:
    """Make the folder, or raise RunError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror}; name another place with --out or --dump"
        ) from error


def report(named: Mapping[str, Predictions], out: Path) -> str:
    """Write `scores.json`, and of the first predictions `classes.csv` and `confusion.png`, into `out`; what they say.

    `named`: by head, or by order of frames. Raises RunError where `out` cannot be written.
    """
    first = next(iter(named.values()))
    found = {name: scores(predictions) for name, predictions in named.items()}
    views = first.probabilities.shape[1:3]
    rows = per_class(first)
    try:
        out.mkdir(parents=True, exist_ok=True)
        about = {**first.about, "clips": views[0], "crops": views[1]}
        summary = {**about, **{name: asdict(each) for name, each in found.items()}}
        (out / "scores.json").write_text(json.dumps(summary, indent=2) + "\n")
        with open(out / "classes.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow([field.name for field in fields(ClassScore)])
            writer.writerows(map(astuple, rows))
        draw(out / "confusion.png", confusion(first), first.classes, f"{len(first.files)} files")
    except OSError as error:
        raise RunError(f"cannot write the scores to {out}: {error.strerror}; name a folder with --out") from error
    console = Console(highlight=False, soft_wrap=True)
    with console.capture() as text:
        console.print(f"{len(first.files)} files, {views[0]} x {views[1]} views each")
        for name, each in found.items():
            console.print(f"{f'{name}: ' if len(found) > 1 else ''}{each}", markup=False)
        if len(found) > 1:
            console.print(f"classes of {next(iter(found))}:", markup=False)
        console.print(table(rows))
        console.print(f"scores, classes and confusion: {out}")
    return text.get().rstrip()


def predict(path: Path, file: Path, picture: Path, *, top: int) -> list[tuple[str, float]]:
    """The `top` likeliest classes of a file, (name, probability), over the checkpoint's test views; draws `picture`.

    It is decoded and computed by whatever can, not by what the checkpoint was trained with. Raises RunError for a file
    that cannot be read, and as `restore`.
    """
    config = own_config(path)
    anywhere = replace(config.model, attention_impl="auto", linear_impl="auto")
    config = replace(config, model=anywhere, data=replace(config.data, backend="auto", workers=0))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, classes = restore(path, config, device)
    stream = config.stream
    kind = source_kind(config.data, stream)
    real = file.resolve()
    try:
        status = real.stat()
    except OSError as error:
        raise RunError(f"{file} cannot be opened ({error.strerror})") from error
    if real.is_dir():
        raise RunError(f"{file} is a folder: name one of its files, or test all with `bevt test`")
    entry = probe(str(real.parent), kind, Entry(real.name, status.st_size, status.st_mtime_ns))
    if entry.error:
        raise RunError(f"{file} cannot be read as one of the {kind}: {entry.error}")
    manifest = Manifest(kind, str(real.parent), (entry,))
    backend = view_backend(config, stream, manifest).name
    config = replace(config, data=replace(config.data, backend=cast(Any, backend)))
    found = classify(model, config, manifest, classes, World(0, 1, device), views=config.views)
    likely = next(iter(found.values())).video_level()[0]
    (batch,) = view_batches(config, stream, manifest, [0], clips=1, crops=1, files=1)
    frames = batch.clips[0] if batch.clips is not None else batch.images  # of images (1, H, W, 3)
    assert frames is not None
    try:
        answer(picture, frames, classes, likely, title=file.name)
    except OSError as error:
        raise RunError(f"cannot write the picture {picture}: {error.strerror}; name another one with --out") from error
    return [(classes[i], float(likely[i])) for i in np.argsort(-likely, kind="stable")[:top]]
