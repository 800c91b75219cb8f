"""What the endpoints share: the cluster, the tokenizer, the limits, and how a request becomes a job."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial

from pydantic import JsonValue
from starlette.requests import Request

from kvasir.cluster.service import RequestFailed, Service
from kvasir.core.commands import Fail
from kvasir.core.errors import RequestError
from kvasir.gateway.answer import Answer
from kvasir.gateway.body import F, read_fields
from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.exchange import Exchange
from kvasir.gateway.fields import ChatMessage, ChatRequest, CompletionRequest
from kvasir.gateway.generation import Backend
from kvasir.gateway.job import Limits, build_job, checked_tokens
from kvasir.gateway.tokenization import Tokenization
from kvasir.gateway.tokenizer import Tokenizer
from kvasir.telemetry.metrics import Metrics


class Desk:
    """Takes requests in, hands answers out."""

    def __init__(self, service: Service, tokenizer: Tokenizer, config: GatewayConfig, metrics: Metrics):
        self.service = service
        self.tokenizer = tokenizer
        self.metrics = metrics
        self.model = config.served_model_name or service.spec.name
        self.started = int(time.time())
        self._config = config
        self._backend = Backend(service, tokenizer, metrics)
        self._tokenization = Tokenization(threads=config.tokenizer_threads, max_waiting=config.max_tokenizing)
        spec = service.spec
        self._limits = Limits(spec.shape.vocab, spec.max_model_len, config.max_choices, config.max_logprobs)

    async def read(self, request: Request, kind: type[F]) -> F:
        """The request's body. Raises RequestError."""
        return await read_fields(request, kind, max_bytes=self._config.max_body_bytes)

    async def complete(self, request: Request) -> Answer:
        fields = await self.read(request, CompletionRequest)
        self.check_model(fields.model)
        if fields.echo:
            raise RequestError("echo is not supported; prepend the prompt yourself", code="unsupported_parameter", param="echo")
        self._check_ready()
        return self._answer(request, fields, await self._prompts(fields))

    async def chat(self, request: Request) -> Answer:
        fields = await self.read(request, ChatRequest)
        self.check_model(fields.model)
        self._check_ready()
        prompt = await self.encode_chat(
            fields.messages, add_generation_prompt=fields.add_generation_prompt, options=fields.chat_template_kwargs
        )
        return self._answer(request, fields, [prompt])

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        work = partial(self.tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self._tokenization.run(work, num_chars=len(text))

    async def encode_chat(
        self,
        messages: Sequence[ChatMessage],
        *,
        add_generation_prompt: bool,
        options: dict[str, JsonValue] | None,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Token ids of a conversation. Raises RequestError."""
        plain = [_plain_message(message, at) for at, message in enumerate(messages)]

        def work() -> list[int]:
            text = self.tokenizer.render(plain, add_generation_prompt=add_generation_prompt, options=options)
            return self.tokenizer.encode(text, add_special_tokens=add_special_tokens)

        return await self._tokenization.run(work, num_chars=sum(len(str(message["content"])) for message in plain))

    def _answer(self, request: Request, fields: CompletionRequest | ChatRequest, prompts: list[list[int]]) -> Answer:
        exchange = Exchange.of(request)
        job = build_job(
            fields, prompts, caller=exchange.caller, limits=self._limits, model=self.model, created=int(time.time())
        )
        return Answer(job, self._backend, exchange, send_timeout_s=self._config.send_timeout_s)

    async def _prompts(self, fields: CompletionRequest) -> list[list[int]]:
        match fields.prompt:
            case str(text):
                return [await self.encode(text, add_special_tokens=fields.add_special_tokens)]
            case [int(), *_] | []:
                return [_tokens(fields.prompt)]
            case [str(), *_]:
                texts = [text for text in fields.prompt if isinstance(text, str)]
                return [await self.encode(text, add_special_tokens=fields.add_special_tokens) for text in texts]
            case _:
                return [_tokens(prompt) for prompt in fields.prompt]

    def check_model(self, model: str | None) -> None:
        """Raises RequestError 404 for a model that is not served; None is the one that is."""
        if model not in (None, self.model, self.service.spec.name):
            message = f"the model {str(model)[:100]!r} does not exist; this server has {self.model!r}"
            raise RequestError(message, status=404, code="model_not_found", param="model")

    def check_tokens(self, tokens: list[int], param: str) -> list[int]:
        """`tokens`, all of them in the vocabulary. Raises RequestError."""
        return checked_tokens(tokens, self._limits, param)

    def _check_ready(self) -> None:
        status = self.service.status()
        if not status.ready:
            raise RequestFailed(Fail(request_id="", code="not_ready", message=f"not ready: {status.reason}"))


def _tokens(prompt: object) -> list[int]:
    """Narrows what validation has established."""
    assert isinstance(prompt, list)
    return prompt


def _plain_message(message: ChatMessage, at: int) -> dict[str, object]:
    """A message as templates read it: `content` is one string; text parts are joined by newlines."""
    plain: dict[str, object] = {"role": message.role, **(message.model_extra or {})}
    if message.content is None or isinstance(message.content, str):
        return plain | {"content": message.content or ""}
    texts = [part["text"] for part in message.content if part.get("type") == "text" and isinstance(part.get("text"), str)]
    if len(texts) < len(message.content):
        where = f"messages.{at}.content"
        raise RequestError(
            f'{where}: only text parts are supported, of the form {{"type": "text", "text": …}}', param="messages"
        )
    return plain | {"content": "\n".join(str(text) for text in texts)}
