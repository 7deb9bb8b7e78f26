"""Machine code of the Triton kernels, counted without a GPU: `python -m benchmarks.aot`.

Compiles the window attention kernels ahead of time for (8, 7, 7) windows, heads of 32 channels and bfloat16, with the
sizes that ship for each architecture, and counts the instructions of the loop over tiles. A score is one query-key pair
of a thread's share of the tiles, padding included: each has exactly one exponential, by which the loop is recognised.
Compares with the committed counts (`results/aot.json`, for one version of Triton); `--write` replaces them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from bevt_kernels.window_attention import triton_backward, triton_forward
from bevt_kernels.window_attention.configs import KERNELS, Config, config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

PATH = Path(__file__).parent / "results" / "aot.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory a program may take (CUDA programming guide, compute capabilities)."""
TARGETS = {"forward": {"instructions": 9.5, "global_loads": 0.5}}
"""Most a score, on every architecture, with the version of Triton that the committed counts are of."""
SLACK = 1.02
"""A count may exceed the committed one by this factor."""

HEAD_DIM, TOKENS, DTYPE = 32, 8 * 7 * 7, torch.bfloat16
FUNCTIONS = {
    "forward": triton_forward.forward_kernel,
    "grad_q": triton_backward.grad_q_kernel,
    "grad_kv": triton_backward.grad_kv_kernel,
    "grad_bias": triton_backward.grad_bias_kernel,
}
_HALF = ("qkv", "out", "grad_out", "grad_qkv")
_FLOAT = ("table", "lse", "statistics", "grad_bias")
_INT = ("starts", "groups", "origins", "tokens", "table_rows")


class Count(NamedTuple):
    """Of one kernel's loop, but registers, stack and shared memory, which are of the whole kernel."""

    instructions: float
    """A score, spills included."""
    spills: float
    """Loads and stores of local memory a score."""
    global_loads: float
    """Global loads a score, 4 to 16 bytes each."""
    atomics: int
    registers: int
    """A thread."""
    stack: int
    """Bytes a thread."""
    shared: int
    """Bytes a program."""


def compile_kernel(kernel: str, sizes: Config, architecture: str) -> CompiledKernel:
    """Ahead of time, for pointers aligned to 16 bytes as tensors are."""
    function = FUNCTIONS[kernel]
    static: dict[str, int] = {"HEAD_DIM": HEAD_DIM, "CHANNELS": HEAD_DIM}
    if kernel == "grad_bias":
        static |= {"BLOCK": sizes.block_q}
    else:
        static |= {"BLOCK_Q": sizes.block_q, "BLOCK_K": sizes.block_k, "GROUP": sizes.group}
    static |= {"ONLINE": False, "EXACT": False} if kernel == "forward" else {"EXACT": False}
    kinds = {**dict.fromkeys(_HALF, "*bf16"), **dict.fromkeys(_FLOAT, "*fp32"), **dict.fromkeys(_INT, "*i32")}
    kinds |= {"scale": "fp32", **dict.fromkeys(static, "constexpr")}
    signature = {name: kinds.get(name, "i32") for name in function.arg_names}
    aligned = {(at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(fn=function, signature=signature, constexprs=static, attrs=aligned)
    options = {"num_warps": sizes.warps, "num_stages": sizes.stages, "enable_fp_fusion": True}
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=options)


def disassemble(compiled: CompiledKernel) -> tuple[str, int, int]:
    """Machine code as text, registers and stack bytes a thread; by the tools that Triton ships."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text, usage = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers:\n{usage}")
    return text, int(found[1]), int(found[2])


def loops(text: str) -> list[list[str]]:
    """The instructions of each loop: from a label to the branch back to it."""
    code: list[str] = []
    labels: dict[str, int] = {}
    found = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.search(r"/\*[0-9a-f]{4,5}\*/\s+(.*?);", line):
            code.append(instruction[1].strip())
            back = re.search(r"BRA.*?`\((\.L_x_\d+)\)", code[-1])
            if back and back[1] in labels:
                found.append(code[labels[back[1]] :])
    return found


def mnemonics(loop: list[str]) -> Counter[str]:
    """How often each instruction occurs; its modifiers are kept after the first dot."""
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in loop)


def count(kernel: str, sizes: Config, architecture: str) -> Count:
    """Raises RuntimeError where no loop has one exponential a score: then the counting is wrong."""
    compiled = compile_kernel(kernel, sizes, architecture)
    text, registers, stack = disassemble(compiled)
    boxes = 1 if kernel == "grad_bias" else sizes.group
    scores = sizes.block_q * sizes.block_k * boxes // (32 * sizes.warps)
    for loop in loops(text):
        found = mnemonics(loop)

        def named(*names: str, found: Counter[str] = found) -> int:
            return sum(n for mnemonic, n in found.items() if mnemonic.split(".")[0] in names)

        if found["MUFU.EX2"] == scores and any("MMA" in mnemonic for mnemonic in found):
            return Count(
                round(len(loop) / scores, 2),
                round(named("LDL", "STL") / scores, 2),
                round(named("LDG", "LDGSTS") / scores, 2),
                named("ATOM", "ATOMG", "RED", "REDG"),
                registers,
                stack,
                compiled.metadata.shared,
            )
    raise RuntimeError(f"{kernel} for {architecture}: no loop with {scores} exponentials and a matrix product")


def main() -> int:
    """The command; returns the exit code: 1 where a count exceeds a ceiling."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the committed counts")
    write = parser.parse_args().write
    committed: dict = json.loads(PATH.read_text()) if PATH.is_file() else {"triton": None}
    comparable = committed["triton"] == triton.__version__
    if not comparable and not write:
        print(f"triton {triton.__version__}; the committed counts are of {committed['triton']}: not judged")
    result: dict = {"triton": triton.__version__}
    failures = []
    print(f"{'':16}{'instructions':>13}{'spills':>8}{'global loads':>14}{'registers':>11}{'stack':>7}{'shared':>8}")
    for architecture in ARCHITECTURES:
        for kernel in KERNELS:
            sizes = config(kernel, DTYPE, HEAD_DIM, TOKENS, architecture)
            got = count(kernel, sizes, architecture)
            result.setdefault(architecture, {})[kernel] = {**sizes._asdict(), **got._asdict()}
            print(
                f"{architecture:7}{kernel:9}{got.instructions:13.2f}{got.spills:8.2f}{got.global_loads:14.2f}"
                f"{got.registers:11}{got.stack:7}{got.shared:8}",
                flush=True,
            )
            before = {} if write else committed.get(architecture, {}).get(kernel, {})
            ceilings = {name: before[name] * SLACK for name in Count._fields if name in before}
            for name, most in {**TARGETS.get(kernel, {}), "atomics": 0, "shared": SHARED_LIMIT[architecture]}.items():
                ceilings[name] = min(ceilings.get(name, most), most)
            failures += [
                f"{architecture} {kernel}: {name} {value}, ceiling {ceilings[name]:.4g}"
                for name, value in got._asdict().items()
                if (comparable or write) and name in ceilings and value > ceilings[name]
            ]
    if write:
        PATH.write_text(json.dumps(result, indent=1) + "\n")
    if comparable or write:
        print("\n".join(failures) or "within all ceilings")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
