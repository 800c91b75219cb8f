"""The command `python -m kvasir.native.build`: build the machine code now; nothing else ever does."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvasir.native.load import SOURCES, built_folder

MODULES = {
    "core": "batcher_commands",
    "costs": "calibration quick",
    "pool": "cost_aware directory eviction ghosts leases match node reuse runs slots ssd story",
    "scheduling": "admission batcher book chunking columns conductor contenders decode_choice decode_set few fleet instance"
    " many placed placer plan queues ranks replication roles sequence step_former",
    "scheduling/policies": "best choice dynamo kvasir mooncake",
    "store/messenger": "fair_queue spans tcp_channel tcp_path tcp_server tcp_transfer tcp_wire",
    "simulator": "agenda cores decoding gaps hot hub instance jobs listener memory network node noise prompts record_book"
    " simulation",
}
"""What runs for every request. It must not define Structs, which mypyc does not know, nor what goes to other processes."""

PROGRAM = """
import os, sys
from concurrent.futures import ThreadPoolExecutor
from mypyc.build import mypycify
from setuptools import setup
from distutils.ccompiler import CCompiler  # that of setuptools, which comes first

def compile(self, sources, output_dir=None, macros=None, include_dirs=None, debug=False,
            extra_preargs=None, extra_postargs=None, depends=None):
    macros, objects, after, options, todo = self._setup_compile(
        output_dir, macros, include_dirs, sources, depends, extra_postargs)
    before = self._get_cc_args(options, debug, extra_preargs)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda made: self._compile(made, *todo[made], before, after, options), objects))
    return objects

CCompiler.compile = compile  # a file on each core, where setuptools would compile one after the other
target, *files = sys.argv[1:]
extensions = mypycify(
    ["--ignore-missing-imports", *files],
    opt_level="2",
    debug_level="0",
    target_dir=target,
    group_name="kvasir_rooms",
    multi_file=True,
)
for extension in extensions:
    extension.extra_compile_args += ["-fvisibility=hidden", "-fno-plt"]  # calls of each other and of Python are direct
arguments = ["-q", "build_ext", "--parallel", str(os.cpu_count()), "--build-lib", f"{target}/lib", "--build-temp", target]
setup(ext_modules=extensions, packages=[], script_args=arguments)
"""

DEADLINE_S = 900.0  # takes 70 s on two cores


class NativeUnavailableError(RuntimeError):
    """There can be no machine code here; the message says why in one line."""


def build() -> Path:
    """The folder of what was built, by this call or an earlier one. Raises NativeUnavailableError."""
    folder = built_folder()
    if folder.exists():
        return folder
    files = [f"kvasir/{room}/{name}.py" for room, names in MODULES.items() for name in names.split()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as target:
            command = [sys.executable, "-c", PROGRAM, target, *files]
            done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
            if done.returncode:
                lines = (done.stdout + done.stderr).strip().splitlines()
                raise NativeUnavailableError(next((line for line in lines if "error" in line.lower()), "mypyc failed"))
            if built_folder() != folder:
                raise NativeUnavailableError("the sources changed meanwhile; build again")
            (Path(target) / "lib").rename(folder)
    except subprocess.TimeoutExpired as error:
        raise NativeUnavailableError(f"mypyc took longer than {DEADLINE_S:.0f} s") from error
    except OSError as error:
        raise NativeUnavailableError(f"cannot write {folder}: {error}") from error
    return folder


def main() -> int:
    """Build and say where in one line, or why not: all is as good in Python, only slower."""
    start = time.perf_counter()
    try:
        folder = build()
    except NativeUnavailableError as error:
        print(f"no machine code, all stays Python: {error}")
        return 1
    print(f"machine code at {folder} ({time.perf_counter() - start:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
