"""Plain values as JSON and back, to the bit: configs, provenance, and the shape of a tree of arrays."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

_FLOAT = "$float"


def to_bytes(value: Any) -> bytes:
    """Canonical JSON: the same value gives the same bytes on every machine."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False).encode()


def from_bytes(data: bytes) -> Any:
    """The JSON value; ValueError where it is none, a non-standard NaN included."""

    def refuse(word: str) -> Any:
        raise ValueError(f"{word} is no JSON")

    return json.loads(data, parse_constant=refuse)


def encode(value: Any, place: str) -> Any:
    """`value` in JSON's own types; `decode` gives it back with every bit of every float, tuples as tuples.

    Raises:
      TypeError: it holds something else than None, bools, ints, floats, strings, tuples, lists and mappings with
        string keys; `place` names it.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {_FLOAT: struct.pack(">d", value).hex()}
    if isinstance(value, list | tuple):
        return [encode(item, f"{place}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise TypeError(f"{place} has the key {key!r}; keys must be strings that do not begin with $")
        return {key: encode(item, f"{place}[{key!r}]") for key, item in value.items()}
    raise TypeError(
        f"{place} is a {type(value).__name__} ({value!r}); stored seeds hold numbers, strings, tuples and mappings of "
        "Python's own types there"
    )


def decode(value: Any) -> Any:
    """What `encode` was given; lists come back as tuples, which is how a spec holds them."""
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if isinstance(value, dict):
        if set(value) == {_FLOAT}:
            return struct.unpack(">d", bytes.fromhex(value[_FLOAT]))[0]
        return {key: decode(item) for key, item in value.items()}
    return value


def structure(tree: Any, name: str = "params") -> tuple[Any, dict[str, Any]]:
    """A tree of dicts, lists and tuples as `(JSON, {name: leaf})`; names are paths that begin with `params`.

    Raises:
      TypeError: another kind of node; it names the place. ValueError: two leaves would share a name.
    """
    leaves: dict[str, Any] = {}

    def walk(node: Any, name: str) -> Any:
        if isinstance(node, Mapping):
            if wrong := [key for key in node if not isinstance(key, str)]:
                raise TypeError(f"{name} has the key {wrong[0]!r}; keys of stored parameters must be strings")
            return {"dict": {key: walk(node[key], f"{name}/{key}") for key in sorted(node)}}
        if type(node) in (list, tuple):
            kind = type(node).__name__
            return {kind: [walk(item, f"{name}/{index}") for index, item in enumerate(node)]}
        if node is None:
            return {"none": True}
        if not (hasattr(node, "shape") and hasattr(node, "dtype")):
            raise TypeError(
                f"{name} is a {type(node).__name__}; stored parameters are arrays in dicts, lists and tuples"
            )
        if name in leaves:
            raise ValueError(f"two arrays would share the name {name!r}; rename a key that holds a '/'")
        leaves[name] = node
        return {"leaf": name}

    return walk(tree, name), leaves


def rebuild(node: Any, leaves: Mapping[str, Any]) -> Any:
    """The tree that `structure` took apart. ValueError or KeyError where it does not fit."""
    if not isinstance(node, dict) or len(node) != 1:
        raise ValueError(f"no node of a tree: {node!r}")
    ((kind, value),) = node.items()
    if kind == "leaf":
        return leaves[value]
    if kind == "none":
        return None
    if kind == "dict":
        return {key: rebuild(child, leaves) for key, child in value.items()}
    if kind in ("list", "tuple"):
        children = [rebuild(child, leaves) for child in value]
        return children if kind == "list" else tuple(children)
    raise ValueError(f"unknown kind of node {kind!r}")
