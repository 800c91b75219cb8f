"""The fields of OpenAI requests: declared once, for validation and for /docs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, StrictInt, model_validator

from kvasir.core.errors import RequestError

MAX_STOPS = 16
MAX_PROMPTS = 128
MAX_STOP_CHARS = 1024
MAX_TEMPERATURE = 2.0
"""OpenAI's bound."""
_INT64 = 2**63

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Count = Annotated[int, Field(ge=1, le=2**31)]

T = TypeVar("T")
Many = Annotated[list[T], Field(fail_fast=True)]
"""A list whose first fault ends its validation: millions of faults would otherwise hold up the event loop for a minute."""
Few = Annotated[list[T], Field(fail_fast=True, max_length=MAX_PROMPTS)]
TokenIds = Many[StrictInt]


class Fields(BaseModel):
    """Unknown fields are ignored, as OpenAI-compatible servers do; known ones that we cannot honour are refused."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, protected_namespaces=(), use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_left_out(cls, given: object) -> object:
        """Clients send null for what their users did not set."""
        if not isinstance(given, dict):
            return given
        return {name: value for name, value in given.items() if value is not None or name not in cls.model_fields}


class StreamOptions(Fields):
    include_usage: bool = False
    """Send a last chunk with `usage` and no choices."""


class GenerationFields(Fields):
    """What completions and chat completions have in common."""

    model: str | None = None
    """The served model when left out."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Count | None = None
    """Choices per prompt. With a `seed`, choice i is drawn with seed + i."""
    max_tokens: Count | None = None
    temperature: float | None = Field(None, ge=0, le=MAX_TEMPERATURE)
    """0 is greedy; 1 when left out."""
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    """Draw from the k most likely tokens; 0 (or -1, as elsewhere) is off."""
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Stop | Many[Stop] | None = None
    """Up to 16 strings; the answer ends before the first of them."""
    stop_token_ids: TokenIds | None = Field(None, max_length=1024)
    min_tokens: int | None = Field(None, ge=0)
    """Only together with `ignore_eos`, where it says nothing new; load generators send it."""
    ignore_eos: bool = False
    """Go on after an end-of-sequence token, to `max_tokens`."""
    user: str | None = None
    cache_salt: str | None = Field(None, max_length=1024)
    """Only requests with the same salt (and API key) can share KVCache."""
    priority: int = Field(0, ge=-1000, le=1000)

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationFields):
    prompt: str | TokenIds | Few[str] | Few[TokenIds]
    """Text, token ids, or a list of either: one answer (or `n`) for each."""
    logprobs: int | None = Field(None, ge=0)
    """Report the logprob of each token and of this many of the most likely ones."""
    echo: bool = False
    add_special_tokens: bool = True


class ChatMessage(Fields):
    role: str
    content: str | Many[dict[str, JsonValue]] | None = None


class ChatRequest(GenerationFields):
    messages: Many[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Extra variables for the chat template, such as `enable_thinking`."""


class TokenizeRequest(Fields):
    model: str | None = None
    prompt: str | None = None
    messages: Many[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    """True for a prompt, false for messages when left out: a chat template writes its own."""
    add_generation_prompt: bool = True
    return_token_strs: bool = False
    chat_template_kwargs: dict[str, JsonValue] | None = None


class DetokenizeRequest(Fields):
    model: str | None = None
    tokens: TokenIds


_NEUTRAL: dict[str, tuple[JsonValue, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "use_beam_search": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": ({},),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "bad_words": ([],),
    "logits_processors": ([],),
    "prompt_logprobs": (),
    "prompt_embeds": (),
    "truncate_prompt_tokens": (),
    "include_stop_str_in_output": (False,),
    "skip_special_tokens": (True,),
    "continue_final_message": (False,),
    "chat_template": (),
    "documents": ([],),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
}
"""Fields that change the answer and that we do not support, with the values at which they change nothing."""


def refuse_unsupported(fields: Fields) -> None:
    """RequestError for a field that would be ignored although it changes the answer."""
    extra: Mapping[str, JsonValue] = fields.model_extra or {}
    for name, value in extra.items():
        if value is not None and name in _NEUTRAL and value not in _NEUTRAL[name]:
            raise RequestError(f"{name} is not supported; leave it out", code="unsupported_parameter", param=name)
