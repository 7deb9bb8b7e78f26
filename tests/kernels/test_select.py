"""The choice of an implementation, the native library's states, and what importing the package costs."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bevt_kernels import NoImplementation, Spec, native, resolve, select

CPU = Spec("cpu", torch.float32)


@pytest.fixture
def offers(monkeypatch: pytest.MonkeyPatch) -> dict:
    """An op `toy` whose implementations take what their reasons say."""
    reasons = {"triton": ["no GPU"], "native": ["too small", "too odd"], "reference": []}
    table = {"toy": {impl: lambda spec, r=why: r for impl, why in reasons.items()}}
    monkeypatch.setattr(select, "_supports", table)
    return reasons


def test_auto_takes_the_first_that_can_serve(offers: dict) -> None:
    assert resolve("toy", "auto", CPU) == "reference"
    offers["native"].clear()
    assert resolve("toy", "auto", CPU) == "native"
    offers["triton"].clear()
    assert resolve("toy", "auto", CPU) == "triton"
    assert resolve("toy", "reference", CPU) == "reference"


@pytest.mark.parametrize("impl", ["auto", "native"])
def test_refusal_lists_every_candidate_and_reason(offers: dict, impl: str) -> None:
    offers["reference"].append("out of order")
    with pytest.raises(NoImplementation) as error:
        resolve("toy", impl, CPU)
    for line in ("triton: no GPU", "native: too small; too odd", "reference: out of order", repr(impl), "float32"):
        assert line in str(error.value)


@pytest.mark.parametrize("op", ["window_attention", "masked_linear_cross_entropy", "linear_argmax"])
def test_what_no_version_has_yet_is_refused_by_name(op: str) -> None:
    with pytest.raises(NoImplementation, match=f"triton: not available for {op} in this version"):
        resolve(op, "triton", CPU)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match="no op 'attention'; there are linear_argmax, masked_linear"):
        resolve("attention", "auto", CPU)
    with pytest.raises(ValueError, match="impl must be auto, triton, native, reference; got 'cuda'"):
        resolve("linear_argmax", "cuda", CPU)
    with pytest.raises(ValueError, match="has no implementation 'cuda'; it has reference, native"):
        torch.ops.bevt_kernels.linear_argmax(torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), "cuda")


def test_cuda_argmax_is_not_native() -> None:
    assert resolve("linear_argmax", "auto", Spec("cuda", torch.float32)) == "reference"
    with pytest.raises(NoImplementation, match=r"native: .*serves the CPU, not cuda"):
        resolve("linear_argmax", "native", Spec("cuda", torch.float32))


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
    assert resolve("linear_argmax", "auto", CPU) == "reference"
    with pytest.raises(NoImplementation) as error:
        resolve("linear_argmax", "native", CPU)
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
