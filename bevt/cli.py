"""The command line: `bevt COMMAND --help` says what each one takes.

Exit status 0: all is well. 1: what was looked for is not so, which each command's help says. 2: a mistake of the user's
(a wrong key, a missing folder, an unreadable file), with one message; a traceback is a defect of this program. 3:
Ctrl-C or SIGTERM stopped training, and a checkpoint lies there to continue from. 130, 143: they stopped something else.
"""

from __future__ import annotations

import importlib
import inspect
import io
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast, get_args

import tyro

from bevt.config import (
    AnyConfig,
    Config,
    ConfigError,
    ContrastConfig,
    DataConfig,
    FinetuneConfig,
    Size,
    TokenizerConfig,
    TrainConfig,
    UserError,
    VideoMAEConfig,
    keys,
    nearest,
    resized_config,
)
from bevt.train.slurm import SlurmOptions, launch

if TYPE_CHECKING:
    from bevt.data.manifest import Manifest
    from bevt.train.loop import RunResult

T = TypeVar("T")
C = TypeVar("C", bound=AnyConfig)

STOPPED = 3
"""Exit status of a run that a signal stopped, with a checkpoint: neither done nor failed."""

USAGE = """usage: bevt COMMAND ...

  demo                    pretrain on the embedded data, end to end, in minutes on two CPU cores
  pretrain RECIPE         run a pretraining recipe, of BEVT or VideoMAE; without one, list them
  finetune RECIPE         learn classes, from pretrained weights; or train probes on frozen ones
  test RECIPE CHECKPOINT  classify held-out files by several views each: scores, classes, confusion
  predict VIDEO           what a finetuned model takes a file for, with a picture
  replicate               the paper's comparisons at a small scale, with a report: three hours on two CPU cores
  export CHECKPOINT       a checkpoint's weights by the names of the original code, Hugging Face or torchvision
  contrast RECIPE         the paper's baseline without labels and masks, on images
  slurm RECIPE            any of these trainings as a job of a Slurm cluster: many machines, requeued until finished
  tokenizer fit           train a VQ tokenizer on your own images or clips
  tokenizer check         whether a tokenizer gives the codes of float32 in its precision
  data index SOURCE       probe every file of a folder or list into a manifest
  data check SOURCE       say what is wrong with the files, and what to do
  data bench SOURCE       how fast each backend makes samples of the files, part by part
  rates RECIPE            every parameter's learning rate and weight decay in a finetuning recipe
  budget RECIPE           multiply-adds, parameters, memory and hours of a recipe
  doctor                  what this installation can do, and what is missing

bevt COMMAND --help says more. Exit status 0: all is well; 1: what was looked for is not so; 2: a mistake, with a
message; 3: Ctrl-C or SIGTERM stopped training after a step, to be continued with --resume; 130, 143: they stopped
something else.
"""


@dataclass(frozen=True)
class PretrainArgs:
    """Run a recipe. Every key of its configuration can be overridden.

    Exit status 0: finished; 3: Ctrl-C or SIGTERM stopped it after a step, and --resume goes on from there (0 under
    torchrun, which would start it again).
    """

    out: Path
    """Folder of the run: configuration, metrics, checkpoints, pictures."""
    config: Annotated[Config, tyro.conf.arg(name="")]
    size: Literal["recipe", "tiny", "small", "base", "large", "huge"] = "recipe"
    """A published size of the recipe's model (Video Swin: tiny to large, vision transformer: small to huge) in place of
    its own; your own model keys come on top."""
    resume: bool = False
    """Continue the run in `out` at its newest checkpoint (start it where there is none)."""
    profile: bool = False
    """Record three early steps with PyTorch's profiler, into `out`/profile: trace.json and table.txt."""


@dataclass(frozen=True)
class PixelArgs(PretrainArgs):
    """Pretrain a VideoMAE by a recipe. Every key of its configuration can be overridden.

    Exit status 0: finished; 3: Ctrl-C or SIGTERM stopped it after a step, and --resume goes on from there (0 under
    torchrun, which would start it again).
    """

    config: Annotated[VideoMAEConfig, tyro.conf.arg(name="")]  # type: ignore[assignment]


