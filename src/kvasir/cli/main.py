"""`kvasir`: the one command. Errors of ours are one line on stderr and exit status 2."""

from __future__ import annotations

import sys

import typer

from kvasir.cli.demo import demo
from kvasir.cli.profile import profile
from kvasir.cli.replay import replay
from kvasir.cli.serve import serve
from kvasir.core.errors import KvasirError, root_cause

app = typer.Typer(
    help="KVCache-centric, disaggregated LLM serving: prefill and decode pools, one KVCache pool, one scheduler.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(serve)
app.command()(replay)
app.command()(profile)
app.command()(demo)


@app.callback()
def _kvasir() -> None:
    """The group; its commands do the work."""


def main() -> None:
    """Entry point of the `kvasir` script."""
    try:
        app()
    except (KvasirError, BaseExceptionGroup) as error:
        cause = root_cause(error)
        if not isinstance(cause, KvasirError):
            raise
        print(f"kvasir: {cause}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
