"""Finding the machine code that belongs to these sources, and having it imported in their stead."""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

SOURCES = Path(__file__).parents[2]

ROOMS = ("core", "costs", "native", "pool", "report", "scheduling", "simulator", "store", "workload")
"""What machine code depends on: how it is built, what is compiled, and all that this imports."""

SUFFIX = str(sysconfig.get_config_var("EXT_SUFFIX"))


def use() -> None:
    """From now on import what was built, if that belongs to these sources and none of them was imported yet."""
    folder = built_folder()
    paths = {str(path.relative_to(folder)).removesuffix(SUFFIX).replace("/", "."): path for path in folder.rglob(f"*{SUFFIX}")}
    if sys.modules.keys().isdisjoint(paths):
        sys.meta_path.insert(0, _Finder(paths))


def built_folder() -> Path:
    """Where the machine code of these sources is or belongs: by whatever it depends on, the interpreter included."""
    digest = hashlib.sha256(f"{SUFFIX} {sys.version}".encode())
    for path in sorted(path for room in ROOMS for path in (SOURCES / "kvasir" / room).rglob("*.py")):
        digest.update(str(path.relative_to(SOURCES)).encode() + b"\0" + path.read_bytes())
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "kvasir" / "native" / digest.hexdigest()[:24]


class _Finder(MetaPathFinder):
    def __init__(self, paths: Mapping[str, Path]):
        self._paths = paths

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self._paths[name]) if name in self._paths else None
