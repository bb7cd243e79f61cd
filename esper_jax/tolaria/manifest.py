"""What a checkpoint holds: one record per leaf, the manifest that lists them, and how both are checked.

Nothing here knows Orbax. A tree is flattened into named host arrays plus `LeafRecord`s (`flatten`); records and
arrays are put back into a template (`unflatten`); a `Manifest` is written atomically and carries its own checksum.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import pathlib
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .. import _versions
from ..kasmina._pytree import is_key
from .peers import put, soon

FORMAT = 1  # raised when an older reader could no longer read what is written
MANIFEST = "manifest.json"
_PYTHON = {"bool": bool, "int": int, "float": float, "complex": complex}


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, found or restored; the message names the step and what to do."""


class StructureMismatch(CheckpointError, ValueError):
    """A whole checkpoint does not fit the template: missing, extra, reshaped or recast leaves, named by path."""


class Damaged(Exception):
    """One step on disk is not whole (internal: becomes a warning on the walk back, or part of a CheckpointError)."""


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One leaf of a saved tree.

    Attributes:
      path: the tree path as `jax.tree_util.keystr` writes it, for example `.params['Dense_0']['kernel']`.
      name: the array's name inside Orbax; None for a zero-size leaf, which Orbax cannot hold and which needs no bytes.
      shape: the stored array's shape (for a PRNG key, that of its `key_data`).
      dtype: the stored array's dtype by name.
      key_impl: the PRNG implementation of a typed key, else None.
      python: "bool", "int", "float" or "complex" if the leaf was a Python scalar, else None.
      checksum: CRC-32 of the array's bytes in C order.
    """

    path: str
    name: str | None
    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None
    python: str | None
    checksum: str

    def describe(self) -> str:
        """`float32[3,4]` or `key<fry>[2]`, as JAX prints it and as error messages show it."""
        shape, dtype = self.signature()
        return _describe(dtype, shape)

    def signature(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype name of the leaf itself: for a key not those of its data."""
        return (self.shape, self.dtype) if self.key_impl is None else (self.shape[:-1], _key_dtype(self.key_impl))

    def check(self, array: Any) -> np.ndarray:
        """Return `array`, as Orbax read it, as it was saved; Damaged if a bit, the shape or the dtype differs."""
        if self.name is None:
            return np.zeros(self.shape, jnp.dtype(self.dtype))
        if not isinstance(array, np.ndarray):
            raise Damaged(f"leaf {self.path}: read back as {type(array).__name__}, not as an array")
        dtype = np.dtype(jnp.dtype(self.dtype))
        if stored_dtype(dtype) != dtype and array.dtype == stored_dtype(dtype):
            array = array.view(dtype)
        if array.shape != self.shape or array.dtype != dtype:
            found = _describe(array.dtype.name, array.shape)
            raise Damaged(f"leaf {self.path}: holds {found}, saved as {_describe(self.dtype, self.shape)}")
        if checksum(array) != self.checksum:
            raise Damaged(f"leaf {self.path}: its bytes have {checksum(array)}, saved with {self.checksum}")
        return array


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything that is known of one step without opening its arrays; see `LeafRecord` for `leaves`.

    `files` maps each file of the step (relative path) to its size in bytes: it names the culprit when a read fails.
    """

    step: int
    score: float | None
    meta: dict[str, Any]
    leaves: tuple[LeafRecord, ...]
    versions: dict[str, str]
    files: dict[str, int] = dataclasses.field(default_factory=dict)
    format: int = FORMAT


def checksum(array: np.ndarray) -> str:
    """CRC-32 of an array's bytes in C order, as `crc32:89abcdef`."""
    return f"crc32:{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype Orbax is given: numpy's own and bfloat16 as they are, other extension types as bytes of their width."""
    return dtype if dtype.isbuiltin == 1 or dtype.name == "bfloat16" else np.dtype(f"u{dtype.itemsize}")


def flatten(tree: Any) -> tuple[tuple[LeafRecord, ...], dict[str, Any]]:
    """Bring a pytree to the host as records and the arrays Orbax stores.

    Args:
      tree: a pytree of jax arrays, typed PRNG keys, numpy arrays and scalars, and Python bool, int, float or complex.

    Returns:
      The records in tree order, and `{record.name: array}` (zero-size leaves have no array). An array that is divided
      over devices stays as it is, so that Orbax writes its parts side by side.

    Raises:
      TypeError: a leaf is something else (a string, a function, an object array), or two leaves share one path.
    """
    records: list[LeafRecord] = []
    arrays: dict[str, np.ndarray] = {}
    leaves = jax.tree_util.tree_flatten_with_path(soon(tree))[0]
    for index, (keys, leaf) in enumerate(leaves):
        path = jax.tree_util.keystr(keys)
        array, key_impl, python = _to_host(path, leaf)
        name = f"{index:06d}" if array.size else None
        records.append(LeafRecord(path, name, array.shape, array.dtype.name, key_impl, python, checksum(array)))
        if name is not None:
            stored = array.view(stored_dtype(array.dtype))
            arrays[name] = leaf if _is_divided(leaf) and stored.dtype == leaf.dtype else stored
    seen: set[str] = set()
    for record in records:
        if record.path in seen:
            raise TypeError(f"two leaves share the path {record.path}: give the node type distinct key paths")
        seen.add(record.path)
    return tuple(records), arrays