@dataclass(frozen=True)
class FinetuneArgs(PretrainArgs):
    """Learn classes by a recipe. Every key of its configuration can be overridden.

    Exit status 0: finished; 3: Ctrl-C or SIGTERM stopped it after a step, and --resume goes on from there (0 under
    torchrun, which would start it again).
    """

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]  # type: ignore[assignment]


@dataclass(frozen=True)
class ContrastArgs(PretrainArgs):
    """Learn images by contrast, the paper's baseline. Every key of the recipe's configuration can be overridden.

    Exit status 0: finished; 3: Ctrl-C or SIGTERM stopped it after a step, and --resume goes on from there (0 under
    torchrun, which would start it again).
    """

    config: Annotated[ContrastConfig, tyro.conf.arg(name="")]  # type: ignore[assignment]


@dataclass(frozen=True)
class TestArgs:
    """Classify the held-out files of a finetuned model by several views each. Under torchrun the processes share them.

    Of a checkpoint of this project the configuration is its own, else the recipe's; every key can be overridden.
    """

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    size: Literal["recipe", "tiny", "small", "base", "large", "huge"] = "recipe"
    """A published size of the recipe's model in place of its own, for a file of somebody's weights."""
    out: Path | None = None
    """Folder for scores.json, classes.csv and confusion.png; default: `test` in the run's folder."""
    dump: Path | None = None
    """Parquet file to write: every view's softmax outputs (`pip install 'bevt[parquet]'`). Of further orders of frames,
    or heads, beside it, with their names."""
    temporal: bool = False
    """Classify each clip also with one frame repeated, with its frames shuffled, and reversed: how much the model
    depends on time (the paper's Table 2)."""


@dataclass(frozen=True)
class FromDumpArgs:
    """Score the outputs that an earlier `bevt test --dump FILE` wrote."""

    from_dump: Path
    """The parquet file."""
    out: Path | None = None
    """Folder for scores.json, classes.csv and confusion.png; default: beside the dump."""


@dataclass(frozen=True)
class PredictArgs:
    """What a finetuned model takes a video or image for."""

    file: tyro.conf.Positional[Path]
    """The video (or image, of a model of images)."""
    checkpoint: Path
    """Of a finetuned model."""
    top: int = 5
    """Classes that are named."""
    out: Path | None = None
    """Picture to write: a strip of frames, and the classes; default: the file's name with .prediction.png, here."""


@dataclass(frozen=True)
class ExportArgs:
    """Write a checkpoint's weights for other people's code, averaged ones where there are such."""

    checkpoint: tyro.conf.Positional[Path]
    """Of this project, of any stage."""
    names: Literal["original", "hugging_face", "torchvision"]
    """`original`: a file for the official code of BEVT, Video Swin (finetuned), VideoMAE or TimeSformer.
    `hugging_face`: a folder for `from_pretrained`, of VideoMAE, ViViT's first model or TimeSformer. `torchvision`: a
    state dict of `swin3d_*`."""
    out: Path
    """File or folder to write; it must not exist."""


@dataclass(frozen=True)
class SlurmArgs(PretrainArgs):
    """Submit `bevt pretrain` of a recipe to Slurm: one process a GPU, restarted where one dies, queued again where the
    time is over. Every key of the configuration can be overridden.

    Exit status 0: submitted.
    """

    job: Annotated[SlurmOptions, tyro.conf.arg(name="")] = field(default_factory=SlurmOptions)


@dataclass(frozen=True)
class SlurmPixelArgs(PixelArgs, SlurmArgs):
    """As `SlurmArgs`, of VideoMAE's pretraining."""


@dataclass(frozen=True)
class SlurmFinetuneArgs(FinetuneArgs, SlurmArgs):
    """As `SlurmArgs`, of `bevt finetune`."""


@dataclass(frozen=True)
class SlurmContrastArgs(ContrastArgs, SlurmArgs):
    """As `SlurmArgs`, of `bevt contrast`."""


