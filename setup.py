"""Packages and the native library; everything else is in pyproject.toml.

The environment variable BEVT_NATIVE decides about the library (C++ torch ops, built by CMake):
AUTO (default) builds it where torch can be imported, and says so or why not; ON fails where it cannot; OFF skips it.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent


def say(message: str) -> None:
    print(f"bevt_kernels: {message}", flush=True)


def native_extensions() -> list[Extension]:
    """The native library as setuptools' one extension, or nothing, by BEVT_NATIVE."""
    mode = os.environ.get("BEVT_NATIVE", "AUTO").upper()
    if mode not in ("AUTO", "ON", "OFF"):
        raise SystemExit(f"BEVT_NATIVE must be AUTO, ON or OFF, got {mode!r}")
    if mode == "OFF":
        say("native library skipped: BEVT_NATIVE=OFF")
        return []
    if importlib.util.find_spec("torch") is None:
        why = (
            "torch cannot be imported in this build; install it first and build with `pip install --no-build-isolation`"
        )
        if mode == "ON":
            raise SystemExit(f"BEVT_NATIVE=ON, but {why}")
        say(f"native library skipped: {why}")
        return []
    # `optional`: setuptools reports a CompileError of this one and carries on.
    return [Extension("bevt_kernels._native", sources=[], optional=mode == "AUTO")]


class CMakeBuild(build_ext):
    """Builds the extension with CMake. The file is no Python module, hence its name without an ABI tag."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        # A library of an earlier build must not outlive one that fails.
        source_copy = ROOT / "kernels" / self.get_ext_filename(ext.name)
        if self.editable_mode or self.inplace:
            source_copy.unlink(missing_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        import torch

        build = Path(self.build_temp).resolve() / "native"
        say(f"building the native library for torch {torch.__version__}")
        search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake, ninja = shutil.which("cmake", path=search), shutil.which("ninja", path=search)
        if cmake is None:
            raise CompileError(
                "bevt_kernels: no cmake: `pip install cmake ninja`, or take the system's (3.25 or newer)"
            )
        generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
        torch_root = Path(torch.__file__).parent
        configure = [f"-DTORCH_ROOT={torch_root}", f"-DTORCH_VERSION={torch.__version__}", "-DCMAKE_BUILD_TYPE=Release"]
        try:
            # --fresh: an isolated build leaves a cache that names tools of an environment that is gone.
            subprocess.run([cmake, "--fresh", "-S", str(ROOT), "-B", str(build), *generator, *configure], check=True)
            subprocess.run([cmake, "--build", str(build)], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            raise CompileError(f"bevt_kernels: the native library did not build (output above): {error}") from error
        shutil.copyfile(build / "_native.so", target)


setup(
    packages=find_packages(include=["bevt", "bevt.*"]) + find_packages("kernels"),
    package_dir={"bevt": "bevt", "bevt_kernels": "kernels/bevt_kernels"},
    package_data={"bevt_kernels": ["*/README.md", "*/configs.json"]},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": CMakeBuild},
)
