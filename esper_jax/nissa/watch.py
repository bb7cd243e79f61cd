"""`esper-jax watch`: a run on the screen, from its directory or from the bus, while it goes on and afterwards."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import IO, Any, Protocol

from .clean import clean
from .console import fill, number, shorten
from .event import Event, Kind
from .live import KIND_STYLES, STYLES, seed_grid, span
from .picture import Picture, Told

_BARS = "▁▂▃▄▅▆▇█"
_LOG = "events.jsonl"
QUIET = 60.0
"""Seconds without an event after which a run may have ended without saying so."""


class Source(Protocol):
    """Where events come from. `poll` gives the new ones, and whether to begin afresh with them."""

    name: str
    trouble: str

    def poll(self) -> tuple[bool, Sequence[Event]]:
        """New events since the last call; never waits long."""
        ...


class LogSource:
    """The events of a run directory, or of an `events.jsonl`, as they are written.

    Raises:
      FileNotFoundError: there is no such directory or file.
      ValueError: the file is no event log.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        given = pathlib.Path(path)
        if not given.exists():
            raise FileNotFoundError(f"there is no run in {given}; give a run directory or the URL of a bus")
        self.path = given / _LOG if given.is_dir() else given
        self.name = (given if given.is_dir() else given.parent).resolve().name
        self.trouble = ""
        self._file: tuple[int, int] = (0, 0)  # inode, and bytes that were read
        self.unread = 0
        if self.path.is_file() and not _is_log(self.path):
            raise ValueError(f"{self.path} is no event log; give a run directory, its {_LOG} or the URL of a bus")

    def poll(self) -> tuple[bool, list[Event]]:
        """The lines that were added; all of them, afresh, when the log was cut back for a resume."""
        try:
            with self.path.open("rb") as file:
                status = os.fstat(file.fileno())
                inode, place = self._file
                afresh = place > 0 and (status.st_ino != inode or status.st_size < place)
                file.seek(0 if afresh else place)
                content = file.read()
        except FileNotFoundError:
            self.trouble = f"{_LOG} is not there yet"
            return False, []
        except OSError as error:
            self.trouble = f"{self.path} cannot be read: {error.strerror or error}"
            return False, []
        self.trouble = ""
        whole = content[: content.rfind(b"\n") + 1]
        self._file = (status.st_ino, (0 if afresh else place) + len(whole))
        found = []
        for line in whole.splitlines():
            try:
                found.append(Event.from_json(line))
            except (ValueError, TypeError, RecursionError):
                self.unread += 1
        return afresh, found


def _is_log(path: pathlib.Path) -> bool:
    """Whether the file begins as a log does, or is empty."""
    with path.open("rb") as file:
        line = file.readline(1 << 24)
    if not line.endswith(b"\n"):  # being written
        return line.startswith(b'{"v": ') or b'{"v": '.startswith(line)
    try:
        Event.from_json(line)
    except (ValueError, TypeError, RecursionError) as error:
        return "schema" in str(error)  # of a later version
    return True


def view(picture: Picture, name: str, *, trouble: str = "", width: int = 80, height: int = 24, now: float = 0.0) -> Any:
    """The picture as a rich renderable at most `width` wide that tries to stay within `height` lines.

    Args:
      picture: the run.
      name: what it is called.
      trouble: why nothing new comes, if so.
      width: columns.
      height: lines; lists are cut to fit, at three lines each.
      now: seconds since 1970, for the age of the last event; 0 leaves it out.
    """
    from rich.console import Group
    from rich.text import Text

    parts: list[Any] = [*_head(picture, name, trouble, width, now)]
    if not picture.points:
        parts.append(Text("no validation yet", style="bright_black"))
    decisions = [_entry(one, width) for one in reversed(picture.decisions)]
    told = [_entry(one, width) for one in reversed(picture.told)]
    wanted = [len(picture.seeds), len(picture.sites), sum(map(len, decisions)), sum(map(len, told))]
    rooms = _share(height - 13, wanted)
    grid = seed_grid(picture.seeds, width, rooms[0])
    parts += [Text(), grid if grid is not None else Text("no seeds now", style="bright_black")]
    if picture.sites:
        parts += [Text(), _site_grid(picture, width, rooms[1])]
    for title, entries, room in (("decisions", decisions, rooms[2]), ("events", told, rooms[3])):
        if entries:
            parts += [Text(f"\n{title}", style="bright_black"), *_newest(entries, room)]
    return Group(*parts)