@dataclass(frozen=True)
class DemoArgs:
    """Pretrain BEVT on the embedded dataset: render and encode it, fit a tokenizer, image stage, joint stage, pictures.

    Exit status 0: both streams beat what the token frequencies alone would give, as the README states; 1: not so; 3:
    Ctrl-C or SIGTERM stopped a training stage, and the same command goes on from there.
    """

    out: Path = Path("runs/demo")
    """Folder of the demo; one that an earlier demo left is continued."""
    seed: int = 0
    """Seed of tokenizer and both stages."""


@dataclass(frozen=True)
class ReplicateArgs:
    """Pretrain as BEVT, by its parts and with other masks, finetune and test on the embedded dataset, and write a
    report beside the paper's tables. Exit status 0: the report is written, whatever it says.
    """

    out: Path = Path("runs/replicate")
    """Folder of all runs and the report; one that an earlier call left is continued."""
    seeds: int = 3
    """Finetunings of each start on each labelling."""


@dataclass(frozen=True)
class TokenizerFitArgs:
    """Train a VQ tokenizer (an encoder, a codebook, a decoder for pictures) on your own frames."""

    out: Path
    """File to write, `.safetensors`; give it to a recipe as --tokenizer.kind vq --tokenizer.path FILE."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where frames come from; clips, images or both."""
    vocab_size: int = 8192
    """Codes."""
    code_dim: int = 32
    """Numbers in a code."""
    width: int = 128
    """Channels after the first convolution; doubled by each of the next two."""
    steps: int = 20000
    """Training steps."""
    batch: int = 64
    """Frames in a step."""
    lr: float = 1e-3
    """Peak learning rate."""
    seed: int = 0
    """Everything random in the fit follows from it."""


@dataclass(frozen=True)
class TokenizerCheckArgs:
    """Compare a tokenizer's codes, as a run on this machine computes them, with those of float32, on your own frames.

    Exit status 1 where fewer than 99.5 % are equal.
    """

    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """What is checked; --tokenizer.precision names another precision than this machine's."""
    data: DataConfig = field(default_factory=DataConfig)
    """Where frames come from; clips, images or both."""
    frames: int = 64
    """Frames that are compared (196 codes each at a crop of 224), rounded up to a multiple of 4; few are read again."""
    seed: int = 0
    """Chooses the frames."""


@dataclass(frozen=True)
class DataIndexArgs:
    """Probe every file once and keep what was found in a manifest; unchanged files are not probed again.

    Exit status 1 where no file can be read.
    """

    source: tyro.conf.Positional[str]
    """Folder (all levels), tar archive, list of `path label` lines, Kinetics csv, SSv2 or Diving48 json; of a manifest
    (.jsonl) the counts are shown."""
    kind: Literal["auto", "clips", "images"] = "auto"
    """`clips` are videos; `auto`: what the source holds more of."""
    out: Path | None = None
    """Where the manifest goes; default: hidden, inside the folder, where pretraining finds it again."""
    most: int = 20
    """Unreadable files that are named."""


@dataclass(frozen=True)
class DataCheckArgs:
    """Say what is wrong with a source's files, and what to do. Exit status 1 where a file cannot be used."""

    source: tyro.conf.Positional[str]
    """As for `bevt data index`, or a manifest (.jsonl)."""
    kind: Literal["auto", "clips", "images"] = "auto"
    """`clips` are videos; `auto`: what the source holds more of."""
    span: int = 121
    """Source frames that a clip covers, (frames - 1) * stride + 1; shorter videos are noted."""
    whole: bool = False
    """Decode every file to its end: what the decoder notices in the middle of a video, which indexing does not see."""
    most: int = 20
    """Files of each kind of problem that are named."""


@dataclass(frozen=True)
class DataBenchArgs:
    """Measure, on your own files, how fast each backend makes samples of them, and which one a run would take."""

    source: tyro.conf.Positional[str]
    """As for `bevt data index`, or a manifest (.jsonl)."""
    data: DataConfig = field(default_factory=DataConfig)
    """How samples are cut and by how many workers; a backend that is named is measured alone. With --data.image-source
    frames single frames of videos are made."""
    kind: Literal["auto", "clips", "images"] = "auto"
    """`clips` are videos; `auto`: what the source holds more of."""
    seconds: float = 5.0
    """Of each of some eight measurements."""
    batch: int = 8
    """Samples in a micro-batch."""


