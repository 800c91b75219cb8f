"""The picture: from the server's JSON to tables. Pure: two states in, something to print out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kvasir.core.units import format_duration, format_size

BAR_WIDTH = 12
SHOWN_DECISIONS = 6

Status = dict[str, Any]
Count = Callable[[Status], int | None]

_ROLES = {"prefill": "cyan", "decode": "magenta", "mixed": "blue", "draining": "yellow"}


def screen(status: Status, earlier: Status | None) -> RenderableType:
    """The whole picture. Rates are since `earlier`; without one they are dashes."""
    parts: list[RenderableType] = [_head(status), _requests(status, earlier), Text(), _instances(status, earlier), Text()]
    parts.append(_tiers(status, earlier))
    for table in (_transfers(status, earlier), _tenants(status), _pins(status), _decisions(status)):
        if table.row_count:
            parts += [Text(), table]
    return Group(*parts)


def trouble(message: str, shown: RenderableType | None) -> RenderableType:
    """Why there is no news, in one line, above the last picture."""
    line = Text(f"{message}; still trying", style="bold red", overflow="fold")
    return line if shown is None else Group(line, Text(), shown)


def _head(status: Status) -> Text:
    state = "[bold green]ready[/]" if status["ready"] else f"[bold yellow]not ready: {escape(status['reason'])}[/]"
    uptime = _age(status["uptime_s"])
    return Text.from_markup(f"[bold]kvasir {status['version']}[/]  {escape(status['model'])}  {state}  up {uptime}")


def _requests(status: Status, earlier: Status | None) -> Table:
    """Latencies and how many of the offered requests met the SLO."""
    requests, slo, latency = status["requests"], status["slo"], status["latency"]
    grid = Table.grid(padding=(0, 3))
    answered = _rate(status, earlier, lambda s: s["requests"]["answered"])
    rejected = requests["rejected"]
    refused = ", ".join(f"{code} {count:,}" for code, count in sorted(rejected.items())) or "none"
    share = "-" if slo["attainment"] is None else f"{slo['attainment']:.1%}"
    objectives = f"TTFT {format_duration(slo['ttft_s'])}, TBT {format_duration(slo['tbt_s'])}"
    grid.add_row(f"requests [bold]{requests['answered']:,}[/] ({answered}/s)", f"rejected: {refused}")
    grid.add_row(f"SLO met by [bold]{share}[/]", f"{slo['effective']:,} of {slo['offered']:,}, within {objectives}")
    last = f"p50/p90/p99 of the last {latency['of_last']:,}"
    grid.add_row(f"TTFT [bold]{_percentiles(latency['ttft_s'])}[/]", f"TBT [bold]{_percentiles(latency['tbt_s'])}[/]   {last}")
    cached, prompt = requests["cached_tokens"], requests["prompt_tokens"]
    tokens = f"tokens in {prompt:,}, {_share(cached, prompt)} of them from cache; out {requests['generation_tokens']:,}"
    grid.add_row(tokens)
    return grid


def _instances(status: Status, earlier: Status | None) -> Table:
    table = _table(
        "instance", "role", "node", ">running", ">waiting", ">waiting tok", ">context tok", ">in tok/s", ">out tok/s", ">scale"
    )
    for instance in status["instances"]:
        name = instance["id"]
        role, age = instance["role"], instance["heartbeat_age_s"]
        late = f" [red]silent {age:.0f} s[/]" if age > 5 else ""
        table.add_row(
            f"{escape(name)}{late}",
            f"[{_ROLES.get(role, 'default')}]{role}[/]",
            escape(instance["node"]),
            *(f"{instance[key]:,}" for key in ("running", "waiting", "waiting_tokens", "context_tokens")),
            *(_instance_rate(status, earlier, name, key) for key in ("prompt_tokens", "output_tokens")),
            _scales(instance),
        )
    return table


def _scales(instance: dict[str, Any]) -> str:
    """Of the phases that the instance has: how many times as long as predicted they take."""
    phases = ("prefill", "decode") if instance["role"] == "mixed" else (instance["role"],)
    measured = [instance[f"{phase}_scale"] for phase in phases]
    return "/".join("-" if scale is None else f"{scale:.2g}" for scale in measured)


def _tiers(status: Status, earlier: Status | None) -> Table:
    table = _table("node", "tier", "filled", ">blocks", ">bytes", ">hits", ">hit rate", ">evicted", ">evicted/s")
    for node in status["nodes"]:
        for tier in node["tiers"]:
            evictions = partial(_tier_count, node=node["node"], tier=tier["tier"], key="evictions")
            table.add_row(
                escape(node["node"]),
                tier["tier"],
                _bar(tier["blocks"], tier["slots"]),
                f"{tier['blocks']:,} of {tier['slots']:,}",
                format_size(tier["bytes"]),
                f"{tier['hits']:,}",
                _share(tier["hits"], node["lookups"]),
                f"{tier['evictions']:,}",
                _rate(status, earlier, evictions),
            )
    return table


def _transfers(status: Status, earlier: Status | None) -> Table:
    table = _table("node", "transport", ">read", ">MB/s", ">transfers", ">failed", ">retried", ">mean", ">queued")
    for node in status["nodes"]:
        for transport in node["transports"]:
            read = partial(_transfer_count, node=node["node"], transport=transport["name"], key="bytes")
            rate = _per_second(status, earlier, read)
            count = transport["transfers"]
            table.add_row(
                escape(node["node"]),
                transport["name"],
                format_size(transport["bytes"]),
                "-" if rate is None else f"{rate / 1e6:,.1f}",
                f"{count:,}",
                f"{transport['failures']:,}",
                f"{transport['retries']:,}",
                format_duration(transport["seconds"] / count) if count else "-",
                f"{transport['queued']:,}",
            )
    return table


def _tenants(status: Status) -> Table:
    table = _table("node", "tenant", ">blocks", ">quota")
    for node in status["nodes"]:
        for usage in node["tenants"]:
            quota = "-" if usage["quota"] is None else f"{usage['quota']:,}"
            table.add_row(escape(node["node"]), escape(usage["tenant"]) or "(none)", f"{usage['blocks']:,}", quota)
    return table


def _pins(status: Status) -> Table:
    table = _table("pin", ">tokens", ">blocks", ">priority", ">left")
    for pin in status["pins"]:
        table.add_row(pin["id"], f"{pin['tokens']:,}", f"{pin['blocks']:,}", f"{pin['priority']}", _age(pin["ttl_s"]))
    return table


def _decisions(status: Status) -> Table:
    table = _table(">ago", "request", "prefill → decode", ">TTFT", ">TBT", "why")
    table.expand = True
    table.columns[-1].ratio = 1  # what is left of the line; the others show whole
    for decision in status["decisions"][:SHOWN_DECISIONS]:
        refusal = decision["refusal"]
        way = f"{decision['prefill'] or '-'} → {decision['decode'] or '-'}"
        table.add_row(
            _age(decision["age_s"]),
            escape(decision["request_id"][-10:]),
            f"[red]{escape(way)}[/]" if refusal else escape(way),
            _seconds(decision["ttft_s"]),
            _seconds(decision["tbt_s"]),
            f"[red]{escape(refusal)}[/]" if refusal else escape(_why(decision["reason"])),
        )
    return table


def _table(*columns: str) -> Table:
    """Columns whose name begins with > are numbers."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", expand=False)
    for name in columns:
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    return table