def copied(leaf: Any) -> Any:
    """A leaf in memory of its own: on the host, but where it is divided over devices, or a key, on those."""
    if isinstance(leaf, jax.Array):
        return jnp.array(leaf) if is_key(leaf) or _is_divided(leaf) else np.array(leaf)
    return np.array(leaf) if isinstance(leaf, np.ndarray) else leaf


def unflatten(template: Any, records: tuple[LeafRecord, ...], arrays: Mapping[str, np.ndarray], where: str) -> Any:
    """Put verified arrays into the structure of `template`.

    Args:
      template: a pytree of arrays or ShapeDtypeStructs; its leaves decide numpy or jax, and the sharding.
      records: what was saved.
      arrays: `{path: array}`, already verified against the records.
      where: how messages name the checkpoint.

    Returns:
      A tree with the template's structure. A numpy leaf comes back as numpy; a leaf that was a Python scalar comes
      back as one if the template has one there too; all others as jax arrays (as numpy where JAX would have to cast,
      which is 64-bit data without `jax_enable_x64`).

    Raises:
      StructureMismatch: naming every leaf that is missing, extra, reshaped or recast.
    """
    leaves, treedef = jax.tree_util.tree_flatten_with_path(template)
    wanted = {jax.tree_util.keystr(keys): leaf for keys, leaf in leaves}
    found = {record.path: record for record in records}
    problems = []
    for path, leaf in wanted.items():
        shape, dtype = _signature(path, leaf)
        if path not in found:
            problems.append(f"missing leaf {path}: found nothing, expected {_describe(dtype, shape)}")
            continue
        record = found[path]
        saved_shape, saved_dtype = record.signature()
        if record.python or type(leaf).__name__ in _PYTHON:  # weakly typed: what JAX would make of it counts
            dtype, saved_dtype = _canonical(dtype), _canonical(saved_dtype)
        expected = f"found {record.describe()}, expected {_describe(dtype, shape)}"
        if saved_shape != shape:
            problems.append(f"reshaped leaf {path}: {expected}")
        elif saved_dtype != dtype:
            problems.append(f"recast leaf {path}: {expected}")
        elif record.python == "int" and int(arrays[path]) != int(arrays[path].astype(jnp.dtype(dtype))):
            problems.append(f"recast leaf {path}: found {int(arrays[path])}, too large for the expected {dtype}")
    for path in found.keys() - wanted.keys():
        problems.append(f"extra leaf {path}: found {found[path].describe()}, expected nothing")
    if problems:
        more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
        lines = "\n  ".join(sorted(problems)[:20] + more)
        raise StructureMismatch(
            f"{where} does not fit the template:\n  {lines}\nThe checkpoint itself is whole. "
            "Build the template from its meta (pass a function of meta), or restore a step saved with this structure."
        )
    placed = [_place(leaf, found[path], arrays[path]) for path, leaf in wanted.items()]
    return jax.tree_util.tree_unflatten(treedef, placed)


def write(directory: pathlib.Path, manifest: Manifest) -> None:
    """Write `manifest.json` into a step's directory: to a temporary name, synced, renamed, the directory synced."""
    body = dataclasses.asdict(manifest)
    text = json.dumps({"checksum": _text_checksum(body), "manifest": body}, indent=1)
    temporary = directory / (MANIFEST + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / MANIFEST)
    sync_directory(directory)


def read(directory: pathlib.Path) -> Manifest:
    """Read and check a step's manifest.

    Raises:
      Damaged: it is missing, unreadable, fails its checksum or belongs to another step.
      CheckpointError: it is whole but written in a later format.
    """
    try:
        data = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        body, stated = data["manifest"], data["checksum"]
    except FileNotFoundError:
        raise Damaged(
            f"{MANIFEST} is missing: it is written last, so the save was cut short or the file deleted"
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{MANIFEST} cannot be read ({type(error).__name__}: {error})") from error
    if _text_checksum(body) != stated:
        raise Damaged(f"{MANIFEST} has {_text_checksum(body)}, saved with {stated}")
    if body["format"] > FORMAT:
        raise CheckpointError(
            f"{directory / MANIFEST} has format {body['format']}, written by {body['versions']}; this esper_jax "
            f"reads up to format {FORMAT}: install that version or a later one."
        )
    body["leaves"] = tuple(LeafRecord(**{**leaf, "shape": tuple(leaf["shape"])}) for leaf in body["leaves"])
    if str(body["step"]) != directory.name:
        raise Damaged(f"{MANIFEST} belongs to step {body['step']}")
    return Manifest(**body)


def one_line(error: BaseException) -> str:
    """An exception for use inside a sentence: its type and the start of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def versions() -> dict[str, str]:
    """The versions a manifest names: those of this library, jax and orbax."""
    return _versions.versions("esper_jax", "jax", "orbax-checkpoint")


def sizes(directory: pathlib.Path) -> dict[str, int]:
    """Bytes of each file below a step's directory, the manifest excepted."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(MANIFEST))
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in sorted(files)}


