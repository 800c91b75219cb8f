"""The endpoints and the shapes of their bodies."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, PlainTextResponse, Response

from kvasir.core.errors import RequestError
from kvasir.gateway.desk import Desk
from kvasir.gateway.fields import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from kvasir.telemetry.metrics import CONTENT_TYPE

BODIES: tuple[type[BaseModel], ...] = (CompletionRequest, ChatRequest, TokenizeRequest, DetokenizeRequest)


def openai_routes(desk: Desk) -> APIRouter:
    """What OpenAI's clients call."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.post("/completions", openapi_extra=_takes(CompletionRequest))
    async def completions(request: Request) -> Response:
        """Continue a text."""
        return await desk.complete(request)

    @router.post("/chat/completions", openapi_extra=_takes(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation."""
        return await desk.chat(request)

    @router.get("/models")
    async def models() -> Response:
        """The model that is served."""
        return JSONResponse({"object": "list", "data": [_card(desk)]})

    @router.get("/models/{name:path}")
    async def model(name: str) -> Response:
        """One model's card."""
        desk.check_model(name)
        return JSONResponse(_card(desk))

    return router


def tokenizer_routes(desk: Desk) -> APIRouter:
    """vLLM's /tokenize and /detokenize."""
    router = APIRouter(tags=["Tokenizer"])

    @router.post("/tokenize", openapi_extra=_takes(TokenizeRequest))
    async def tokenize(request: Request) -> Response:
        """Token ids of a text or of a conversation."""
        fields = await desk.read(request, TokenizeRequest)
        tokens = await _tokenize(desk, fields)
        strings = [desk.tokenizer.decode([token]) for token in tokens] if fields.return_token_strs else None
        limit = desk.service.spec.max_model_len
        return JSONResponse({"count": len(tokens), "max_model_len": limit, "tokens": tokens, "token_strs": strings})

    @router.post("/detokenize", openapi_extra=_takes(DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        fields = await desk.read(request, DetokenizeRequest)
        desk.check_model(fields.model)
        desk.check_tokens(fields.tokens, "tokens")
        return JSONResponse({"prompt": desk.tokenizer.decode(fields.tokens)})

    return router


def operator_routes(desk: Desk) -> APIRouter:
    """What probes, scrapers and people call."""
    router = APIRouter(tags=["Operation"])

    @router.head("/health", include_in_schema=False)
    @router.get("/health")
    async def health() -> Response:
        """The process is alive."""
        return PlainTextResponse("ok\n")

    @router.head("/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> Response:
        """Requests can be answered: 200, or 503 with the reason."""
        status = desk.service.status()
        return JSONResponse({"ready": status.ready, "reason": status.reason}, status_code=200 if status.ready else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Prometheus metrics, under our own names and vLLM's."""
        return Response(desk.metrics.exposition(), media_type=CONTENT_TYPE)

    @router.get("/version")
    async def kvasir_version() -> Response:
        return JSONResponse({"version": version("kvasir-serve")})

    return router


async def _tokenize(desk: Desk, fields: TokenizeRequest) -> list[int]:
    desk.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if fields.prompt is not None:
        return await desk.encode(fields.prompt, add_special_tokens=fields.add_special_tokens is not False)
    return await desk.encode_chat(
        fields.messages or [],
        add_generation_prompt=fields.add_generation_prompt,
        options=fields.chat_template_kwargs,
        add_special_tokens=fields.add_special_tokens is True,
    )


def _card(desk: Desk) -> dict[str, object]:
    spec = desk.service.spec
    card = {
        "id": desk.model,
        "object": "model",
        "created": desk.started,
        "owned_by": "kvasir",
        "root": spec.name,
        "parent": None,
    }
    return card | {"max_model_len": spec.max_model_len, "vocab_size": spec.shape.vocab}


def _takes(body: type[BaseModel]) -> dict[str, object]:
    """The body for /docs; the endpoints read it themselves, with bounds that FastAPI does not have."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
