"""Urza, the library of stored seeds: keep a seed that proved itself, and germinate it again elsewhere.

Importing this needs neither fsspec nor safetensors; opening a library does.
"""

from .cache import CacheStats
from .errors import DamagedSeed, UnknownSeed, UrzaError
from .harvest import seed_of
from .library import Urza
from .record import Entry, StoredSeed
from .sweep import Swept

__all__ = ["CacheStats", "DamagedSeed", "Entry", "StoredSeed", "Swept", "UnknownSeed", "Urza", "UrzaError", "seed_of"]
