"""The task `charlm`: the next character of Python's own standard library, with a small causal transformer."""

from __future__ import annotations

import pathlib
import sysconfig

import numpy as np

from .base import Split, Task
from .models import CharTransformer

FILES = (
    "argparse.py",
    "ast.py",
    "calendar.py",
    "configparser.py",
    "csv.py",
    "dataclasses.py",
    "difflib.py",
    "enum.py",
    "fractions.py",
    "functools.py",
    "inspect.py",
    "optparse.py",
    "random.py",
    "shutil.py",
    "statistics.py",
    "subprocess.py",
    "tarfile.py",
    "textwrap.py",
    "threading.py",
    "typing.py",
)
"""The files that are read, in this order. Their text differs a little from one version of Python to the next."""

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
"""The characters that have a code of their own, their place in this string; one more code stands for all others."""

LENGTH = 64
_WINDOWS = {"train": 4000, "validation": 500, "test": 500}


def charlm() -> Task:
    """The next character of Python's own standard library, a small causal transformer with `nn.remat`."""
    train, validation, test = _splits(encode(_text()))
    return Task(
        name="charlm",
        description="The next character of Python's own standard library, a small causal transformer with `nn.remat`.",
        inputs=f"a text [{LENGTH}] of character codes, int32; the target is the same text one character later",
        model=CharTransformer(vocabulary=len(VOCABULARY) + 1, length=LENGTH),
        train=train,
        validation=validation,
        test=test,
        classes=len(VOCABULARY) + 1,
        batch_size=64,
        learning_rate=3e-3,
        epochs=12,
        where=r"block_\d+/",
        blueprints=("mlp", "lora", "norm"),
    )


def encode(text: str) -> np.ndarray:
    """Codes of the characters, int32 `[len(text)]`, from 0 to `len(VOCABULARY)`, the last for characters not in it."""
    codes = {character: code for code, character in enumerate(VOCABULARY)}
    return np.array([codes.get(character, len(VOCABULARY)) for character in text], np.int32)


def _text() -> str:
    folder = pathlib.Path(sysconfig.get_path("stdlib"))
    try:
        return "".join((folder / name).read_text(encoding="utf-8") for name in FILES)
    except OSError as error:
        raise FileNotFoundError(
            f"the task 'charlm' reads Python's own sources, and {error.filename} could not be read "
            f"({error.strerror}): run it with a Python whose standard library is installed as .py files"
        ) from error


def _splits(codes: np.ndarray) -> tuple[Split, Split, Split]:
    """Windows that do not overlap and are all different, in one fixed random order, cut into the three parts."""
    starts = np.arange(0, len(codes) - LENGTH - 1, LENGTH + 1)
    windows = np.unique(np.stack([codes[start : start + LENGTH + 1] for start in starts]), axis=0)
    if len(windows) < sum(_WINDOWS.values()):
        raise ValueError(
            f"the task 'charlm' needs {sum(_WINDOWS.values())} pieces of text and found {len(windows)} in this "
            "Python's standard library: run it with CPython 3.11 or newer"
        )
    windows = np.random.default_rng(0).permutation(windows)
    ends = np.cumsum(list(_WINDOWS.values()))
    parts = (windows[end - count : end] for end, count in zip(ends, _WINDOWS.values(), strict=True))
    train, validation, test = ((part[:, :-1].copy(), part[:, 1:].copy()) for part in parts)
    return train, validation, test
