"""The commands `esper-jax watch` and `esper-jax schema`. Imported by the command line only: it needs tyro."""

from __future__ import annotations

import dataclasses
import json
import sys

import tyro

from . import nissa
from ._checks import seconds
from .nissa.watch import LogSource, Source, watch
from .oona import BusSource


@dataclasses.dataclass(frozen=True)
class Watch:
    """Show a run while it goes on, and after it has ended: scores, sites, seeds, health, decisions with reasons."""

    source: tyro.conf.Positional[str]
    """A run directory, or the URL of a bus, e.g. redis://localhost:6379/0 with ?run=NAME, or else the newest run."""
    once: bool = False
    """Print one picture of the run as it stands, and end."""
    interval: float = 0.5
    """Seconds between two looks."""

    def run(self) -> None:
        """Watch until the run has ended or Ctrl-C.

        Raises:
          ValueError, ImportError, OSError, OonaError: what is wrong, in a sentence.
        """
        seconds("--interval", self.interval)
        try:
            source: Source = BusSource(self.source) if "://" in self.source else LogSource(self.source)
            picture = watch(source, once=self.once, interval=self.interval)
        except KeyboardInterrupt:
            return
        if self.once and not picture.events:
            raise ValueError(source.trouble or f"{source.name} has no events yet")


@dataclasses.dataclass(frozen=True)
class Schema:
    """Print the JSON Schema of the events that are written to events.jsonl and to the bus."""

    strict: bool = False
    """Refuse kinds and keys that the library does not write itself."""

    def run(self) -> None:
        """Print it."""
        sys.stdout.write(json.dumps(nissa.schema(strict=self.strict), indent=1) + "\n")
