"""A run on the screen: a live display on a terminal, short plain lines anywhere else, both readable at 80 columns."""

from __future__ import annotations

import dataclasses
import math
import sys
import textwrap
import time as clock
from collections.abc import Callable, Sequence
from typing import IO, Any

from .._checks import flag, function, instance, real, whole
from .clean import clean
from .event import ALARMS, SERVICES, Event, Kind
from .events import points

WIDTH = 80
_LOUD = (Kind.ROLLBACK, Kind.COMPILE_FAILED, Kind.FAULT, *ALARMS, *SERVICES)
_TOLD = (Kind.RUN_STARTED, Kind.GERMINATED, Kind.RESUMED, Kind.EARLY_STOP, Kind.RUN_ENDED, *_LOUD)
_SILENT_STAGES = ("EMBARGOED", "RESETTING", "DORMANT")
_PATIENCE = 10  # epochs before a refusal of the same action at the same place is told again


class Console:
    """A sink that shows the run to people.

    On a terminal with `rich` installed: a progress bar, the metrics, one line a seed, and lifecycle events with their
    reasons above it. Anywhere else: a line for each event that matters and about 20 lines of metrics in all, or one
    every 5 seconds where epochs are slow. Call `close` in a `finally`: it gives the terminal its cursor back.

    Args:
        epochs: how many epochs the run plans.
        quiet: show only warnings, faults and rollbacks.
        file: where to write; standard output when None.
        every: epochs between two plain lines of metrics; `epochs / 20` when None.
        seconds: or the seconds between them, whichever comes first.
    """

    def __init__(
        self,
        epochs: int,
        *,
        quiet: bool = False,
        file: IO[str] | None = None,
        every: int | None = None,
        seconds: float = 5.0,
        now: Callable[[], float] = clock.monotonic,
    ) -> None:
        whole("epochs", epochs, 0)
        flag("quiet", quiet)
        if file is not None:
            instance("file", file, "write", "flush", "isatty", example="a text file such as sys.stderr")
        if every is not None:
            whole("every", every, 0)
        real("seconds", seconds, least=0)
        function("now", now, "time.monotonic")
        self.epochs = epochs
        self.quiet = quiet
        self._file = file
        self._every = max(1, epochs // 20 if every is None else every)
        self._seconds = seconds
        self._now = now
        self._best = -math.inf
        self._printed: tuple[int, float] | None = None  # epoch and time of the last line of metrics
        self._held: Event | None = None  # an epoch whose line was left out
        self._refused: dict[tuple[Any, ...], int] = {}
        self._births: set[tuple[Any, ...]] = set()  # those told in this epoch
        self._display: Any = None
        if not quiet and self._stream.isatty():
            from .live import Display  # imports rich only if it is installed

            self._display = Display.on(self._stream, epochs)

    @property
    def _stream(self) -> IO[str]:
        return sys.stdout if self._file is None else self._file

    def emit(self, event: Event) -> None:
        """Show the event, if it is one for people."""
        if event.kind == Kind.EPOCH:
            self._best = max(self._best, _finite(event.data.get("score")), _finite(event.data.get("best")))
        if not self._tells(event):
            return
        event = dataclasses.replace(event, message=clean(event.message), data=clean(event.data))
        if event.kind == Kind.EPOCH:
            if self._display is not None:
                self._display.update(event, self._best)
            else:
                self._metrics(event)
            return
        if event.kind in (Kind.RUN_ENDED, Kind.EARLY_STOP):
            self._flush()
        if self._display is not None:
            self._display.say(event)
            if event.kind == Kind.RUN_ENDED:
                self._display.stop()
        else:
            text = f"{event.kind}: {event.message}" if event.kind in ALARMS else event.message
            self._line(f"epoch {event.epoch:>4} ", text)

    def close(self) -> None:
        """Take the live display down and show the last epoch, if its line was left out."""
        if self._display is not None:
            self._display.stop()
        self._flush()

    def _tells(self, event: Event) -> bool:
        """Whether people need to see it; each birth once, each repeated refusal once in a while."""
        data = event.data
        if self.quiet:
            return event.kind in _LOUD
        if event.kind == Kind.DECISION and data.get("outcome") == "refused":
            key = tuple(data.get(name) for name in ("action", "site", "slot", "blueprint"))
            last = self._refused.get(key)
            if last is not None and last <= event.epoch < last + _PATIENCE:
                return False
            self._refused[key] = event.epoch
            return True
        if event.kind == Kind.GERMINATED or (event.kind == Kind.STAGE and data.get("after") == "GERMINATED"):
            born = (event.epoch, event.step, data.get("site"), data.get("slot"))
            told = born in self._births
            self._births = {birth for birth in self._births if birth[0] == event.epoch} | {born}
            return not told
        if event.kind == Kind.STAGE:
            return data.get("after") not in _SILENT_STAGES
        return event.kind == Kind.EPOCH or event.kind in _TOLD

    def _metrics(self, event: Event) -> None:
        last = self._printed
        if (
            last is None
            or event.epoch // self._every != last[0] // self._every
            or self._now() >= last[1] + self._seconds
            or event.epoch >= self.epochs
        ):
            self._print_metrics(event)
        else:
            self._held = event

    def _print_metrics(self, event: Event) -> None:
        self._held = None
        self._printed = event.epoch, self._now()
        data = event.data
        losses = [f"{name} {_loss(data.get(key))}" for name, key in (("train", "train_loss"), ("loss", "loss"))]
        scores = [f"score {number(data.get('score'), 2)}", f"best {number(self._best, 2)}"]
        parts = [*losses, *scores, tally(data.get("seeds", []))]
        self._line(f"epoch {event.epoch:>4}/{self.epochs}  ", "  ".join(part for part in parts if part))

    def _flush(self) -> None:
        if self._held is not None:
            self._print_metrics(self._held)

    def _line(self, head: str, text: str) -> None:
        stream = self._stream
        encoding = getattr(stream, "encoding", None) or "utf-8"
        print(fill(head, text).encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def fill(head: str, text: str, width: int = WIDTH) -> str:
    """`head` and `text` broken into lines of at most `width` characters; a longer word (a path) stays whole."""
    indent = " " * len(head)
    lines = text.splitlines() or [""]
    filled = [
        textwrap.fill(
            line, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
        )
        for line in lines
    ]
    return (head + "\n".join(filled)[len(head) :]).rstrip()


def number(value: Any, digits: int) -> str:
    """A number with `digits` decimals, in exponent form when it is huge, "-" when it is missing or NaN."""
    if not isinstance(value, (int, float)) or math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.1e}"


def _loss(value: Any) -> str:
    return number(value, 3 if isinstance(value, (int, float)) and abs(value) >= 0.1 else 4)


def tally(seeds: Sequence[dict[str, Any]]) -> str:
    """How many seeds are on trial and how many were kept: `2 live 1 kept`."""
    stages = [seed.get("stage") for seed in seeds]
    trial = sum(stage in ("GERMINATED", "TRAINING", "BLENDING", "HOLDING") for stage in stages)
    kept = stages.count("FOSSILIZED")
    return " ".join([f"{trial} live"] * bool(trial) + [f"{kept} kept"] * bool(kept))


def shorten(text: str, width: int) -> str:
    """`text` in at most `width` characters: the end of a path says most, so the start gives way to an ellipsis."""
    if len(text) <= width:
        return text
    tail = text[len(text) - width + 1 :]
    cut = tail.find("/")  # better whole names, where that costs little
    return "…" + (tail[cut:] if 0 <= cut <= width // 3 else tail)


def table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A plain-text table: numbers to the right, words to the left, one space of air on each side of a column.

    Floats are shown with up to four significant digits (give a string for any other form), None and NaN as "-".

    >>> print(table([["host", 1200, 91.5], ["grown", 1850, 94.25]], ["model", "parameters", "score"]))
    model  parameters  score
    -----  ----------  -----
    host        1,200   91.5
    grown       1,850  94.25
    """
    for row in rows:
        if len(row) != len(headers):
            raise ValueError(f"each row needs {len(headers)} cells, one for each of {list(headers)}, got {list(row)}")
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        any(_is_number(row[i]) for row in rows) and all(_is_number(row[i]) or row[i] is None for row in rows)
        for i in range(len(headers))
    ]
    widths = [max([len(head), *(len(row[i]) for row in cells)]) for i, head in enumerate(headers)]

    def line(row: Sequence[str]) -> str:
        pairs = zip(row, widths, numeric, strict=True)
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in pairs).rstrip()

    return "\n".join([line(headers), "  ".join("-" * width for width in widths), *map(line, cells)])


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)) or hasattr(value, "dtype")


def _cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if hasattr(value, "dtype"):
        value = value.item()
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _finite(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else -math.inf


__all__ = ["Console", "fill", "number", "points", "shorten", "table", "tally"]
