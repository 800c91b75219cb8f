"""The operator's endpoints, and who may call them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from kvasir.cluster.orders import PinPriority
from kvasir.cluster.service import PinStatus, Rejected, TimedDecision
from kvasir.core.commands import Decision
from kvasir.core.errors import ClusterError, ConfigError, RequestError
from kvasir.core.request import Slo
from kvasir.gateway.app import make_app
from kvasir.gateway.config import GatewayConfig
from kvasir.gateway.tokenizer import Tokenizer

HERE = "http://127.0.0.1:8000"
KEY = {"authorization": "Bearer sk-admin"}


@dataclass
class FakeAdmin:
    """Remembers what it was asked."""

    asked: list[Any] = field(default_factory=list)
    fails: Exception | None = None
    latest: list[TimedDecision] = field(default_factory=list)

    def decisions(self, limit: int) -> list[TimedDecision]:
        return self.latest[:limit]

    async def clear_cache(self) -> dict[str, int]:
        self._take("clear")
        return {"node0": 5}

    def pins(self) -> list[PinStatus]:
        return [PinStatus("p1", 40, 2, 60.0, "normal", "", {"node0": 2})]

    async def pin(self, prompt: list[int], *, salt: str, tenant: str, ttl_s: float, priority: PinPriority) -> PinStatus:
        self._take((prompt, salt, tenant, ttl_s, priority))
        return PinStatus("p1", len(prompt), len(prompt) // 16, ttl_s, priority, tenant, {"node0": 1})

    async def unpin(self, pin_id: str) -> PinStatus:
        if pin_id != "p1":
            raise RequestError("no such pin", status=404, code="pin_not_found")
        self._take(("unpin", pin_id))
        return PinStatus("p1", 40, 2, 5.0, "high", "", {"node0": 2})

    async def set_quota(self, tenant: str, blocks: int | None) -> dict[str, int]:
        self._take((tenant, blocks))
        return {"node0": 0}

    def _take(self, what: Any) -> None:
        if self.fails is not None:
            raise self.fails
        self.asked.append(what)


@pytest.fixture
def admin() -> FakeAdmin:
    return FakeAdmin()


async def served(
    service: Any, tokenizer: Tokenizer, config: GatewayConfig, admin: FakeAdmin, *, client: str = "127.0.0.1", url: str = HERE
) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(make_app(service, tokenizer, config, admin), client=(client, 5000))
    async with httpx.AsyncClient(transport=transport, base_url=url) as found:
        yield found


@pytest.fixture
async def operator(
    service: Any, tokenizer: Tokenizer, config: GatewayConfig, admin: FakeAdmin
) -> AsyncIterator[httpx.AsyncClient]:
    async for found in served(service, tokenizer, config, admin):
        yield found


class TestWhoMayCall:
    @pytest.mark.parametrize("client", ["127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"])
    @pytest.mark.parametrize("url", [HERE, "http://localhost:8000", "http://[::1]:8000"])
    async def test_an_open_api_is_open_to_its_own_machine(
        self, service: Any, tokenizer: Tokenizer, config: GatewayConfig, admin: FakeAdmin, client: str, url: str
    ) -> None:
        async for found in served(service, tokenizer, config, admin, client=client, url=url):
            assert (await found.get("/admin/status")).status_code == 200

    @pytest.mark.parametrize(
        ("client", "url", "headers"),
        [
            ("10.0.0.7", HERE, {}),
            ("::ffff:10.0.0.7", HERE, {}),
            ("not an address", HERE, {}),
            ("127.0.0.1", "http://evil.example:8000", {}),
            ("127.0.0.1", "http://localhost.evil.example", {}),
            ("127.0.0.1", HERE, {"origin": "http://evil.example"}),
            ("127.0.0.1", HERE, {"origin": "null"}),
        ],
    )
    async def test_and_to_nobody_else(
        self,
        service: Any,
        tokenizer: Tokenizer,
        config: GatewayConfig,
        admin: FakeAdmin,
        client: str,
        url: str,
        headers: dict[str, str],
    ) -> None:
        async for found in served(service, tokenizer, config, admin, client=client, url=url):
            for answer in (
                await found.get("/admin/status", headers=headers),
                await found.post("/admin/cache/clear", headers=headers),
            ):
                assert answer.status_code == 403
                assert answer.json()["error"]["code"] == "forbidden"
                assert "--admin-key" in answer.json()["error"]["message"]
        assert admin.asked == []

    async def test_with_api_keys_and_no_admin_key_it_is_closed(
        self, service: Any, tokenizer: Tokenizer, admin: FakeAdmin
    ) -> None:
        async for found in served(service, tokenizer, GatewayConfig(api_keys=("sk-one",)), admin):
            answer = await found.get("/admin/status", headers={"authorization": "Bearer sk-one"})
            assert answer.status_code == 403

    @pytest.mark.parametrize("api_keys", [(), ("sk-one",)])
    async def test_an_admin_key_opens_it_from_anywhere_and_nothing_else_does(
        self, service: Any, tokenizer: Tokenizer, admin: FakeAdmin, api_keys: tuple[str, ...]
    ) -> None:
        config = GatewayConfig(api_keys=api_keys, admin_keys=("sk-admin",))
        async for found in served(service, tokenizer, config, admin, client="10.0.0.7", url="http://kvasir.example"):
            assert (await found.get("/admin/status", headers=KEY)).status_code == 200
            for headers in ({}, {"authorization": "Bearer sk-one"}, {"authorization": "Bearer "}):
                answer = await found.get("/admin/status", headers=headers)
                assert answer.status_code == 401
                assert "admin key" in answer.json()["error"]["message"]
            assert (await found.get("/v1/models", headers=KEY)).status_code == (401 if api_keys else 200)

    async def test_what_is_not_there_is_locked_too(self, service: Any, tokenizer: Tokenizer, admin: FakeAdmin) -> None:
        async for found in served(service, tokenizer, GatewayConfig(admin_keys=("sk-admin",)), admin):
            assert (await found.get("/admin/nothing")).status_code == 401
            assert (await found.get("/admin")).status_code == 401
            assert (await found.get("/admin/nothing", headers=KEY)).status_code == 404

    def test_a_key_cannot_be_both(self) -> None:
        with pytest.raises(ConfigError, match="admin key is an API key too"):
            GatewayConfig(api_keys=("k",), admin_keys=("k",))


async def test_status_tells_of_everything(
    service: Any, tokenizer: Tokenizer, admin: FakeAdmin, rejection: Rejected, says: Any
) -> None:
    admin.latest = [TimedDecision(rejection.reject.decision, 1.5)]
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 4}
    async for found in served(service, tokenizer, GatewayConfig(slo=Slo(ttft_s=5.0, tbt_s=1.0)), admin):
        await found.post("/v1/completions", json=body)
        service.script = lambda submission: [rejection]
        assert (await found.post("/v1/completions", json=body)).status_code == 429
        status = (await found.get("/admin/status")).json()
    assert status["ready"] is True
    assert status["requests"]["answered"] == 1
    assert status["requests"]["rejected"] == {"slo_tbt": 1}
    assert status["slo"] == {"ttft_s": 5.0, "tbt_s": 1.0, "effective": 1, "offered": 2, "attainment": 0.5}
    assert set(status["latency"]["ttft_s"]) == {"p50", "p90", "p99"}
    (decision,) = status["decisions"]
    assert (decision["prefill"], decision["decode"], decision["age_s"]) == ("p0", "d0", 1.5)
    assert decision["reason"].startswith("rejected, decode is full")
    assert status["pins"][0]["id"] == "p1"


class TestDecisions:
    async def test_a_limit_limits(self, operator: httpx.AsyncClient, admin: FakeAdmin) -> None:
        admin.latest = [TimedDecision(Decision(f"r{n}", "mooncake", 0.0), float(n)) for n in range(50)]
        assert len((await operator.get("/admin/decisions")).json()["decisions"]) == 20
        found = (await operator.get("/admin/decisions?limit=2")).json()["decisions"]
        assert [decision["request_id"] for decision in found] == ["r0", "r1"]

    @pytest.mark.parametrize("limit", ["0", "-1", "x", "1001", "1" * 5000, "", "²"])
    async def test_a_limit_that_is_none_is_refused(self, operator: httpx.AsyncClient, limit: str) -> None:
        answer = await operator.get("/admin/decisions", params={"limit": limit})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


class TestPins:
    async def test_text_tokens_or_a_chat_are_pinned(
        self, operator: httpx.AsyncClient, admin: FakeAdmin, tokenizer: Tokenizer
    ) -> None:
        text = "the quick brown fox"
        made = await operator.post("/admin/pins", json={"prompt": text, "ttl": "10m", "priority": "high"})
        assert made.status_code == 201
        assert made.json()["ttl_s"] == 600
        await operator.post("/admin/pins", json={"prompt": [1, 2, 3], "cache_salt": "s", "tenant": "a" * 16, "ttl": 5})
        chat = {"messages": [{"role": "system", "content": text}]}
        await operator.post("/admin/pins", json=chat)
        first, second, third = admin.asked
        assert first == (tokenizer.encode(text), "", "", 600.0, "high")
        assert second == ([1, 2, 3], f"{'a' * 16}:s", "a" * 16, 5.0, "normal")
        assert third[0] == tokenizer.encode(f"<|im_start|>system\n{text}<|im_end|>\n")
        assert third[3] == 3600

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "prompt"),
            ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
            ({"prompt": [10**9]}, "prompt"),
            ({"prompt": "a", "ttl": "soon"}, "ttl"),
            ({"prompt": "a", "ttl": 0}, "ttl"),
            ({"prompt": "a", "ttl": "31000000s"}, "ttl"),
            ({"prompt": "a", "tenant": "Robert'); --"}, "tenant"),
            ({"prompt": "a", "priority": "most"}, "priority"),
            ({"messages": []}, "messages"),
        ],
    )
    async def test_what_makes_no_sense_is_refused(
        self, operator: httpx.AsyncClient, admin: FakeAdmin, body: Any, param: str
    ) -> None:
        answer = await operator.post("/admin/pins", json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
        assert admin.asked == []

    async def test_pins_are_listed_and_deleted(self, operator: httpx.AsyncClient, admin: FakeAdmin) -> None:
        assert [pin["id"] for pin in (await operator.get("/admin/pins")).json()["pins"]] == ["p1"]
        assert (await operator.delete("/admin/pins/p1")).json()["blocks"] == 2
        missing = await operator.delete("/admin/pins/p2")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "pin_not_found")


class TestQuotasAndCache:
    async def test_a_quota_is_set_and_lifted(self, operator: httpx.AsyncClient, admin: FakeAdmin) -> None:
        answer = await operator.put("/admin/tenants/abc123/quota", json={"blocks": 100})
        assert answer.json() == {"tenant": "abc123", "blocks": 100, "nodes": ["node0"]}
        answer = await operator.delete("/admin/tenants/abc123/quota")
        assert answer.json() == {"tenant": "abc123", "blocks": None, "nodes": ["node0"]}
        assert admin.asked == [("abc123", 100), ("abc123", None)]

    @pytest.mark.parametrize(
        ("tenant", "body"),
        [("a", {}), ("a", {"blocks": None}), ("a", {"blocks": -1}), ("a", {"blocks": "many"}), ("a.b", {"blocks": 1})],
    )
    async def test_a_quota_that_is_none_is_refused(self, operator: httpx.AsyncClient, tenant: str, body: Any) -> None:
        assert (await operator.put(f"/admin/tenants/{tenant}/quota", json=body)).status_code == 400

    async def test_a_pool_that_cannot_be_reached_is_a_503(self, operator: httpx.AsyncClient, admin: FakeAdmin) -> None:
        admin.fails = ClusterError("cannot reach the pool of node1")
        answer = await operator.post("/admin/cache/clear")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "cluster_error")

    async def test_the_cache_is_cleared(self, operator: httpx.AsyncClient, admin: FakeAdmin) -> None:
        assert (await operator.post("/admin/cache/clear")).json() == {"forgotten_blocks": {"node0": 5}}
        assert admin.asked == ["clear"]


async def test_the_endpoints_are_documented(operator: httpx.AsyncClient) -> None:
    schema = (await operator.get("/openapi.json")).json()
    assert {"/admin/status", "/admin/pins", "/admin/tenants/{tenant}/quota"} <= set(schema["paths"])
    assert {"PinRequest", "QuotaRequest"} <= set(schema["components"]["schemas"])
