"""`bevt doctor`: what this installation can do, what is missing, and how to get it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable

import torch

OPTIONAL = {
    "triton": "GPU kernels",
    "xformers": "attention of vision transformers, and a benchmark baseline",
    "transformers": "tests against independent implementations",
}


def doctor() -> int:
    """Print the report; the exit status: 1 where something that training needs is missing."""
    problems: list[str] = []
    for name, check in CHECKS.items():
        text, problem = check()
        print(f"{name:16}{text}")
        if problem:
            problems.append(problem)
    for problem in problems:
        print(f"missing: {problem}")
    if not problems:
        print("nothing that training needs is missing")
    return 1 if problems else 0


def _machine() -> tuple[str, str]:
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    capability = torch.backends.cpu.get_cpu_capability()
    return f"Python {platform.python_version()}, {platform.machine()}, {affinity} cores, {capability}", ""


def _torch() -> tuple[str, str]:
    return f"{torch.__version__}, CUDA {torch.version.cuda or 'not in this build'}", ""


def _devices() -> tuple[str, str]:
    if not torch.cuda.is_available():
        return "CPU only", ""
    names = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        names.append(f"{p.name} (sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB)")
    return ", ".join(names), ""


def _implementations() -> tuple[str, str]:
    from bevt_kernels import Spec, resolve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    trained = Spec(device, torch.float32, True, (8, 7, 7), 32)
    frozen = Spec(device, torch.float32)
    ops = dict.fromkeys(("window_attention", "masked_linear_cross_entropy", "linear"), trained)
    ops |= dict.fromkeys(("linear_argmax", "conv3x3"), frozen)
    return f"\n{'':16}".join(f"{op}: {resolve(op, 'auto', spec)}" for op, spec in ops.items()), ""


def _native() -> tuple[str, str]:
    from bevt_kernels import native

    return str(native.status()), ""


def _codecs() -> tuple[str, str]:
    if importlib.util.find_spec("av") is None:
        return "PyAV is not installed", "PyAV, for the video stream: pip install av"
    import av

    from bevt.data import DataError, dali, torchcodec

    wanted = ("h264", "hevc", "vp8", "vp9", "av1", "mpeg4", "mjpeg")
    lines = [f"PyAV {av.__version__}: {', '.join(codec for codec in wanted if _decodes(av.codec.Codec, codec))}"]
    try:
        where = "GPUs" if torch.cuda.is_available() else "CPUs"
        lines.append(f"DALI {dali.library().__version__}: {', '.join(dali.CODECS[where])}")
    except DataError as error:
        lines.append(str(error))
    try:
        torchcodec.library()
        lines.append("torchcodec: what its FFmpeg decodes")
    except DataError as error:
        lines.append(str(error))
    return f"\n{'':16}".join(lines), ""


def _decodes(codec: Callable[..., object], name: str) -> bool:
    try:
        codec(name, "r")
    except ValueError:  # av.codec.codec.UnknownCodecError
        return False
    return True


def _packages() -> tuple[str, str]:
    found = []
    for name, use in OPTIONAL.items():
        try:
            present = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            present = False
        found.append(f"{name} ({use}): {'installed' if present else 'not installed'}")
    return f"\n{'':16}".join(found), ""


def _apex() -> tuple[str, str]:
    """NVIDIA's apex has `apex.optimizers`; the package of that name on PyPI is something else."""
    if importlib.util.find_spec("apex") is None:
        return "not installed (optional; NVIDIA's is built from its source)", ""
    try:
        right = importlib.util.find_spec("apex.optimizers") is not None
    except ImportError:
        right = False
    if right:
        return "NVIDIA apex", ""
    version = importlib.metadata.version("apex")
    return f"apex {version} is PyPI's unrelated package of that name, not NVIDIA's; pip uninstall apex", ""


CHECKS: dict[str, Callable[[], tuple[str, str]]] = {
    "machine": _machine,
    "torch": _torch,
    "devices": _devices,
    "implementations": _implementations,
    "native library": _native,
    "video": _codecs,
    "packages": _packages,
    "apex": _apex,
}
