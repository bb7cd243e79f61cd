"""Results for people and for programs: tables (rich where it is installed), JSON, and Markdown from the JSON."""

from __future__ import annotations

import argparse
import datetime
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from .machine import describe, machine, versions
from .roofline import roofline
from .timing import Ratio, Timing, summarise

Row = dict[str, Any]


class Column(NamedTuple):
    """A column of a table: the key in each row, its heading, and how its values are shown (see `shown`)."""

    key: str
    heading: str
    form: str = "text"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= size or unit == "us":
            value = seconds / size
            return f"{value:.0f} {unit}" if abs(value) >= 100 else f"{value:.3g} {unit}"
    raise AssertionError


FORMS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "time": _time,
    "times": lambda v: f"{_time(v[0])} ({_time(v[1])} to {_time(v[2])})",
    "ratio": lambda v: f"{v:.3f}",
    "percent": lambda v: f"{100 * v:.1f}%",
    "count": lambda v: f"{v:,.0f}",
    "number": lambda v: f"{v:.3g}",
    "steps": lambda v: f"{v:.1f}" if abs(v) < 100 else f"{v:,.0f}",
    "interval": lambda v: f"{v[0]:.3f} to {v[1]:.3f}",
    "yes": lambda v: "yes" if v else "NO",
}


def shown(value: Any, form: str) -> str:
    """A value as text; an absent one (None, NaN) is a dash.

    Args:
      value: what a row holds.
      form: text, time (seconds), times (median, least and most seconds), ratio, percent (of 1), count, number, steps,
        interval (a pair), or yes (a truth).
    """
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return "-"
    return FORMS[form](value)


def time_columns(timing: Timing) -> Row:
    """The cells `median`, `p95`, `p99` and `iqr` (seconds a call) and `samples` of a timing."""
    found = summarise(timing.samples)
    return {**{key: found[key] for key in ("median", "p95", "p99", "iqr")}, "samples": found["count"]}


def ratio_columns(measured: Ratio) -> Row:
    """The cells `ratio`, `interval` (95%, of the median) and `spread` (quartile distance of single rounds)."""
    return {"ratio": measured.median, "interval": [measured.low, measured.high], "spread": measured.spread}


class Report:
    """One script's results: tables are printed when they are added, and all is written as JSON at the end."""

    def __init__(self, name: str, about: str, args: argparse.Namespace, *packages: str) -> None:
        """Begin; on an accelerator its ceilings are measured first. `packages` are further ones to give versions of."""
        self.path: pathlib.Path | None = args.json
        self.found: dict[str, Any] = {
            "benchmark": name,
            "about": " ".join(about.split()),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "machine": machine(),
            "versions": versions(*packages),
            "options": {k: v for k, v in vars(args).items() if k != "json" and not isinstance(v, pathlib.Path)},
            "roofline": None,
            "tables": [],
            "notes": [],
        }
        print(f"{name}: {describe(self.found['machine'])}")
        print(", ".join(f"{k} {v}" for k, v in self.found["versions"].items()))
        if jax.default_backend() != "cpu":
            ceilings = roofline(args.dtype)
            self.found["roofline"] = ceilings
            print(roofline_line(ceilings, args.dtype))

    def table(self, title: str, columns: Sequence[Column], rows: Sequence[Row], *notes: str) -> None:
        """Print a table and keep it; `notes` are sentences below it."""
        kept = {"title": title, "columns": [list(c) for c in columns], "rows": list(rows), "notes": list(notes)}
        self.found["tables"].append(kept)
        show(title, columns, rows)
        for note in notes:
            print(note)

    def note(self, text: str) -> None:
        """Print a sentence about the whole and keep it."""
        self.found["notes"].append(text)
        print(text)

    def finish(self) -> dict[str, Any]:
        """Write the JSON file where one was asked for; returns what it holds."""
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(self.found, indent=1, default=_plain) + "\n")
            print(f"written: {self.path}")
        return self.found


def roofline_line(ceilings: Mapping[str, float], dtype: str) -> str:
    """Measured ceilings in a line."""
    return (
        f"Measured ceilings: {ceilings['matmul_flops'] / 1e12:.3g} TFLOP/s in a {ceilings['size']:.0f}-square "
        f"{dtype} matrix product, {ceilings['copy_bytes'] / 1e9:.3g} GB/s in a copy"
    )


def show(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print a table, by rich where it is installed."""
    cells = [[shown(row.get(c.key), c.form) for c in columns] for row in rows]
    try:
        import rich.box
        import rich.console
        import rich.table
    except ImportError:
        print(f"\n{plain([c.heading for c in columns], cells, title)}")
        return
    made = rich.table.Table(title=title, box=rich.box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in columns:
        made.add_column(column.heading, justify="left" if column.form in ("text", "yes") else "right")
    for row in cells:
        made.add_row(*row)
    width = None if sys.stdout.isatty() else 200
    rich.console.Console(width=width, highlight=False, markup=False).print(made)


def plain(headings: Sequence[str], cells: Sequence[Sequence[str]], title: str = "") -> str:
    """A table as plain text, columns aligned."""
    widths = [max(len(text) for text in column) for column in zip(headings, *cells, strict=True)]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)) for row in cells]
    head = "  ".join(text.ljust(width) for text, width in zip(headings, widths, strict=True))
    return "\n".join(line.rstrip() for line in ([title] if title else []) + [head, "-" * len(head), *lines])


def markdown(table: Mapping[str, Any]) -> str:
    """One table of the JSON file as Markdown, with its title and notes."""
    columns = [Column(*c) for c in table["columns"]]
    lines = [f"**{table['title']}**", "", "| " + " | ".join(c.heading for c in columns) + " |"]
    lines.append("|" + "|".join("---" if c.form in ("text", "yes") else "---:" for c in columns) + "|")
    for row in table["rows"]:
        lines.append("| " + " | ".join(shown(row.get(c.key), c.form).replace("|", "\\|") for c in columns) + " |")
    for note in table["notes"]:
        lines += ["", note]
    return "\n".join(lines)


def _plain(value: Any) -> Any:
    """Numpy and jax scalars and arrays as JSON has them."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