def _why(reason: str) -> str:
    """`prefill on p0 by least TTFT: wait ...; decode ...` without what the other columns say."""
    return reason.partition(" by ")[2].partition("; decode")[0] or reason


def _instance_rate(status: Status, earlier: Status | None, name: str, key: str) -> str:
    return _rate(status, earlier, lambda s: next((i[key] for i in s["instances"] if i["id"] == name), None))


def _tier_count(status: Status, node: str, tier: str, key: str) -> int | None:
    found = (t[key] for n in status["nodes"] if n["node"] == node for t in n["tiers"] if t["tier"] == tier)
    return next(found, None)


def _transfer_count(status: Status, node: str, transport: str, key: str) -> int | None:
    found = (t[key] for n in status["nodes"] if n["node"] == node for t in n["transports"] if t["name"] == transport)
    return next(found, None)


def _rate(status: Status, earlier: Status | None, count: Count) -> str:
    rate = _per_second(status, earlier, count)
    return "-" if rate is None else f"{rate:,.0f}" if rate >= 10 or rate == 0 else f"{rate:.1f}"


def _per_second(status: Status, earlier: Status | None, count: Count) -> float | None:
    """Growth of a count per second; None when it cannot be known, as after a restart of the server."""
    if earlier is None:
        return None
    now, before = count(status), count(earlier)
    elapsed = status["time_s"] - earlier["time_s"]
    if now is None or before is None or elapsed <= 0 or now < before:
        return None
    return (now - before) / float(elapsed)


def _bar(part: int, whole: int) -> str:
    filled = round(BAR_WIDTH * part / whole) if whole else 0
    return f"[green]{'█' * filled}[/][dim]{'░' * (BAR_WIDTH - filled)}[/]"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _percentiles(found: dict[str, float] | None) -> str:
    return "-" if found is None else " / ".join(format_duration(found[name]) for name in ("p50", "p90", "p99"))


def _seconds(value: float | None) -> str:
    return "-" if value is None else format_duration(value)


def _age(seconds: float) -> str:
    """`4 s`, `3m 12s`, `5h 02m`."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
