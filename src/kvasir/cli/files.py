"""The trace that a command reads, and files that it writes: checked before the work, written after it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import BinaryIO

from kvasir.core.errors import ConfigError, TraceError
from kvasir.workload.source import is_synthetic, synthesise
from kvasir.workload.trace import Trace


def trace_from(source: str, read: Callable[[BinaryIO], Trace]) -> Trace:
    """A trace file as `read` understands it, or a synthetic trace by name. Raises TraceError or ConfigError."""
    if is_synthetic(source):
        return synthesise(source)
    try:
        with open(source, "rb") as lines:
            return read(lines)
    except OSError as error:
        raise TraceError(
            f"cannot read trace {source}: {error.strerror}; a file, or for example synthetic:conversation"
        ) from None


def check_writable(*paths: Path | None, reads: Iterable[str | None] = ()) -> None:
    """Raises ConfigError if one of `paths` could not be written, comes twice, or is a file that the command `reads`."""
    taken = {Path(name).resolve() for name in reads if name is not None}
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise ConfigError(f"cannot write {path}: it is a directory; name a file in it")
        if path.exists():
            _check_permission(path, path)
        else:
            check_folder(path.absolute().parent, path)
        if path.resolve() in taken:
            raise ConfigError(f"cannot write {path}: the command reads or writes it already; name another file")
        taken.add(path.resolve())


def check_folder(folder: Path, path: Path | None = None) -> None:
    """Raises ConfigError if no file, `path` for one, could be written in `folder`."""
    if not folder.is_dir():
        raise ConfigError(f"cannot write {path or folder}: no such directory")
    _check_permission(folder, path or folder)


def write(path: Path, pieces: Iterable[bytes]) -> None:
    """Raises ConfigError."""
    try:
        with path.open("wb") as file:
            file.writelines(pieces)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _check_permission(place: Path, path: Path) -> None:
    if not os.access(place, os.W_OK):
        raise ConfigError(f"cannot write {path}: permission denied")