@dataclass(frozen=True)
class RatesArgs:
    """Every parameter's learning rate over the run's, and its weight decay; nothing is trained."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]
    size: Literal["recipe", "tiny", "small", "base", "large", "huge"] = "recipe"
    """A published size of the recipe's model in place of its own."""
    classes: int = 400
    """Classes of the head."""


@dataclass(frozen=True)
class BudgetArgs:
    """What a recipe costs, component by component. Counted, not measured, but for the efficiency you give."""

    config: Annotated[Config, tyro.conf.arg(name="")]
    size: Literal["recipe", "tiny", "small", "base", "large", "huge"] = "recipe"
    """A published size of the recipe's model in place of its own."""
    gpus: int = 8
    """Devices."""
    tflops: float = 790.0
    """Matrix-product rate of one device, TFLOP/s; 790: bf16 measured on an H200."""
    efficiency: float = 0.4
    """Share of that rate that the whole step reaches."""
    clips: int = 240000
    """Training clips in one epoch (Kinetics-400: 240,000)."""
    images: int = 1281167
    """Training images in one epoch (ImageNet-1K: 1,281,167)."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Type of the devices, whose memory is predicted."""


@dataclass(frozen=True)
class PixelBudgetArgs(BudgetArgs):
    """As `BudgetArgs`, of VideoMAE's pretraining."""

    config: Annotated[VideoMAEConfig, tyro.conf.arg(name="")]  # type: ignore[assignment]


@dataclass(frozen=True)
class FinetuneBudgetArgs(BudgetArgs):
    """As `BudgetArgs`, of learning classes."""

    config: Annotated[FinetuneConfig, tyro.conf.arg(name="")]  # type: ignore[assignment]
    classes: int = 400
    """Classes of the head."""


BUDGET_KINDS: dict[type, type[BudgetArgs]] = {
    Config: BudgetArgs,
    VideoMAEConfig: PixelBudgetArgs,
    FinetuneConfig: FinetuneBudgetArgs,
}


def _parse(args_type: type[T], argv: Sequence[str], prog: str, default: T | None = None) -> T:
    """Arguments as `args_type`; a flag that does not exist is an error that names the nearest one."""
    named = keys(args_type if default is None else default)
    flags = {"--" + key.removeprefix("config.").removeprefix("job.").replace("_", "-") for key in named} | {"--help"}
    flags |= {flag.replace("--", "--no-", 1) for flag in flags}
    for word in argv:
        flag = word.split("=")[0].replace("_", "-")
        if flag.startswith("--") and flag not in flags:
            raise ConfigError(f"no option {flag}; the nearest is {nearest(flag, sorted(flags))}")
    # Of a configuration's models the default's kind is the one whose keys there are.
    config = (tyro.conf.AvoidSubcommands,)
    return cast(T, tyro.cli(args_type, args=list(argv), prog=prog, default=default, config=config))


def _recipe(argv: list[str], command: str, recipes: Mapping[str, Callable[[], C]]) -> tuple[C, list[str]]:
    """The recipe that the first argument names, and the other arguments."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: bevt {command} RECIPE --help | --KEY VALUE ...\n\nrecipes:")
        for name, recipe in recipes.items():
            print(f"  {name:20} {(recipe.__doc__ or '').splitlines()[0]}")
        raise SystemExit(0 if argv else 2)
    if argv[0] not in recipes:
        near = nearest(argv[0], recipes)
        raise ConfigError(f"no recipe {argv[0]!r}; the nearest is {near!r}, and there are {', '.join(recipes)}")
    config, rest = recipes[argv[0]](), argv[1:]
    if {"-h", "--help"} & set(rest):
        print(f"{inspect.getdoc(recipes[argv[0]])}\n")
    for flag, size in pairwise(" ".join(rest).replace("=", " ").split()):
        if flag == "--size" and size in get_args(Size):  # before the keys are read, so that they can still change it
            config = cast(C, resized_config(config, cast(Size, size)))
    return config, rest


def _pretrain(argv: list[str]) -> int:
    from bevt.recipes import RECIPES

    return _train(argv, "pretrain", RECIPES)


def _finetune(argv: list[str]) -> int:
    from bevt.recipes import FINETUNE_RECIPES

    return _train(argv, "finetune", FINETUNE_RECIPES)


def _contrast(argv: list[str]) -> int:
    from bevt.recipes import CONTRAST_RECIPES

    return _train(argv, "contrast", CONTRAST_RECIPES)


KINDS: dict[type, type[PretrainArgs]] = {
    Config: PretrainArgs,
    VideoMAEConfig: PixelArgs,
    FinetuneConfig: FinetuneArgs,
    ContrastConfig: ContrastArgs,
}
"""What a training's command takes, by the kind of its configuration."""

