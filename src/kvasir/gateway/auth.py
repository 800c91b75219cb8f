"""API keys and tenants: who calls, and which KVCache they may share."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest

from kvasir.core.errors import RequestError

_TENANT_CHARS = 16


@dataclass(frozen=True, slots=True)
class Caller:
    """Whoever sent a request; `tenant` names the API key without telling it, and is empty when the API is open."""

    tenant: str

    def salt(self, cache_salt: str | None) -> str:
        """What block keys are salted with. A tenant has a fixed length, so no two pairs give the same salt."""
        return f"{self.tenant}:{cache_salt or ''}" if self.tenant else cache_salt or ""


ANYONE = Caller(tenant="")
"""Whoever calls an open API."""


class Keys:
    """The accepted API keys, kept as digests."""

    def __init__(self, keys: tuple[str, ...]):
        self._digests = tuple(sha256(key.encode()).digest() for key in keys)

    def caller(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header. Raises RequestError 401."""
        if not self._digests:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # every key is compared, in constant time, so that the answer's delay tells nothing about any of them
        is_known = sum(compare_digest(digest, known) for known in self._digests) > 0
        if scheme.lower() != "bearer" or not is_known:
            what = "no API key in the Authorization header" if authorization is None else "incorrect API key"
            raise RequestError(f"{what}; send 'Authorization: Bearer <key>'", status=401, code="invalid_api_key")
        return Caller(tenant=sha256(b"kvasir-tenant" + digest).hexdigest()[:_TENANT_CHARS])
