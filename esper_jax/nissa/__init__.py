"""Nissa, what is seen of a run: events, the sinks that keep them, the screen, and the figure.

Construct events with `events.<kind>(...)`, emit them to a `Fanout` of sinks, read them back with `read_events`.
"""

from . import events
from .console import Console, table
from .events import Event, Kind, course
from .figure import training_figure
from .sinks import Fanout, JsonlSink, ListSink, Sink, read_events
from .timeline import Life, lives

__all__ = [
    "Console",
    "Event",
    "Fanout",
    "JsonlSink",
    "Kind",
    "Life",
    "ListSink",
    "Sink",
    "course",
    "events",
    "lives",
    "read_events",
    "table",
    "training_figure",
]