SLURM_KINDS: dict[type, type[SlurmArgs]] = {
    Config: SlurmArgs,
    VideoMAEConfig: SlurmPixelArgs,
    FinetuneConfig: SlurmFinetuneArgs,
    ContrastConfig: SlurmContrastArgs,
}
"""Likewise, as a job of a cluster."""


def _train(argv: list[str], command: str, recipes: Mapping[str, Callable[[], AnyConfig]]) -> int:
    """Train by a recipe: `bevt.train.COMMAND.COMMAND`."""
    default, rest = _recipe(argv, command, recipes)
    kind: type[Any] = KINDS[type(default)]
    blank = kind(out=tyro.MISSING, config=cast(Any, default))
    args = _parse(kind, rest, f"bevt {command} {argv[0]}", blank)
    from bevt.data.processes import stop_with_parent

    train = getattr(importlib.import_module(f"bevt.train.{command}"), command)
    elastic = "TORCHELASTIC_RUN_ID" in os.environ
    if elastic:
        stop_with_parent()
    result: RunResult = train(args.config, args.out, resume=args.resume, profile=args.profile)
    if os.environ.get("RANK", "0") == "0":
        how = "finished" if result.finished else "stopped, to be continued with --resume,"
        print(f"{how} at step {result.step} of {result.steps}: {result.checkpoint}")
        for name, value in result.evaluation.items():
            print(f"  {name:22} {value:.4f}")
    if elastic:  # torchrun would start a run again that does not end with 0
        return 0
    return 0 if result.finished else STOPPED


def _test(argv: list[str]) -> int:
    if any(word.split("=")[0] in ("--from-dump", "--from_dump") for word in argv):
        args = _parse(FromDumpArgs, argv, "bevt test")
        from bevt.evaluate.checkpoints import report
        from bevt.evaluate.predictions import Predictions

        found = Predictions.load(args.from_dump)
        named = {found.about.get("of", "normal"): found}
        print(report(named, args.out or args.from_dump.with_suffix(".scores")))
        return 0
    from bevt.recipes import FINETUNE_RECIPES

    default, rest = _recipe(argv, "test", FINETUNE_RECIPES)
    asks = bool({"-h", "--help"} & set(rest))
    if not asks and (not rest or rest[0].startswith("-")):
        raise ConfigError(f"name the model: bevt test {argv[0]} CHECKPOINT --KEY VALUE ...")
    from bevt.evaluate.checkpoints import score, tested_config

    path = Path(rest[0])
    config = default if asks else tested_config(path, default)
    if not asks and path.is_dir() and any(word.split("=")[0] == "--size" for word in rest):
        raise ConfigError(f"--size is for a file of somebody's weights: {path} has a size of its own")
    prog = f"bevt test {argv[0]} CHECKPOINT"
    given = _parse(TestArgs, rest if asks else rest[1:], prog, TestArgs(config=config))
    text = score(path, given.config, out=given.out, dump=given.dump, temporal=given.temporal)
    if text:  # of the first process
        print(text)
    return 0


def _predict(argv: list[str]) -> int:
    args = _parse(PredictArgs, argv, "bevt predict")
    from bevt.evaluate.checkpoints import predict

    if args.top < 1:
        raise ConfigError(f"--top must be above 0, got {args.top}")
    picture = args.out or Path(f"{args.file.name}.prediction.png")
    if picture.resolve() == args.file.resolve():
        raise ConfigError(f"--out {picture} is the file itself: name another one")
    for name, probability in predict(args.checkpoint, args.file, picture, top=args.top):
        print(f"{100 * probability:5.1f} %  {name}")
    print(f"picture: {picture}")
    return 0


