"""`kvasir`: the one command. Errors of ours are one line on stderr and exit status 2."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version
from typing import Annotated

import typer

from kvasir.core.errors import KvasirError, root_cause


def make_app() -> typer.Typer:
    """All commands. Their imports take most of a second, so they are made where an interrupt is caught."""
    from kvasir.cli.bench import bench
    from kvasir.cli.demo import demo
    from kvasir.cli.plan import plan
    from kvasir.cli.profile import profile
    from kvasir.cli.replay import replay
    from kvasir.cli.serve import serve
    from kvasir.cli.simulate import simulate
    from kvasir.cli.top import top

    app = typer.Typer(
        help="KVCache-centric, disaggregated LLM serving: prefill and decode pools, one KVCache pool, one scheduler.",
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode="markdown",
        pretty_exceptions_enable=False,
    )
    for command in (serve, top, replay, simulate, plan, profile, demo):
        app.command()(command)
    app.add_typer(bench, name="bench")
    app.callback()(_kvasir)
    return app


def main() -> None:
    """Entry point of the `kvasir` script."""
    try:
        make_app()()
    except (KvasirError, BaseExceptionGroup) as error:
        cause = root_cause(error)
        if not isinstance(cause, KvasirError):
            raise
        print(f"kvasir: {cause}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains as it flushes
        sys.exit(1)
    except OSError as error:
        print(f"kvasir: cannot write: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"kvasir {version('kvasir-serve')}")
        raise typer.Exit


def _kvasir(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The group; its commands do the work."""


if __name__ == "__main__":
    main()
