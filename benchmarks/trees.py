"""Another commit's tree beside the working one, with a native library of its own sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIBRARY = "kernels/bevt_kernels/_native.so"
SOURCES = ("kernels/csrc", "CMakeLists.txt", "setup.py")
"""What the native library is built of."""


class Unusable(Exception):
    """There is no such commit, or no tree or library of it; the message is for the user."""


def git(*words: str) -> subprocess.CompletedProcess[str]:
    """`git WORDS` in this repository, whatever its exit status."""
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)


def commit(rev: str) -> str:
    """The full hash of a revision. Raises Unusable where there is none."""
    try:
        done = git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{rev}^{{commit}}")
    except OSError as error:
        raise Unusable(f"the base is a commit, and git does not run: {error}") from error
    if done.returncode:
        if git("rev-parse", "--git-dir").returncode:
            raise Unusable(f"the base is a commit, and there is no git history here: {done.stderr.strip() or rev!r}")
        raise Unusable(f"{rev!r} is no commit of this repository (a shallow clone has few: git fetch --unshallow)")
    return done.stdout.splitlines()[-1]


def give_library(tree: Path, of: str) -> None:
    """Put the library of commit `of`'s sources into its checkout `tree`: the working tree's where they are the same.

    Raises Unusable where it does not build.
    """
    if (ROOT / LIBRARY).exists() and git("diff", "--quiet", of, "--", *SOURCES).returncode == 0:
        shutil.copy(ROOT / LIBRARY, tree / LIBRARY)
        return
    print(f"building the native library of {of[:10]}", flush=True)
    # ON: else a library that does not build is passed over.
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=tree,
        env={**os.environ, "BEVT_NATIVE": "ON"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode or not (tree / LIBRARY).exists():
        raise Unusable(f"the native library of {of[:10]} does not build:\n{done.stdout[-3000:]}")


def checkout(of: str, native: bool) -> Path:
    """The tree of commit `of` under build/bases, with its library where `native`; made once for each torch.

    Raises Unusable where that fails.
    """
    kept = ROOT / "build" / "bases" / f"{of}-torch-{torch.__version__}{'' if native else '-no-native'}"
    if kept.exists():
        return kept
    part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    packed = part.with_suffix(".zip")  # not a worktree: git would know of that after `make clean`
    try:
        done = git("archive", "--format=zip", f"--output={packed}", of)
        if done.returncode:
            raise Unusable(f"{of[:10]} cannot be checked out: {done.stderr.strip()}")
        shutil.unpack_archive(packed, part)
        if native:
            give_library(part, of)
            shutil.rmtree(part / "build", ignore_errors=True)  # object files
        try:
            part.rename(kept)
        except OSError:  # another process has just made it
            if not kept.is_dir():
                raise
    finally:
        packed.unlink(missing_ok=True)
        shutil.rmtree(part, ignore_errors=True)
    return kept


def stale() -> str:
    """What is wrong with the age of the working tree's library, with what to do; empty where nothing is."""
    rebuild = "build it: BEVT_NATIVE=ON pip install --no-build-isolation -e ."
    if not (ROOT / LIBRARY).exists():
        return f"the working tree has no {LIBRARY}; {rebuild}"
    files = [path for source in SOURCES for path in [ROOT / source, *(ROOT / source).rglob("*")] if path.is_file()]
    newest = max(files, key=lambda path: path.stat().st_mtime)
    if newest.stat().st_mtime > (ROOT / LIBRARY).stat().st_mtime:
        return f"{LIBRARY} is older than {newest.relative_to(ROOT)}, and may not be its build; {rebuild}"
    return ""