def _export(argv: list[str]) -> int:
    args = _parse(ExportArgs, argv, "bevt export")
    from bevt.train.export import export

    print(export(args.checkpoint, args.names, args.out))
    return 0


def _slurm(argv: list[str]) -> int:
    from bevt.recipes import ALL_RECIPES

    default, rest = _recipe(argv, "slurm", ALL_RECIPES)
    kind: type[Any] = SLURM_KINDS[type(default)]
    args: SlurmArgs = _parse(kind, rest, f"bevt slurm {argv[0]}", kind(out=tyro.MISSING, config=default))
    _, words = tyro.cli(SlurmOptions, args=rest, return_unknown_args=True)  # those that the run itself reads
    print(launch(args.config, args.job, args.out, [argv[0], *words], resume=args.resume))
    return 0


def _demo(argv: list[str]) -> int:
    args = _parse(DemoArgs, argv, "bevt demo")
    from bevt.demo import demo

    passed = demo(args.out, args.seed)
    if passed is None:
        print("stopped; the same command goes on from here")
        return STOPPED
    return 0 if passed else 1


def _replicate(argv: list[str]) -> int:
    args = _parse(ReplicateArgs, argv, "bevt replicate")
    from bevt.replicate import replicate

    if args.seeds < 1:
        raise ConfigError(f"--seeds must be above 0, got {args.seeds}")
    replicate(args.out, args.seeds)
    return 0


def _tokenizer_fit(argv: list[str]) -> int:
    args = _parse(TokenizerFitArgs, argv, "bevt tokenizer fit")
    from bevt.tokenizers.vq import VQConfig
    from bevt.train.tokenizer import fit_tokenizer

    if not (args.data.clips or args.data.images):
        raise ConfigError("name the frames to fit on: --data.clips DIR, --data.images DIR or both")
    train = TrainConfig(clips=int(bool(args.data.clips)), images=int(bool(args.data.images)))
    vq = VQConfig(
        image_size=args.data.crop // 2,
        vocab_size=args.vocab_size,
        code_dim=args.code_dim,
        width=args.width,
        steps=args.steps,
        batch=args.batch,
        lr=args.lr,
        seed=args.seed,
    )
    report = fit_tokenizer(Config(recipe="tokenizer", data=args.data, train=train), vq, args.out)
    print(
        f"{args.out}: {report.codes_used} of {vq.vocab_size} codes in use, entropy {report.entropy:.2f} nats "
        f"(perplexity {report.perplexity:.0f}), commonest {100 * report.top_share:.1f} %, "
        f"mean error {report.error:.1f} of 255, {report.seconds:.0f} s"
    )
    return 0


def _tokenizer_check(argv: list[str]) -> int:
    args = _parse(TokenizerCheckArgs, argv, "bevt tokenizer check")
    from bevt.evaluate.agreement import check_tokenizer

    if not (args.data.clips or args.data.images):
        raise ConfigError("name the frames to compare on: --data.clips DIR, --data.images DIR or both")
    if args.frames < 1:
        raise ConfigError(f"--frames must be above 0, got {args.frames}")
    train = TrainConfig(clips=int(bool(args.data.clips)), images=int(bool(args.data.images)), seed=args.seed)
    config = Config(recipe="tokenizer", data=args.data, tokenizer=args.tokenizer, train=train)
    found, settled = check_tokenizer(config, args.frames)
    print(f"{args.tokenizer.path}: {', '.join(f'{what} {how}' for what, how in settled.items())}\n{found}")
    return 0 if found.passed else 1


def _data_index(argv: list[str]) -> int:
    args = _parse(DataIndexArgs, argv, "bevt data index")
    _not_negative(most=args.most)
    manifest = _indexed(args.source, args.kind, args.out)
    bad = len(manifest.unreadable)
    for number in manifest.unreadable[: args.most]:
        entry = manifest.entries[number]
        print(f"{entry.path}: {entry.error}")
    if bad > args.most:
        print(f"... and {bad - args.most} more")
    print(f"{len(manifest.entries) - bad} readable {manifest.kind}, {bad} unreadable")
    return 0 if bad < len(manifest.entries) else 1


