"""Machine code of the Triton kernels, counted without a GPU: `python -m benchmarks.aot`.

Compiles each kernel of ENTRIES ahead of time with the sizes that ship for each architecture, and counts the
instructions of its main loop for each unit of work that a thread does there, padding included:

- window attention for (8, 7, 7) windows, heads of 32 channels and bfloat16. A unit is a score, a query-key pair: each
  has exactly one exponential, by which the loop over tiles is known.
- linear_argmax of 2048 channels and 8192 classes. A unit is a logit: each has exactly one comparison that NaN never
  passes. The loop over tiles of classes is counted without the product's loop over channels inside it.
- masked_linear_cross_entropy's loss kernel for 8192 classes, gradients included. A unit is a logit, with one
  exponential; the loop is over rows. Its search for a tie, which one row in ten takes, counts as if all did.

To add a kernel, write a function from an architecture to an Entry and name it in ENTRIES; for one without a product, an
instruction that occurs once a unit (MUFU.EX2, the exponential) is all it takes. TARGETS are for what must hold
whatever was counted before. Compares with the committed counts (`results/aot.json`, for one version of Triton);
`--write` replaces them.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from bevt_kernels.linear_argmax import triton_forward as argmax
from bevt_kernels.masked_linear_cross_entropy import triton_forward as cross_entropy
from bevt_kernels.window_attention import triton_backward, triton_forward
from bevt_kernels.window_attention.configs import KERNELS, config
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

PATH = Path(__file__).parent / "results" / "aot.json"
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory a program may take (CUDA programming guide, compute capabilities)."""
TARGETS: dict[str, dict[str, float]] = {
    "window_attention forward": {"instructions": 9.5, "global_loads": 0.5},
    "linear_argmax bf16": {"spills": 0, "stack": 0},
    "linear_argmax fp16": {"spills": 0, "stack": 0},
    "masked_linear_cross_entropy bf16": {"spills": 0, "stack": 0, "global_loads": 0.5},
    "masked_linear_cross_entropy fp16": {"spills": 0, "stack": 0, "global_loads": 0.5},
}
"""Most a unit, on every architecture, with the version of Triton that the committed counts are of."""
SLACK = 1.02
"""A count may exceed the committed one by this factor."""


class Entry(NamedTuple):
    """A kernel as one architecture gets it."""

    function: triton.JITFunction
    types: dict[str, str]
    """Of the arguments that are not i32, as in Triton's signatures: "*bf16", "fp32"."""
    static: dict[str, int]
    """Compile-time arguments."""
    sizes: dict[str, int]
    """Written beside the count; `warps` and `stages` of them are the compiler's."""
    units: int
    """Of work in one turn of the main loop, by all threads together."""
    mark: str
    """An instruction, as `mnemonics` names it, that the main loop holds exactly once for each unit of a thread."""
    aligned: tuple[str, ...] = ()
    """Whole numbers that are multiples of 16, beside all pointers."""


def window_attention(kernel: str, architecture: str) -> Entry:
    """For (8, 7, 7) windows, heads of 32 channels and bfloat16."""
    functions = {
        "forward": triton_forward.forward_kernel,
        "grad_q": triton_backward.grad_q_kernel,
        "grad_kv": triton_backward.grad_kv_kernel,
        "grad_bias": triton_backward.grad_bias_kernel,
    }
    halves, floats = ("qkv", "out", "grad_out", "grad_qkv"), ("table", "lse", "statistics", "grad_bias")
    wholes = ("starts", "groups", "origins", "tokens", "table_rows")
    types = {**dict.fromkeys(halves, "*bf16"), **dict.fromkeys(floats, "*fp32"), **dict.fromkeys(wholes, "*i32")}
    sizes = config(kernel, torch.bfloat16, 32, 8 * 7 * 7, architecture)
    static: dict[str, int] = {"HEAD_DIM": 32, "CHANNELS": 32, "EXACT": False}
    units = sizes.block_q * sizes.block_k
    if kernel == "grad_bias":
        static |= {"BLOCK": sizes.block_q}
    else:
        static |= {"BLOCK_Q": sizes.block_q, "BLOCK_K": sizes.block_k, "GROUP": sizes.group}
        units *= sizes.group
    if kernel == "forward":
        static |= {"ONLINE": False}
    return Entry(functions[kernel], {**types, "scale": "fp32"}, static, sizes._asdict(), units, "MUFU.EX2")


def linear_argmax(dtype: torch.dtype, architecture: str) -> Entry:
    """For 2048 channels: what matters of the problem is that they are a multiple of the block."""
    sizes = argmax.config(dtype, architecture)
    half = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    types = {**dict.fromkeys(("x", "weight", "bias"), half), "values": "*fp32", "codes": "*i64"}
    static: dict[str, int] = {"BLOCK_M": sizes.block_m, "BLOCK_V": sizes.block_v, "BLOCK_C": sizes.block_c}
    units = sizes.block_m * sizes.block_v
    return Entry(
        argmax.argmax_kernel, types, {**static, "EVEN": True}, sizes._asdict(), units, "FSETP.GTU.AND", aligned=("C",)
    )


