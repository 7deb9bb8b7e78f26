"""What the Triton kernels compile to, without a GPU: `python -m benchmarks.aot` against its committed ceilings."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
"""A test each: together they take 95 s of one core where nothing is cached."""
LOOP = """
 .L_x_1:
        /*0000*/                   LDG.E R1, [R2.64] ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R1, R4 ;
        /*0020*/              @P0  MUFU.EX2 R4, R4 ;
        /*0030*/                   STL [R1+0x4], R4 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
"""


NESTED = """
 .L_x_0:
        /*0000*/                   FADD R4, R4, R5 ;
 .L_x_1:
        /*0010*/                   LDL R1, [R1+0x4] ;
        /*0020*/                   HGMMA.64x256x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   FSETP.GTU.AND P0, PT, R4, R5, PT ;
        /*0050*/               @P2 BRA `(.L_x_0) ;
"""


@pytest.fixture
def aot():
    return pytest.importorskip("benchmarks.aot", reason="needs triton: pip install triton")


def test_loops_are_counted_from_label_to_branch(aot) -> None:
    code, (loop,) = aot.loops("        /*0000*/ MOV R0, R1 ;" + LOOP + "        /*0050*/ EXIT ;")
    found = aot.mnemonics(code[loop.start : loop.stop])
    assert found == {"LDG.E": 1, "HMMA.16816.F32": 1, "MUFU.EX2": 1, "STL": 1, "BRA": 1}


def test_a_main_loop_is_known_by_its_mark(aot) -> None:
    whole, product = aot.main_loop(LOOP, "MUFU.EX2", 1)
    assert (whole.total(), product.total()) == (5, 0), "a product beside the mark belongs to the main loop"
    assert aot.main_loop(LOOP, "MUFU.EX2", 2) is None


def test_the_loop_of_the_product_within_is_told_apart(aot) -> None:
    whole, product = aot.main_loop(NESTED, "FSETP.GTU.AND", 1)
    assert product == {"LDL": 1, "HGMMA.64x256x16.F32.BF16": 1, "BRA": 1}
    assert whole - product == {"FADD": 1, "FSETP.GTU.AND": 1, "BRA": 1}


def compiling(*arguments: str) -> subprocess.CompletedProcess:
    """Python with `arguments`, in a process whose kernels are compiled and not interpreted."""
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def kernels() -> set[str]:
    """Of the sources, the functions under @triton.jit that no other such function calls: those that are launched."""
    found, called = set(), set()
    for path in (ROOT / "kernels" / "bevt_kernels").rglob("*.py"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef) and "triton.jit" in "".join(
                map(ast.unparse, function.decorator_list)
            ):
                found.add(function.name)
                calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
                called |= {call.id for call in calls if isinstance(call, ast.Name)}
    return found - called


def test_every_kernel_that_is_launched_is_compiled_ahead_of_time() -> None:
    done = compiling("-m", "benchmarks.aot", "--list", "--architecture", "sm_90")
    assert done.returncode == 0, done.stderr
    listed = set(re.findall(r"^sm_90 (\w+)\(", done.stdout, re.MULTILINE))
    assert len(listed) > 10
    assert listed == kernels()
    for variant in ("ONLINE=True", "EXACT=True", "FIRST=False", "GRAD=False", "EVEN=False"):
        assert variant in done.stdout, f"no kernel with {variant}"


BROKEN = """
from benchmarks import aot
first = next(aot.variants(["sm_90"]))
print(aot.compile_variant(first._replace(options={**first.options, "num_warps": 3})).error)
aot.variants = lambda architectures: iter([first])
aot.SHARED_LIMIT["sm_90"] = 1000
print(aot.main_all(["sm_90"], 1))
"""


def test_a_kernel_that_cannot_run_is_named() -> None:
    done = compiling("-c", BROKEN)
    assert done.returncode == 0, done.stderr
    assert "num_warps must be a power of 2" in done.stdout.splitlines()[0]
    assert re.search(
        r"\nsm_90 forward_kernel\(.*: takes \d+ bytes of shared memory, of which there are 1000\n1\n", done.stdout
    )


def test_no_architecture_is_left_out(aot) -> None:
    assert sorted(ARCHITECTURES) == sorted(aot.ARCHITECTURES)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_and_fits(architecture: str) -> None:
    done = compiling("-m", "benchmarks.aot", "--all", "--architecture", architecture, "--processes", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"all \d+ compile and fit", done.stdout)


@pytest.mark.slow
def test_machine_code_keeps_within_its_ceilings() -> None:
    done = compiling("-m", "benchmarks.aot")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "within all ceilings" in done.stdout or "not judged" in done.stdout