def _data_check(argv: list[str]) -> int:
    args = _parse(DataCheckArgs, argv, "bevt data check")
    from rich.console import Console
    from rich.table import Table

    from bevt.data.check import CATEGORIES, check
    from bevt.train.metrics import counting

    _not_negative(span=args.span, most=args.most)
    manifest = _indexed(args.source, args.kind, None)
    with counting(f"decoding {manifest.kind}", enabled=args.whole) as progress:
        problems = check(manifest, args.span, whole=args.whole, progress=progress)
    table = Table("problem", "files", "", "what to do", box=None)
    for name, (severity, advice, _) in CATEGORIES.items():
        found = [problem for problem in problems if problem.category == name]
        if not found:
            continue
        table.add_row(name, str(len(found)), severity, advice)
        print(f"{name}:")
        for problem in found[: args.most]:
            print(f"  {problem.path}: {problem.what}")
        if len(found) > args.most:
            print(f"  ... and {len(found) - args.most} more (--most)")
    if problems:
        print()
        Console(highlight=False).print(table)
    errors = sum(CATEGORIES[problem.category].severity == "error" for problem in problems)
    print(f"{len(manifest.entries)} {manifest.kind}: {errors} cannot be used, {len(problems) - errors} other remarks")
    return 1 if errors else 0


def _data_bench(argv: list[str]) -> int:
    args = _parse(DataBenchArgs, argv, "bevt data bench")
    from rich.console import Console

    from bevt.data.bench import bench

    if args.data.clips or args.data.images:
        raise ConfigError("--data.clips and --data.images are a run's: the files to read are the SOURCE")
    kind = _indexed(args.source, args.kind, None).kind
    with Console(stderr=True).status("measuring"):
        report = bench(args.source, kind, args.data, batch=args.batch, seconds=args.seconds)
    Console(highlight=False).print(report)
    return 0


