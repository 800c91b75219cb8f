"""Command-line options made from a config Struct, so that a setting is declared once."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any

import msgspec
import typer
from msgspec import Struct


def options_of(config: type[Struct], *, but: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """One `--option` for each field, with its description as help; an option that was not given is None."""
    hints = typing.get_type_hints(config, include_extras=True)
    fields = [field for field in msgspec.structs.fields(config) if field.name not in but]
    return [_option(field, hints[field.name]) for field in fields]


def with_options(parameters: list[inspect.Parameter]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a `command(..., **flags)` these options as its own parameters, after the ones that it names."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        command.__signature__ = signature.replace(parameters=[*own, *parameters])  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in [*own, *parameters]}
        return command

    return decorate


def _option(field: msgspec.structs.FieldInfo, hint: Any) -> inspect.Parameter:
    kind, meta = typing.get_args(hint)[:2]
    default = None if field.default is msgspec.NODEFAULT else field.default
    shown = "" if default in (None, [], False) else f" [default: {default}]"
    option = typer.Option(f"--{field.name.replace('_', '-')}", help=f"{meta.description}{shown}", show_default=False)
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[_optional(kind), option]
    )


def _optional(kind: Any) -> Any:
    """The type that the parser should see; a closed choice is checked with the rest of the config, in our words."""
    if typing.get_origin(kind) is typing.Literal:
        kind = str
    return kind if isinstance(kind, types.UnionType) and type(None) in kind.__args__ else kind | None
