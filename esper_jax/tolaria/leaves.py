"""The leaves of a saved tree: one record for each, which says what its bytes must be, and the way there and back.

Nothing here knows Orbax or files. A tree is flattened into named host arrays plus `LeafRecord`s (`flatten`); arrays
that were read back are verified against the records, and put into a template (`unflatten`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..kasmina._pytree import is_key
from .peers import put, soon, spread

_PYTHON = {"bool": bool, "int": int, "float": float, "complex": complex}


class CheckpointError(RuntimeError):
    """A checkpoint could not be saved, found or restored; the message names the step and what to do."""


class StructureMismatch(CheckpointError, ValueError):
    """A whole checkpoint does not fit the template: missing, extra, reshaped or recast leaves, named by path."""


class Damaged(Exception):
    """One step on disk is not whole (internal: becomes a warning on the walk back, or part of a CheckpointError)."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an array, as the process that holds it stores it.

    Attributes:
      folder: that process's folder of the step.
      name: the array's name there; other parts of it are empty there.
      start, shape: which part of the array it is.
      checksum: as in `LeafRecord`.
    """

    folder: str
    name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    checksum: str

    @staticmethod
    def from_json(piece: Mapping[str, Any]) -> Piece:
        """A piece as JSON gave it."""
        return Piece(**{**piece, "start": tuple(piece["start"]), "shape": tuple(piece["shape"])})

    @property
    def place(self) -> tuple[slice, ...]:
        """Where it lies in the array."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))


class Spread:
    """An array whose parts lie with several processes: a leaf of a tree on its way to disk."""

    def __init__(self, array: jax.Array) -> None:
        self.array = array

    def pieces(self, folder: str, name: str) -> tuple[Piece, ...]:
        """This process's parts, of each that several hold but one, as Orbax will store them there."""
        mine = [shard for shard in self.array.addressable_shards if shard.replica_id == 0]
        found = []
        for shard in mine:
            start = tuple(part.indices(size)[0] for part, size in zip(shard.index, self.array.shape, strict=True))
            found.append(Piece(folder, name, start, shard.data.shape, checksum(np.asarray(shard.data))))
        return tuple(found)


