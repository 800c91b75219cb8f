"""What a simulation is made from: the trace, the cluster, the objectives and the faults that the flags name."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from kvasir.cli.costs import load_profile
from kvasir.cli.files import trace_from
from kvasir.core.errors import ConfigError
from kvasir.core.request import Slo
from kvasir.core.units import parse_duration
from kvasir.costs.shape import ModelShape
from kvasir.engine.checkpoint import read_spec
from kvasir.report.slo import ScaledSlo
from kvasir.simulator.clusters import load_cluster, with_split
from kvasir.simulator.faults import Fault, check_faults, fault_plan
from kvasir.simulator.spec import ClusterSpec
from kvasir.workload.readers import Options, read_any
from kvasir.workload.source import is_synthetic
from kvasir.workload.trace import Trace

SCALED = "scaled"
"""The value of --slo-ttft that stands for `ScaledSlo`."""

FAULTS_PER_SEED = 5
"""How many faults `--faults SEED` draws over the trace."""

_ANY_BLOCK_TOKENS = 64  # a checkpoint's shape does not depend on it


def load_trace(source: str, *, rate: float = 1.0, seed: int = 0, tokenizer: Path | None = None) -> Trace:
    """A trace file of any known format, or a synthetic trace by name. Raises TraceError or ConfigError.

    `rate`, `seed` and the checkpoint directory `tokenizer` serve formats without arrival times or token counts.
    """
    options = Options(rate=rate, seed=seed)
    if tokenizer is not None and not is_synthetic(source):
        options = Options(rate=rate, seed=seed, count_tokens=_counter(tokenizer))
    return trace_from(source, lambda lines: read_any(lines, options))


def find_cluster(name: str, split: str | None = None) -> ClusterSpec:
    """The cluster of a TOML file, or one that ships, with other roles if `split` says so. Raises ConfigError."""
    path = Path(name)
    is_file = path.is_file() or name.endswith(".toml")
    cluster = cluster_from(read_text(path), path.parent) if is_file else cluster_from(name)
    return cluster if split is None else with_split(cluster, split)


def cluster_from(name_or_text: str, folder: Path = Path()) -> ClusterSpec:
    """As `load_cluster`, with the files that a text names looked for in `folder`. Raises ConfigError."""
    return load_cluster(
        name_or_text,
        model_at=lambda where: _shape(folder / where),
        profile_at=lambda where: load_profile(folder / where),
    )


def objectives(ttft: str, tbt: str) -> Slo | ScaledSlo:
    """`30s`, or `scaled`: max(2 s, 5 x the request's own unloaded prefill). Raises ConfigError."""
    tbt_s = _positive("--slo-tbt", tbt)
    return ScaledSlo(tbt_s=tbt_s) if ttft == SCALED else Slo(_positive("--slo-ttft", ttft), tbt_s)


def faults_for(source: str | None, cluster: ClusterSpec, *, span_s: float) -> tuple[Fault, ...]:
    """A fault file's `[[fault]]` tables, or a plan over `span_s` drawn from a seed. Raises ConfigError."""
    if source is None:
        return ()
    if source.isdecimal():
        return fault_plan(random.Random(int(source)), cluster, span_s=span_s, count=FAULTS_PER_SEED)
    try:
        faults = msgspec.convert(tomllib.loads(read_text(Path(source))), _FaultFile).fault
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigError(f"fault file {source}: {error}") from None
    check_faults(faults, cluster)
    return tuple(sorted(faults, key=lambda fault: (fault.at_s, fault.target)))


class _FaultFile(Struct, frozen=True, forbid_unknown_fields=True):
    fault: list[Fault]


def duration(flag: str, text: str) -> float:
    """The flag's seconds. Raises ConfigError, which names it."""
    try:
        return parse_duration(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from None


def _positive(flag: str, text: str) -> float:
    seconds = duration(flag, text)
    if seconds <= 0:
        raise ConfigError(f"{flag} must be positive, got {text}")
    return seconds


def read_text(path: Path) -> str:
    """Raises ConfigError, in one line, for a file that cannot be read."""
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: not text in UTF-8") from None


def _shape(directory: Path) -> ModelShape:
    if not directory.is_dir():
        raise ConfigError(f"model: no checkpoint directory {directory}")
    return read_spec(directory, block_tokens=_ANY_BLOCK_TOKENS).shape


def _counter(directory: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"--tokenizer: no file {path}")
    tokenizer = Tokenizer.from_file(str(path))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
