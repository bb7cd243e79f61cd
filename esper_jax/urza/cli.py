"""`esper-jax urza list|show|gc`: look at a library of stored seeds, and sweep it."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Annotated, Any

from ..kasmina.summary import Table, align
from .errors import UrzaError
from .library import Urza
from .record import Entry


@dataclasses.dataclass(frozen=True)
class List:
    """List the seeds of a library, best first."""

    library: str
    """A directory, or any fsspec URL."""
    order: str = "contribution"
    """contribution, parameters, flops, latency or newest."""
    blueprint: str | None = None
    """Only seeds of this blueprint."""
    max_params: int | None = None
    """Only seeds with at most so many parameters."""
    limit: int | None = None
    """At most so many seeds."""


@dataclasses.dataclass(frozen=True)
class Show:
    """Show all that is known of a seed, and verify its files."""

    library: str
    """A directory, or any fsspec URL."""
    seed: str
    """The seed's id, or the start of it."""


@dataclasses.dataclass(frozen=True)
class Gc:
    """Free files that no seed uses; with --keep also remove all but the best seeds."""

    library: str
    """A directory, or any fsspec URL."""
    keep: int | None = None
    """Keep so many seeds, those with the highest contribution, and remove the others."""
    damaged: bool = False
    """Remove seeds whose files were changed, cut short or lost."""
    grace: float = 3600.0
    """Free nothing younger than so many seconds."""
    dry_run: bool = False
    """Say what would be removed, and remove nothing."""


@dataclasses.dataclass(frozen=True)
class Command:
    """The library of stored seeds: list, show or gc."""

    command: List | Show | Gc


def command() -> Any:
    """The type of the `urza` subcommand for tyro."""
    import tyro

    positional = tyro.conf.PositionalRequiredArgs
    members = [
        Annotated[kind, tyro.conf.subcommand(name, prefix_name=False), positional]
        for name, kind in (("list", List), ("show", Show), ("gc", Gc))
    ]
    choice: Any = members[0] | members[1] | members[2]
    return dataclasses.make_dataclass("Urza", [("command", choice)], bases=(Command,), frozen=True)


def run(chosen: Command) -> str:
    """What the command prints.

    Raises:
      UrzaError, ValueError, ImportError: as the library raises them; UrzaError where there is no library.
    """
    what = chosen.command
    urza = Urza(what.library)
    if not urza.store.exists():
        raise UrzaError(f"there is no library of seeds at {what.library}")
    if isinstance(what, List):
        return _list(urza, what)
    return _show(urza, what.seed) if isinstance(what, Show) else _gc(urza, what)


def _list(urza: Urza, what: List) -> str:
    found = urza.find(order=what.order, blueprint=what.blueprint, max_params=what.max_params, limit=what.limit)
    if not found:
        return f"no seeds in {what.library}"
    heads = ("id", "blueprint", "site", "features", "params", "points", "FLOPs", "ms")
    rows = [
        (
            entry.id[:8],
            _short(entry.blueprint, 14),
            _short(str(entry.provenance.get("site", "-")), 16),
            _features(entry, "x"),
            f"{entry.parameters:,}",
            _real(entry.contribution, "+.2f"),
            _count(entry.flops),
            _real(entry.latency_ms, ".3g"),
        )
        for entry in found
    ]
    plural = "seed" if len(found) == 1 else "seeds"
    return Table(f"{align(heads, rows)}\n{len(found)} {plural}, {sum(e.parameters for e in found):,} parameters")


def _show(urza: Urza, seed: str) -> str:
    entry = urza.entry(seed)
    urza.verify(entry)
    assert entry.file is not None
    config = ", ".join(f"{name}={value!r}" for name, value in entry.config.items()) or "-"
    size = entry.file.bytes + (0 if entry.program is None else entry.program.file.bytes)
    on = entry.measured_on
    where = f" on {on['platform']} ({on['device']}), input {list(on['shape'])} {on['dtype']}" if on else ""
    program = "not stored"
    if entry.program is not None:
        kinds = ", ".join(spec.name.removeprefix("rank_") for spec in entry.program.arrays)
        program = f"StableHLO for inputs of rank {kinds}, by JAX {entry.program.jax}"
    made_for = f"{entry.site.kind} {_features(entry, ' x ')}, {entry.site.dtype}, reads the layer's {entry.reads}"
    put = "-" if math.isnan(entry.created) else time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(entry.created))
    rows = [
        ("id", entry.id),
        ("blueprint", f"{entry.blueprint} ({config})"),
        ("blend", entry.blend),
        ("made for", made_for),
        ("parameters", f"{entry.parameters:,} in {len(entry.arrays)} arrays"),
        *(("", f"{spec.name} {spec.dtype}{list(spec.shape)}") for spec in entry.arrays),
        ("contribution", _real(entry.contribution, "+.2f", " points")),
        ("FLOPs", _real(entry.flops, ",.0f", where)),
        ("latency", _real(entry.latency_ms, ".3g", " ms")),
        ("program", program),
        ("last put", put),
        *((f"from {name}", _plain(value)) for name, value in entry.provenance.items()),
        ("files", f"{size:,} bytes, verified"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def _gc(urza: Urza, what: Gc) -> str:
    swept = urza.gc(keep=what.keep, damaged=what.damaged, grace=what.grace, dry_run=what.dry_run)
    did = "would remove" if what.dry_run else "removed"
    lines = [f"{did} {len(swept.seeds)} seed(s) and {len(swept.files)} file(s)"]
    lines += [f"  seed {seed_id[:12]}" for seed_id in swept.seeds]
    if swept.young:
        lines += [f"left {swept.young} unused file(s) that are younger than {what.grace:g} s: --grace 0 takes them too"]
    if swept.unread:
        lines += [f"cannot be read: {why}" for why in swept.unread.values()]
        lines += ["while a seed cannot be read, no parameters are freed; --damaged removes seeds with damaged files"]
    return "\n".join(lines)


def _features(entry: Entry, times: str) -> str:
    return " -> ".join(times.join(map(str, shape)) for shape in (entry.site.in_shape, entry.site.out_shape))


def _real(value: float, form: str, unit: str = "") -> str:
    return "-" if math.isnan(value) else format(value, form) + unit


def _plain(value: Any) -> str:
    return "-" if isinstance(value, float) and math.isnan(value) else str(value)


def _count(value: float) -> str:
    """A large number in three digits: 1.23M."""
    if math.isnan(value):
        return "-"
    for unit in ("", "k", "M", "G"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}T"


def _short(text: str, width: int) -> str:
    """The end of a long name, since a site's path ends in what tells it apart."""
    return text if len(text) <= width else "…" + text[len(text) - width + 1 :]
