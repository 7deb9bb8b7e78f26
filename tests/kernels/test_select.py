"""The choice of an implementation, the native library's states, and what importing the package costs."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from bevt_kernels import NoImplementation, Spec, native, resolve, select

CPU = Spec("cpu", torch.float32)
OPS = ("window_attention", "masked_linear_cross_entropy", "linear_argmax")


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> dict:
    """An op `toy` whose implementations take what their reasons say."""
    reasons = {"triton": ["no GPU"], "native": ["too small", "too odd"], "reference": []}
    table = {"toy": {impl: lambda spec, r=why: r for impl, why in reasons.items()}}
    monkeypatch.setattr(select, "_supports", table)
    return reasons


def test_auto_takes_the_first_that_can_serve(offers: dict) -> None:
    spec = Spec("cuda", torch.float32)
    assert resolve("toy", "auto", spec) == "reference"
    offers["native"].clear()
    assert resolve("toy", "auto", spec) == "native"
    offers["triton"].clear()
    assert resolve("toy", "auto", spec) == "triton"
    assert resolve("toy", "reference", spec) == "reference"


def test_auto_never_takes_the_interpreter(offers: dict) -> None:
    offers["triton"].clear()
    assert resolve("toy", "auto", CPU) == "reference"
    assert resolve("toy", "triton", CPU) == "triton"


@pytest.mark.parametrize(
    ("spec", "installed", "reason"),
    [
        (Spec("cpu", torch.float32), "3.6.0", "serves CUDA; on the CPU only Triton's interpreter"),
        (Spec("xpu", torch.float32), "3.6.0", "serves CUDA, not xpu"),
        (Spec("cuda", torch.float64), "3.6.0", "takes float32, bfloat16 and float16, not torch.float64"),
        (Spec("cuda", torch.float32), "3.5.1", "needs triton 3.6 or newer, found 3.5.1"),
        (Spec("cuda", torch.float32), "", "needs triton 3.6 or newer: pip install triton"),
    ],
)
def test_triton_says_why_it_cannot_serve(
    spec: Spec, installed: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        if not installed:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(select, "version", version)
    monkeypatch.setattr(select, "_TRITON", select._triton_reason())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert any(reason in found for found in select.triton_reasons(spec))


def test_triton_wants_ampere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_TRITON", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert select.triton_reasons(Spec("cuda", torch.float32)) == ["needs compute capability 8.0, this GPU has 7.5"]


@pytest.mark.parametrize("impl", ["auto", "native"])
def test_refusal_lists_every_candidate_and_reason(offers: dict, impl: str) -> None:
    offers["reference"].append("out of order")
    with pytest.raises(NoImplementation) as error:
        resolve("toy", impl, CPU)
    for line in ("triton: no GPU", "native: too small; too odd", "reference: out of order", repr(impl), "float32"):
        assert line in str(error.value)


def test_what_an_op_does_not_have_is_refused_by_name(offers: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(select._supports["toy"], "triton")
    with pytest.raises(NoImplementation, match="triton: not available for toy in this version"):
        resolve("toy", "triton", CPU)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no op 'attention'; there are conv3x3, linear, linear_argmax, masked_linear"):
        resolve("attention", "auto", CPU)
    with pytest.raises(ValueError, match="impl must be auto, triton, native, reference; got 'cuda'"):
        resolve("linear_argmax", "cuda", CPU)
    with pytest.raises(ValueError, match="has no implementation 'cuda'; it has triton, native, reference"):
        torch.ops.bevt_kernels.linear_argmax(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), "cuda")


@pytest.mark.parametrize("op", OPS)
def test_native_is_for_the_cpu_and_not_for_float64(op: str) -> None:
    assert "serves the CPU, not cuda" in select.reasons(op, "native", Spec("cuda", torch.float32))
    assert "takes float32, bfloat16 and float16, not torch.float64" in select.reasons(
        op, "native", Spec("cpu", torch.float64)
    )
    assert resolve(op, "auto", Spec("cpu", torch.float64)) == "reference"


@pytest.mark.skipif(not native.loaded(), reason=f"native library {native.status()}")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_is_native_on_the_cpu(op: str, dtype: torch.dtype) -> None:
    assert resolve(op, "auto", Spec("cpu", dtype, needs_grad=True)) == "native"


MARK = b"\x7fELF bevt_kernels native library, torch "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"not built: there is no _native.so .*BEVT_NATIVE=ON pip install"),
        (b"text", "is not this project's library or is damaged: rebuild with"),
        (MARK + b"1.0.0\0", f"built for torch 1.0.0 but torch {torch.__version__} is installed: rebuild with"),
        (MARK + torch.__version__.encode() + b"\0", f"built for torch {torch.__version__} but it does not load"),
    ],
    ids=["absent", "foreign", "stale", "unloadable"],
)
def test_native_library_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, message: str
) -> None:
    path = tmp_path / "_native.so"
    if content is not None:
        path.write_bytes(content)
    loaded, status = native.load(path)
    monkeypatch.setattr(native, "_loaded", loaded)
    monkeypatch.setattr(native, "_status", status)
    for op in OPS:
        assert resolve(op, "auto", CPU) == "reference"
        with pytest.raises(NoImplementation) as error:
            resolve(op, "native", CPU)
        error.match(message.replace("+", r"\+"))


def test_import_needs_neither_triton_nor_bevt() -> None:
    code = """
import sys
sys.modules["triton"] = None
sys.modules["bevt"] = None
import bevt_kernels
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
