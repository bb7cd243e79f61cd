"""Oona, the message bus: a run's events to other processes, over Redis Streams, or inside this one.

`Tolaria(..., oona="redis://...")` publishes; `Reader("redis://...?run=NAME")` reads; `esper-jax watch` shows. Without a
server `Tolaria.bus` is a `MemoryBus`. The package `redis` is needed only where a URL is given.
"""

from .address import Address, OonaError, runs
from .memory import MemoryBus, Message
from .reader import BusSource, Reader
from .redis_bus import RedisBus, deliver

__all__ = ["Address", "BusSource", "MemoryBus", "Message", "OonaError", "Reader", "RedisBus", "deliver", "runs"]
