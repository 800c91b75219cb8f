"""The operator's endpoints: the state of the cluster, decisions, the cache, pins and quotas."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, JsonValue
from starlette.responses import JSONResponse, Response

from kvasir.cluster.orders import PinPriority
from kvasir.cluster.service import Admin
from kvasir.core.errors import ConfigError, RequestError
from kvasir.core.units import parse_duration
from kvasir.gateway.auth import Caller
from kvasir.gateway.desk import Desk
from kvasir.gateway.fields import ChatMessage, Fields, Many, TokenIds
from kvasir.gateway.overview import decision_json, overview, pin_json

MAX_LIMIT = 1000
MAX_TTL_S = 30 * 86400.0
DEFAULT_LIMIT = 20


class PinRequest(Fields):
    prompt: str | TokenIds | None = None
    messages: Many[ChatMessage] | None = Field(None, min_length=1)
    tenant: str = Field("", pattern=r"^[0-9a-f]{0,16}$")
    """Whose blocks; as the log and the metrics name it. Empty where the API is open."""
    cache_salt: str | None = Field(None, max_length=1024)
    ttl: float | Annotated[str, Field(max_length=32)] = "1h"
    """Seconds, or a duration such as `10m`; at most 30 days."""
    priority: PinPriority = "normal"
    """`low`, `normal` or `high`: which goes first once its time is over."""
    chat_template_kwargs: dict[str, JsonValue] | None = None
    add_generation_prompt: bool = False


class QuotaRequest(Fields):
    blocks: int = Field(ge=0, le=2**40)
    """In the DRAM of each node."""


BODIES: tuple[type[BaseModel], ...] = (PinRequest, QuotaRequest)


def admin_routes(desk: Desk, admin: Admin) -> APIRouter:
    """Under /admin; who may call them is for the door to say."""
    router = APIRouter(prefix="/admin", tags=["Administration"])

    @router.get("/status")
    async def status() -> Response:
        """The whole cluster, now."""
        return JSONResponse(overview(desk, admin))

    @router.get("/decisions")
    async def decisions(request: Request) -> Response:
        """The conductor's latest decisions with their reasons, the newest first."""
        limit = _limit(request.query_params.get("limit"))
        return JSONResponse({"decisions": [decision_json(timed) for timed in admin.decisions(limit)]})

    @router.post("/cache/clear")
    async def clear_cache() -> Response:
        """Forget every block that no request holds."""
        return JSONResponse({"forgotten_blocks": await admin.clear_cache()})

    @router.get("/pins")
    async def pins() -> Response:
        return JSONResponse({"pins": [pin_json(pin) for pin in admin.pins()]})

    @router.post("/pins", openapi_extra=_takes(PinRequest))
    async def pin(request: Request) -> Response:
        """Keep a prefix from eviction for a while."""
        fields = await desk.read(request, PinRequest)
        prompt = await _prompt(desk, fields)
        salt = Caller(fields.tenant).salt(fields.cache_salt)
        made = await admin.pin(prompt, salt=salt, tenant=fields.tenant, ttl_s=_ttl_s(fields.ttl), priority=fields.priority)
        return JSONResponse(pin_json(made), status_code=201)

    @router.delete("/pins/{pin_id}")
    async def unpin(pin_id: str) -> Response:
        return JSONResponse(pin_json(await admin.unpin(pin_id)))

    @router.put("/tenants/{tenant}/quota", openapi_extra=_takes(QuotaRequest))
    async def quota(tenant: str, request: Request) -> Response:
        """How many blocks a tenant may have on each node."""
        _check_tenant(tenant)
        fields = await desk.read(request, QuotaRequest)
        done = await admin.set_quota(tenant, fields.blocks)
        return JSONResponse({"tenant": tenant, "blocks": fields.blocks, "nodes": sorted(done)})

    @router.delete("/tenants/{tenant}/quota")
    async def no_quota(tenant: str) -> Response:
        """The tenant may have as many blocks as there are."""
        _check_tenant(tenant)
        return JSONResponse({"tenant": tenant, "blocks": None, "nodes": sorted(await admin.set_quota(tenant, None))})

    return router


async def _prompt(desk: Desk, fields: PinRequest) -> list[int]:
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    if isinstance(fields.prompt, str):
        return await desk.encode(fields.prompt, add_special_tokens=True)
    if fields.prompt is not None:
        return desk.check_tokens(fields.prompt, "prompt")
    return await desk.encode_chat(
        fields.messages or [], add_generation_prompt=fields.add_generation_prompt, options=fields.chat_template_kwargs
    )


def _check_tenant(tenant: str) -> None:
    if not 0 < len(tenant) <= 64 or not tenant.isascii() or not tenant.isalnum():
        raise RequestError("a tenant is named by letters and digits, as in the metrics", param="tenant")


def _ttl_s(ttl: float | str) -> float:
    try:
        ttl_s = parse_duration(ttl)
    except ConfigError as error:
        raise RequestError(f"ttl: {error}", param="ttl") from None
    if not 0 < ttl_s <= MAX_TTL_S:
        raise RequestError(f"ttl must be above 0 and at most {MAX_TTL_S:.0f} seconds, got {ttl_s:g}", param="ttl")
    return ttl_s


def _limit(given: str | None) -> int:
    if given is None:
        return DEFAULT_LIMIT
    if not given.isascii() or not given.isdigit() or len(given) > 6 or not 1 <= int(given) <= MAX_LIMIT:
        raise RequestError(f"limit must be 1 to {MAX_LIMIT}, got {given[:20]!r}", param="limit")
    return int(given)


def _takes(body: type[BaseModel]) -> dict[str, object]:
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
