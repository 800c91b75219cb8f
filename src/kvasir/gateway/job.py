"""From a request's fields to what the cluster is asked for: prompts, limits, sampling. All refusals happen here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import uuid4

from msgspec.structs import replace

from kvasir.cluster.service import Submission
from kvasir.core.errors import RequestError
from kvasir.core.request import Sampling
from kvasir.gateway.auth import Caller
from kvasir.gateway.fields import MAX_STOPS, ChatRequest, CompletionRequest, GenerationFields

_COMPLETION_MAX_TOKENS = 16
"""OpenAI's default for /v1/completions. A chat answer may by default fill the context."""

_SEED_RANGE = 2**63


@dataclass(frozen=True, slots=True)
class Job:
    """One HTTP request, understood: choice i belongs to prompt i // n."""

    id: str
    created: int
    model: str
    n: int
    prompts: tuple[list[int], ...]
    max_tokens: tuple[int, ...]
    sampling: Sampling
    stops: tuple[str, ...]
    stop_tokens: tuple[int, ...]
    ignore_eos: bool
    salt: str
    tenant: str
    priority: int
    stream: bool
    include_usage: bool

    @property
    def num_prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)

    def submission(self, index: int) -> Submission:
        """What the cluster is asked for choice `index`."""
        seed = self.sampling.seed
        shifted = None if seed is None else (seed + index % self.n) % _SEED_RANGE
        return Submission(
            request_id=f"{self.id}-{index}",
            prompt=self.prompts[index // self.n],
            max_tokens=self.max_tokens[index // self.n],
            sampling=self.sampling if shifted == seed else replace(self.sampling, seed=shifted),
            ignore_eos=self.ignore_eos,
            stop_tokens=self.stop_tokens,
            salt=self.salt,
            tenant=self.tenant,
            priority=self.priority,
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """What this server allows; the tokens come from the model, the rest from GatewayConfig."""

    vocab: int
    max_model_len: int
    max_choices: int
    max_logprobs: int


def build_job(
    fields: CompletionRequest | ChatRequest,
    prompts: Sequence[list[int]],
    *,
    caller: Caller,
    limits: Limits,
    model: str,
    created: int,
) -> Job:
    """Check everything and say what is to be done. Raises RequestError."""
    n = fields.n or 1
    if fields.min_tokens and not fields.ignore_eos:
        raise RequestError(
            "min_tokens is supported only together with ignore_eos", code="unsupported_parameter", param="min_tokens"
        )
    if n * len(prompts) > limits.max_choices:
        raise RequestError(
            f"n times the number of prompts is {n * len(prompts)}; at most {limits.max_choices} choices", param="n"
        )
    prefix = "chatcmpl" if isinstance(fields, ChatRequest) else "cmpl"
    return Job(
        id=f"{prefix}-{uuid4().hex}",
        created=created,
        model=model,
        n=n,
        prompts=tuple(_checked_prompt(prompt, limits) for prompt in prompts),
        max_tokens=tuple(_max_tokens(fields, len(prompt), limits) for prompt in prompts),
        sampling=_sampling(fields, limits),
        stops=_checked_stops(fields.stops),
        stop_tokens=tuple(checked_tokens(fields.stop_token_ids or [], limits, "stop_token_ids")),
        ignore_eos=fields.ignore_eos,
        salt=caller.salt(fields.cache_salt),
        tenant=caller.tenant,
        priority=fields.priority,
        stream=fields.stream,
        include_usage=fields.includes_usage,
    )


def _checked_prompt(prompt: list[int], limits: Limits) -> list[int]:
    if not prompt:
        raise RequestError("the prompt is empty; give at least one token", code="empty_prompt", param="prompt")
    if len(prompt) >= limits.max_model_len:
        message = (
            f"the prompt has {len(prompt)} tokens; this model's context is {limits.max_model_len}, prompt and answer together"
        )
        raise RequestError(message, code="context_length_exceeded", param="prompt")
    return checked_tokens(prompt, limits, "prompt")


def checked_tokens(tokens: list[int], limits: Limits, param: str) -> list[int]:
    """`tokens`, all of them in the vocabulary. Raises RequestError."""
    if tokens and (min(tokens) < 0 or max(tokens) >= limits.vocab):
        raise RequestError(f"{param} holds a token id outside 0..{limits.vocab - 1}", param=param)
    return tokens


def _max_tokens(fields: GenerationFields, num_prompt: int, limits: Limits) -> int:
    room = limits.max_model_len - num_prompt
    asked, param = fields.max_tokens, "max_tokens"
    if isinstance(fields, ChatRequest) and fields.max_completion_tokens is not None:
        asked, param = fields.max_completion_tokens, "max_completion_tokens"
    if asked is None:
        return room if isinstance(fields, ChatRequest) else min(room, _COMPLETION_MAX_TOKENS)
    if asked > room:
        message = f"{num_prompt} prompt tokens and {param} {asked} exceed this model's context of {limits.max_model_len} tokens"
        raise RequestError(message, code="context_length_exceeded", param=param)
    return asked


def _sampling(fields: CompletionRequest | ChatRequest, limits: Limits) -> Sampling:
    return Sampling(
        temperature=1.0 if fields.temperature is None else fields.temperature,
        top_p=1.0 if fields.top_p is None else fields.top_p,
        top_k=max(fields.top_k or 0, 0),
        seed=None if fields.seed is None else fields.seed % _SEED_RANGE,
        logprobs=_logprobs(fields, limits),
    )


def _logprobs(fields: CompletionRequest | ChatRequest, limits: Limits) -> int | None:
    if isinstance(fields, CompletionRequest):
        asked, param = fields.logprobs, "logprobs"
    else:
        if fields.top_logprobs and not fields.logprobs:
            raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
        asked, param = (fields.top_logprobs or 0) if fields.logprobs else None, "top_logprobs"
    if asked is not None and asked > limits.max_logprobs:
        raise RequestError(f"{param} is {asked}; at most {limits.max_logprobs}", param=param)
    return asked


def _checked_stops(stops: list[str]) -> tuple[str, ...]:
    if len(stops) > MAX_STOPS:
        raise RequestError(f"stop has {len(stops)} strings; at most {MAX_STOPS}", param="stop")
    return tuple(stops)
