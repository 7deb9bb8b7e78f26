"""Machine code of the Triton kernels, counted without a GPU: `python -m benchmarks.aot`.

Compiles each kernel of ENTRIES ahead of time with the sizes that ship for each architecture, and counts the
instructions of its main loop for each unit of work that a thread does there, padding included:

- window attention for (8, 7, 7) windows, heads of 32 channels and bfloat16. A unit is a score, a query-key pair: each
  has exactly one exponential, by which the loop over tiles is known.
- linear_argmax of 2048 channels and 8192 classes. A unit is a logit: each has exactly one comparison that NaN never
  passes. The loop over tiles of classes is counted without the product's loop over channels inside it.
- masked_linear_cross_entropy's loss kernel for 8192 classes, gradients included. A unit is a logit, with one
  exponential; the loop is over rows. Its search for a tie, which one row in ten takes, counts as if all did.

`--all` instead compiles every kernel that the GPU cases of the registry launch, also in float16 and float32, and fails
where one does not compile or takes more shared memory than a program may have: half a minute a process and architecture
(nothing is counted). `--list` names them. What is launched is not written down here: the ops' own launchers are called
with tensors that have no data, and Triton tells what it would compile. So it is what a GPU would be given, with
Triton's own choice of what is a constant and what a multiple of 16.

To add a kernel to the counts, write a function from an architecture to an Entry and name it in ENTRIES; for one without
a product, an instruction that occurs once a unit (MUFU.EX2, the exponential) is all it takes. TARGETS are for what must
hold whatever was counted before. Compares with the committed counts (`results/aot.json`, for one version of Triton);
`--write` replaces them.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton
from bevt_kernels.linear_argmax import triton_forward as argmax
from bevt_kernels.masked_linear_cross_entropy import triton_forward as cross_entropy
from bevt_kernels.testing import ArgmaxCase, ConvCase, LinearCase, LossCase, WindowCase
from bevt_kernels.window_attention import triton_backward, triton_forward
from bevt_kernels.window_attention.configs import KERNELS, config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import driver

from benchmarks.arguments import positive
from benchmarks.registry import DTYPES, OPS, Case, HeadCase, StepCase, TrainCase, VideoMAECase, ViTCase, grown
from bevt.config import SIZES

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


def _tool(compiled: CompiledKernel, tool: str, option: str) -> str:
    """What one of the tools that Triton ships says of the machine code."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def usage(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers and stack bytes a thread."""
    text = _tool(compiled, "cuobjdump", "-res-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump names no registers:\n{text}")
    return int(found[1]), int(found[2])


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
    registers, stack = usage(compiled)
    units = entry.units // (32 * entry.sizes["warps"])
    found = main_loop(_tool(compiled, "nvdisasm", "-c"), entry.mark, units)
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


OPTIONS = ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion", "launch_cooperative_grid")
"""Of the compiler, that a launch may set; the others follow from the architecture."""


class Variant(NamedTuple):
    """A kernel as Triton is asked to compile it, by a launch."""

    architecture: str
    origin: str
    """The dtype, op and case that first ask for it."""
    module: str
    kernel: str
    """The function's name in `module`."""
    signature: dict[str, str]
    static: dict[tuple[int, ...], Any]
    """Constants by place: compile-time arguments, and what Triton makes one, such as a stride of 1."""
    attributes: dict[tuple[int, ...], Any]
    """By place, what is known of an argument: that it is a multiple of 16."""
    options: dict[str, Any]
    """The compiler's."""

    @property
    def identity(self) -> str:
        """Equal for what is compiled to the same."""
        return repr(self._replace(origin=""))

    @property
    def name(self) -> str:
        """The kernel with the types of its pointers, its constants and its warps."""
        names, types = list(self.signature), dict.fromkeys(self.signature.values())
        pointers = " ".join(each for each in types if each.startswith("*"))
        constants = [f"{names[place[0]]}={value}" for place, value in self.static.items()]
        return f"{self.kernel}({pointers}; {', '.join(constants)}), {self.options['num_warps']} warps"


class Compiled(NamedTuple):
    """What became of a variant."""

    architecture: str
    name: str
    origin: str
    registers: int
    """A thread."""
    stack: int
    """Bytes a thread: spills, where it is not 0."""
    shared: int
    """Bytes a program."""
    error: str
    """Why it cannot run; empty where it can."""


class _Driver:
    """What a launch asks Triton's driver before it compiles."""

    def __init__(self, architecture: str) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(self.architecture.removeprefix("sm_")), 32)

    def get_current_device(self) -> str:
        """The key of each kernel's caches: no number, so that no GPU of this machine finds them."""
        return self.architecture

    def get_current_stream(self, device: str) -> int:
        return 0