def _not_negative(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 0:
            raise ConfigError(f"--{name} must not be below 0, got {number}")


def _indexed(source: str, kind: Literal["auto", "clips", "images"], out: Path | None) -> Manifest:
    """The manifest of `source`, made or brought up to date behind a progress bar."""
    from bevt.data.manifest import Manifest, cache_path, index, probe_source
    from bevt.data.shapes import PREFIX, located
    from bevt.data.sources import guess_kind
    from bevt.train.metrics import counting

    if source.endswith(".jsonl"):
        manifest = Manifest.load(source) if kind == "auto" else probe_source(source, kind)
        print(f"manifest: {source}, of {manifest.root}")
        return manifest
    if not source:
        raise ConfigError("SOURCE is empty: name a folder, a tar archive, a list or a manifest (.jsonl)")
    if kind != "auto":
        chosen = kind
    else:
        chosen = "clips" if source.startswith(PREFIX) else guess_kind(source)
    source = located(source, chosen)
    if out and (out.is_dir() or not os.access(out.parent, os.W_OK)):
        what = "is a folder" if out.is_dir() else "cannot be written"
        raise ConfigError(f"--out {out} {what}: name a file in a folder that exists")
    cache = out or cache_path(Path(source), chosen)
    with counting(f"probing {chosen}") as progress:
        manifest = index(source, chosen, cache=cache, progress=progress)
    print(f"manifest: {cache}")
    return manifest


def _rates(argv: list[str]) -> int:
    from bevt.recipes import FINETUNE_RECIPES

    default, rest = _recipe(argv, "rates", FINETUNE_RECIPES)
    args = _parse(RatesArgs, rest, f"bevt rates {argv[0]}", RatesArgs(config=default))
    from bevt.train.finetune import rates

    print(f"{'parameter':64} {'rate':>10} {'decay':>8}")
    for name, rule in rates(args.config, args.classes).items():
        print(f"{name:64} {rule.factor:10.6f} {rule.weight_decay:8g}")
    return 0


def _budget(argv: list[str]) -> int:
    from bevt.recipes import FINETUNE_RECIPES, RECIPES

    default, rest = _recipe(argv, "budget", {**RECIPES, **FINETUNE_RECIPES})
    kind = BUDGET_KINDS[type(default)]
    args = _parse(kind, rest, f"bevt budget {argv[0]}", kind(config=cast(Any, default)))
    from bevt.budget import budget

    classes = args.classes if isinstance(args, FinetuneBudgetArgs) else 0
    flops, of = args.tflops * 1e12, (args.clips, args.images, args.device, classes)
    print(budget(args.config, args.gpus, flops, args.efficiency, *of))
    return 0


def _doctor(argv: list[str]) -> int:
    tyro.cli(
        lambda: None, args=argv, prog="bevt doctor", description="What this installation can do, and what is missing."
    )
    from bevt.doctor import doctor

    return doctor()


COMMANDS: dict[tuple[str, ...], Callable[[list[str]], int]] = {
    ("demo",): _demo,
    ("pretrain",): _pretrain,
    ("finetune",): _finetune,
    ("contrast",): _contrast,
    ("replicate",): _replicate,
    ("test",): _test,
    ("predict",): _predict,
    ("export",): _export,
    ("slurm",): _slurm,
    ("tokenizer", "fit"): _tokenizer_fit,
    ("tokenizer", "check"): _tokenizer_check,
    ("data", "index"): _data_index,
    ("data", "check"): _data_check,
    ("data", "bench"): _data_bench,
    ("rates",): _rates,
    ("budget",): _budget,
    ("doctor",): _doctor,
}


def _dispatch(argv: list[str]) -> int:
    for words, command in COMMANDS.items():
        if tuple(argv[: len(words)]) == words:
            return command(argv[len(words) :])
    asked = bool(argv) and argv[-1] in ("-h", "--help")
    if not argv or (asked and any(tuple(argv[:-1]) == words[: len(argv) - 1] for words in COMMANDS)):
        print(USAGE)
        return 0 if argv else 2
    given = " ".join(argv[:2])
    near = nearest(given, (" ".join(words) for words in COMMANDS))
    print(f"bevt: no command {given!r}; the nearest is {near!r}\n\n{USAGE}", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `bevt` and `python -m bevt`."""
    # Before torch loads its OpenMP: threads spin shortly at a barrier, then sleep. Beside one busy process on two cores
    # a step of the demo took 2.5 s so, 18 s with the default; alone 5 % longer. Decoding processes are such neighbours.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    status = 0
    with _Interrupts() as interrupts:
        try:
            status = _dispatch(arguments)
        except BaseException as error:
            if not interrupts.status:  # else, whatever it became on its way out of a library, it was an interrupt
                if not isinstance(error, UserError | OSError):
                    raise
                if not (isinstance(error, ConfigError) and os.environ.get("RANK", "0") != "0"):  # the first says it
                    print(f"bevt: {error}", file=sys.stderr)
                status = 2
        if interrupts.status:
            print(f"bevt: {'interrupted' if interrupts.status == 130 else 'terminated'}", file=sys.stderr)
            status = interrupts.status
    raise SystemExit(status)


class _Interrupts:
    """Context in which SIGINT and SIGTERM raise KeyboardInterrupt, so that helper processes and shared memory are
    cleared away; a further one, which would interrupt that, is answered, and after PATIENCE seconds ends the process.
    """

    PATIENCE = 5.0

    def __init__(self) -> None:
        self.status = 0
        """Exit status: 130 or 143 once a signal has come."""
        self._since = 0.0

    def __enter__(self) -> _Interrupts:
        self._before = {each: signal.signal(each, self._handle) for each in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        if not self.status:  # else until the interpreter has ended
            for each, handler in self._before.items():
                signal.signal(each, handler)

    def _handle(self, signum: int, frame: object) -> None:
        if not self.status:
            self.status, self._since = 128 + signum, time.monotonic()
            raise KeyboardInterrupt
        if time.monotonic() - self._since > self.PATIENCE:
            os._exit(self.status)
        os.write(2, b"\nending; a signal after five seconds ends it at once\n")
