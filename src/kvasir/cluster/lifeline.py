"""What makes child processes die with their parent, and how both start.

The parent holds the write end of a pipe, each child the read end. When the parent ends, however it ends, the kernel closes
the pipe; the child's watcher thread sees it even while the event loop is busy, asks for a clean stop, and ends the process
when the stop takes longer than its grace. (PR_SET_PDEATHSIG would add nothing but a race: its signal comes a moment after the
pipe's end and kills a child that is cleaning up; it also takes the death of the forking thread for the parent's.)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import select
import shutil
import signal
import stat
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import TypeVar

import msgspec
import uvloop

from kvasir.core.errors import ConfigError

GRACE_S = 1.0
"""How long a child may take to stop cleanly once its parent is gone."""

ConfigT = TypeVar("ConfigT")


class Lifeline:
    """The parent's side. Keep it as long as the children should live; `close` ends them all."""

    def __init__(self) -> None:
        self.read_fd, self._write_fd = os.pipe()

    def close(self) -> None:
        for fd in (self.read_fd, self._write_fd):
            if fd >= 0:
                os.close(fd)
        self.read_fd = self._write_fd = -1


async def start_process(
    module: str, config: msgspec.Struct, *, lifeline: Lifeline, env: Mapping[str, str] | None = None
) -> asyncio.subprocess.Process:
    """Start `module` as a child that reads its config from stdin; `env` is added to this process's own.

    It gets a process group of its own, so that Ctrl-C reaches the parent alone, which then stops its children in order.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "kvasir.native.run",
        module,
        "--lifeline",
        str(lifeline.read_fd),
        stdin=asyncio.subprocess.PIPE,
        pass_fds=(lifeline.read_fd,),
        env={**os.environ, **(env or {})},
        process_group=0,
    )
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(config))
    process.stdin.close()
    return process


def child_config(config_type: type[ConfigT], argv: list[str] | None = None) -> tuple[ConfigT, int | None]:
    """A child's config, from `--config FILE` or stdin, and its lifeline. Raises ConfigError; unknown keys are errors."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, help="JSON file; without it, JSON on stdin")
    parser.add_argument("--lifeline", type=int, help="file descriptor of a pipe that the parent holds")
    arguments = parser.parse_args(argv)
    raw = arguments.config.read_bytes() if arguments.config else sys.stdin.buffer.read()
    try:
        return msgspec.json.decode(raw, type=config_type), arguments.lifeline
    except msgspec.DecodeError as error:
        raise ConfigError(f"not a {config_type.__name__}: {error}") from error


def run_child(
    main: Callable[[], Coroutine[None, None, None]],
    lifeline_fd: int | None,
    *,
    grace_s: float = GRACE_S,
    when_orphaned: Callable[[], None] = lambda: None,
) -> None:
    """Run `main` to its end, or cancel it on SIGTERM or when the parent is gone; then the process has `grace_s` to end.

    `when_orphaned` is called last, from either thread, if the parent is gone.
    """
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_until_stopped(main, lifeline_fd, lambda: _end(grace_s, when_orphaned)))
    finally:
        if lifeline_fd is not None and _is_closed(lifeline_fd):
            when_orphaned()


async def _until_stopped(
    main: Callable[[], Coroutine[None, None, None]], lifeline_fd: int | None, end: Callable[[], None]
) -> None:
    loop = asyncio.get_running_loop()
    task = asyncio.ensure_future(main())
    loop.add_signal_handler(signal.SIGTERM, task.cancel)

    def watch(fd: int) -> None:
        os.read(fd, 1)  # nobody ever writes: it returns when the last write end is closed
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is on its way out
            loop.call_soon_threadsafe(task.cancel)
        end()

    if lifeline_fd is not None:
        threading.Thread(target=watch, args=(lifeline_fd,), name="lifeline", daemon=True).start()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _end(grace_s: float, when_orphaned: Callable[[], None]) -> None:
    time.sleep(grace_s)
    when_orphaned()
    os._exit(1)


def _is_closed(lifeline_fd: int) -> bool:
    poll = select.poll()
    poll.register(lifeline_fd, 0)
    return bool(poll.poll(0))  # a hang-up is reported without being asked for


def remove_runtime_directory(directory: Path) -> None:
    """Remove the sockets of a cluster whose parent is gone. Touches only what `make_runtime_directory` made."""
    if not directory.is_dir() or not directory.name.startswith("kvasir-"):
        return
    found = directory.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and stat.S_IMODE(found.st_mode) == 0o700:
        shutil.rmtree(directory, ignore_errors=True)