def watch(
    source: Source,
    *,
    once: bool = False,
    interval: float = 0.5,
    file: IO[str] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Picture:
    """Show a run until it has ended or Ctrl-C, or print one picture of it as it stands; the picture.

    Raises:
      ImportError: `rich` is not installed.
    """
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError as error:
        raise ImportError('watching needs the package rich: pip install "esper_jax[cli]"') from error

    stream = sys.stdout if file is None else file
    if isinstance(stream, io.TextIOWrapper) and not (stream.encoding or "").lower().startswith("utf"):
        stream.reconfigure(errors="replace")
    console = Console(file=stream, highlight=False)
    picture = Picture()

    def look() -> bool:
        """Take in what is new; whether there was anything."""
        nonlocal picture
        afresh, found = source.poll()
        if afresh:
            picture = Picture()
        for event in found:
            picture.add(event)
        return bool(found)

    def shown() -> Any:
        size, trouble, now = console.size, _state(source, picture)[1], time.time()
        return view(picture, source.name, trouble=trouble, width=size.width, height=size.height, now=now)

    if once or not console.is_terminal:
        said = ""
        while look() or not (once or picture.ended):
            if not once and not picture.ended:
                kind, text = _state(source, picture)
                if kind and kind != said:  # what a screen would show, once
                    console.print(clean(text), markup=False, soft_wrap=True)
                said = kind
                sleep(interval)
        console.print(shown())
        return picture
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            while look():
                pass
            live.update(shown(), refresh=True)
            if picture.ended:
                break
            sleep(interval)
    return picture


def _state(source: Source, picture: Picture) -> tuple[str, str]:
    """Why there is nothing new, if so: a word or two that stay the same while it does, and a sentence."""
    count = getattr(source, "unread", 0)
    unread = f", and {count} lines that are none" if count else ""
    if source.trouble:
        return source.trouble, source.trouble
    if not picture.events:
        return f"no events{unread}", f"no events yet{unread}"
    age = time.time() - picture.seen
    if not picture.ended and age > QUIET:
        return "quiet", f"no new event since {span(age)}: the run may have ended without saying so"
    return "", ""


def _head(picture: Picture, name: str, trouble: str, width: int, now: float) -> Iterable[Any]:
    from rich.text import Text

    state, style = ("running", "green") if picture.events else ("waiting", "yellow")
    if picture.ended:
        state, style = picture.ended, "bold"
    planned = "" if picture.planned is None else f"/{picture.planned}"
    line = Text(shorten(clean(name), 34), style="bold", overflow="ellipsis", no_wrap=True)
    line.append("  ").append(state, style=style).append(f"  epoch {picture.epoch}{planned}  step {picture.step:,}")
    if now and math.isfinite(picture.seen) and not picture.ended:
        line.append(f"  {span(max(0.0, now - picture.seen))} ago", style="bright_black")
    yield line
    if trouble:
        yield Text(clean(trouble), style="bold yellow")
    data = picture.metrics
    if data:
        metrics = Text(overflow="ellipsis", no_wrap=True)
        for label, value in (
            ("score", number(data.get("score"), 2)),
            ("best", number(picture.best, 2)),
            ("train", number(data.get("train_loss"), 4)),
            ("loss", number(data.get("loss"), 4)),
        ):
            metrics.append(f"{label} ", style="bright_black").append(f"{value}  ")
        for count, label in ((picture.faults, "faults"), (picture.rollbacks, "rollbacks")):
            if count:
                metrics.append(f"{count} {label}  ", style="bold red")
        yield metrics
        scores = [point.score for point in picture.points if math.isfinite(point.score)]
        if len(scores) > 1:
            low, high = f"{min(scores):.1f} ", f" {max(scores):.1f}"
            bars = sparkline(scores, max(10, width - len(low) - len(high) - 1))
            yield Text.assemble((low, "bright_black"), (bars, "cyan"), (high, "bright_black"))


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as a line of at most `width` bars; more values are averaged in groups.

    >>> sparkline([0.0, 0.5, 1.0], 10)
    '▁▅█'
    """
    count = min(width, len(values))
    edges = [round(index * len(values) / count) for index in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[math.floor((mean - low) * scale + 0.5)] for mean in means)


def _site_grid(picture: Picture, width: int, room: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    sites = picture.sites
    columns = [name for name in ("health", "gain", "dead", "variance") if any(name in row for row in sites.values())]
    live = {seed["site"] for seed in picture.seeds}
    order = sorted(sites, key=lambda path: (path not in live, -_real(sites[path].get("gain"))))
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bright_black")
    grid.add_column("site", no_wrap=True)
    for name in columns:
        grid.add_column(name, justify="right", no_wrap=True)
    wide = max(14, width - 12 * len(columns))
    for path in order[:room]:
        values = [sites[path].get(name, math.nan) for name in columns]
        style = "bold" if path in live else ""
        grid.add_row(Text(shorten(path, wide), style=style), *(Text(f"{_real(v, math.nan):.3g}") for v in values))
    if len(order) > room:
        grid.add_row(Text(f"and {len(order) - room} more", style="bright_black"))
    return grid


def _entry(one: Told, width: int) -> list[Any]:
    """When, and what with its reason: as many lines as it takes."""
    from rich.text import Text

    styles = {str(kind): style for kind, style in KIND_STYLES.items()}
    style = STYLES.get(one.outcome) or styles.get(one.kind, "")
    head, text = f"{one.epoch:>5}  ", one.text
    if one.kind == Kind.DECISION:
        style, text = ("" if one.outcome == "applied" else "bright_black"), f"{one.outcome} {text}"
    lines = fill(head, text, width).splitlines()
    return [
        Text.assemble((line[: len(head)], "bright_black"), (line[len(head) :], style), overflow="fold")
        for line in lines
    ]


def _newest(entries: Sequence[list[Any]], room: int) -> list[Any]:
    """Of entries, newest first, as many as fit into `room` lines (one at least), oldest first."""
    chosen: list[list[Any]] = []
    for entry in entries:
        room -= len(entry)
        if chosen and room < 0:
            break
        chosen.append(entry)
    return [line for entry in reversed(chosen) for line in entry]


def _share(left: int, wanted: Sequence[int]) -> list[int]:
    """Lines for each list: what it wants as far as there is room, at least three."""
    given = [min(3, want) for want in wanted]
    while sum(given) < left and any(have < want for have, want in zip(given, wanted, strict=True)):
        for index, want in enumerate(wanted):
            if given[index] < want and sum(given) < left:
                given[index] += 1
    return given


def _real(value: Any, otherwise: float = -math.inf) -> float:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else otherwise
