"""What all benchmark scripts share: options, models, interleaved timing, the machine's description, tables and JSON."""

from .cli import begin, parser, settle
from .machine import machine, versions
from .models import MODELS, Workload, workload
from .output import Column, Report, markdown, ratio_columns, shown, time_columns
from .roofline import roofline
from .timing import Ratio, Timing, interleave, noise_floor, ratio, summarise, within

__all__ = [
    "MODELS",
    "Column",
    "Ratio",
    "Report",
    "Timing",
    "Workload",
    "begin",
    "interleave",
    "machine",
    "markdown",
    "noise_floor",
    "parser",
    "ratio",
    "ratio_columns",
    "roofline",
    "settle",
    "shown",
    "summarise",
    "time_columns",
    "versions",
    "within",
    "workload",
]
