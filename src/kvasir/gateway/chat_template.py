"""Chat templates: from messages to the text that a model was trained to read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvasir.core.errors import ModelError, RequestError

Message = Mapping[str, object]

_SPECIAL_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A compiled template with the tokenizer's special tokens, rendered in a sandbox."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    @staticmethod
    def require(template: ChatTemplate | None) -> ChatTemplate:
        """The template, or the RequestError that says that the model has none."""
        if template is None:
            message = "this model has no chat template; send text to /v1/completions, or serve a chat model"
            raise RequestError(message, code="no_chat_template", param="messages")
        return template

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, options: Mapping[str, object] | None) -> str:
        """`options` are extra variables, such as `enable_thinking`. Raises RequestError when the template objects."""
        variables = {**self._special_tokens, "tools": None, "documents": None, **(options or {})}
        variables |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(variables)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            what = str(error) if _is_harmless(error, messages) else type(error).__name__
            raise RequestError(f"the model's chat template refuses these messages: {what}", param="messages") from None


def _is_harmless(error: Exception, messages: Sequence[Message]) -> bool:
    """True for what a template says on purpose without quoting a message: an error must not carry a prompt."""
    contents = [str(content) for message in messages if (content := message.get("content"))]
    return isinstance(error, _TemplateObjected) and not any(content in str(error) for content in contents)


def load_chat_template(config: Mapping[str, object], override: str | None) -> ChatTemplate | None:
    """The template of tokenizer_config.json (a string, or a list with one named `default`), or `override`."""
    source = override if override is not None else _from_config(config.get("chat_template"))
    if source is None:
        return None
    return ChatTemplate(source, {name: text for name in _SPECIAL_TOKENS if (text := _token_text(config.get(name)))})


def _from_config(entry: object) -> str | None:
    if isinstance(entry, str):
        return entry
    if isinstance(entry, list):
        named = {
            item["name"]: item["template"] for item in entry if isinstance(item, dict) and {"name", "template"} <= item.keys()
        }
        return named.get("default")
    return None


def _token_text(token: object) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


class _TemplateObjected(jinja2.TemplateError):
    """A template called `raise_exception`."""


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's part for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """What templates on the Hugging Face hub expect to find."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().astimezone().strftime(form)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise _TemplateObjected(message)


def _to_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)
