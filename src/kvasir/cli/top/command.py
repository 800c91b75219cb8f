"""The command: ask a cluster for its state again and again, and show it."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console, RenderableType
from rich.live import Live

from kvasir.cli.top.view import screen, trouble
from kvasir.core.errors import ClusterError, ConfigError
from kvasir.core.units import parse_duration

TIMEOUT_S = 5.0
SHORTEST_S = 0.1

Status = dict[str, Any]


def top(
    url: Annotated[str, typer.Option(help="Address of the cluster.")] = "http://127.0.0.1:8000",
    once: Annotated[bool, typer.Option("--once", help="Show it once and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what the server says, as one JSON object a line.")] = False,
    interval: Annotated[str, typer.Option(help="Time between two looks; rates are over it.")] = "1s",
    admin_key: Annotated[
        str | None, typer.Option(envvar="KVASIR_ADMIN_KEY", help="Admin key, where the server has one.", show_envvar=True)
    ] = None,
) -> None:
    """Show a running cluster live: instances, tiers of the pool, transfers, latencies, rejections and the latest decisions.

    kvasir top

    kvasir top --url http://10.0.0.1:8000 --once --json
    """
    interval_s = parse_duration(interval)
    if interval_s < SHORTEST_S:
        raise ConfigError(f"--interval must be at least {SHORTEST_S:g}s, got {interval}")
    headers = {"authorization": f"Bearer {admin_key}"} if admin_key else {}
    with _client(url, headers) as client:
        try:
            if once:
                _show_once(client, interval_s, as_json=as_json)
            elif as_json:
                _print_lines(client, interval_s)
            else:
                _watch(client, interval_s)
        except KeyboardInterrupt:
            return


def _client(url: str, headers: dict[str, str]) -> httpx.Client:
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"--url must be like http://127.0.0.1:8000, got {url!r}")
    try:
        return httpx.Client(base_url=url, headers=headers, timeout=TIMEOUT_S, trust_env=False)
    except (httpx.InvalidURL, ValueError) as error:
        raise ConfigError(f"--url must be like http://127.0.0.1:8000, got {url!r}: {error}") from None


def _show_once(client: httpx.Client, interval_s: float, *, as_json: bool) -> None:
    """Rates need two looks."""
    first = ask(client)
    if as_json:
        print(json.dumps(first))
        return
    time.sleep(interval_s)
    Console(highlight=False).print(screen(ask(client), first))


def _print_lines(client: httpx.Client, interval_s: float) -> None:
    while True:
        try:
            print(json.dumps(ask(client)), flush=True)
        except ClusterError as error:
            print(f"kvasir: {error}", file=sys.stderr)
        time.sleep(interval_s)


def _watch(client: httpx.Client, interval_s: float) -> None:
    """On a terminal a screen that changes, elsewhere one picture after another."""
    console = Console(highlight=False)
    looks = _Looks(client)
    if not console.is_terminal:
        while True:
            console.print(looks.next(), "")
            time.sleep(interval_s)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(looks.next(), refresh=True)
            time.sleep(interval_s)


class _Looks:
    """What to show, look by look; while the server is away, its last state and why there is no newer one."""

    def __init__(self, client: httpx.Client):
        self._client = client
        self._last: Status | None = None
        self._shown: RenderableType | None = None

    def next(self) -> RenderableType:
        try:
            status = ask(self._client)
        except ClusterError as error:
            self._last = None
            return trouble(str(error), self._shown)
        self._shown = screen(status, self._last)
        self._last = status
        return self._shown


def ask(client: httpx.Client) -> Status:
    """The cluster's state. Raises ClusterError with the remedy, in one line."""
    url = str(client.base_url).rstrip("/")
    try:
        response = client.get("/admin/status")
    except httpx.TimeoutException:
        raise ClusterError(
            f"no answer from {url} within {TIMEOUT_S:g} s; it may be overloaded, trying again may help"
        ) from None
    except httpx.HTTPError as error:
        what = str(error) or type(error).__name__
        raise ClusterError(f"cannot reach {url}: {what}; start `kvasir serve`, or give its address with --url") from None
    match response.status_code:
        case 200:
            return _object(response, url)
        case 401 | 403:
            raise ClusterError(f"{url} refuses: {_message(response)}; give the key with --admin-key or KVASIR_ADMIN_KEY")
        case 404:
            raise ClusterError(f"{url} has no /admin/status: it is no Kvasir, or an older one; check --url")
        case status:
            raise ClusterError(f"{url} answered with status {status}: {_message(response)}; its log has more")


def _object(response: httpx.Response, url: str) -> Status:
    try:
        found = response.json()
    except ValueError:
        found = None
    if not isinstance(found, dict) or "instances" not in found:
        raise ClusterError(f"{url} answered with something that is no state of a cluster; check --url")
    return found


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:100].strip().splitlines()[0] if response.text.strip() else "no reason given"
