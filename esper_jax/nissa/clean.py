"""Text from elsewhere on its way to a terminal."""

from __future__ import annotations

import re
from typing import Any

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(value: Any) -> Any:
    r"""A string, or those in dicts and lists, without what could steer a terminal or cannot be written.

    Control characters, marks of writing direction and lone surrogates become spaces.

    >>> clean("a\x1b[2Jb")
    'a [2Jb'
    """
    if isinstance(value, str):
        return _CONTROL.sub(" ", value)
    if isinstance(value, dict):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, list) else value
