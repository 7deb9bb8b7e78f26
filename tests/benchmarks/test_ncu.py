"""`python -m benchmarks.ncu` with a program in the profiler's place: no GPU has to be there."""

import os
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bevt_kernels.testing import WindowCase

from benchmarks import ncu, problems

COMMAND = ["window_attention", "--case", "swin-b video stage 1"]
HEADER = (
    '"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",'
    '"CC","Section Name","Metric Name","Metric Unit","Metric Value"'
)
"""As Nsight Compute 2022 to 2025 writes it."""

FILL = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<c10::BFloat16>>(int, T2, T3)"


def lines(number: int, kernel: str, metrics: dict[str, tuple[str, str]], section: str) -> list[str]:
    """Of one launch, a line a metric: name -> (unit, value)."""
    launch = f'"{number}","4242","python3.11","127.0.0.1","{kernel}","1","7","(128, 1, 1)","(1792, 1, 1)","0","9.0"'
    return [f'{launch},"{section}","{name}","{unit}","{value}"' for name, (unit, value) in metrics.items()]


def details() -> str:
    """Two launches of a kernel of ours and one of torch's, whose hit rate the GPU does not tell."""
    text = ["==PROF== Connected to process 4242", '==PROF== Profiling "forward_kernel": 0%....50%....100% - 9 passes']
    text += [HEADER]
    for number, (kernel, duration, sm, hit) in enumerate(
        [
            ("forward_kernel", "1,000,000", "60.00", "90.00"),
            (FILL, "2,500", "12.50", "(!) n/a"),
            ("forward_kernel", "3,000,000", "40.00", "70.00"),
        ]
    ):
        sections = {
            "Duration": ("ns", duration),
            "Compute (SM) Throughput": ("%", sm),
            "DRAM Throughput": ("%", "7.25"),
            "Registers Per Thread": ("register/thread", "255"),
            "Dynamic Shared Memory Per Block": ("byte/block", "98,304"),
            "Static Shared Memory Per Block": ("byte/block", "0"),
            "Issue Slots Busy": ("%", "99.00"),
        }
        text += lines(number, kernel, sections, "GPU Speed Of Light Throughput")
        asked = {
            "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active": ("%", "33.30"),
            "smsp__issue_active.avg.pct_of_peak_sustained_active": ("%", "55.50"),
            "lts__t_sector_hit_rate.pct": ("%", hit),
            "l1tex__t_bytes_pipe_lsu_mem_local_op_ld.sum": ("byte", "1,048,576"),
            "l1tex__t_bytes_pipe_lsu_mem_local_op_st.sum": ("byte", "524,288"),
        }
        text += lines(number, kernel, asked, "Command line profiler metrics")
    return "\n".join([*text, "==PROF== Disconnected from process 4242"]) + "\n"


