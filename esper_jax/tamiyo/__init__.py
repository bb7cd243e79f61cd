"""Tamiyo, control: controllers that decide when, where and what to grow, and what to keep."""

from .heuristic import Tamiyo
from .keeping import Keeper
from .schedules import FixedSchedule, RandomSchedule

__all__ = ["FixedSchedule", "Keeper", "RandomSchedule", "Tamiyo"]
