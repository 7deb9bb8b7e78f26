"""What the Triton kernels compile to, without a GPU: `python -m benchmarks.aot` against its committed ceilings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOOP = """
 .L_x_1:
        /*0000*/                   LDG.E R1, [R2.64] ;
        /*0010*/                   HMMA.16816.F32 R4, R8, R1, R4 ;
        /*0020*/              @P0  MUFU.EX2 R4, R4 ;
        /*0030*/                   STL [R1+0x4], R4 ;
        /*0040*/               @P1 BRA `(.L_x_1) ;
"""


def test_loops_are_counted_from_label_to_branch() -> None:
    aot = pytest.importorskip("benchmarks.aot", reason="needs triton: pip install triton")
    (loop,) = aot.loops("        /*0000*/ MOV R0, R1 ;" + LOOP + "        /*0050*/ EXIT ;")
    assert aot.mnemonics(loop) == {"LDG.E": 1, "HMMA.16816.F32": 1, "MUFU.EX2": 1, "STL": 1, "BRA": 1}


@pytest.mark.slow
def test_machine_code_keeps_within_its_ceilings() -> None:
    pytest.importorskip("triton", reason="needs triton: pip install triton")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.aot"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "within all ceilings" in done.stdout or "not judged" in done.stdout