def changed_files(directory: pathlib.Path, manifest: Manifest) -> list[str]:
    """One sentence for each file that is missing or has another size than when it was saved."""
    now = sizes(directory)
    return [
        f"file {name} is missing" if name not in now else f"file {name} has {now[name]} bytes, saved with {size}"
        for name, size in manifest.files.items()
        if now.get(name) != size
    ]


def check_meta(meta: Any, path: str = "meta") -> None:
    """Raise TypeError, naming the place, where JSON could not hold `meta` or would silently change a key."""
    if isinstance(meta, dict):
        for key, value in meta.items():
            if not isinstance(key, str):
                raise TypeError(f"{path} has the key {key!r}: JSON keeps only str keys, so write it as a str")
            check_meta(value, f"{path}[{key!r}]")
    elif isinstance(meta, (list, tuple)):
        for index, value in enumerate(meta):
            check_meta(value, f"{path}[{index}]")
    elif not (meta is None or isinstance(meta, (str, bool, int, float))):
        raise TypeError(
            f"{path} is a {type(meta).__name__}: meta holds only dict, list, str, bool, int, float and None"
        )


def clean_score(score: Any) -> float | None:
    """A score as a finite float, or None: a score that is not finite is never the best."""
    return None if score is None or not math.isfinite(float(score)) else float(score)


def sync_directory(directory: pathlib.Path) -> None:
    """Make a directory's entries (renames in it) survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _text_checksum(body: Any) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return f"crc32:{zlib.crc32(text.encode()):08x}"


def _describe(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


def _is_divided(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and not is_key(leaf) and not leaf.sharding.is_fully_replicated


@functools.cache
def _key_dtype(impl: str) -> str:
    """The name JAX gives the dtype of keys of an implementation: `key<fry>` for "threefry2x32"."""
    return jax.eval_shape(lambda: jax.random.key(0, impl=impl)).dtype.name


def _canonical(dtype: str) -> str:
    """What a dtype becomes as a jax array: float64 is float32 unless `jax_enable_x64` is set."""
    return dtype if dtype.startswith("key<") else jax.dtypes.canonicalize_dtype(jnp.dtype(dtype)).name


def _signature(path: str, leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype name of a template's leaf, to be compared with a record's."""
    if is_key(leaf):
        return tuple(leaf.shape), leaf.dtype.name
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), np.dtype(leaf.dtype).name
    return (), _to_host(path, leaf)[0].dtype.name


def _to_host(path: str, leaf: Any) -> tuple[np.ndarray, str | None, str | None]:
    """One leaf as (numpy array in C order, key implementation or None, Python scalar type or None)."""
    key_impl = python = None
    if is_key(leaf):
        key_impl = str(jax.random.key_impl(leaf))
        leaf = jax.random.key_data(leaf)
    elif not isinstance(leaf, np.generic):  # np.float64 is a float too
        python = next((name for name, kind in _PYTHON.items() if isinstance(leaf, kind)), None)
    if python is None and not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
        raise TypeError(
            f"leaf {path} is a {type(leaf).__name__}: a checkpoint holds arrays, PRNG keys and numbers only"
        )
    array = np.asarray(leaf, order="C")
    if array.dtype.kind in "iufc":
        array = array.astype(np.dtype(array.dtype.name), copy=False)  # the machine's own byte order
    if array.dtype.kind in "OSUMm" or array.dtype.isbuiltin == 0:
        raise TypeError(f"leaf {path} has dtype {array.dtype}: a checkpoint holds numbers only")
    return array, key_impl, python


def _place(leaf: Any, record: LeafRecord, array: np.ndarray) -> Any:
    """The restored value in the kind of the template's leaf: numpy, Python scalar, key or jax array."""
    if record.python and type(leaf).__name__ in _PYTHON:
        return _PYTHON[record.python](array.item())
    dtype = np.dtype(leaf.dtype) if record.python and hasattr(leaf, "dtype") else array.dtype
    array = array.astype(dtype, copy=False)
    if isinstance(leaf, np.ndarray):
        return array
    if isinstance(leaf, np.generic):
        return array[()]
    if jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype:
        return array
    committed = isinstance(leaf, jax.ShapeDtypeStruct) or getattr(leaf, "committed", False)
    sharding = getattr(leaf, "sharding", None) if committed else None
    if record.key_impl is None:
        return put(array, sharding)
    return jax.random.wrap_key_data(put(array, sharding), impl=record.key_impl)