@dataclasses.dataclass(frozen=True)
class LeafRecord:
    """One leaf of a saved tree.

    Attributes:
      path: the tree path as `jax.tree_util.keystr` writes it, for example `.params['Dense_0']['kernel']`.
      name: the array's name inside Orbax; None for a zero-size leaf, which Orbax cannot hold and which needs no bytes,
        and for one that is stored in `pieces`.
      shape: the stored array's shape (for a PRNG key, that of its `key_data`).
      dtype: the stored array's dtype by name.
      key_impl: the PRNG implementation of a typed key, else None.
      python: "bool", "int", "float" or "complex" if the leaf was a Python scalar, else None.
      checksum: CRC-32 of the array's bytes in C order; "" where each piece has its own.
      pieces: the parts of an array that several processes have stored, each its own.
    """

    path: str
    name: str | None
    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None
    python: str | None
    checksum: str
    pieces: tuple[Piece, ...] = ()

    @staticmethod
    def from_json(leaf: Mapping[str, Any]) -> LeafRecord:
        """A record as JSON gave it."""
        pieces = tuple(map(Piece.from_json, leaf.get("pieces", ())))
        return LeafRecord(**{**leaf, "shape": tuple(leaf["shape"]), "pieces": pieces})

    def describe(self) -> str:
        """`float32[3,4]` or `key<fry>[2]`, as JAX prints it and as error messages show it."""
        shape, dtype = self.signature()
        return _describe(dtype, shape)

    def signature(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype name of the leaf itself: for a key not those of its data."""
        return (self.shape, self.dtype) if self.key_impl is None else (self.shape[:-1], _key_dtype(self.key_impl))

    def places(self, folder: str) -> list[tuple[str, str, tuple[slice, ...]]]:
        """Where its bytes are: folder, name and part; `folder` is that of arrays that are stored whole."""
        whole = [] if self.name is None else [(folder, self.name, ())]
        return [*whole, *((piece.folder, piece.name, piece.place) for piece in self.pieces)]

    def check(self, stored: Sequence[Any]) -> np.ndarray:
        """The leaf as it was saved, of what was read at its `places` (in their order: an array, or why it cannot be).

        Damaged if a bit, the shape or the dtype differs.
        """
        if self.name is not None:
            return self._checked(stored[0], self.shape, self.checksum)
        array = np.zeros(self.shape, jnp.dtype(self.dtype))
        for piece, part in zip(self.pieces, stored, strict=True):
            array[piece.place] = self._checked(part, piece.shape, piece.checksum)
        found = sum(math.prod(piece.shape) for piece in self.pieces)
        if found != array.size:
            raise Damaged(f"leaf {self.path}: its pieces have {found} of {array.size} elements")
        return array

    def _checked(self, array: Any, shape: tuple[int, ...], crc: str) -> np.ndarray:
        if isinstance(array, Exception):
            raise Damaged(f"leaf {self.path}: cannot be read ({one_line(array)})")
        if not isinstance(array, np.ndarray):
            raise Damaged(f"leaf {self.path}: read back as {type(array).__name__}, not as an array")
        dtype = np.dtype(jnp.dtype(self.dtype))
        if stored_dtype(dtype) != dtype and array.dtype == stored_dtype(dtype):
            array = array.view(dtype)
        if array.shape != shape or array.dtype != dtype:
            found = _describe(array.dtype.name, array.shape)
            raise Damaged(f"leaf {self.path}: holds {found}, saved as {_describe(self.dtype, shape)}")
        if checksum(array) != crc:
            raise Damaged(f"leaf {self.path}: its bytes have {checksum(array)}, saved with {crc}")
        return array


@contextlib.contextmanager
def fitting(where: str) -> Iterator[None]:
    """A block that builds what a step's meta describes; StructureMismatch, naming the step, where it cannot."""
    try:
        yield
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise StructureMismatch(
            f"{where} describes what cannot be built here ({type(error).__name__}: {' '.join(said.split())[:500]}); "
            "restore it with what wrote it"
        ) from error


def one_line(error: BaseException) -> str:
    """An exception for use inside a sentence: its type and the start of its text."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def checksum(array: np.ndarray) -> str:
    """CRC-32 of an array's bytes in C order, as `crc32:89abcdef`."""
    return f"crc32:{zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data):08x}"


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype Orbax is given: numpy's own and bfloat16 as they are, other extension types as bytes of their width."""
    return dtype if dtype.isbuiltin == 1 or dtype.name == "bfloat16" else np.dtype(f"u{dtype.itemsize}")


def flatten(tree: Any, folder: str = "") -> tuple[tuple[LeafRecord, ...], dict[str, Any]]:
    """Bring a pytree to the host as records and the arrays Orbax stores.

    Args:
      tree: a pytree of jax arrays, typed PRNG keys, numpy arrays and scalars, and Python bool, int, float or complex,
        and of `Spread`.
      folder: where the pieces of what is `Spread` will be.

    Returns:
      The records in tree order, and `{name: array}` (zero-size leaves have no array). An array that is divided over
      devices stays as it is, so that Orbax writes its parts side by side.

    Raises:
      TypeError: a leaf is something else (a string, a function, an object array), or two leaves share one path.
    """
    records: list[LeafRecord] = []
    arrays: dict[str, Any] = {}
    leaves = jax.tree_util.tree_flatten_with_path(soon(tree))[0]
    for index, (keys, leaf) in enumerate(leaves):
        path = jax.tree_util.keystr(keys)
        if isinstance(leaf, Spread):
            whole, own = leaf.array, stored_dtype(np.dtype(leaf.array.dtype))
            arrays[f"{index:06d}"] = whole if own == whole.dtype else whole.view(own)
            pieces = leaf.pieces(folder, f"{index:06d}")
            records.append(LeafRecord(path, None, whole.shape, whole.dtype.name, None, None, "", pieces))
            continue
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


def is_there(tree: Any) -> bool:
    """Whether all arrays of a tree are computed, and none was donated."""
    arrays: list[Any] = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array) and not is_key(leaf)]
    try:
        return all(not leaf.is_deleted() and leaf.is_ready() for leaf in arrays)
    except RuntimeError:  # donated in between
        return False


def is_spread(tree: Any) -> bool:
    """Whether several processes have to store a tree together."""
    return any(isinstance(leaf, Spread) for leaf in jax.tree.leaves(tree))


def parted(tree: Any) -> Any:
    """The tree, with each array marked whose parts lie with several processes."""

    def marked(leaf: Any) -> Any:
        if not spread(leaf):
            return leaf
        return Spread(leaf) if leaf.size else np.zeros(leaf.shape, leaf.dtype)

    return jax.tree.map(marked, tree)


def copied(leaf: Any) -> Any:
    """A leaf in memory of its own: on the host, but where it is divided over devices, or a key, on those."""
    if isinstance(leaf, Spread):
        return Spread(jnp.array(leaf.array))
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