class _WithoutCUDA(TorchFunctionMode):
    """By other means, what a build of torch without CUDA refuses for tensors of that device, with or without data."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), keywords: Any = None) -> Any:
        keywords = keywords or {}
        if "out" in keywords:  # there is nothing to fill in
            return keywords["out"]
        if function is Tensor.__setitem__:
            return None
        if function is not Tensor.__getitem__:
            return function(*args, **keywords)
        tensor, index = args
        if isinstance(index, int):
            return tensor.select(0, index)
        start, stop, step = index.indices(len(tensor))  # of a slice: the launchers use no other brackets
        assert step == 1, index
        return tensor.narrow(0, start, stop - start)


@contextmanager
def recorded(architecture: str) -> Iterator[list[dict[str, Any]]]:
    """Inside, kernels that are launched on tensors of the device "cuda", which have no data, are listed and not run.

    An item is what Triton's hook gets before a compilation. Tensors are taken to begin at a multiple of 16 bytes.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("kernels cannot be compiled while TRITON_INTERPRET=1 is set: unset it")
    found: list[dict[str, Any]] = []

    def hook(**launch: Any) -> bool:
        found.append({**launch["compile"], "module": launch["fn"].module, "kernel": launch["fn"].name})
        return True  # as if somebody else compiled it: the launch returns

    def on_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
        """Index arrays of the windows as they are, on the CPU: a kernel is compiled for their dtypes alone."""
        return lambda *args: make(*(torch.device("cpu") if isinstance(x, torch.device) else x for x in args))

    def start(tensor: Tensor) -> int:
        return int(tensor.storage_offset()) * tensor.element_size()

    with ExitStack() as stack:
        for target, name, value in (
            (driver, "_active", _Driver(architecture)),
            (triton_forward, "architecture", lambda device: architecture),
            (argmax, "architecture", lambda device: architecture),
            (argmax, "processors", lambda device: 132),
            (triton_forward, "cut", on_cpu(triton_forward.cut)),
            (triton_forward, "groups", on_cpu(triton_forward.groups)),
            (triton_backward, "bias_sums", on_cpu(triton_backward.bias_sums)),
        ):
            stack.enter_context(mock.patch.object(target, name, value))
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", start))
        with knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = hook
            with FakeTensorMode(), torch.device("cuda"), _WithoutCUDA():
                yield found


def parts(case: Case) -> list[Case]:
    """The ops' cases in a registry case: itself, or of a model those whose kernels it launches.

    Sizes that no kernel is compiled for are arbitrary. Raises TypeError for a kind of case that is not known here.
    """
    if isinstance(case, WindowCase | LossCase | ArgmaxCase):
        return [case]
    if isinstance(case, LinearCase | ConvCase | VideoMAECase | ViTCase):  # no kernels in Triton
        return []
    if not isinstance(case, StepCase | HeadCase | TrainCase):
        raise TypeError(f"benchmarks/aot.py does not know which kernels {case} launches: say it in `parts`")
    config = SIZES[case.size]
    window, heads = config.window_size, config.num_heads[0]
    head_dim = config.embed_dim // heads
    clips = WindowCase(1, window, window, heads=heads, head_dim=head_dim)
    if isinstance(case, StepCase):
        return [clips]
    classes = case.classes if isinstance(case, HeadCase) else 8192
    loss = LossCase(12544, 8 * config.embed_dim, classes, 12544, 12544)
    if isinstance(case, HeadCase):
        return [loss]
    image = (1, *window[1:])
    images = WindowCase(1, image, image, table_window=window, heads=heads, head_dim=head_dim)
    return [clips, images, loss, ArgmaxCase(1568, 2048, classes)]


def launch(case: Case, dtype: torch.dtype) -> None:
    """Forward and backward of an op's case by its Triton launchers, on tensors that hold nothing."""
    if isinstance(case, WindowCase):
        channels = case.heads * case.head_dim
        qkv = torch.empty(case.batch, *case.grid, 3 * channels, dtype=dtype)
        table = torch.empty(math.prod(2 * t - 1 for t in case.table), case.heads)
        static = (case.heads, case.window, case.shift, case.table, case.scale)
        out, lse = triton_forward.forward(qkv, table, *static)
        triton_backward.backward(torch.empty_like(out), qkv, table, out, lse, *static, True)
    elif isinstance(case, LossCase):
        hidden = torch.empty(case.rows, case.channels, dtype=dtype)
        weight = torch.empty(case.classes, case.channels, dtype=dtype)
        targets, index = (torch.empty(case.slots, dtype=torch.int64) for _ in range(2))
        # A model's bias is float32, the benchmark's in the dtype of the others; the masks are training's, validation's.
        for bias, mask in ((torch.float32, True), (torch.float32, False), (dtype, True)):
            of_bias = torch.empty(case.classes, dtype=bias)
            cross_entropy.forward(hidden, weight, of_bias, targets, index, [mask] * 3)
    elif isinstance(case, ArgmaxCase):
        shapes = ((case.rows, case.channels), (case.classes, case.channels), (case.classes,))
        argmax.linear_argmax(*(torch.empty(shape, dtype=dtype) for shape in shapes))


