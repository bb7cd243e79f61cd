"""What can go wrong with a library of seeds, and the sentence for a package that is missing."""

from __future__ import annotations

import importlib
from typing import Any


class UrzaError(RuntimeError):
    """A stored seed cannot be written, read or used; the message names the file or id, what was found and expected."""


class UnknownSeed(UrzaError, KeyError):
    """No seed of that id is in the library."""

    def __str__(self) -> str:
        return str(self.args[0])


class DamagedSeed(UrzaError):
    """A file of the library is not what was written: changed, cut short, or gone."""


def needed(module: str) -> Any:
    """The optional package `module`, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ImportError(
            f'the library of stored seeds needs the package {package}: pip install "esper_jax[urza]"'
        ) from error
