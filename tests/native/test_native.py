"""The simulator as machine code: used only while it belongs to the sources, and with the same results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import kvasir.native
from kvasir.native.load import built_folder

pytest.importorskip("mypyc")

WHERE = "import kvasir.cli, kvasir.pool.tiny as tiny; print(tiny.__file__, tiny.answer())"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project of one module that is compiled, with our builder and a cache of its own."""
    native = Path(kvasir.native.__file__).parent
    shutil.copytree(native, tmp_path / "kvasir/native", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "kvasir/cli").mkdir()
    shutil.copy(native.parent / "cli/__init__.py", tmp_path / "kvasir/cli")
    build = tmp_path / "kvasir/native/build.py"
    head, tail = build.read_text().split("MODULES = {", 1)
    build.write_text(f'{head}MODULES = {{"pool": "tiny"}}\n{tail.split("}", 1)[1]}')
    (tmp_path / "kvasir/pool").mkdir()
    (tmp_path / "kvasir/__init__.py").touch()
    (tmp_path / "kvasir/pool/__init__.py").touch()
    (tmp_path / "kvasir/pool/tiny.py").write_text("def answer() -> int:\n    return 42\n")
    return tmp_path


def python(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = {"PYTHONPATH": str(tree), "XDG_CACHE_HOME": str(tree / "cache")}
    environment = os.environ | paths | environment
    return subprocess.run([sys.executable, *arguments], cwd=tree, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler")
def test_what_was_built_is_used_until_a_source_changes(tree: Path) -> None:
    source = tree / "kvasir/pool/tiny.py"
    assert python(tree, "-c", WHERE).stdout == f"{source} 42\n"
    built = python(tree, "-m", "kvasir.native.build")
    assert built.returncode == 0, built.stdout + built.stderr
    path, answer = python(tree, "-c", WHERE).stdout.split()
    assert (Path(path).is_relative_to(tree / "cache"), Path(path).suffix, answer) == (True, ".so", "42")
    imported_before = python(tree, "-c", f"import kvasir.pool.tiny; {WHERE}")
    assert imported_before.stdout == f"{source} 42\n"
    source.write_text("def answer() -> int:\n    return 43\n")
    assert python(tree, "-c", WHERE).stdout == f"{source} 43\n"


def test_a_module_is_run_with_its_arguments_on_machine_code(tree: Path) -> None:
    main = "import sys; from kvasir.pool import tiny; print(__name__, sys.argv[1:], tiny.answer(), tiny.__file__)"
    (tree / "kvasir/main.py").write_text(main)
    has_compiler = shutil.which("gcc") is not None
    if has_compiler:
        assert python(tree, "-m", "kvasir.native.build").returncode == 0
    ran = python(tree, "-m", "kvasir.native.run", "kvasir.main", "--some", "thing")
    assert ran.stdout.startswith("__main__ ['--some', 'thing'] 42 "), ran.stderr
    assert (str(tree / "cache") in ran.stdout) is has_compiler


def test_without_a_compiler_the_simulator_stays_python(tree: Path) -> None:
    built = python(tree, "-m", "kvasir.native.build", CC="/nowhere/cc")
    assert built.returncode == 1
    assert built.stdout.startswith("no machine code, all stays Python: ")
    assert built.stdout.count("\n") == 1
    assert python(tree, "-c", WHERE).stdout == f"{tree / 'kvasir/pool/tiny.py'} 42\n"


@pytest.mark.skipif(not built_folder().exists(), reason="not built: python -m kvasir.native.build")
@pytest.mark.parametrize("policy", ["kvasir", "mooncake", "colocated-chunked"])
def test_machine_code_and_sources_give_the_same_results(policy: str, tmp_path: Path) -> None:
    command = ["-m", "kvasir.cli.main", "simulate", "synthetic:conversation?requests=300", "--policy", policy, "--json"]
    runs = [
        subprocess.run([sys.executable, *command], env=env, capture_output=True, check=True)
        for env in (os.environ, os.environ | {"XDG_CACHE_HOME": str(tmp_path)})
    ]
    native, source = (json.loads(run.stdout) for run in runs)
    assert native | {"wall_s": 0} == source | {"wall_s": 0}


@pytest.mark.skipif(not built_folder().exists(), reason="not built: python -m kvasir.native.build")
def test_machine_code_reads_the_recordings_that_it_writes() -> None:
    program = """
import io
from kvasir.native.load import use
use()
from kvasir.core.request import Slo
from kvasir.costs.roofline import reference_cost
from kvasir.scheduling import placer
from kvasir.scheduling.conductor_config import ConductorConfig
from kvasir.scheduling.recording import ConductorSetup, line_of, read_recording
setup = ConductorSetup("kvasir", None, "static", 512, ConductorConfig(1024, mixed_step_s=0.05), reference_cost(), Slo(), 0)
print(placer.__file__, list(read_recording([line_of(setup)])) == [setup])
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith(".so True\n")