def variants(architectures: Sequence[str] = ARCHITECTURES) -> Iterator[Variant]:
    """Each once: what the registry's GPU cases launch, and as well in the dtypes that are not benchmarked."""
    dtypes = dict.fromkeys((DTYPES["cuda"], torch.bfloat16, torch.float16, torch.float32))
    for architecture in architectures:
        seen: set[str] = set()
        for dtype in dtypes:
            for op, name, case in _gpu_cases():
                origin = f"{str(dtype).removeprefix('torch.')} {op} {name}"
                with recorded(architecture) as launches:
                    launch(case, dtype)
                for each in launches:
                    variant = Variant(
                        architecture,
                        origin,
                        each["module"],
                        each["kernel"],
                        each["signature"],
                        each["constants"],
                        each["configs"][0],
                        {name: each[name] for name in OPTIONS},
                    )
                    if variant.identity not in seen:
                        seen.add(variant.identity)
                        yield variant


def _gpu_cases() -> Iterator[tuple[str, str, Case]]:
    """(op, case's name, case of an op)."""
    for op, entries in OPS.items():
        for name, entry in entries.cases.items():
            if "cuda" in entry.batch:  # which matters: a loss of many slots is cut, its first piece a case of its own
                yield from ((op, name, part) for part in parts(grown(op, name, "cuda")))


def compile_variant(variant: Variant) -> Compiled:
    """Ahead of time; an error is part of the result."""
    function = getattr(importlib.import_module(variant.module), variant.kernel)
    source = ASTSource(function, variant.signature, variant.static, variant.attributes)
    target = _Driver(variant.architecture).get_current_target()
    named = variant.architecture, variant.name, variant.origin
    try:
        compiled = triton.compile(source, target=target, options=variant.options)
    except Exception as error:  # of many kinds: the compiler's passes, its assembler
        return Compiled(*named, 0, 0, 0, f"{type(error).__name__}: {str(error).strip()}")
    shared, limit = compiled.metadata.shared, SHARED_LIMIT[variant.architecture]
    excess = f"takes {shared} bytes of shared memory, of which there are {limit}" if shared > limit else ""
    return Compiled(*named, *usage(compiled), shared, excess)


def compile_all(architectures: Sequence[str] = ARCHITECTURES, processes: int = 1) -> Iterator[Compiled]:
    """Every variant, in order, by so many processes."""
    if processes == 1:
        yield from map(compile_variant, variants(architectures))
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield from pool.imap(compile_variant, variants(architectures))


def main_all(architectures: Sequence[str], processes: int) -> int:
    """`--all`; returns the exit code: 1 where a kernel cannot run."""
    failures, number = [], 0
    print(f"{'':7}{'registers':>10}{'stack':>7}{'shared':>8}")
    for got in compile_all(architectures, processes):
        number += 1
        print(
            f"{got.architecture:7}{got.registers:10}{got.stack:7}{got.shared:8}  {got.name}, {got.origin}", flush=True
        )
        if got.error:
            failures.append(f"{got.architecture} {got.name}, {got.origin}: {got.error}")
    print("\n".join(failures) or f"all {number} compile and fit")
    return int(bool(failures))


def main() -> int:
    """The command; returns the exit code: 1 where a count exceeds a ceiling, or a kernel cannot run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="replace the committed counts")
    parser.add_argument("--all", action="store_true", help="compile every kernel, and count nothing")
    parser.add_argument("--list", action="store_true", help="name every kernel that --all compiles")
    parser.add_argument("--architecture", action="append", choices=ARCHITECTURES, help="with --all or --list, only it")
    parser.add_argument(
        "--processes", type=positive, default=min(4, os.cpu_count() or 1), help="that --all compiles in"
    )
    arguments = parser.parse_args()
    architectures, write = arguments.architecture or ARCHITECTURES, arguments.write
    if knobs.runtime.interpret:
        print("kernels cannot be compiled while TRITON_INTERPRET=1 is set: unset it", file=sys.stderr)
        return 2
    if arguments.list:
        for variant in variants(architectures):
            print(f"{variant.architecture} {variant.name}, {variant.origin}")
        return 0
    if arguments.all:
        return main_all(architectures, arguments.processes)
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
