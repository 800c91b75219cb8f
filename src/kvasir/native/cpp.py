"""Compile C++ sources of ours once per machine, into the user's cache: when they are first wanted, or now by

python -m kvasir.native.cpp PACKAGE ...
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import as_file, files
from pathlib import Path

COMPILERS = ("g++", "c++", "clang++")
FLAGS = ("-O3", "-march=native", "-pthread", "-shared", "-fPIC", "-std=c++17", "-fno-math-errno", "-fno-trapping-math")
COMPILE_DEADLINE_S = 120.0  # takes 5 s here; a small machine under load some times that
LOCK_DEADLINE_S = 150.0  # another process's whole compilation


class NotCompiledError(RuntimeError):
    """There can be no library on this machine; the message says why in one line. Whoever wants one has a slower way."""


def build(package: str) -> Path:
    """The shared library of the sources in `package`'s folder csrc, compiled if no earlier call has. Raises NotCompiledError.

    Safe when several processes call it at once: one compiles, the others wait for it.
    """
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise NotCompiledError(f"no C++ compiler on PATH (tried {', '.join(COMPILERS)})")
    with as_file(files(package) / "csrc") as folder:
        sources = sorted(folder.glob("*.cpp"))
        library = _cache_folder() / f"{_fingerprint(compiler, folder)}.so"
        if library.exists():
            return library
        try:
            library.parent.mkdir(parents=True, exist_ok=True)
            with _locked(library.with_suffix(".lock")):
                if not library.exists():
                    _compile(compiler, sources, library)
        except OSError as error:
            raise NotCompiledError(f"cannot write {library.parent}: {error}") from error
    return library


def _compile(compiler: str, sources: list[Path], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *FLAGS, *map(str, sources), "-o", str(made)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_DEADLINE_S, check=False)
        except subprocess.TimeoutExpired as error:
            raise NotCompiledError(f"{compiler} took longer than {COMPILE_DEADLINE_S:.0f} s") from error
        if done.returncode:
            complaint = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200].strip())
            raise NotCompiledError(f"{compiler} failed: {complaint}")
        made.rename(library)


def _cache_folder() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "kvasir" / "kernels"


def _fingerprint(compiler: str, folder: Path) -> str:
    """Whatever the machine code depends on: sources, flags, compiler, and the processor's instruction sets."""
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NotCompiledError(f"{compiler} --version failed: {error}") from error
    digest = hashlib.sha256(version)
    digest.update(repr((FLAGS, platform.machine(), _instruction_sets())).encode())
    for source in sorted(folder.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:24]


def _instruction_sets() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + LOCK_DEADLINE_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise NotCompiledError(f"waited {LOCK_DEADLINE_S:.0f} s for {path}") from None
                time.sleep(0.1)
        yield


def main(packages: list[str]) -> int:
    """Build and say where, a line each; exit status 1 where there can be none."""
    status = 0
    for package in packages:
        start = time.perf_counter()
        try:
            print(f"{package}: C++ compiled to {build(package)} ({time.perf_counter() - start:.1f} s)")
        except NotCompiledError as error:
            print(f"{package}: runs slower, without C++: {error}")
            status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
