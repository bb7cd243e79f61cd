"""Ready-made problems to grow networks on: `get_task("digits")` gives the data, a small host and how to judge it.

`TASKS` names them all and builds nothing until asked; data comes from installed packages or is made on the spot, so
nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from .base import Task, accuracy, cross_entropy
from .charlm import charlm
from .digits import digits
from .mnist1d import mnist1d, mnist1d_cnn
from .models import MLP, CharTransformer, Conv1dNet, DigitsCNN

__all__ = [
    "MLP",
    "TASKS",
    "CharTransformer",
    "Conv1dNet",
    "DigitsCNN",
    "Task",
    "accuracy",
    "cross_entropy",
    "get_task",
]

TASKS: Mapping[str, Callable[[], Task]] = MappingProxyType(
    {"digits": digits, "mnist1d": mnist1d, "mnist1d-cnn": mnist1d_cnn, "charlm": charlm}
)
"""Name of each task and the function that builds it; that function's docstring says in a sentence what it is."""


def get_task(name: str) -> Task:
    """Builds the task of that name; the same call gives the same data, in the same order.

    Args:
      name: one of `TASKS`.

    Raises:
      ValueError: there is no such task; the message lists those that exist.
      ImportError: a package that the task's data comes from is not installed.

    >>> task = get_task("charlm")
    >>> task.train[0].shape, task.train[0].dtype
    ((4000, 64), dtype('int32'))
    """
    if name not in TASKS:
        raise ValueError(f"there is no task {name!r}; choose from {', '.join(TASKS)}")
    try:
        return TASKS[name]()
    except ImportError as error:
        raise ImportError(
            f"the task {name!r} needs the package {error.name!r}, which cannot be imported ({error}): "
            'pip install "esper_jax[tasks]"'
        ) from error
