"""The JSON Schema of events, made from the types in `kinds`, so that there is one definition and not two."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, NotRequired, Union, get_args, get_origin, get_type_hints, is_typeddict

from . import kinds
from .event import SCHEMA, Kind
from .kinds import Measure
from .metrics import METRICS

DATA: dict[Kind, type] = {
    Kind.RUN_STARTED: kinds.RunStarted,
    Kind.EPOCH: kinds.Epoch,
    Kind.STAGE: kinds.Stage,
    Kind.ANSWER: kinds.Answer,
    Kind.DECISION: kinds.Decision,
    Kind.FEEDBACK: kinds.Feedback,
    Kind.GERMINATED: kinds.Germinated,
    Kind.CONTRIBUTION: kinds.Contributed,
    Kind.INTERACTION: kinds.Interaction,
    Kind.FAULT: kinds.Fault,
    Kind.HEALTH: kinds.HealthTold,
    Kind.SWAP: kinds.Swap,
    Kind.COMPILE_FAILED: kinds.CompileFailed,
    Kind.ROLLBACK: kinds.Rollback,
    Kind.SNAPSHOT: kinds.Reason,
    Kind.CHECKPOINT: kinds.Checkpoint,
    Kind.RESUMED: kinds.Resumed,
    Kind.EARLY_STOP: kinds.EarlyStop,
    Kind.RUN_ENDED: kinds.RunEnded,
    Kind.OUTAGE: kinds.Outage,
    Kind.RECOVERY: kinds.Recovery,
    Kind.DROPPED: kinds.Dropped,
    Kind.WARNING: kinds.Warned,
    Kind.ERROR: kinds.Failed,
}
"""The type of `data` for every kind."""

_FLOAT = {"anyOf": [{"type": "number"}, {"enum": ["NaN", "Infinity", "-Infinity"]}]}
_PLAIN = {str: "string", bool: "boolean", int: "integer", type(None): "null"}


def schema(*, strict: bool = False) -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of one event, as a line of `events.jsonl` or an entry of the bus holds it.

    Args:
      strict: refuse kinds and keys that are not named. What the library writes passes this; the schema for readers
        (the default) lets users' own kinds and additional keys through.

    >>> schema()["properties"]["kind"]
    {'type': 'string'}
    """
    found: dict[str, Any] = {"float": {**_FLOAT, "description": "a number; JSON has no NaN, so it is a string"}}
    rules = []
    for kind, data in DATA.items():
        part = {"properties": {"data": _of(data, found, strict)}}
        rules.append({"if": {"properties": {"kind": {"const": str(kind)}}, "required": ["kind"]}, "then": part})
    kind_schema = {"enum": [str(kind) for kind in DATA]} if strict else {"type": "string"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"esper_jax event, version {SCHEMA}",
        "description": "One thing that happened in a run. `time` is in seconds since 1970, `message` is for people.",
        "type": "object",
        "properties": {
            "v": {"const": SCHEMA},
            "kind": kind_schema,
            "epoch": {"type": "integer"},
            "step": {"type": "integer"},
            "message": {"type": "string"},
            "data": {"type": "object"},
            "time": {"type": "number"},
        },
        "required": ["v", "kind", "epoch", "step", "message", "data", "time"],
        "additionalProperties": False,
        "allOf": rules,
        "$defs": found,
        "x-metrics": [
            {"name": m.name, "unit": m.unit, "description": m.about, "labels": list(m.labels)} for m in METRICS
        ],
    }


def _of(kind: Any, found: dict[str, Any], strict: bool) -> dict[str, Any]:
    """The schema of one type; TypedDicts go to `found` and are referred to."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        base, *notes = arguments
        said = [f"{note.about} ({note.unit})" if note.unit else note.about for note in notes if type(note) is Measure]
        return {**_of(base, found, strict), "description": "; ".join(said)}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [_of(one, found, strict) for one in arguments]}
    if origin is list:
        return {"type": "array", "items": _of(arguments[0], found, strict)}
    if origin is tuple:
        parts = [_of(one, found, strict) for one in arguments]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(arguments[1], found, strict)}
    if kind is float:
        return {"$ref": "#/$defs/float"}
    if kind is Any:
        return {}
    if is_typeddict(kind):
        if kind.__name__ not in found:
            found[kind.__name__] = _record(kind, found, strict)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    raise TypeError(f"the schema has no rule for {kind!r}: use str, int, float, bool, list, dict, tuple or a TypedDict")


def _record(kind: Any, found: dict[str, Any], strict: bool) -> dict[str, Any]:
    fields = get_type_hints(kind, include_extras=True)
    optional = {name for name, hint in fields.items() if get_origin(hint) is NotRequired}
    inner = {name: get_args(hint)[0] if name in optional else hint for name, hint in fields.items()}
    return {
        "type": "object",
        "description": (kind.__doc__ or "").strip(),
        "properties": {name: _of(hint, found, strict) for name, hint in inner.items()},
        "required": [name for name in fields if name not in optional],
        "additionalProperties": not strict,
    }
