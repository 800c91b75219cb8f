"""The HTTP application: OpenAI's endpoints and the operator's, over any Service."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from kvasir.cluster.service import Admin, Service
from kvasir.gateway.admin import BODIES as ADMIN_BODIES
from kvasir.gateway.admin import admin_routes
from kvasir.gateway.auth import AdminGate, Keys
from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.desk import Desk
from kvasir.gateway.door import Door
from kvasir.gateway.errors import reply_to_status
from kvasir.gateway.routes import BODIES, openai_routes, operator_routes, tokenizer_routes
from kvasir.gateway.tokenizer import Tokenizer
from kvasir.telemetry.metrics import Metrics


def make_app(service: Service, tokenizer: Tokenizer, config: GatewayConfig, admin: Admin | None = None) -> FastAPI:
    """The ASGI application that answers for `service`, and to its operator by `admin`. Serve it with `serve_http`."""
    metrics = Metrics(
        model=config.served_model_name or service.spec.name,
        block_tokens=service.spec.block_tokens,
        status=service.status,
        block_bytes=service.spec.slot_bytes,
        slo=config.slo,
    )
    desk = Desk(service, tokenizer, config, metrics)
    app = _DocumentedApp(title="Kvasir", summary="KVCache-centric, disaggregated LLM serving", redirect_slashes=False)
    keys = Keys(config.api_keys)
    gate = AdminGate(Keys(config.admin_keys, "admin key"), has_api_keys=bool(keys))
    app.add_middleware(Door, keys=keys, gate=gate)
    app.add_exception_handler(HTTPException, _refuse_route)
    for router in (openai_routes(desk), tokenizer_routes(desk), operator_routes(desk)):
        app.include_router(router)
    if admin is not None:
        app.include_router(admin_routes(desk, admin))
    return app


class _DocumentedApp(FastAPI):
    """FastAPI with the bodies that the endpoints read themselves."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schema = get_openapi(title=self.title, version=self.version, summary=self.summary, routes=self.routes)
            _, bodies = models_json_schema(
                [(body, "validation") for body in (*BODIES, *ADMIN_BODIES)], ref_template="#/components/schemas/{model}"
            )
            schema.setdefault("components", {}).setdefault("schemas", {}).update(bodies["$defs"])
            self.openapi_schema = schema
        return self.openapi_schema


async def _refuse_route(request: Request, error: Exception) -> Response:
    """404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    path, headers = request.url.path[:200], dict(error.headers or {})
    reply = reply_to_status(error.status_code, method=request.method, path=path, headers=headers)
    return Response(reply.body, status_code=reply.status, headers=reply.headers, media_type="application/json")
