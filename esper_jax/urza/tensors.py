"""Named arrays as the bytes of a safetensors file and back, to the bit, in every dtype that JAX has."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from .errors import needed

# What safetensors writes under its own names; others (int4, further kinds of float8) travel as bytes.
_NATIVE = {
    "bool": "BOOL",
    "int8": "I8",
    "uint8": "U8",
    "int16": "I16",
    "uint16": "U16",
    "int32": "I32",
    "uint32": "U32",
    "int64": "I64",
    "uint64": "U64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
}


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """An array's name in the file, its dtype as JAX calls it, and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]


def describe(arrays: Mapping[str, Any]) -> tuple[ArraySpec, ...]:
    """The specs of named arrays, by name."""
    return tuple(ArraySpec(name, jnp.dtype(a.dtype).name, tuple(a.shape)) for name, a in sorted(arrays.items()))


def pack(arrays: Mapping[str, Any], owner: str | None = None) -> bytes:
    """The arrays as one safetensors file, which may say whose they are; the same arrays give the same bytes."""
    save = needed("safetensors.numpy").save
    ready = {}
    for name, array in sorted(arrays.items()):
        plain = np.asarray(array, order="C")
        if jnp.dtype(plain.dtype).name not in _NATIVE:
            plain = np.frombuffer(plain.tobytes(), np.uint8)
        ready[name] = plain
    return bytes(save(ready, {"seed": owner} if owner else None))


def owner_of(data: bytes) -> str:
    """Whose the arrays of a file are, as `pack` was told; "" where it was not, or it is no such file."""
    try:
        size = int.from_bytes(data[:8], "little")
        return str(json.loads(data[8 : 8 + size])["__metadata__"]["seed"])
    except (ValueError, KeyError, TypeError):
        return ""


def unpack(data: bytes, specs: Sequence[ArraySpec]) -> dict[str, np.ndarray]:
    """The arrays of a file, read-only.

    Raises:
      ValueError: the file is no safetensors file, or holds other arrays than `specs` says.
    """
    safetensors = needed("safetensors")
    try:
        found = dict(safetensors.deserialize(data))
    except safetensors.SafetensorError as error:
        raise ValueError(f"it is no safetensors file ({error})") from error
    if set(found) != {spec.name for spec in specs}:
        raise ValueError(f"it holds the arrays {sorted(found)}, expected {sorted(spec.name for spec in specs)}")
    arrays = {}
    for spec in specs:
        held, dtype = found[spec.name], jnp.dtype(spec.dtype)
        size = int(np.prod(spec.shape, dtype=np.int64)) * dtype.itemsize
        native = _NATIVE.get(dtype.name)
        shape = list(spec.shape) if native else [size]
        if held["dtype"] != (native or "U8") or list(held["shape"]) != shape or len(held["data"]) != size:
            raise ValueError(
                f"array {spec.name} is {held['dtype']}{held['shape']}, expected {spec.dtype}{list(spec.shape)}"
            )
        arrays[spec.name] = np.frombuffer(bytes(held["data"]), dtype).reshape(spec.shape)
    return arrays
