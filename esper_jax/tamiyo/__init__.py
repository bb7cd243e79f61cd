"""Tamiyo, control: controllers that decide when, where and what to grow, and what to keep."""

from .client import TamiyoClient
from .heuristic import Tamiyo
from .keeping import Keeper
from .mock import MockController
from .replay import ReplayController
from .schedules import FixedSchedule, RandomSchedule

__all__ = [
    "FixedSchedule",
    "Keeper",
    "MockController",
    "RandomSchedule",
    "ReplayController",
    "Tamiyo",
    "TamiyoClient",
]