@pytest.fixture
def profiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], Path]:
    """Puts a program named ncu on PATH: (what it writes to its log, its exit code) -> file for its arguments."""

    def install(text: str, code: int = 0) -> Path:
        (tmp_path / "answer").write_text(text)
        arguments = tmp_path / "arguments"
        program = tmp_path / "ncu"
        program.write_text(
            f"#!{sys.executable}\n"
            "import pathlib, shutil, sys\n"
            "here = pathlib.Path(__file__).parent\n"
            '(here / "arguments").write_text("\\n".join(sys.argv[1:]))\n'
            'shutil.copy(here / "answer", sys.argv[sys.argv.index("--log-file") + 1])\n'
            'pathlib.Path(sys.argv[sys.argv.index("--export") + 1] + ".ncu-rep").write_text("report")\n'
            f"sys.exit({code})\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        return arguments

    monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr(ncu, "FOLDER", tmp_path / "build")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    return install


def test_a_row_a_kernel(profiler: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = profiler(details())
    assert ncu.main([*COMMAND, "--kernel", "forward|Fill"]) == 0
    first, head, ours, torchs, last = capsys.readouterr().out.splitlines()
    assert first == "window_attention, swin-b video stage 1, triton, NVIDIA H100 80GB HBM3:"
    titles = [column.title for column in ncu.COLUMNS]
    assert all(title in head for title in titles)
    # Durations are added up, percentages weighted by them, 60 and 40 % in 1 and 3 ms.
    want = ["forward_kernel", "2", "4000", "45", "33.3", "55.5", "7.25", "75", "-", "255", "96", "3"]
    assert ours.split() == want
    assert torchs.startswith("vectorized_elementwise_kernel<4, FillFunctor<c10::BFloat1... ")
    assert torchs.split()[-11:] == ["1", "2.5", "12.5", "33.3", "55.5", "7.25", "-", "-", "255", "96", "1.5"]
    assert "window_attention-swin-b-video-stage-1-triton.ncu-rep" in last
    assert (tmp_path / "build" / "window_attention-swin-b-video-stage-1-triton.ncu-rep").exists()
    given = arguments.read_text().splitlines()
    assert given[given.index("--profile-from-start") + 1] == "off"
    assert given[given.index("--kernel-name") + 1] == "regex:forward|Fill"
    asked = given[given.index("--metrics") + 1].split(",")
    assert set(asked) == {metric for column in ncu.COLUMNS for metric in column.metrics}
    assert given[-8:] == ["-m", "benchmarks.ncu", *COMMAND, "--impl", "triton", "--step"]


@pytest.mark.parametrize(
    ("text", "code", "exit_code", "message"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU Performance "
            "Counters on the target device 0. For instructions on enabling permissions and to get more information see "
            "https://developer.nvidia.com/ERR_NVGPUCTRPERM\n==WARNING== No kernels were profiled.\n",
            0,
            2,
            "NVreg_RestrictProfilingToAdminUsers=0",
        ),
        ("==ERROR== The application returned an error code (1).\n", 1, 1, "failed (exit code 1):\n==ERROR=="),
        ("==WARNING== No kernels were profiled.\n", 0, 1, "no kernel was profiled:\n==WARNING=="),
        (details().replace('"ns"', '"us"'), 0, 1, "Duration of forward_kernel is in 'us', asked for in nanoseconds"),
    ],
    ids=["forbidden", "program fails", "no kernel", "other units"],
)
def test_what_goes_wrong_is_said(
    profiler: Callable, capsys: pytest.CaptureFixture, text: str, code: int, exit_code: int, message: str
) -> None:
    profiler(text, code)
    assert ncu.main(COMMAND) == exit_code
    printed = capsys.readouterr()
    assert message in printed.err
    assert not printed.out


def test_a_machine_without_a_profiler_or_a_gpu_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert ncu.main(COMMAND) == 2
    assert "needs a CUDA GPU: torch sees none" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ncu.main(COMMAND) == 2
    assert "ncu is not on PATH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["window_attention", "--case", "cpu target"],
            "no case 'cpu target' for a GPU; there are: 'swin-b video stage 1', ",
        ),
        ([*COMMAND, "--impl", "tritno"], "no contestant 'tritno' for a GPU; there are: 'triton', "),
    ],
)
def test_what_is_not_there_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert ncu.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_one_step_after_the_warm_up_is_profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problems.WindowAttention(WindowCase(1, (2, 3, 3), (2, 3, 3), heads=2, head_dim=16), "cpu")
    done: list[str] = []
    monkeypatch.setattr(problems, "build", lambda *_: problem)
    monkeypatch.setattr(problem, "step", done.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: done.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: done.append("stop"))
    ncu.step("window_attention", "any", "reference")
    assert done == ["reference", "reference", "start", "reference", "stop"]
    with pytest.raises(SystemExit, match=r"^\w+ cannot run: "):
        ncu.step("window_attention", "any", next(n for n, c in problem.contestants.items() if c.reasons))
