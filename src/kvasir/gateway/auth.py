"""API keys and tenants: who calls, and which KVCache they may share."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from hmac import compare_digest
from ipaddress import ip_address

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
    """The accepted keys, kept as digests. `kind` is what messages call one."""

    def __init__(self, keys: tuple[str, ...], kind: str = "API key"):
        self._digests = tuple(sha256(key.encode()).digest() for key in keys)
        self._kind = kind

    def __bool__(self) -> bool:
        return bool(self._digests)

    def caller(self, authorization: str | None) -> Caller:
        """The caller behind an Authorization header. Raises RequestError 401."""
        if not self._digests:
            return ANYONE
        scheme, _, key = (authorization or "").partition(" ")
        digest = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        # every key is compared, in constant time, so that the answer's delay tells nothing about any of them
        is_known = sum(compare_digest(digest, known) for known in self._digests) > 0
        if scheme.lower() != "bearer" or not is_known:
            kind = self._kind
            what = f"no {kind} in the Authorization header" if authorization is None else f"incorrect {kind}"
            raise RequestError(f"{what}; send 'Authorization: Bearer <key>'", status=401, code="invalid_api_key")
        return Caller(tenant=sha256(b"kvasir-tenant" + digest).hexdigest()[:_TENANT_CHARS])


class AdminGate:
    """Who may call /admin: whoever has an admin key; without one configured, this machine, unless there are API keys."""

    def __init__(self, admin_keys: Keys, *, has_api_keys: bool):
        self._keys = admin_keys
        self._has_api_keys = has_api_keys

    def check(self, *, authorization: str | None, client: str | None, host: str | None, is_from_a_page: bool) -> None:
        """Raises RequestError 401 or 403. `client` is the peer's address, `host` the Host header.

        A web page that runs in a browser on this machine is not its operator: it shows itself by an Origin, or by a Host
        that is no name of this machine (a DNS name that was pointed here).
        """
        if self._keys:
            self._keys.caller(authorization)
        elif self._has_api_keys:
            raise _forbidden("/admin is closed while API keys are configured; start with --admin-key to open it")
        elif not _is_loopback(client) or not _is_this_machine(host) or is_from_a_page:
            raise _forbidden("/admin is open to this machine alone; start with --admin-key and send the key")


def _is_loopback(client: str | None) -> bool:
    try:
        address = ip_address(client or "")
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _is_this_machine(host: str | None) -> bool:
    name = (host or "").strip().lower()
    name = name[1 : name.find("]")] if name.startswith("[") else name.partition(":")[0]
    return name == "localhost" or _is_loopback(name)


def _forbidden(message: str) -> RequestError:
    return RequestError(message, status=403, code="forbidden")
