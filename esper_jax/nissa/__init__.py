"""Nissa, what is seen of a run: events, the sinks that keep them, the screen, and the figure.

Construct events with `events.<kind>(...)`, emit them to a `Fanout` of sinks, read them back with `read_events`.
`schema()` is the JSON Schema of what is written. Slow sinks sit behind a `Background`.
"""

from . import events
from .background import Background
from .console import Console, table
from .dashboards import PrometheusSink, TensorBoardSink, WandbSink
from .event import Event, Kind, course
from .figure import training_figure
from .metrics import METRICS, samples
from .schema import schema
from .sinks import Fanout, JsonlSink, ListSink, Sink, read_events
from .timeline import Life, lives

__all__ = [
    "METRICS",
    "Background",
    "Console",
    "Event",
    "Fanout",
    "JsonlSink",
    "Kind",
    "Life",
    "ListSink",
    "PrometheusSink",
    "Sink",
    "TensorBoardSink",
    "WandbSink",
    "course",
    "events",
    "lives",
    "read_events",
    "samples",
    "schema",
    "table",
    "training_figure",
]
