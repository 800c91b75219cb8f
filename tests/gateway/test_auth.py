"""API keys, request ids and what tenants share."""

from typing import Any

import httpx
import pytest

from kvasir.core.errors import ConfigError
from kvasir.gateway.auth import Caller
from kvasir.gateway.config import GatewayConfig

TEXT = {"model": "tiny", "prompt": "hi", "max_tokens": 4}


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class TestWithKeys:
    @pytest.fixture
    def config(self) -> GatewayConfig:
        return GatewayConfig(api_keys=("sk-one", "sk-two"))

    @pytest.mark.parametrize(
        "headers", [{}, bearer("sk-three"), bearer(""), {"authorization": "Basic sk-one"}, bearer("sk-ön")]
    )
    async def test_a_wrong_key_is_a_401(self, client: httpx.AsyncClient, service: Any, headers: dict[str, str]) -> None:
        raw = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        response = await client.post("/v1/completions", json=TEXT, headers=raw)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
        assert "sk-" not in response.text
        assert not service.submitted

    @pytest.mark.parametrize("key", ["sk-one", "sk-two"])
    async def test_every_key_opens(self, client: httpx.AsyncClient, key: str) -> None:
        assert (await client.post("/v1/completions", json=TEXT, headers=bearer(key))).status_code == 200

    @pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/version", "/docs"])
    async def test_probes_need_no_key(self, client: httpx.AsyncClient, path: str) -> None:
        assert (await client.get(path)).status_code == 200

    @pytest.mark.parametrize("path", ["/v1/models", "/nothing"])
    async def test_all_else_needs_one(self, client: httpx.AsyncClient, path: str) -> None:
        assert (await client.get(path)).status_code == 401

    async def test_two_keys_never_share_a_salt(self, client: httpx.AsyncClient, service: Any) -> None:
        for key in ("sk-one", "sk-two"):
            for salt in (None, "", "a", "sk-one"):
                await client.post("/v1/completions", json=TEXT | {"cache_salt": salt}, headers=bearer(key))
        one, two = service.submitted[:4], service.submitted[4:]
        assert not {s.salt for s in one} & {s.salt for s in two}
        assert len({s.tenant for s in one}) == len({s.tenant for s in two}) == 1
        assert "sk-" not in one[0].tenant + one[0].salt


async def test_without_keys_only_the_users_salt_counts(client: httpx.AsyncClient, service: Any) -> None:
    await client.post("/v1/completions", json=TEXT, headers=bearer("whatever"))
    await client.post("/v1/completions", json=TEXT | {"cache_salt": "a"})
    assert [(s.salt, s.tenant) for s in service.submitted] == [("", ""), ("a", "")]


def test_no_salt_reaches_into_another_tenant() -> None:
    assert Caller("a" * 16).salt("x") != Caller("b" * 16).salt("x")
    assert Caller("").salt(None) == ""


async def test_a_request_id_is_echoed_or_made(client: httpx.AsyncClient) -> None:
    given = await client.get("/health", headers={"x-request-id": "trace-7"})
    assert given.headers["x-request-id"] == "trace-7"
    for bad in ("", "x" * 500, "two words"):
        made = (await client.get("/nothing", headers={"x-request-id": bad})).headers["x-request-id"]
        assert len(made) == 32


async def test_two_requests_with_one_id_are_two_requests_to_the_cluster(client: httpx.AsyncClient, service: Any) -> None:
    for _ in range(2):
        await client.post("/v1/completions", json=TEXT, headers={"x-request-id": "same"})
    assert len({submission.request_id for submission in service.submitted}) == 2


@pytest.mark.parametrize("keys", [("",), (" a",), ("ö",)])
def test_a_key_that_no_header_can_carry_is_refused(keys: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="API key"):
        GatewayConfig(api_keys=keys)
