"""The live display on a terminal, with `rich`; without it `Display.on` answers None and the console prints lines."""

from __future__ import annotations

import math
import time as clock
from typing import IO, Any

from .console import number, shorten
from .event import ALARMS, Event, Kind

ROWS = 12
STYLES = {
    "GERMINATED": "yellow",
    "TRAINING": "cyan",
    "BLENDING": "dark_orange",
    "HOLDING": "magenta",
    "FOSSILIZED": "green",
    "PRUNED": "red",
    "EMBARGOED": "bright_black",
    "RESETTING": "bright_black",
}
KIND_STYLES = {
    Kind.GERMINATED: "yellow",
    Kind.DECISION: "bright_black",
    Kind.FAULT: "bold red",
    Kind.OUTAGE: "bold yellow",
    Kind.RECOVERY: "green",
    Kind.DROPPED: "yellow",
    Kind.ROLLBACK: "bold red",
    Kind.WARNING: "bold yellow",
    Kind.ERROR: "bold red",
    Kind.RUN_ENDED: "bold",
}
_ORDER = {"HOLDING": 0, "BLENDING": 1, "TRAINING": 2, "GERMINATED": 3, "FOSSILIZED": 4, "PRUNED": 5}


class Display:
    """A progress bar, the metrics and one line a seed, drawn again as events come."""

    @staticmethod
    def on(file: IO[str], epochs: int) -> Display | None:
        """A display on that terminal; None when rich is not installed or the terminal cannot draw."""
        try:
            import rich.console
        except ImportError:
            return None
        console = rich.console.Console(file=file, highlight=False)
        drawable = console.is_terminal and not console.is_dumb_terminal and console.encoding.startswith("utf")
        return Display(console, epochs) if drawable else None

    def __init__(self, console: Any, epochs: int) -> None:
        from rich.live import Live

        self._console = console
        self._epochs = epochs
        self._event: Event | None = None
        self._best = math.nan
        self._begun = clock.monotonic()
        self._first = 0
        self._live = Live(self, console=console, refresh_per_second=4, transient=False)
        self._running = False

    def update(self, event: Event, best: float) -> None:
        """Show the metrics and seeds of an epoch event."""
        if self._event is None:
            self._first = event.epoch - 1  # a resumed run starts late: needed for the time left
        self._event, self._best = event, best
        self._start()
        self._live.refresh()

    def say(self, event: Event) -> None:
        """Print an event above the display, where it stays."""
        from rich.table import Table
        from rich.text import Text

        self._start()
        after = event.data.get("after") if event.kind == Kind.STAGE else None
        style = STYLES.get(str(after), "") if after else KIND_STYLES.get(Kind(event.kind), "")
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(overflow="fold")
        text = f"{event.kind}: {event.message}" if event.kind in ALARMS else event.message
        line.add_row(Text(f"epoch {event.epoch:>4}", style="bright_black"), Text(text, style=style))
        self._console.print(line)

    def stop(self) -> None:
        """Leave the last picture on the screen and give the terminal back."""
        if self._running:
            self._running = False
            self._live.stop()

    def _start(self) -> None:
        if not self._running:
            self._running = True
            self._live.start(refresh=False)

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.text import Text

        if self._event is None:
            return Text(f"waiting for the first of {self._epochs} epochs  {span(clock.monotonic() - self._begun)}")
        data = self._event.data
        parts = [("train", "train_loss", 4), ("loss", "loss", 4), ("score", "score", 2)]
        metrics = Text("  ").join(Text.assemble((f"{n} ", "bright_black"), number(data.get(k), d)) for n, k, d in parts)
        metrics.append("  best ", style="bright_black").append(number(self._best, 2), style="bold")
        room = max(3, min(ROWS, self._console.size.height - 8))
        seeds = seed_grid(data.get("seeds", []), self._console.size.width, room)
        return Group(self._bar(self._event.epoch), metrics, *([seeds] if seeds is not None else []))

    def _bar(self, epoch: int) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        spent = clock.monotonic() - self._begun
        rate = spent / max(1, epoch - self._first)
        left = f"{span(spent)} + {span(rate * max(0, self._epochs - epoch))}"
        row = Table.grid(padding=(0, 1), expand=True)
        row.add_column(no_wrap=True)
        row.add_column(ratio=1)
        row.add_column(no_wrap=True)
        row.add_row(f"epoch {epoch}/{self._epochs}", ProgressBar(total=max(1, self._epochs), completed=epoch), left)
        return row


def seed_grid(seeds: list[dict[str, Any]], width: int, room: int) -> Any:
    """Up to `room` seeds of an epoch as a rich table `width` wide, those on trial first; None where there are none."""
    from rich.table import Table
    from rich.text import Text

    rows = sorted((s for s in seeds if s.get("stage") in _ORDER), key=lambda s: _ORDER[s["stage"]])
    if not rows:
        return None
    wide = max(14, width - 58)
    grid = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False, header_style="bright_black")
    for title in ("site", "slot", "seed", "stage", "alpha"):
        grid.add_column(title, no_wrap=True)
    for title in ("", "health", "contrib"):
        grid.add_column(title, justify="right", no_wrap=True)
    for seed in rows[:room]:
        style = STYLES[seed["stage"]]
        alpha = seed.get("alpha", math.nan)
        gain = seed.get("contribution", math.nan)
        grid.add_row(
            Text(shorten(str(seed["site"]), wide)),
            Text(str(seed["slot"])),
            Text(shorten(str(seed["blueprint"]), 11)),
            Text(seed["stage"].lower(), style=style),
            Text(_alpha_bar(alpha), style=style),
            Text(number(alpha, 2)),
            Text(number(seed.get("health"), 2)),
            Text(number(gain, 2) if not gain > 0 else f"+{gain:.2f}"),
        )
    if len(rows) > room:
        grid.add_row(Text(f"and {len(rows) - room} more", style="bright_black"))
    return grid


def _alpha_bar(alpha: float, width: int = 8) -> str:
    filled = 0 if math.isnan(alpha) else round(min(max(alpha, 0.0), 1.0) * width)
    return "█" * filled + "░" * (width - filled)


def span(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: `1:05`, `2:00:00`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