def masked_linear_cross_entropy(dtype: torch.dtype, architecture: str) -> Entry:
    """The loss kernel for 8192 classes, in a chunk after the first."""
    half = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}[dtype]
    floats, wholes = ("bias", "losses", "correct", "column_sums"), ("targets", "index")
    types = {"logits": half, **dict.fromkeys(floats, "*fp32"), **dict.fromkeys(wholes, "*i64")}
    static = {"BLOCK_V": 8192, "FULL": True, "EXACT": False, "GRAD": True, "SUMS": True, "FIRST": False}
    sizes = {"block_v": 8192, "warps": cross_entropy.warps(8192), "stages": cross_entropy.STAGES}
    return Entry(cross_entropy.loss_kernel, types, static, sizes, 8192, "MUFU.EX2", aligned=("V",))


ENTRIES: dict[str, Callable[[str], Entry]] = {
    **{f"window_attention {kernel}": partial(window_attention, kernel) for kernel in KERNELS},
    "linear_argmax bf16": partial(linear_argmax, torch.bfloat16),
    "linear_argmax fp16": partial(linear_argmax, torch.float16),
    "masked_linear_cross_entropy bf16": partial(masked_linear_cross_entropy, torch.bfloat16),
    "masked_linear_cross_entropy fp16": partial(masked_linear_cross_entropy, torch.float16),
}


class Count(NamedTuple):
    """Of one kernel's main loop, but registers, stack and shared memory, which are of the whole kernel."""

    instructions: float
    """A unit, spills included; without those of the loop within that holds the matrix product, if there is one."""
    spills: float
    """Loads and stores of local memory a unit, the product's loop included."""
    global_loads: float
    """Global loads a unit, 4 to 16 bytes each; the product's loop left out."""
    atomics: int
    registers: int
    """A thread."""
    stack: int
    """Bytes a thread."""
    shared: int
    """Bytes a program."""


def compile_entry(entry: Entry, architecture: str) -> CompiledKernel:
    """Ahead of time, for pointers aligned to 16 bytes as tensors are."""
    types = {**entry.types, **dict.fromkeys(entry.static, "constexpr")}
    signature = {name: types.get(name, "i32") for name in entry.function.arg_names}
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or name in entry.aligned
    }
    source = ASTSource(fn=entry.function, signature=signature, constexprs=entry.static, attrs=aligned)
    options = {"num_warps": entry.sizes["warps"], "num_stages": entry.sizes["stages"], "enable_fp_fusion": True}
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


def loops(text: str) -> tuple[list[str], list[range]]:
    """The instructions, and where each loop lies: from a label to the branch back to it. Inner loops come first."""
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
                found.append(range(labels[back[1]], len(code)))
    return code, found


def mnemonics(code: list[str]) -> Counter[str]:
    """How often each instruction occurs; its modifiers are kept after the first dot."""
    return Counter(re.sub(r"^@!?U?P\w+\s+", "", line).split()[0] for line in code)


def main_loop(text: str, mark: str, marks: int) -> tuple[Counter[str], Counter[str]] | None:
    """The loop in which `mark` occurs `marks` times, and of it the loop within that holds the matrix product."""
    code, found = loops(text)
    for loop in found:
        whole = mnemonics(code[loop.start : loop.stop])
        if whole[mark] == marks:
            inside = [code[at.start : at.stop] for at in found if loop.start < at.start and at.stop < loop.stop]
            products = [each for each in inside if any("MMA" in mnemonic for mnemonic in mnemonics(each))]
            return whole, mnemonics(max(products, key=len, default=[]))
    return None


def count(entry: Entry, architecture: str) -> Count:
    """Raises RuntimeError where no loop has one mark a unit: then the counting is wrong."""
    compiled = compile_entry(entry, architecture)
    text, registers, stack = disassemble(compiled)
    units = entry.units // (32 * entry.sizes["warps"])
    found = main_loop(text, entry.mark, units)
    if found is None:
        raise RuntimeError(f"{entry.function.__name__} for {architecture}: no loop holds {entry.mark} {units} times")
    whole, product = found

    def named(counter: Counter[str], *names: str) -> int:
        return sum(n for mnemonic, n in counter.items() if mnemonic.split(".")[0] in names)

    return Count(
        round((whole - product).total() / units, 2),
        round(named(whole, "LDL", "STL") / units, 2),
        round(named(whole - product, "LDG", "LDGSTS") / units, 2),
        named(whole, "ATOM", "ATOMG", "RED", "REDG"),
        registers,
        stack,
        compiled.metadata.shared,
    )


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
    print(f"{'':43}{'instructions':>13}{'spills':>8}{'global loads':>14}{'registers':>11}{'stack':>7}{'shared':>8}")
    for architecture in ARCHITECTURES:
        for kernel, entry_for in ENTRIES.items():
            entry = entry_for(architecture)
            got = count(entry, architecture)
            result.setdefault(architecture, {})[kernel] = {**entry.sizes, **got._asdict()}
            print(
                f"{architecture:7}{kernel:36}{got.instructions:13.2f}{got.spills:8.2f}{got.global_loads:14.2f}"
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
